"""Reading a trained model back from its run folder."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from multimax.files import load_checkpoint
from multimax.training.config import Config, read_config


def read_run(
    checkpoint: Path, task: str, experiments: str, data_root: str | None = None
) -> tuple[Path, Config, dict[str, Any]]:
    """The checkpoint of a run, its configuration and its content.

    Args:
        checkpoint: a run folder (of which it is the one with the reported weights), or a checkpoint
            in one; config.yaml is beside it.
        task: what it must have been trained for.
        experiments: what experiments of this task are called, such as "mt_...".
        data_root: replaces `data.root` of the configuration.

    Raises:
        FileNotFoundError: the checkpoint or its config.yaml is missing.
        ValueError: the checkpoint is damaged or of another task, or its configuration is not one of
            this version.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    file = folder / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {file}, which tells what model {checkpoint.name} is of: give a run "
            "folder, or a checkpoint in its run folder"
        )
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        content["task"]["name"]
    except Exception as error:  # those of YAML have no class in common with the others
        raise ValueError(
            f"{file} is damaged ({error!r}): copy it again from where the run was trained"
        ) from error
    if content["task"]["name"] != task:
        raise ValueError(
            f"{folder} was trained for {content['task']['name']}: give the run of an experiment "
            f"{experiments}"
        )
    if data_root is not None:
        content["data"]["root"] = data_root
    config = read_config(content)
    path = folder / f"{config.trainer.report}.pt" if checkpoint.is_dir() else checkpoint
    return path, config, load_checkpoint(path)


def load_trained(
    model: nn.Module, path: Path, state: dict[str, Any], fingerprint: str, data: str
) -> None:
    """Put the weights of a checkpoint into its model, in evaluation mode.

    Args:
        model: as its configuration describes it.
        path: of the checkpoint.
        state: its content.
        fingerprint: of the vocabulary that the model was built for.
        data: the name of its data set.

    Raises:
        ValueError: the checkpoint is of another vocabulary or of another model.
    """
    if state.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{path} was trained with another vocabulary than that of {data}: give its data with "
            "--data-root"
        )
    try:
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not fit the model in config.yaml beside it ({error}): keep a checkpoint "
            "in its run folder"
        ) from error
    model.eval()
