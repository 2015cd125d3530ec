"""Checkpoints that do not say what they were trained with: an experiment says it for them."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from torch import nn

import multimax
from multimax.files import load_checkpoint
from multimax.integrations.official import load_official_checkpoint
from multimax.normalizers import NORMALIZERS
from multimax.options import as_typed
from multimax.tasks import TASKS, open_model
from multimax.training.command_line import explain_bad_overrides
from multimax.training.config import Config, read_config
from multimax.training.trained import TrainedModel, load_trained

CONFIGS = Path(multimax.__file__).parents[1] / "configs"
# What is drawn or learned in training, and is not there or not the same after it.
TRAINING_ONLY = ("dropout", "attention_dropout", "activation_dropout", "adaptive_dropout")
BEGINNING = ("init",)  # of a normalizer


def compose_experiment(
    experiment: str, settings: Sequence[str] = (), data_root: str | None = None
) -> Config:
    """The configuration of `train.py experiment=...` with further settings.

    Raises:
        FileNotFoundError: the experiments are not installed, only the library is.
        ValueError: there is no such experiment or setting, or a value is out of range.
    """
    if not CONFIGS.is_dir():
        raise FileNotFoundError(
            f"there is no {CONFIGS}: experiments are files of the repository, install it from "
            "there with pip install -e '.[train]'"
        )
    overrides = [f"experiment={experiment}", *settings]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        problem = explain_bad_overrides(overrides)
        if problem:
            raise ValueError(problem)
        content = compose("config", overrides=overrides)
    if data_root is not None:
        content.data.root = data_root
    return read_config(content)


def load_foreign(path: Path, config: Config) -> TrainedModel:
    """The model of a configuration with the weights of a checkpoint that lies anywhere.

    Args:
        path: a checkpoint of a run, one that `multimax.integrations.fairseq.convert` wrote, or one
            of the official code of MultiMax for vision (its trained weights, not their average).
        config: what it was trained with, and what it is evaluated on.

    Raises:
        FileNotFoundError: there is no such file, or no data set.
        ValueError: it is no checkpoint, of another vocabulary, or of another model.
    """
    content = load_checkpoint(path)
    if "fingerprint" in content:
        return load_trained(path, config, content, "of --experiment and --set")
    if not {"cfg", "args"}.isdisjoint(content) and "extra_state" in content:
        raise ValueError(
            f"{path} is a checkpoint of fairseq: python -m multimax.integrations.fairseq.convert "
            f"to-multimax {path} model.pt makes one of ours"
        )
    source, model = open_model(config)
    task = TASKS[config.task.name]
    if {"class", "options"} <= content.keys():
        _load_converted(model, task.model_options(config, source), content, path)
    else:
        load_official_checkpoint(model, path)
    return TrainedModel(model.eval(), config, task.vocabulary(source), source, path)


def _load_converted(
    model: nn.Module, configured: Mapping[str, Any], content: Mapping[str, Any], path: Path
) -> None:
    """Put converted weights into a model; ValueError if they are of another model.

    Not everything of a model shows in the shapes of its weights: the number of heads does not.
    """
    kind = type(model)
    if content["class"] != kind.__name__:
        raise ValueError(
            f"{path} is a {content['class']}, not the {kind.__name__} of --experiment: choose an "
            "experiment of its task"
        )
    ours = _plain(kind, {key: value for key, value in configured.items() if key != "name"})
    theirs = _plain(kind, content["options"])
    for name, value in theirs.items():
        if value != ours[name]:
            raise ValueError(
                f"{path} has {name}={as_typed(value)}, the configuration "
                f"{name}={as_typed(ours[name])}: {_remedy(name)}"
            )
    try:
        model.load_state_dict(content["model"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, its weights do not fit its options: {error}"
        ) from error


def _plain(kind: type[nn.Module], options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a Transformer that evaluation depends on, in one spelling."""
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()
    }
    plain = {key: v for key, v in (defaults | dict(options)).items() if key not in TRAINING_ONLY}
    for name in plain:
        if name.endswith("attention") or name == "output":
            plain[name] = _plain_normalizer(plain[name] or plain["attention"])
        elif isinstance(plain[name], Sequence) and not isinstance(plain[name], str):
            plain[name] = list(plain[name])
    return plain


def _plain_normalizer(options: str | Mapping[str, Any]) -> dict[str, Any]:
    given = {"name": options} if isinstance(options, str) else dict(options)
    parameters = inspect.signature(NORMALIZERS[given["name"]]).parameters
    plain = {"name": given["name"]}
    plain |= {name: parameter.default for name, parameter in parameters.items()}
    plain |= {"shared": False, "before_scale": False} | given
    return {key: value for key, value in plain.items() if key not in BEGINNING}


def _remedy(option: str) -> str:
    if option in ("attention", "output"):
        return f"choose the experiment, or --set {option}=..."
    if option == "padding_index" or option.endswith("vocabulary_size"):
        return "give the data that it was trained on with --data-root"
    return f"--set model.{option}=..."
