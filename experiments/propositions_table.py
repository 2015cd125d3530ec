"""The shares of rows for which the propositions hold, as a table with their intervals.

Proposition 2 has three outcomes for a row, not two: both S and M improve, one of them gets worse,
or neither gets worse but one stays as it is, as where no score is below b.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from scipy import stats
from torch import Tensor

from experiments.propositions import (
    QUANTILES,
    TEMPERATURES,
    TOLERANCE,
    Rows,
    first_order,
    proposition1,
    quantiles,
)
from experiments.statistics import CONFIDENCE
from multimax import softmax

T_B, T_D = 2.0, 0.5


class Outcome(NamedTuple):
    """What MultiMax does to each row.

    Attributes:
        both: bool, S and M are higher than with SoftMax.
        worse: bool, S or M is lower.
        defined: bool, S and M are defined; the other two are False elsewhere.
    """

    both: Tensor
    worse: Tensor
    defined: Tensor


def outcome(scores: Tensor, b: float, d: float) -> Outcome:
    """By row, with t_b = 2 and t_d = 0.5; arguments as in `region`."""
    rows = Rows(scores)
    after, before = (
        rows.measured(first_order(scores, T_B, T_D, b, d)),
        rows.measured(softmax(scores)),
    )
    s, m = after.sparsity - before.sparsity, after.multi_modality - before.multi_modality
    defined = ~(s.isnan() | m.isnan())
    both = defined & (s > TOLERANCE) & (m > TOLERANCE)
    return Outcome(both, defined & ((s < -TOLERANCE) | (m < -TOLERANCE)), defined)


def share(successes: int, trials: int) -> str:
    """In per cent, with its Wilson interval; empty without a trial."""
    if not trials:
        return ""
    interval = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, "wilson")
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * successes / trials:.1f} [{low:.1f}, {high:.1f}]"


def smallest_counterexample(scores: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The row with the fewest scores, of these the one with the least spread, that gets worse.

    Args:
        scores: (rows, keys) by name, as `random_scores`; nothing masked.

    Returns:
        Its scores from large to small, b and d; None if no row gets worse.
    """
    found = [
        (x.size(1), (row.max() - row.min()).item(), row, b, d)
        for x in scores.values()
        for b, d in (quantiles(x, of) for of in QUANTILES)
        for row in x[outcome(x, b, d).worse]
    ]
    if not found:
        return None
    _, _, row, b, d = min(found, key=lambda of: of[:2])
    return {"scores": sorted(row.tolist(), reverse=True), "b": b, "d": d, "t_b": T_B, "t_d": T_D}


def markdown(random: Mapping[str, Tensor], measured: Mapping[str, Tensor]) -> str:
    """The table over scores drawn at random and those of trained models."""
    columns = ["scores", "rows", "with S and M", "1: S falls, %", "1: M rises, %"]
    columns += [f"2: b, d at {b:g}, {d:g}; both better, %" for b, d in QUANTILES]
    lines = [columns, ["---"] * len(columns)]
    lines += [[name, *_cells(x)] for name, x in {**random, **measured}.items()]
    grid = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([grid, *(f"- {remark}" for remark in _remarks(random))]) + "\n"


def _remarks(random: Mapping[str, Tensor]) -> list[str]:
    remarks = [
        f"Proposition 1: rows for which S never rises, and M never falls, over "
        f"{len(TEMPERATURES) - 1} steps of the temperature from {TEMPERATURES[0]:g} to "
        f"{TEMPERATURES[-1]:g}. The threshold is the row's mean.",
        f"Proposition 2: rows for which MultiMax (t_b = {T_B:g}, t_d = {T_D:g}; b and d at these "
        "quantiles of the scores) has a higher S and a higher M than SoftMax; worse: rows for "
        "which one of them is lower. The others stay as they are in one or both.",
        "In brackets 95 % Wilson intervals, which take rows as independent: those of one example "
        "of a trained model are not. Rows for which a measure is not defined are left out.",
        "A row that lies below b is given SoftMax of a lower temperature, one above d that of a "
        "higher: by Proposition 1, one of the measures gets worse. Short rows often do.",
    ]
    if found := smallest_counterexample(random):
        row = ", ".join(f"{score:.3g}" for score in found["scores"])
        remarks.append(
            "Proposition 2, the shortest of the random rows that get worse, and of these the one "
            f"with the least spread: ({row}) with b = {found['b']:.3g}, d = {found['d']:.3g}."
        )
    return remarks


def _cells(x: Tensor) -> list[str]:
    first = proposition1(x)[0]  # the threshold is the mean
    with_s, with_m = first["rows_with_s"], first["rows_with_m"]
    outcomes = [outcome(x, *quantiles(x, of)) for of in QUANTILES]
    defined = int(outcomes[0].defined.sum())
    return [
        f"{len(x):,}",
        f"{defined:,}",
        share(with_s - first["rows_where_s_rises"], with_s),
        share(with_m - first["rows_where_m_falls"], with_m),
        *(
            f"{share(int(of.both.sum()), defined)}, worse {_percent(of, defined)}"
            for of in outcomes
        ),
    ]


def _percent(of: Outcome, defined: int) -> str:
    return f"{100 * int(of.worse.sum()) / defined:.1f}" if defined else ""
