"""What a published model says of the run that it came from."""

from collections.abc import Mapping
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from multimax.data.images.base import ImageData
from multimax.data.images.tensors import TensorImageData
from multimax.training.trained import TrainedModel

# Of result.json, as it is there.
KEPT = (
    "experiment", "scale", "seed", "config_hash", "notes", "parameters", "updates", "versions",
    "commit", "finished",
)  # fmt: skip
# Settings that say something of the machine and its user, and nothing of the numbers.
PRIVATE: dict[str, Any] = {
    "output_dir": "outputs",
    "resume": "auto",
    "weights": None,
    "group": None,
    "tags": [],
    "logger": {"wandb": "disabled"},
}
PLACES = ("root", "cache")  # of data


def facts_of(
    trained: TrainedModel, result: Mapping[str, Any], license: str, averaged: bool
) -> dict[str, Any]:
    """Configuration, figures and versions of a run, without paths; as JSON.

    Args:
        trained: the model of the run.
        result: its `result.json`.
        license: of the weights.
        averaged: the facts are those of the averaged weights.
    """
    config = result["config"] | PRIVATE
    config["data"] = {k: None if k in PLACES else v for k, v in config["data"].items()}
    facts = {key: result[key] for key in KEPT} | {
        "license": license,
        "weights": "averaged" if averaged else result["reported_weights"],
        "continued": result["origin"] is not None,
        "config": config,
        "inputs": {"data": result["inputs"]["data"]},
        "metrics": {split: _own(of, averaged) for split, of in result["metrics"].items()},
    }
    if isinstance(trained.source, ImageData):
        facts["images"] = _images(trained.source)
    return facts


def _own(figures: Mapping[str, float], averaged: bool) -> dict[str, float]:
    """The figures of the trained weights, or of their average."""
    ema = {name.removeprefix("ema_"): v for name, v in figures.items() if name.startswith("ema_")}
    if averaged:
        return ema | {"examples": figures["examples"]}
    return {name: value for name, value in figures.items() if not name.startswith("ema_")}


def _images(data: ImageData) -> dict[str, Any]:
    """Names of the classes, and how pixels in [0, 1] are normalized."""
    mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    if isinstance(data, TensorImageData):
        mean, std = data.mean.flatten().tolist(), data.std.flatten().tolist()
    return {"class_names": data.class_names, "mean": mean, "std": std}
