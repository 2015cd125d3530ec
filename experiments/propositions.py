"""The paper's two propositions, counted row by row on random scores and on those of trained models.

Proposition 1: with SoftMax, a higher temperature t raises the multi-modality M and lowers the
sparsity S. That is a theorem, for every row, threshold and reference. p_max - p_n is p_max times
1 - exp((x_n - x_max) / t), and both fall with t. With E the mean of the scores weighted by p,
d p_l / dt = p_l (E - x_l) / t^2: of the entries below the threshold those below E gain and those
above it lose; together they gain, as the entries above the threshold, if it is above E, all lose.
The terms exp(-p_l / s) are steepest where p_l is small, which is where mass is gained: S falls.

Proposition 2: with t_b > 1 and t_d < 1, MultiMax has a higher M and a higher S than SoftMax at
t = 1. With delta(x) = sigma(x) - x and Z the sums of exponentials before and after,

    p'_l / p_l = exp(delta(x_l)) Z / Z',    so that entry l loses mass if and only if
    delta(x_l) < log(Z' / Z) = log sum_k p_k exp(delta(x_k)),

the push on it is harder than the average push, weighted by p. Pressing the large entries down
(t_d < 1) lowers Z': entries that are not pushed as hard, such as all between b and d, gain. For the
smallest entry of a row and a modulator of the first order, (t_b - 1)(b - x_min) >= (1 - t_d)
(x_max - d) is enough. It is no theorem for all rows: `COUNTEREXAMPLE`.

S and M are Definitions 2 and 1 in float64, with the row's mean as threshold and its smallest
SoftMax probability (t = 1) as reference. Rows in which one of them is not defined are left out and
counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from multimax import multimax, softmax
from multimax.metrics import multi_modality, row_mean, softmax_reference, sparsity

TEMPERATURES = np.geomspace(0.1, 10, 21).tolist()
# Thresholds of Proposition 1: from the mean (0) towards the largest score (1) of the row.
THRESHOLDS = (0.0, 0.5, 0.9)
T_B = np.linspace(1.0, 5.0, 17)[1:].tolist()
T_D = np.linspace(0.0, 1.0, 17)[:-1].tolist()
QUANTILES = ((0.25, 0.75), (0.5, 0.75), (0.5, 0.95), (0.9, 0.95))  # of the scores: b, d
RANDOM_ROWS, SEED = 1000, 0
TOLERANCE = 1e-12  # rounding of S and M, which are in [0, 1]
# Scores whose smallest entry gains: d = 5 presses both large ones down, b = 1 hardly the small one.
COUNTEREXAMPLE = [10.0, 9.0, 0.0]
SCALARS_OF_COUNTEREXAMPLE = {"t_b": 1.001, "t_d": 0.1, "b": 1.0, "d": 5.0}


def random_scores() -> dict[str, Tensor]:
    """(rows, keys) of several distributions and lengths, float64."""
    generator = np.random.default_rng(SEED)
    draws = {
        "normal, deviation 1": lambda size: generator.normal(0, 1, size),
        "normal, deviation 3": lambda size: generator.normal(0, 3, size),
        "uniform in [-5, 5]": lambda size: generator.uniform(-5, 5, size),
        "Student's t, 3 degrees of freedom": lambda size: generator.standard_t(3, size),
    }
    return {
        f"{name}, {keys} keys": torch.from_numpy(draw((RANDOM_ROWS, keys)))
        for name, draw in draws.items()
        for keys in (4, 49, 196)
    }


class Measured(NamedTuple):
    """S and M of each row, NaN where they are not defined."""

    sparsity: Tensor
    multi_modality: Tensor


class Rows:
    """Rows of scores with what both definitions need of them.

    Args:
        scores: (rows, keys) float64, -inf where masked.
        threshold: from the row's mean (0) to its largest score (1).
    """

    def __init__(self, scores: Tensor, threshold: float = 0.0) -> None:
        self.scores, self.mask = scores, scores > -torch.inf
        mean = row_mean(scores.where(self.mask, 0.0), mask=self.mask)
        self.threshold = mean + threshold * (scores.amax(-1, keepdim=True) - mean)
        self.reference = softmax_reference(scores, mask=self.mask)

    def measured(self, probabilities: Tensor) -> Measured:
        """S and M of what a normalizer made of the scores."""
        given = (probabilities, self.scores, self.threshold)
        return Measured(
            sparsity(*given, self.reference, mask=self.mask),
            multi_modality(*given, mask=self.mask),
        )


def proposition1(scores: Tensor) -> list[dict[str, Any]]:
    """How often S rises or M falls from one temperature to the next, for each of `THRESHOLDS`."""
    found = []
    for threshold in THRESHOLDS:
        rows = Rows(scores, threshold)
        measured = [rows.measured(softmax(scores, temperature=t)) for t in TEMPERATURES]
        s, m = (torch.stack(values) for values in zip(*measured, strict=True))
        counts = {
            "rows_with_s": ~s[0].isnan(),
            "rows_with_m": ~m[0].isnan(),
            "rows_where_s_rises": (s.diff(dim=0) > TOLERANCE).any(0),
            "rows_where_m_falls": (m.diff(dim=0) < -TOLERANCE).any(0),
        }
        found.append(
            {"threshold": threshold, **{name: int(of.sum()) for name, of in counts.items()}}
        )
    return found


class Improved(NamedTuple):
    """How many rows MultiMax makes sparser, more multi-modal, and both; of how many; undefined."""

    sparser: int
    more_multi_modal: int
    both: int
    rows: int
    undefined: int


def improved(rows: Rows, probabilities: Tensor, baseline: Measured) -> Improved:
    """Compare probabilities of the rows with those of SoftMax, measured beforehand."""
    s, m = rows.measured(probabilities)
    defined = ~(s.isnan() | m.isnan())
    sparser = (s - baseline.sparsity)[defined] > TOLERANCE
    more = (m - baseline.multi_modality)[defined] > TOLERANCE
    counts = (sparser, more, sparser & more, defined, ~defined)
    return Improved(*(int(of.sum()) for of in counts))


def first_order(scores: Tensor, t_b: float, t_d: float, b: float, d: float) -> Tensor:
    """MultiMax of the first order."""
    ts, ranges = torch.tensor([[1 - t_b, t_d - 1], [b, d]], dtype=scores.dtype)
    return multimax(scores, ts, ranges)


def region(
    scores: Tensor, b: float, d: float, t_b: Sequence[float] = T_B, t_d: Sequence[float] = T_D
) -> list[list[Improved]]:
    """Where Proposition 2 holds: for each t_b, a list over t_d."""
    rows = Rows(scores)
    baseline = rows.measured(softmax(scores))
    return [
        [improved(rows, first_order(scores, of_b, of_d, b, d), baseline) for of_d in t_d]
        for of_b in t_b
    ]


def quantiles(scores: Tensor, shares: Sequence[float]) -> list[float]:
    """Of the scores that are not masked."""
    allowed = scores[scores > -torch.inf].numpy()
    return np.quantile(allowed, shares).tolist()


def loses_mass(scores: Tensor, t_b: float, t_d: float, b: float, d: float) -> Tensor:
    """bool, the entries with delta(x_l) < log(Z' / Z), by the derivation above."""
    push = (1 - t_b) * (b - scores).clamp_min(0) + (t_d - 1) * (scores - d).clamp_min(0)
    return push < (scores + push).logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True)
