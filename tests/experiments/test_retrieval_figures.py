"""The figures of the study of retrieval: that points, lines and colours are those of the runs."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from retrieval_runs import SCALARS, made_up, small_study, whole_study
from torch import linspace, tensor

from experiments.comparison import cells_of
from experiments.figures import reachable, retrieval_errors, retrieval_training
from experiments.reachable import SETTINGS, load_reached
from experiments.retrieval import seeds_of
from experiments.selection import CONFIGS, run_of
from multimax import modulate

CELL, ERRORS = "linear-multimax2", [0.01, 0.02, 0.03, 0.4]  # one is stuck
FAMILY = retrieval_errors.FAMILIES["MultiMax"]


@pytest.fixture(scope="module")
def recorded():
    """The cells of a small study, and their results by file."""
    study = small_study(("linear-softmax", CELL))
    results = {
        Path(f"{cell}-{seed}"): made_up(study, cell, seed, error, [2 * error, 3 * error])
        for cell in study.cells
        for seed, error in enumerate(ERRORS)
    }
    cells = cells_of(study, "small", [run_of(of, str(file)) for file, of in results.items()])
    # The whole study with these runs, so that every panel finds its cell.
    every = dict.fromkeys(whole_study().cells, type(cells.selections[CELL])())
    return type(cells)(whole_study(), "small", {}, {**every, **cells.selections}), results


def panel(figure, row, column, columns):
    return figure.axes[row * columns + column]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_families_have_every_cell_of_the_study_once():
    names = [f"{keys}-{name}" for keys in retrieval_errors.KEYS
             for family in retrieval_errors.FAMILIES.values() for name in family]  # fmt: skip
    assert sorted(names) == sorted(whole_study().cells)
    assert all(len(of) == 6 for of in retrieval_errors.FAMILIES.values())


def test_errors_by_n_and_by_k(recorded):
    cells, _ = recorded
    by_n = retrieval_errors.points(cells, CELL, "n")
    assert list(by_n) == [64, 256, 1024, 4096]
    assert by_n[64] == ERRORS
    assert by_n[256] == [2 * error for error in ERRORS]
    by_k = retrieval_errors.points(cells, CELL, "k")
    assert (list(by_k), by_k[4]) == ([1, 2, 4, 8, 16], ERRORS)
    assert retrieval_errors.points(cells, "mlp-softmax", "n") == {}


@pytest.mark.slow
def test_lines_are_medians_and_bars_quartiles(recorded):
    figure = retrieval_errors._figure(recorded[0], "n")
    axes = panel(figure, 0, 2, 3)
    assert axes.get_title() == "MultiMax; linear keys"
    (bar,) = axes.containers
    index = FAMILY.index("multimax2")
    assert bar.lines[0].get_color() == retrieval_errors.COLORS[index]
    middle = np.median(ERRORS)
    np.testing.assert_allclose(bar.lines[0].get_ydata()[:3], [middle, 2 * middle, 3 * middle])
    np.testing.assert_allclose(bar.lines[0].get_xdata(), [64, 256, 1024, 4096], rtol=0.1)
    (low, high) = bar.lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose([low, high], np.quantile(ERRORS, [0.25, 0.75]))
    softmax = next(line for line in axes.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(softmax.get_ydata()[1], 2 * middle)
    assert panel(figure, 1, 0, 3).containers == []


@pytest.mark.slow
def test_a_seed_is_a_line_and_a_stuck_one_is_orange(recorded):
    cells, results = recorded
    stuck = {name: seeds_of(cells, name) for name in cells.study.cells}
    assert stuck[CELL].stuck == {3}
    figure = retrieval_training._curves(cells, results, stuck, "linear")
    axes = panel(figure, 2, FAMILY.index("multimax2"), 6)
    assert [line.get_color() for line in axes.lines] == [retrieval_training.GOOD] * 3 + [
        retrieval_training.BAD
    ]
    assert axes.texts[0].get_text() == "1 of 4 stuck"
    assert [line.get_ydata()[-1] for line in axes.lines] == ERRORS
    assert panel(figure, 1, 0, 6).texts[0].get_text() == "no run yet"


@pytest.mark.slow
def test_modulators_are_those_that_were_learned(recorded):
    cells, results = recorded
    stuck = {name: seeds_of(cells, name) for name in cells.study.cells}
    figure = retrieval_training._modulators(cells, results, stuck)
    identity, first, *_, last = panel(figure, 0, FAMILY.index("multimax2"), 6).lines
    assert identity.get_linestyle() == "--"
    x = linspace(*retrieval_training.SCORES, 401)
    np.testing.assert_allclose(first.get_ydata(), modulate(x, *map(tensor, SCALARS.values())))
    assert last.get_color() == retrieval_training.BAD


@pytest.mark.slow
def test_bars_are_what_was_computed_and_points_what_was_measured(recorded):
    reached = load_reached(CONFIGS.parent / "results" / "reachable.json")
    assert sorted(reached) == sorted(whole_study().cells)
    figure = reachable._figure(recorded[0], reached)
    names = [name for family in retrieval_errors.FAMILIES.values() for name in family]
    for index, setting in enumerate(reachable.SETTINGS):
        assert setting in SETTINGS
        widths = [bar.get_width() for bar in figure.axes[2 * index].patches]
        assert widths == [reached[f"linear-{name}"][setting] for name in names]
    points = [c.lines[0] for c in figure.axes[1].containers]
    assert [p.get_xdata()[0] for p in points] == pytest.approx([np.median(ERRORS)] * 2)
    heights = [round(p.get_ydata()[0]) for p in points]
    assert heights == [names.index("softmax"), names.index("multimax2")]


def test_without_runs_there_is_an_error_that_says_what_makes_them(tmp_path):
    for figure in (retrieval_errors, retrieval_training, reachable):
        with pytest.raises(FileNotFoundError, match=r"no .*: python"):
            figure.draw(tmp_path / "figures", tmp_path)
    assert not (tmp_path / "figures").exists()
