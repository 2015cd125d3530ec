"""Spread over seeds, paired differences with their intervals, and what a comparison can see."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats
from scipy.optimize import brentq

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences.

    Attributes:
        mean: over the seeds that both have.
        half_width: of its confidence interval, by Student's t.
        p_value: two-sided, that it is not 0.
        error: of the mean, its standard error.
        pairs: number of seeds.
    """

    mean: float
    half_width: float
    p_value: float
    error: float
    pairs: int

    def smallest(self, confidence: float = CONFIDENCE) -> float:
        """The difference whose interval excludes 0 in 80 % of such comparisons.

        The spread is the one that was found; the test has a noncentral t distribution.
        """
        freedom = self.pairs - 1
        quantile = float(stats.t.ppf((1 + confidence) / 2, freedom))
        # The median of a noncentral t is near its noncentrality: at the quantile it has 50 %.
        found: Any = brentq(lambda n: stats.nct.sf(quantile, freedom, n) - POWER, 0, 9 * quantile)
        return found * self.error


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), deviation


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """The difference of `values` to a baseline over common seeds; None with fewer than two."""
    common = sorted(set(values) & set(baseline))
    if len(common) < 2:
        return None
    mean, deviation = mean_and_deviation([values[seed] - baseline[seed] for seed in common])
    error = deviation / math.sqrt(len(common))
    freedom = len(common) - 1
    quantile = float(stats.t.ppf((1 + confidence) / 2, freedom))
    t = abs(mean) / error if error else math.inf if mean else 0.0
    p_value = 2 * float(stats.t.sf(t, freedom))
    return Difference(mean, quantile * error, p_value, error, len(common))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
