"""Sparsity against multi-modality of normalizers on the same scores, with bootstrap intervals.

Definitions 1 and 2 of the paper. For each row of scores the threshold is its mean, and the
reference s of the sparsity is the smallest SoftMax probability (temperature 1) of the row: both
depend on the scores alone, so that they are the same for all normalizers. Means are over the rows
of all layers; the bootstrap draws examples (images, blocks, sentences) with all their rows.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.scores import LayerScores
from multimax import entmax, evsoftmax, multimax, softmax, topk
from multimax.metrics import multi_modality, row_mean, softmax_reference, sparsity
from multimax.normalizers import build_preserving_rng

TEMPERATURES = np.geomspace(0.01, 100, 161)  # 1 is one of them
ALPHAS = np.unique(np.concatenate([[1.0, 1.5, 2.0], 1 + np.geomspace(0.01, 10, 61)]))
FLOORS = np.concatenate([[0.0], np.geomspace(1e-6, 0.999, 31)])
KEPT = np.unique(np.geomspace(1, 128, 29).round().astype(int))
# Of the first order: all combinations of t_b and t_d, with b and d at quantiles of the layer's
# scores. t_b = 1, t_d = 1 is SoftMax, and left out.
T_B = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 9.0)
T_D = (1.0, 0.75, 0.5, 0.25, 0.0)
QUANTILES = ((0.25, 0.5), (0.25, 0.75), (0.25, 0.9), (0.5, 0.5), (0.5, 0.75), (0.5, 0.9),
             (0.75, 0.75), (0.75, 0.9))  # fmt: skip
FACTORS = np.linspace(0, 4, 33)  # of the learned scalars t_b - 1 and t_d - 1; 1 is as learned

Normalize = Callable[[Tensor], Tensor]


class Rows(NamedTuple):
    """The sampled rows of one layer.

    Attributes:
        scores: (rows, keys) float64, -inf where masked.
        examples: (rows,), see `LayerScores`.
        learned: the scalars of a MultiMax layer: its own or those of its counterpart; {} for none.
    """

    scores: Tensor
    examples: np.ndarray
    learned: dict[str, list[float]]


def rows_of(layer: LayerScores, learned: dict[str, list[float]]) -> Rows:
    """The rows of a layer, for scalars that need not be its own."""
    return Rows(torch.from_numpy(layer.scores).double(), layer.examples, learned)


@dataclass(frozen=True)
class Family:
    """What one normalizer makes of the same rows over the range of its parameter.

    Attributes:
        parameters: what tells its points apart, in order.
        sums: (2, layers, points, examples), of the sparsity and of the multi-modality of the rows
            of each example.
        rows: (2, layers, examples), of how many rows each sum is: those with a sparsity, and those
            with a multi-modality.
        undefined: (2,), rows without a sparsity, and without a multi-modality.
    """

    parameters: list[dict[str, float]]
    sums: np.ndarray
    rows: np.ndarray
    undefined: np.ndarray

    @property
    def examples(self) -> int:
        """How many there are."""
        return self.rows.shape[-1]

    def means(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean sparsity and mean multi-modality, (replicates, points), over weighted examples.

        Args:
            weights: (replicates, examples), how often each example was drawn.
        """
        s, m = (
            weights @ sums.T / (weights @ rows)[:, None]
            for sums, rows in zip(self.sums.sum(1), self.rows.sum(1), strict=True)
        )
        return s, m

    def point(self, index: int) -> "Family":
        """A family of one of its points."""
        sums = self.sums[:, :, index : index + 1]
        return Family([self.parameters[index]], sums, self.rows, self.undefined)

    def layers(self) -> list["Family"]:
        """A family of each of its layers."""
        return [
            Family(self.parameters, self.sums[:, [i]], self.rows[:, [i]], self.undefined)
            for i in range(self.sums.shape[1])
        ]


def softmax_family(layers: Iterable[Rows]) -> Family:
    """SoftMax over its temperature."""
    points = [
        ({"temperature": t}, lambda x, t=t: softmax(x, temperature=t))
        for t in TEMPERATURES.tolist()
    ]
    return same_for_all(layers, points)


def topk_family(layers: Iterable[Rows]) -> Family:
    """Top-k over k."""
    return same_for_all(layers, [({"k": k}, lambda x, k=k: topk(x, k)) for k in KEPT.tolist()])


def entmax_family(layers: Iterable[Rows]) -> Family:
    """Entmax over alpha: SoftMax at 1, sparsemax at 2."""
    return same_for_all(
        layers, [({"alpha": a}, lambda x, a=a: entmax(x, a)) for a in ALPHAS.tolist()]
    )


def evsoftmax_family(layers: Iterable[Rows]) -> Family:
    """Evidential SoftMax over its floor, what it leaves of the weight below the mean."""
    points = [({"floor": f}, lambda x, f=f: evsoftmax(x, floor=f)) for f in FLOORS.tolist()]
    return same_for_all(layers, points)


def grid_family(layers: Iterable[Rows]) -> Family:
    """MultiMax of the first order over t_b and t_d, b and d at quantiles of the layer's scores."""
    parameters = [
        {"t_b": t_b, "t_d": t_d, "quantile_b": low, "quantile_d": high}
        for low, high in QUANTILES
        for t_b in T_B
        for t_d in T_D
        if (t_b, t_d) != (1, 1)
    ]
    return measured(parameters, ((rows, _first_order(rows, parameters)) for rows in layers))


def _first_order(rows: Rows, parameters: list[dict[str, float]]) -> list[Normalize]:
    allowed = rows.scores[rows.scores > -torch.inf]

    def normalize(p: dict[str, float]) -> Normalize:
        ts = torch.tensor([1 - p["t_b"], p["t_d"] - 1], dtype=torch.float64)
        quantiles = torch.tensor([p["quantile_b"], p["quantile_d"]], dtype=torch.float64)
        ranges = allowed.quantile(quantiles)
        return lambda x: multimax(x, ts, ranges)

    return [normalize(p) for p in parameters]


def path_family(layers: Iterable[Rows]) -> Family:
    """From SoftMax over the learned MultiMax and beyond it: a factor on all t_b - 1 and t_d - 1."""
    parameters = [{"factor": factor} for factor in FACTORS.tolist()]
    return measured(
        parameters,
        ((rows, [learned_normalizer(rows.learned, f) for f in FACTORS]) for rows in layers),
    )


def learned_normalizer(learned: Mapping[str, list[float]], factor: float = 1.0) -> Normalize:
    """MultiMax with recorded scalars, of which `ts` is multiplied by a factor."""
    order, affine = len(learned["ts"]) // 2, "scale" in learned
    module = build_preserving_rng({"name": "multimax", "order": order, "affine": affine}).double()
    state = {name: torch.tensor(values, dtype=torch.float64) for name, values in learned.items()}
    module.load_state_dict(state | {"ts": factor * state["ts"]})
    return module


LEARNED = int(np.flatnonzero(FACTORS == 1)[0])  # the point of `path_family` that was learned


def same_for_all(
    layers: Iterable[Rows], points: list[tuple[dict[str, float], Normalize]]
) -> Family:
    """A family whose points are the same normalizer in every layer."""
    functions = [normalize for _, normalize in points]
    return measured([parameters for parameters, _ in points], ((r, functions) for r in layers))


@torch.no_grad()
def measured(
    parameters: list[dict[str, float]], layers: Iterable[tuple[Rows, list[Normalize]]]
) -> Family:
    """Sparsity and multi-modality of each point, summed by example over rows and layers."""
    values, examples = [], []
    for rows, functions in layers:
        x, mask = rows.scores, rows.scores > -torch.inf
        threshold = row_mean(x.where(mask, 0.0), mask=mask)
        reference = softmax_reference(x, mask=mask)
        for_all = [
            torch.stack(
                [
                    sparsity(p, x, threshold, reference, mask=mask),
                    multi_modality(p, x, threshold, mask=mask),
                ]
            )
            for p in (normalize(x) for normalize in functions)
        ]
        values.append(torch.stack(for_all).numpy())  # (points, 2, rows)
        examples.append(rows.examples)
    of_all, places = np.unique(np.concatenate(examples), return_inverse=True)
    places = np.split(places, np.cumsum([len(of) for of in examples])[:-1])
    sums = np.zeros((2, len(values), len(parameters), len(of_all)))
    rows, undefined = np.zeros((2, len(values), len(of_all))), np.zeros(2, int)
    for layer, (found, place) in enumerate(zip(values, places, strict=True)):
        for which in range(2):
            # Whether a row has a value depends on its scores alone, not on the normalizer.
            defined = ~np.isnan(found[0, which])
            undefined[which] += (~defined).sum()
            np.add.at(rows[which, layer], place[defined], 1)
            np.add.at(sums[which, layer].T, place[defined], found[:, which, defined].T)
    return Family(parameters, sums, rows, undefined)


GRID, PATH = "MultiMax, chosen scalars", "MultiMax, learned scalars scaled"
FAMILIES: dict[str, Callable[[Iterable[Rows]], Family]] = {
    "SoftMax": softmax_family,
    "top-k": topk_family,
    "entmax": entmax_family,
    "evidential SoftMax": evsoftmax_family,
    GRID: grid_family,
    PATH: path_family,
}
# The points of a curve that have a name.
NAMED = {
    "SoftMax": {"temperature": {1.0: "t = 1"}},
    "entmax": {"alpha": {1.5: "1.5-entmax", 2.0: "sparsemax"}},
    "evidential SoftMax": {"floor": {0.0: "floor 0"}},
}


def named_points(name: str, family: Family) -> dict[int, str]:
    """Points of a family that have a name, by index."""
    return {
        int(np.abs(np.array([of[parameter] for of in family.parameters]) - value).argmin()): text
        for parameter, texts in NAMED.get(name, {}).items()
        for value, text in texts.items()
    }
