"""Studies that compare by ratios and have a smallest effect of interest: figures and verdicts."""

import re

import numpy as np
import pytest
from retrieval_runs import made_up, small_study, whole_study
from scipy import stats
from test_forest import label_of

from experiments.comparison import cells_of
from experiments.figures import tables as figure_of_tables
from experiments.rendering import significant
from experiments.selection import run_of
from experiments.statistics import Difference
from experiments.tables import table_of, verdict_of

CELLS = ("linear-softmax", "linear-multimax2")
SOFTMAX = [0.2, 0.25, 0.3, 0.22]
MULTIMAX = [0.02, 0.004, 0.031, 0.009]


def claimed(**changes):
    (claim, *_) = whole_study().claims
    assert (claim.cell, claim.than) == (CELLS[1], CELLS[0])
    return small_study(CELLS).model_copy(update={"claims": (claim, claim), **changes})


def cells_with(study, softmax=SOFTMAX, multimax=MULTIMAX, last=None):
    found = [
        made_up(study, cell, seed, error)
        for cell, errors in zip(CELLS, (softmax, multimax), strict=True)
        for seed, error in enumerate(errors)
    ]
    if last:
        found[-1] |= last
    return cells_of(study, "small", [run_of(of, str(i)) for i, of in enumerate(found)])


def interval(level, than=SOFTMAX, errors=MULTIMAX):
    """Of the ratio, by scipy's paired t-test of the logarithms."""
    found = stats.ttest_rel(np.log10(errors), np.log10(than)).confidence_interval(level)
    return [10**end for end in (found.low, found.high)]


def test_ratios_are_of_geometric_means_and_their_intervals_those_of_logarithms():
    table = table_of(cells_with(claimed()))
    first, second = table.rows
    assert table.columns[2:8] == ["error", "sd", "seeds", "n", "ratio", "95 % CI"]
    assert first["error"] == significant(stats.gmean(SOFTMAX), 3) == "0.240"
    assert second["error"] == significant(stats.gmean(MULTIMAX), 3)
    assert second["sd"] == significant(stats.gstd(MULTIMAX), 3)
    ratio = significant(stats.gmean(MULTIMAX) / stats.gmean(SOFTMAX), 3)
    low, high = (significant(end, 3) for end in interval(0.95))
    assert (second["ratio"], second["95 % CI"]) == (f"{ratio}*", f"[{low}, {high}]")
    low, high = (significant(end, 3) for end in interval(0.975))  # two claims
    assert table.remarks[1] == (
        f"Linear keys: MultiMax beats SoftMax: **confirmed** at this scale (error ratio {ratio} "
        f"[{low}, {high}], 4 pairs)."
    )
    assert "level 97.5 % (Bonferroni, for 2 claims)" in table.remarks[0]
    assert "smallest effect of interest is a ratio of 2." in table.remarks[0]


def test_what_the_runs_do_not_decide_says_which_ratio_they_would_have_seen():
    errors = [0.1, 0.25, 0.05, 0.22]
    said = table_of(cells_with(claimed(), multimax=errors)).remarks[1]
    difference = np.log10(errors) - np.log10(SOFTMAX)
    error = difference.std(ddof=1) / 2
    sees = 10 ** Difference(0, 0, 1, error, 4).smallest(0.975)
    assert f"**underpowered** at this scale (error ratio {10 ** difference.mean():.3g} [" in said
    assert said.endswith(f"sees a ratio of {significant(sees, 3)} in 80 % of cases).")


@pytest.mark.parametrize(
    ("gain", "half", "verdict"),
    [
        (3.0, 1.0, "confirmed"),
        (2.0, 1.9, "confirmed"),
        (2.0, 2.1, "underpowered"),  # no effect is not excluded
        (1.9, 0.5, "underpowered"),  # there is an effect, and it may be too small or not
        (1.4, 0.5, "refuted"),  # there is an effect, and it is too small
        (0.0, 1.9, "refuted"),
        (0.0, 2.1, "underpowered"),
        (-9.0, 1.0, "refuted"),
        (-9.0, 20.0, "underpowered"),
    ],
)
def test_verdicts_with_a_smallest_effect(gain, half, verdict):
    lower = whole_study().claims[0]
    assert lower.lower
    higher = lower.model_copy(update={"lower": False})
    for of, mean in ((higher, gain), (lower, -gain)):
        assert verdict_of(of, Difference(mean, half, 0.5, 1.0, 10), 1.0, 2.0) == verdict


def test_a_run_that_diverged_counts_as_the_study_says():
    failed = {"diverged": "the loss is nan", "metrics": {}}
    cells = cells_with(claimed(), last=failed)
    assert [*cells.values(CELLS[1], "n = 4096").values()] == [*MULTIMAX[:3], 1.0]
    table = table_of(cells)
    assert table.rows[1]["error"] == significant(stats.gmean([*MULTIMAX[:3], 1.0]), 3)
    assert table.rows[1]["seeds"] == "4"
    said = "Runs that diverged count as 1: linear, MultiMax, order 2 (seed 3)."
    assert table.remarks[0].endswith(said)
    without = table_of(cells_with(claimed(diverged=None), last=failed))
    assert without.rows[1]["seeds"] == "3"
    said = "Runs that diverged are left out: linear, MultiMax, order 2 (seed 3)."
    assert without.remarks[0].endswith(said)


def test_an_interval_beyond_all_numbers_is_infinite():
    table = table_of(cells_with(claimed(), softmax=[1e-30, 1.0], multimax=[1.0, 1e-30]))
    assert "inf]" in table.remarks[1]


def test_a_figure_without_a_logarithm_is_refused():
    with pytest.raises(ValueError, match=r"error of cell linear-multimax2, seed 1, is 0: .*ratios"):
        table_of(cells_with(claimed(), multimax=[0.1, 0.0]))
    content = claimed().model_dump() | {"smallest": 1.0}
    with pytest.raises(ValueError, match=re.escape("smallest=1 must be a ratio above 1")):
        type(claimed()).model_validate(content)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00065, "0.00065"), (1.2, "1.2"), (1.0, "1.0"), (23.4, "23"), (6.5e-7, "6.5e-07")],
)
def test_significant_digits(value, text):
    assert significant(value, 2) == text


def test_the_figure_has_ratios_on_a_logarithmic_axis_and_a_band_of_what_does_not_matter():
    figure = figure_of_tables.forest(cells_with(claimed()))
    axes = figure.axes[0]
    assert "error, ratio to linear | SoftMax (lower is better)" in label_of(figure)
    ticks = dict(
        zip((t.get_text() for t in axes.get_xticklabels()), axes.get_xticks(), strict=True)
    )
    assert ticks["0.1"] == pytest.approx(-1)
    assert ticks["1"] == 0
    low, high = axes.patches[0].get_x(), axes.patches[0].get_x() + axes.patches[0].get_width()
    assert (low, high) == pytest.approx((-np.log10(2), np.log10(2)))
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    np.testing.assert_allclose(dots.get_xdata(), np.log10(np.divide(MULTIMAX, SOFTMAX)))
