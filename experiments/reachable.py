"""How near the weights of each normalizer can come to a uniform mean of the marked items.

    python -m experiments.reachable      # a minute on one core: results/reachable.json and a table

The items are those of k-mean retrieval, and their scores a linear function a (r - b) of their
relevance r, which is the best that linear keys can do. For each normalizer of the study, a, b and
its own scalars are fitted to sets of 64 items of which 4 are marked, from several starts, so that
the mean total variation between the weights and the uniform distribution over the marked items is
smallest; they are then kept for sets of other sizes. Weights that need not sum to one are divided
by the mean of their sums in the sets of the fit: the map of the values can learn such a factor. Of
options that are no scalars (the cap, the k of top-k) the best of those that the study tries is
taken.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from experiments.rendering import Table
from experiments.selection import config_of, study_of
from experiments.tables import write
from multimax.data.synthetic.base import Setting
from multimax.data.synthetic.k_mean import KMean
from multimax.files import write_json
from multimax.models.sharing import take_shared
from multimax.normalizers import Normalizer, build_for_attention
from multimax.training.studies import Study

FILE = Path("results/reachable.json")
STUDY, KEYS = "retrieval", "linear"
FITTED = Setting(64, 4)
SETTINGS = {
    "n = 64": FITTED,
    **{f"n = {n}": Setting(n, 4) for n in (256, 1024, 4096)},
    **{f"k = {k}": Setting(64, k) for k in (1, 2, 8, 16)},
}
SETS, FIT_SEED, TEST_SEED = 500, 0, 1
SCALES, ORIGINS = (1.0, 4.0, 16.0), (0.0, 0.5)  # where a and b start
INITS = ("paper", "separated")  # where a modulator starts
STEPS = 300  # of L-BFGS, and of the Nelder-Mead search after it ten times as many


class Sets(NamedTuple):
    """Sets of items.

    Attributes:
        relevance: (sets, items), float64.
        target: (sets, items), the uniform distribution over the marked items.
    """

    relevance: Tensor
    target: Tensor


class Weights(nn.Module):
    """A normalizer of scores that are a linear function of the relevance.

    Args:
        options: of the normalizer, as attention has them.
        scale: where a starts.
        origin: where b starts.
    """

    def __init__(self, options: Mapping[str, Any], scale: float, origin: float) -> None:
        super().__init__()
        own, _ = take_shared(options)
        self.normalizer: Normalizer = build_for_attention(own, 1, 1).double()
        self.line: nn.Parameter = nn.Parameter(torch.tensor([scale, origin], dtype=torch.float64))
        self.divisor: float | None = 1.0 if self.normalizer.sums_to_one else None
        self.eval()

    def forward(self, relevance: Tensor) -> Tensor:
        """Weights of the shape (sets, items) of `relevance`."""
        weights = self.normalizer(self.line[0] * (relevance - self.line[1]))
        return weights / (weights.sum(-1).mean() if self.divisor is None else self.divisor)

    def keep_divisor(self, relevance: Tensor) -> None:
        """Divide by the mean sum of these sets from now on, if weights need not sum to one."""
        if self.divisor is None:
            weights = self.normalizer(self.line[0] * (relevance - self.line[1]))
            self.divisor = weights.sum(-1).mean().item()


class Reached(NamedTuple):
    """What a normalizer reaches.

    Attributes:
        label: of the normalizer in the study.
        cells: of the study that have it, whatever their keys and starts.
        weights: as fitted.
        variation: the mean total variation by the name of the setting.
    """

    label: str
    cells: list[str]
    weights: Weights
    variation: dict[str, float]


def draw(setting: Setting, sets: int, seed: int) -> Sets:
    """Sets of the task, of a seed of their own."""
    length, marked = setting
    data = KMean(length, marked, test_lengths=(length,), test_marked=(marked,))
    items, _ = data.draw(np.random.default_rng([seed, *setting]), sets, setting)
    relevance = torch.from_numpy(items[..., 0]).double()
    return Sets(relevance, (relevance > 0.5).double() / marked)


def total_variation(weights: Tensor, target: Tensor) -> Tensor:
    """(sets,) half the absolute differences of (sets, items), summed: 0 is equal, 1 apart."""
    return 0.5 * (weights - target).abs().sum(-1)


def fit(options: Mapping[str, Any], sets: Sets, seed: int = 0) -> tuple[float, Weights]:
    """The smallest mean total variation that was found, and its weights.

    Of the L-BFGS descents from all starts the best goes on with a Nelder-Mead search, which needs
    no derivatives: the total variation has kinks.
    """
    torch.manual_seed(seed)
    found = [_descend(weights, sets) for weights in _starts(options)]
    _, weights = min(found, key=_by_variation)
    return _descend(weights, sets, "Nelder-Mead", {"maxfev": 10 * STEPS, "adaptive": True})


def _by_variation(found: tuple[float, Weights]) -> tuple[float, float]:
    """Of fits that are equal to four digits, the one with the smallest scores."""
    return round(found[0], 4), abs(found[1].line[0].item())


def _starts(options: Mapping[str, Any]) -> Iterator[Weights]:
    inits = [{"init": init} for init in INITS] if options["name"] == "multimax" else [{}]
    for init, scale, origin in itertools.product(inits, SCALES, ORIGINS):
        yield Weights({**options, **init}, scale, origin)


def _descend(
    weights: Weights, sets: Sets, method: str = "L-BFGS-B", options: Mapping[str, Any] | None = None
) -> tuple[float, Weights]:
    """The mean total variation where a search from these weights ends, and the weights there."""
    parameters = list(weights.parameters())
    gradient = method == "L-BFGS-B"

    def loss(vector: np.ndarray) -> Any:
        vector_to_parameters(torch.from_numpy(vector), parameters)
        with torch.set_grad_enabled(gradient):
            mean = total_variation(weights(sets.relevance), sets.target).mean()
        value = mean.item()
        if not np.isfinite(value):  # scalars so large that the scores overflow
            return (2.0, np.zeros_like(vector)) if gradient else 2.0
        if not gradient:
            return value
        slopes = torch.autograd.grad(mean, parameters, allow_unused=True, materialize_grads=True)
        return value, torch.cat([slope.flatten() for slope in slopes]).numpy()

    start = parameters_to_vector(parameters).detach().numpy()
    end = minimize(
        loss, start, method=method, jac=gradient, options={"maxiter": STEPS, **(options or {})}
    )
    vector_to_parameters(torch.from_numpy(end.x), parameters)
    return float(end.fun), weights


def families(study: Study) -> dict[str, tuple[list[str], list[dict[str, Any]]]]:
    """The cells of each normalizer, and its options that the study tries; by its label.

    Starts of modulators are left out: where they end is what is fitted.
    """
    found: dict[str, tuple[list[str], list[dict[str, Any]]]] = {}
    labels: dict[str, str] = {}
    for name, cell in study.cells.items():
        if cell.row[0] == KEYS:
            options = _options(study, name)
            label = labels.setdefault(str(options), cell.row[-1])
            found.setdefault(label, ([], options))[0].append(name)
    for name, cell in study.cells.items():
        twin = name.replace(cell.row[0], KEYS, 1)
        for cells, _ in found.values():
            if twin in cells and name not in cells:
                cells.append(name)
    return found


def _options(study: Study, cell: str) -> list[dict[str, Any]]:
    """The options of the normalizer in the settings to try, each once."""
    tried: dict[tuple[str, ...], int] = {}
    for index, settings in enumerate(study.cells[cell].tuning or [[]]):
        own = tuple(setting for setting in settings if setting.startswith("attention."))
        tried.setdefault(own, index)
    found = []
    for index in tried.values():
        options = config_of(*study.tried(cell, index)).attention.given()
        # A temperature is a part of a; the starts of scalars are those of `_starts`.
        found.append({k: v for k, v in options.items() if k not in ("init", "temperature")})
    return [one for i, one in enumerate(found) if one not in found[:i]]


def reach(label: str, cells: list[str], options: Sequence[Mapping[str, Any]]) -> Reached:
    """Fit a normalizer, with the best of its options, and measure it at all settings."""
    fitted_to = draw(FITTED, SETS, FIT_SEED)
    _, weights = min((fit(one, fitted_to) for one in options), key=_by_variation)
    variation = {}
    with torch.no_grad():
        weights.keep_divisor(fitted_to.relevance)
        for name, setting in SETTINGS.items():
            sets = draw(setting, SETS, TEST_SEED)
            found = total_variation(weights(sets.relevance), sets.target)
            variation[name] = found.mean().item()
    return Reached(label, cells, weights, variation)


def table_of(found: Sequence[Reached]) -> Table:
    """A row for each normalizer."""
    columns = ["normalizer", *SETTINGS, "a", "b", "scalars"]
    rows = []
    for one in found:
        scale, origin = one.weights.line.tolist()
        texts = {name: f"{value:.3f}" for name, value in one.variation.items()}
        rows.append(
            {"normalizer": one.label, **texts, "a": f"{scale:.3g}", "b": f"{origin:.3g}"}
            | {"scalars": _scalars(one.weights)}
        )
    caption = (
        "Total variation between the uniform distribution over the marked items and the nearest "
        f"one that scores a (r - b) of the relevance r reach, fitted at n = {FITTED.length}, "
        f"k = {FITTED.relevant}"
    )
    remarks = [
        f"Means over {SETS} sets that were not fitted to; 0 is the target, 1 nothing in common "
        "with it. a, b and the normalizer's own scalars are fitted to as many other sets, and kept "
        "for all columns. n items, 4 of them marked; k of 64 items marked.",
        "Weights that need not sum to one (sink, Softpick, sigmoid) are divided by the mean of "
        "their sums in the fitted sets, here divisor; at other sizes they can be more than 1 from "
        "the target. Where the scores do not change when all are shifted, b is what it began with.",
        "Where 0.000 is reached, many scalars do: what they leak to unmarked items is too little "
        "to be seen at n = 64, and those of a trained model may leak more among more items. "
        "A start of MultiMax is no other normalizer and has no row. Sets of one size do not tell "
        "the scale a from the scalars of a length scale: at other sizes these have what the fit "
        "ended with. With keys from an MLP, scores can be any function of the relevance, so that "
        "SoftMax of two values, far apart, is as near as one likes for every n and k.",
    ]
    return Table("reachable", caption, columns, 1, rows, remarks, [], SETS)


def _scalars(weights: Weights) -> str:
    """The fitted scalars, and the options that are numbers."""
    normalizer = weights.normalizer
    options = {name: getattr(normalizer, name, None) for name in ("k", "softcap")}
    texts = [f"{name} {value:g}" for name, value in options.items() if value]
    for name, parameter in normalizer.named_parameters():
        values = " ".join(f"{value:.3g}" for value in parameter.flatten().tolist())
        texts.append(f"{name.replace('_', ' ')} {values}")
    if not normalizer.sums_to_one:
        texts.append(f"divisor {weights.divisor:.3g}")
    return "; ".join(texts)


def load_reached(file: Path = FILE) -> dict[str, dict[str, float]]:
    """The total variation by the name of the setting, of every cell of the study.

    Raises:
        FileNotFoundError: it has not been computed.
    """
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}: python -m experiments.reachable makes it")
    content = json.loads(file.read_text()).values()
    return {cell: {name: of[name] for name in SETTINGS} for of in content for cell in of["cells"]}


def main() -> None:
    """Fit all normalizers of the study and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    found = []
    try:
        for label, (cells, options) in families(study_of(STUDY)).items():
            found.append(reach(label, cells, options))
            print(f"{label}: {found[-1].variation[f'n = {FITTED.length}']:.4f}", flush=True)
        write_json(FILE, {one.label: {"cells": one.cells, **one.variation} for one in found})
        print(FILE)
        write(table_of(found))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
