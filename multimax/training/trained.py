"""Trained models, read back from their run folders."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from torch import nn

from multimax.files import load_checkpoint
from multimax.tasks import TASKS, open_model
from multimax.training.config import Config, config_hash, read_config

# What experiments of a task are called.
EXPERIMENTS = {
    "image_classification": "deit_...",
    "language_modeling": "lm_...",
    "translation": "mt_...",
    "retrieval": "retrieval_...",
    "max_retrieval": "max_retrieval_...",
    "associative_recall": "recall_...",
    "mqmtar": "mqmtar_...",
    "reverse": "reverse_...",
    "sort": "sort_...",
}


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, and what is needed to use it.

    Attributes:
        model: with its trained weights, in evaluation mode, on the CPU.
        config: what it was trained with.
        vocabulary: the `Vocabulary` of a language model, the `Languages` of a translation model;
            None of an image classifier.
        source: the data set of the configuration, of which texts are not read yet.
        path: of the checkpoint.
        averaged: the averaged weights, if there are any.
        data: fingerprint of the data that it was trained on; None if that is not known.
    """

    model: nn.Module
    config: Config
    vocabulary: Any
    source: Any
    path: Path
    averaged: Mapping[str, Any] | None = None
    data: str | None = None


def load_run(
    checkpoint: str | Path,
    data_root: str | None = None,
    settings: Sequence[str] = (),
    task: str | None = None,
) -> TrainedModel:
    """The trained model of a run.

    Args:
        checkpoint: a run folder (of which it is the one with the reported weights), or a checkpoint
            in one; config.yaml is beside it.
        data_root: replaces `data.root` of the configuration.
        settings: replace others of the configuration, as on the command line of `train.py`.
        task: what it must have been trained for; None takes any.

    Raises:
        FileNotFoundError: the checkpoint, its config.yaml, or the data set is missing.
        ValueError: the checkpoint is damaged, of another task, vocabulary or model, or its
            configuration is not one of this version.
    """
    return load_trained(*read_run(Path(checkpoint), data_root, settings, task))


def load_finished_run(folder: str | Path) -> tuple[TrainedModel, dict[str, Any]]:
    """The model that the result of a finished run is of, and the content of `result.json`.

    Raises:
        FileNotFoundError: the run has not finished, or a file of it or its data is missing.
        ValueError: something in the run folder is damaged, or of other data or settings than its
            result.
    """
    folder = Path(folder)
    result = read_result(folder)
    path, config, state = read_run(folder, task=result["task"])
    _check_same(folder, "settings", config_hash(config), result["config_hash"])
    run = load_trained(path, config, state)
    _check_same(folder, "data", run.source.fingerprint, result["inputs"]["data"])
    return run, result


def read_result(folder: Path) -> dict[str, Any]:
    """The content of `result.json`.

    Raises:
        FileNotFoundError: the run has not finished.
        ValueError: the file is damaged.
    """
    file = folder / "result.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {file}: give the folder of a finished run; the command that began a run "
            "also goes on with it"
        )
    try:
        result = json.loads(file.read_text())
        _ = result["task"], result["config_hash"], result["inputs"]["data"], result["metrics"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}): copy it again from where the run was trained"
        ) from error
    return result


def read_run(
    checkpoint: Path,
    data_root: str | None = None,
    settings: Sequence[str] = (),
    task: str | None = None,
) -> tuple[Path, Config, dict[str, Any]]:
    """The checkpoint of a run, its configuration and its content; arguments as in `load_run`.

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
        content: Any = OmegaConf.load(file)
        trained_for = content.task.name
    except Exception as error:  # those of YAML have no class in common with the others
        raise ValueError(
            f"{file} is damaged ({error!r}): copy it again from where the run was trained"
        ) from error
    if task not in (None, trained_for):
        named = EXPERIMENTS.get(task, f"of {task}")
        raise ValueError(
            f"{folder} was trained for {trained_for}: give the run of an experiment {named}"
        )
    config = changed(content, data_root, settings)
    path = folder / f"{config.trainer.report}.pt" if checkpoint.is_dir() else checkpoint
    return path, config, load_checkpoint(path)


def load_trained(
    path: Path,
    config: Config,
    state: Mapping[str, Any],
    of: str = "in config.yaml beside it",
) -> TrainedModel:
    """The model of a configuration with the weights of a checkpoint.

    Args:
        path: of the checkpoint.
        config: what it was trained with.
        state: its content.
        of: where the configuration is, for messages.

    Raises:
        FileNotFoundError: the data set is missing.
        ValueError: the checkpoint is of another vocabulary or of another model.
    """
    source, model = open_model(config)
    vocabulary = TASKS[config.task.name].vocabulary(source)
    if state.get("fingerprint") != getattr(vocabulary, "fingerprint", ""):
        raise ValueError(
            f"{path} was trained with another vocabulary than that of {config.data.name}: give its "
            "data with --data-root"
        )
    try:
        model.load_state_dict(state["model"])
        data = state["inputs"]["data"]
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} does not fit the model {of} ({error}): keep a checkpoint in its run folder"
        ) from error
    return TrainedModel(
        model.eval(), config, vocabulary, source, path, averaged=state.get("ema"), data=data
    )


def changed(content: Any, data_root: str | None = None, settings: Sequence[str] = ()) -> Config:
    """A recorded configuration with other settings; arguments as in `load_run`.

    Raises:
        ValueError: it is not one of this version, or a setting is unknown or out of range.
    """
    content = OmegaConf.create(content)
    for setting in settings:
        try:
            (parsed,) = OverridesParser.create().parse_overrides([setting])
        except HydraException as error:
            raise ValueError(f"{setting!r} must be NAME=VALUE ({error})") from error
        if parsed.is_delete() or parsed.is_sweep_override():
            raise ValueError(f"{setting!r} must be NAME=VALUE with a single value")
        OmegaConf.update(content, parsed.key_or_group, parsed.value(), force_add=True)
    if data_root is not None:
        content.data.root = data_root
    return read_config(content)


def _check_same(folder: Path, name: str, found: str, recorded: str) -> None:
    if found != recorded:
        raise ValueError(
            f"the {name} of {folder} ({found}) are not those that its result.json is of "
            f"({recorded}): give the folder as the run left it"
        )
