"""What the seeds of the study of retrieval say beside its claims, see docs/preregistration.md.

    python -m experiments.retrieval        # results/tables/retrieval_seeds_small.*

For each cell the interquartile mean of log10 of the error over seeds, with a bootstrap interval;
the probability that a run improves on one of SoftMax and of sparsemax with the same keys; and how
many runs got stuck. Source of these measures: Agarwal et al., Deep Reinforcement Learning at the
Edge of the Statistical Precipice, NeurIPS 2021, arXiv 2108.13264.
"""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.comparison import Cells, cells_of
from experiments.rendering import Table, significant
from experiments.results import load
from experiments.selection import run_of, study_of
from experiments.statistics import CONFIDENCE
from experiments.tables import write

STUDY, SCALE = "retrieval", "small"
RESAMPLES, SEED = 10_000, 0
STUCK = 10.0  # times the error of the best seed of a cell, which a stuck run is above
PEERS = ("SoftMax", "sparsemax")
Estimate = tuple[float, float, float]  # with the ends of its interval


class Seeds(NamedTuple):
    """The runs of a cell.

    Attributes:
        errors: by seed, in the main column.
        stuck: seeds with more than `STUCK` times the smallest error.
    """

    errors: dict[int, float]
    stuck: set[int]


def seeds_of(cells: Cells, cell: str) -> Seeds:
    """The runs of a cell, and which of them got stuck."""
    errors = cells.values(cell, cells.main_column)
    bound = STUCK * min(errors.values(), default=math.inf)
    return Seeds(errors, {seed for seed, error in errors.items() if error > bound})


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half: a quarter of the values, rounded down, is cut at each end."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interquartile_mean_with_interval(values: Sequence[float]) -> Estimate:
    """The interquartile mean and its percentile interval over resamples of the values."""
    array = np.asarray(values, dtype=float)
    means = interquartile_mean(array[_resampled(len(array))])
    return float(interquartile_mean(array)), *_interval(means)


def probability_of_improvement(values: Sequence[float], than: Sequence[float]) -> Estimate:
    """The share of pairs of runs of which the first has the lower error; a tie counts as half.

    The interval is over resamples of either cell, independently of each other.
    """
    ours, theirs = np.asarray(values, dtype=float), np.asarray(than, dtype=float)
    wins = (ours[:, None] < theirs) + 0.5 * (ours[:, None] == theirs)
    first, second = (_counts(len(of), seed) for seed, of in enumerate((ours, theirs), SEED))
    shares = ((first @ wins) * second).sum(1) / wins.size
    return float(wins.mean()), *_interval(shares)


def _resampled(size: int, seed: int = SEED) -> np.ndarray:
    """(RESAMPLES, size) indices, drawn with replacement."""
    return np.random.default_rng(seed).integers(size, size=(RESAMPLES, size))


def _counts(size: int, seed: int) -> np.ndarray:
    """(RESAMPLES, size) how often each index is in a resample."""
    return (_resampled(size, seed)[:, :, None] == np.arange(size)).sum(1)


def _interval(statistics: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(statistics, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def table_of(cells: Cells) -> Table:
    """A row for each cell that has runs."""
    study, main = cells.study, cells.main_column
    found = {name: seeds for name in study.cells if (seeds := seeds_of(cells, name)).errors}
    better = {peer: f"better than {peer}" for peer in PEERS}
    columns = [
        *study.row, "seeds", "stuck", "diverged", "best", "median", "worst", "mean",
        *(f"{column}, interquartile" for column in study.columns), *better.values(),
    ]  # fmt: skip
    rows = []
    for name, seeds in found.items():
        row = dict(zip(study.row, study.cells[name].row, strict=True))
        row |= _spread(cells, name, seeds)
        for column in study.columns:
            row[f"{column}, interquartile"] = _interquartile(cells, name, column)
        for peer, title in better.items():
            than = _peer(cells, name, peer)
            row[title] = ""
            if than in found and than != name:
                estimate = probability_of_improvement(
                    [*seeds.errors.values()], [*found[than].errors.values()]
                )
                row[title] = "{:.2f} [{:.2f}, {:.2f}]".format(*estimate)
        rows.append(row)
    caption = f"{study.title}, over seeds, at {cells.scale} scale"
    remarks = [
        f"best, median, worst and mean (arithmetic): of {main} over seeds, n = 64 and k = 4. "
        f"stuck: runs with more than {STUCK:g} times the {main} of the best seed of their row.",
        "interquartile: 10 to the power of the mean of log10 over the middle half of the seeds, "
        f"with its {100 * CONFIDENCE:g} % interval over {RESAMPLES:,} resamples of seeds "
        "(percentile bootstrap).",
        "better than SoftMax, than sparsemax: the share of pairs of a run of this row and one of "
        f"that normalizer with the same keys in which this one has the lower {main}; a tie counts "
        "as half; resampled as above, both rows independently.",
    ]
    if diverged := study.diverged:
        remarks.append(f"A run that diverged counts as {diverged:g} in all columns.")
    name = f"{study.name}_seeds_{cells.scale}"
    return Table(name, caption, columns, len(study.row), rows, remarks, [], cells.count())


def _spread(cells: Cells, cell: str, seeds: Seeds) -> dict[str, str]:
    digits, errors = cells.study.digits, [*seeds.errors.values()]
    diverged = sum(run.diverged for run in cells.selections[cell].runs.values())
    numbers = {
        "best": min(errors),
        "median": float(np.median(errors)),
        "worst": max(errors),
        "mean": float(np.mean(errors)),
    }
    counts = {"seeds": len(errors), "stuck": len(seeds.stuck), "diverged": diverged}
    texts = {name: significant(value, digits) for name, value in numbers.items()}
    return {name: str(count) for name, count in counts.items()} | texts


def _interquartile(cells: Cells, cell: str, column: str) -> str:
    estimate = interquartile_mean_with_interval([*cells.compared(cell, column).values()])
    mean, low, high = (significant(10**value, cells.study.digits) for value in estimate)
    return f"{mean} [{low}, {high}]"


def _peer(cells: Cells, cell: str, label: str) -> str | None:
    """The cell with another normalizer and the same rest of the row."""
    row = [*cells.study.cells[cell].row[:-1], label]
    return next((name for name, of in cells.study.cells.items() if of.row == row), None)


def main() -> None:
    """Write the table of the recorded runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    try:
        runs = [run_of(result, str(file)) for file, result in load().items()]
        cells = cells_of(study_of(STUDY), SCALE, runs)
        if not cells.count():
            raise ValueError(f"there is no run of the study: python train.py -m study={STUDY}")
        write(table_of(cells))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
