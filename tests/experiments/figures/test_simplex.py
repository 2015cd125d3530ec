"""The curves on the simplex, against closed forms, and what the caption says of them."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.figures import simplex
from experiments.figures.simplex import ALPHAS, EXAMPLES, RANGES, TEMPERATURES, region, wanted


def softmax(*scores):
    exponentials = [math.exp(score) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def points(scores):
    """Points by the beginnings of labels."""
    return {curve.label: curve.points for curve in simplex.curves(scores)}


def starting(found, label):
    (points,) = (points for name, points in found.items() if name.startswith(label))
    return points


def distance(points, ring):
    """The largest difference of a probability, of each point."""
    return np.abs(points - ring).max(-1)


@pytest.mark.slow
@pytest.mark.parametrize("scores", [scores for scores, *_ in EXAMPLES])
def test_every_point_is_a_distribution(scores):
    for label, found in points(scores).items():
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-12, err_msg=label)
        assert found.min() >= 0
        assert found.shape[-1] == 3
    np.testing.assert_allclose(region(scores).sum(-1), 1, atol=1e-12)


def test_curves_are_closed_forms():
    found = points((2.0, 1.8, 0.0))
    for t, p in zip(TEMPERATURES, starting(found, "SoftMax, temperature from"), strict=True):
        assert p == pytest.approx(softmax(2 / t, 1.8 / t, 0))
    assert starting(found, "SoftMax, temperature 0.5")[2] == pytest.approx(softmax(1, 0.9, 0))
    assert starting(found, "top-k").tolist() == [
        pytest.approx([1, 0, 0]),
        pytest.approx([*softmax(2, 1.8), 0]),
    ]
    floor = starting(found, "evidential")
    assert floor[0] == pytest.approx(softmax(2, 1.8, 0))
    assert floor[-1] == pytest.approx([*softmax(2, 1.8), 0])
    entmax = starting(found, "entmax")
    assert entmax[0] == pytest.approx(softmax(2, 1.8, 0))
    assert entmax[np.abs(ALPHAS - 2).argmin()] == pytest.approx([0.6, 0.4, 0], abs=1e-9)
    assert starting(found, "sparsemax (")[0] == pytest.approx([0.6, 0.4, 0])
    for t, p in zip(TEMPERATURES, starting(found, "sparsemax of"), strict=True):
        if 0.2 < t < 3.8:  # two entries: half of 1 plus, minus, half of what they differ
            assert p == pytest.approx([0.5 + 0.1 / t, 0.5 - 0.1 / t, 0])


def test_multimax_goes_from_one_softmax_to_another():
    found = points((2.0, 1.8, 0.0))
    ranges = starting(found, "MultiMax, b = d")
    assert RANGES[0] < 0 < 2 < RANGES[-1]
    assert ranges[0] == pytest.approx(softmax(2 / 4, 1.8 / 4, 0))  # t_d = 1/4: temperature 4
    assert ranges[-1] == pytest.approx(softmax(4 * 2, 4 * 1.8, 0))  # t_b = 4: temperature 1/4
    star = softmax(1 + 0.25 * 1, 1 + 0.25 * 0.8, 1 - 4 * 1)
    assert starting(found, "MultiMax, $t_b$ = 4") == pytest.approx(np.array([star]))


def test_the_region_has_the_corners_of_t_b_and_t_d():
    border = region((2.0, 1.8, 0.0), steps=5)
    assert border[0] == pytest.approx(softmax(2, 1.8, 0))
    assert border[4] == pytest.approx(softmax(2, 1.8, -3))
    assert border[9] == pytest.approx(softmax(1.25, 1.2, -3))
    assert border[14] == pytest.approx(softmax(1.25, 1.2, 0))
    assert border[19] == pytest.approx(border[0])
    assert len(border) == 20


def test_rings_are_even():
    assert wanted(2).tolist() == [0.5, 0.5, 0]
    assert wanted(1).tolist() == [1, 0, 0]
    assert wanted(3) == pytest.approx([1 / 3] * 3)
    assert [sum(x > 1 for x in scores) for scores, _, relevant in EXAMPLES] == [
        relevant for *_, relevant in EXAMPLES
    ]


@pytest.mark.slow
def test_what_the_caption_says():
    rings = [(points(scores), wanted(relevant)) for scores, _, relevant in EXAMPLES]

    def distances(label):
        """(panels, steps)"""
        return np.stack([distance(starting(found, label), ring) for found, ring in rings])

    assert distances("MultiMax, $t_b$ = 4").max() < 0.07
    of_softmax = distances("SoftMax, temperature from")
    assert of_softmax[:2].min(-1) == pytest.approx([0.08, 0.16], abs=0.01)
    for label in ("SoftMax, temperature from", "sparsemax of", "entmax", "evidential", "top-k"):
        assert distances(label).max(0).min() > 0.13, label  # one parameter for all panels
    found, _ = rings[1]
    sparse = starting(found, "sparsemax of")
    assert (sparse[sparse[:, 2] == 0][:, 0] - 0.5).min() > 0.09


@pytest.mark.slow
def test_it_is_drawn(tmp_path):
    open_before = plt.get_fignums()
    png, pdf = simplex.draw(tmp_path)
    assert (png.name, pdf.name) == ("simplex.png", "simplex.pdf")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert plt.get_fignums() == open_before


@pytest.mark.slow
def test_every_panel_shows_its_curves_and_names_its_corners(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(simplex, "save", lambda figure, *_: figures.append(figure) or [])
    simplex.draw(tmp_path)
    (figure,) = figures
    for axes, (scores, title, relevant) in zip(figure.axes, EXAMPLES, strict=True):
        assert title in axes.get_title()
        labels = [axis.get_label_text() for axis in (axes.taxis, axes.laxis, axes.raxis)]
        assert labels == ["entry 1", "entry 2", "entry 3"]
        curves = list(points(scores).values())
        # After the line of equal shares and the centre. Entry 1 is at the top, 2 at the left.
        for line, shares in zip(axes.lines[2:], [*curves, wanted(relevant)[None]], strict=True):
            x, y = line.get_data()
            np.testing.assert_allclose(x, (shares[:, 2] - shares[:, 1]) / math.sqrt(3), atol=1e-12)
            np.testing.assert_allclose(y, shares[:, 0], atol=1e-12)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(curves) + 2
    plt.close(figure)
