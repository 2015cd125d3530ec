"""The figure of differences to the baseline: what is drawn where, against a paired t-test."""

import math
from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from test_tables import result

from experiments.comparison import cells_of
from experiments.figures import tables
from experiments.selection import run_of, study_of

MAIN = "top-1 %"


def small_study(**changes):
    """Some cells of table 2, so that few configurations are composed."""
    study = study_of("table2")
    names = ("softmax", "topk-attention", "multimax2-attention", "multimax2-both")
    cells = {name: study.cells[name] for name in names}
    return study.model_copy(update={"cells": cells, "claims": (), **changes})


def cells_with(**top1):
    """The cells of `small_study` with runs of the seeds 0, 1, ...; values by experiment."""
    entries = [
        result(experiment, seed, value)
        for experiment, values in top1.items()
        for seed, value in enumerate(values)
    ]
    return cells_of(small_study(), "small", [run_of(e, f"{i}") for i, e in enumerate(entries)])


def label_of(figure):
    """What is written below the axis, wherever its lines end."""
    return " ".join(figure.axes[0].get_xlabel().split())


def rows(figure):
    """What the figure shows of each cell: dots, interval, marker and the text beside it."""
    axes = figure.axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    bars = {round(c.lines[0].get_ydata()[0]): c for c in axes.containers}
    texts = {round(text.get_position()[1]): text.get_text() for text in axes.texts[: len(dots)]}
    found = {}
    for height, label in enumerate(axes.get_yticklabels()):
        (own,) = [line for line in dots if math.floor(line.get_ydata()[0] + 0.5) == height]
        bar = bars.get(height)
        interval = mean = None
        if bar:
            ((start, end),) = bar.lines[2][0].get_segments()
            interval, mean = (start[0], end[0]), bar.lines[0]
        found[label.get_text()] = (list(own.get_xdata()), interval, mean, texts[height])
    return found


def test_a_row_has_its_seeds_their_mean_and_its_interval():
    figure = tables.forest(
        cells_with(
            deit_softmax=[80.0, 82.0, 81.0],
            deit_multimax=[81.0, 82.5, 82.5, 99.0],  # there is no fourth seed to compare with
            deit_topk=[78.0],
        )
    )
    shown = rows(figure)
    assert list(shown) == ["top-k | SoftMax", "MultiMax, order 2 | MultiMax, order 2"]
    assert shown["top-k | SoftMax"] == ([-2.0], None, None, "n = 1")
    seeds, interval, mean, text = shown["MultiMax, order 2 | MultiMax, order 2"]
    assert (seeds, text) == ([1.0, 0.5, 1.5], "n = 3")
    half = 4.302653 * 0.5 / math.sqrt(3)  # t, 2 degrees of freedom
    assert interval == pytest.approx((1 - half, 1 + half))
    assert mean.get_xdata()[0] == pytest.approx(1.0)
    (zero,) = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 0]]
    assert list(zero.get_ydata()) == [0, 1]  # from below to above, in shares of the axes
    assert "difference to SoftMax | SoftMax (higher is better)" in label_of(figure)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gain", "lower", "color"),
    [(1.0, False, tables.BETTER), (-1.0, False, tables.WORSE), (-1.0, True, tables.BETTER)],
)
def test_a_star_is_blue_for_better_and_orange_for_worse(gain, lower, color):
    softmax = [80.0, 81.0, 82.0]
    cells = cells_with(
        deit_softmax=softmax,
        deit_multimax=[v + gain * (1 + 0.01 * s) for s, v in enumerate(softmax)],
        deit_topk=[v + (-1) ** s for s, v in enumerate(softmax)],
    )
    if lower:
        claim = study_of("table2").claims[0].model_copy(update={"column": MAIN, "lower": True})
        cells = replace(cells, study=small_study(claims=(claim,)))
    figure = tables.forest(cells)
    shown = rows(figure)
    *_, mean, text = shown["MultiMax, order 2 | MultiMax, order 2"]
    assert (to_hex(mean.get_color()), text) == (color, "n = 3 *")
    *_, mean, text = shown["top-k | SoftMax"]
    assert (mean.get_color(), text) == (tables.OPEN, "n = 3")
    assert ("lower is better" in label_of(figure)) == lower


def test_the_interval_of_two_seeds_may_go_beyond_the_picture_and_says_so():
    cells = cells_with(
        deit_softmax=[80.0, 80.0, 80.0], deit_multimax=[81.0, 82.0], deit_topk=[80.0, 81.0, 80.5]
    )
    axes = tables.forest(cells).axes[0]
    low, high = axes.get_xlim()
    half = 4.302653 * 0.5 / math.sqrt(3)
    assert low < 0.5 - half < 0 < 2.0 < high < 1.5 + 12.7062 * 0.5  # of two: 12.7 standard errors
    arrows = [(line.get_marker(), line.get_xdata()[0]) for line in axes.lines]
    assert [arrow for arrow in arrows if arrow[0] in ("<", ">")] == [("<", 0), (">", 1)]


@pytest.mark.slow
def test_only_what_can_be_compared_is_drawn(tmp_path):
    assert tables.save(cells_with(deit_softmax=[80.0, 81.0]), tmp_path) is None
    assert tables.save(cells_with(deit_multimax=[80.0, 81.0]), tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    cells = cells_with(deit_softmax=[80.0], deit_multimax=[81.0])
    path = tables.save(cells, tmp_path)
    assert path == tmp_path / "table2_small.png"
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    path.write_bytes(b"stale")
    (tmp_path / "table2_small_more.png").write_bytes(b"")
    (tmp_path / "table2_smaller.png").write_bytes(b"")
    assert tables.drawn_for(cells, tmp_path) == [path, tmp_path / "table2_small_more.png"]
    assert path.read_bytes() == first


def test_differences_of_very_different_sizes_share_an_axis():
    cells = cells_with(
        deit_softmax=[80.0, 82.0], deit_multimax=[80.5, 82.2], deit_topk=[-4000.0, -4100.0]
    )
    figure = tables.forest(cells)
    axes = figure.axes[0]
    assert axes.get_xscale() == "symlog"
    # Half a point and four thousand are both to be seen.
    width = axes.get_window_extent().width
    place = {x: axes.transData.transform((x, 0))[0] for x in (0.0, 0.5, -4000.0)}
    assert place[0.5] - place[0.0] > 0.01 * width
    assert place[0.0] - place[-4000.0] > 0.2 * width
    assert "logarithmic beyond" in label_of(figure)
    near = tables.forest(cells_with(deit_softmax=[80.0, 82.0], deit_multimax=[80.5, 82.2]))
    assert near.axes[0].get_xscale() == "linear"
    assert "logarithmic" not in label_of(near)
