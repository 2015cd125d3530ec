"""Scores that attention layers of trained models received: the files of `results/scores/`.

`python -m experiments.measure` writes them, `load_scores` reads them.
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from multimax.files import write_atomically

SCORES = Path("results/scores")
SCHEMA = 1
# Ends of the bins of a histogram of probabilities, eight a decade. A bin is (lower end, upper end];
# the first reaches down to 0, which is not in it.
EDGES = np.concatenate([[0.0], 10.0 ** (np.arange(-72, 1) / 8)])


@dataclass(frozen=True)
class LayerScores:
    """What one attention layer received and made of it.

    Attributes:
        scores: (rows, keys) float32, a sample of the rows before the normalizer; -inf where masked
            and beyond the end of a shorter row.
        examples: (rows,) int32, the index of the image, block of text or sentence pair of each row.
        heads: (rows,) int32, the attention head of each row.
        histogram: (bins,) int64, between `EDGES`: the probabilities above 0 of all rows of the
            split, masked entries left out.
        zeros: probabilities of exactly 0, masked entries left out.
        rows: how many rows the histogram is of.
        scalars: what the normalizer learned, by the names of its parameters.
    """

    scores: np.ndarray
    examples: np.ndarray
    heads: np.ndarray
    histogram: np.ndarray
    zeros: int
    rows: int
    scalars: dict[str, list[float]] = field(default_factory=dict)

    @property
    def probabilities(self) -> int:
        """How many probabilities were counted."""
        return int(self.histogram.sum()) + self.zeros

    def share_above(self, probability: float) -> float:
        """The share of all probabilities that are larger; must be one of `EDGES`."""
        return float(self.histogram[_edge(probability) :].sum()) / self.probabilities

    def share_up_to(self, probability: float) -> float:
        """The share of all probabilities that are at most this, zeros too; one of `EDGES`."""
        return 1 - self.share_above(probability)


@dataclass(frozen=True)
class Scores:
    """The attention scores of a trained model on examples that it was not trained on.

    Attributes:
        config: the recorded configuration of the run; `seed` is in it.
        split: of the data, "test" where there is one.
        split_examples: how many examples it has; the histograms are of all of them.
        layers: by the name of the normalizer's module, in the order of the model.
    """

    config: dict[str, Any]
    split: str
    split_examples: int
    layers: dict[str, LayerScores]

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config["seed"]


def save_scores(path: Path, scores: Scores) -> None:
    """Write a file: compressed, without pickles, the same bytes for the same scores."""
    layers = list(scores.layers.values())
    about = {
        "schema": SCHEMA,
        "config": scores.config,
        "split": scores.split,
        "split_examples": scores.split_examples,
        "layers": {
            name: {"zeros": layer.zeros, "rows": layer.rows, "scalars": layer.scalars}
            for name, layer in scores.layers.items()
        },
    }
    arrays = {
        f"{name}_{number}": getattr(layer, name)
        for number, layer in enumerate(layers)
        for name in ARRAYS
    }
    text = np.frombuffer(json.dumps(about, allow_nan=False).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=text, edges=EDGES, **arrays)
    write_atomically(path, lambda stream: stream.write(buffer.getvalue()))


ARRAYS = {"scores": np.float32, "examples": np.int32, "heads": np.int32, "histogram": np.int64}


def load_scores(source: Path = SCORES) -> dict[str, Scores]:
    """All measured runs below `source`, by the name of their file without its ending.

    Raises:
        ValueError: a file is damaged or of another version.
    """
    return {file.stem: _read(file) for file in sorted(source.glob("*.npz"))}


def _read(file: Path) -> Scores:
    try:
        with np.load(file, allow_pickle=False) as content:
            about = json.loads(content["about"].tobytes())
            if about["schema"] != SCHEMA or not np.array_equal(content["edges"], EDGES):
                raise ValueError("it is of another version")
            layers = {
                name: LayerScores(**{key: content[f"{key}_{number}"] for key in ARRAYS}, **facts)
                for number, (name, facts) in enumerate(about["layers"].items())
            }
        for name, layer in layers.items():
            _check(name, layer)
        return Scores(about["config"], about["split"], about["split_examples"], layers)
    except Exception as error:  # those of zip, zlib, NumPy and JSON have no class in common
        raise ValueError(
            f"{file} is damaged ({error or type(error).__name__}): delete it and measure its run "
            "again, python -m experiments.measure outputs/SCALE/EXPERIMENT/RUN"
        ) from error


def _check(name: str, layer: LayerScores) -> None:
    """Raise ValueError for arrays that do not fit together."""
    rows = len(layer.scores)
    shapes = {
        "scores": (rows, layer.scores.shape[-1]),
        "examples": (rows,),
        "heads": (rows,),
        "histogram": (len(EDGES) - 1,),
    }
    for key, shape in shapes.items():
        array = getattr(layer, key)
        if array.shape != shape or array.dtype != ARRAYS[key]:
            raise ValueError(f"{key} of {name} are {array.dtype} of shape {array.shape}")


def _edge(probability: float) -> int:
    index = int(np.abs(EDGES - probability).argmin())
    if not np.isclose(EDGES[index], probability, rtol=1e-6, atol=0):
        raise ValueError(f"{probability} is no edge of the histograms: use a power of ten >= 1e-9")
    return index
