"""Fronts, areas, interpolation and intervals, against brute force; and a planted advantage."""

import itertools
import math

import numpy as np
import pytest
import torch

from experiments import efficiency
from experiments.efficiency import area, best_at, front, interval, outcome, resampled
from experiments.pareto import FAMILIES, GRID, LEARNED, PATH, Family, Rows


@pytest.fixture
def points():
    """(20, 30) sparsities and multi-modalities on a coarse grid, so that some are tied."""
    generator = np.random.default_rng(1)
    return generator.integers(0, 12, (2, 20, 30)) / 11


def test_the_front_is_what_no_point_dominates(points):
    for s, m in zip(*points, strict=True):
        pairs = set(zip(s, m, strict=True))
        expected = [
            (x, y)
            for x, y in pairs
            if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in pairs)
        ]
        found = front(s, m)
        assert [(s[i], m[i]) for i in found] == sorted(expected)


def test_the_area_is_what_the_points_cover(points):
    # Every cell of the grid of possible values is covered or not.
    cells = (np.arange(11) + 0.5) / 11
    for s, m, found in zip(*points, area(*points), strict=True):
        covered = [
            any(x < u and y < v for u, v in zip(s, m, strict=True))
            for x, y in itertools.product(cells, cells)
        ]
        assert found == pytest.approx(sum(covered) / 121)


def test_best_at_interpolates_along_the_curve():
    s = np.array([[0.0, 0.4, 0.8], [0.8, 0.2, 0.6]])
    m = np.array([[1.0, 0.6, 0.5], [0.1, 0.9, 0.2]])
    # Of the first curve, a quarter of the way from the first to the second point. The second goes
    # up to 0.9 and back: at 0.5 its way there is at 0.5, and its way back at 0.375.
    assert best_at(np.array([0.1, 0.5]), s, m) == pytest.approx([0.9, 0.5])
    # A point that is sparser and more multi-modal counts for less sparsity too; beyond, none does.
    assert best_at(np.array([0.8, 0.1]), s, m) == pytest.approx([0.5, 0.9])
    assert np.isnan(best_at(np.array([0.81, 0.0]), s, m)).tolist() == [True, False]


def test_best_at_is_the_curve_in_the_limit():
    t = np.linspace(0, 1, 2001)
    s, m = t[None] ** 2, 1 - t[None] ** 3
    for wanted in (0.0, 0.1, 0.5, 0.99):
        assert best_at(np.array([wanted]), s, m)[0] == pytest.approx(1 - wanted**1.5, abs=1e-6)


def test_the_interval_of_a_mean_is_that_of_the_theory():
    values = np.random.default_rng(2).normal(size=500)
    weights = resampled(500)
    assert (weights.sum(1) == 500).all()
    assert (weights[0] == 1).all()
    found = interval(weights @ values / 500)
    error = 1.96 * values.std() / math.sqrt(500)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.1 * error)


def test_what_is_undefined_has_no_interval():
    assert interval(np.array([0.0, 1.0, math.nan])) is None


def family_of(s, m, parameters=None):
    """Of one layer, from (points, examples) values, a row each."""
    s, m = np.array(s, dtype=float), np.array(m, dtype=float)
    parameters = parameters or [{"p": float(i)} for i in range(len(s))]
    rows = np.ones((2, 1, s.shape[1]))
    return Family(parameters, np.stack([s, m])[:, None], rows, np.zeros(2, int))


def test_differences_are_paired_by_example():
    generator = np.random.default_rng(3)
    noise = generator.normal(size=400)
    curve = family_of([0 * noise, 1 + 0 * noise], [1 + noise, 0 * noise + noise])
    point = family_of([0.25 + 0 * noise], [0.75 + 0.1 + noise])
    found = interval(efficiency.difference(point, curve, resampled(400)))
    # The noise is common to both, so that nothing of it is left.
    assert found == pytest.approx((0.1, 0.1, 0.1))


@pytest.fixture(scope="module")
def families():
    """Of planted rows: two layers, 60 examples; scalars that flatten above 1 and steepen below."""
    generator = torch.Generator().manual_seed(4)
    learned = {"ts": [-3.0, -0.6], "ranges": [0.0, 0.5]}
    layers = [
        Rows(2 * torch.randn(60, 12, generator=generator).double(), np.arange(60), learned)
        for _ in range(2)
    ]
    return {name: family(layers) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def found(families):
    return outcome(families)


def comparison(found, multimax, against):
    (row,) = (
        row
        for row in found["comparisons"]
        if (row["multimax"], row["against"]) == (multimax, against)
    )
    return row


def at_same_sparsity(family, index, curve, once):
    """By numpy's own interpolation: sparsity falls and multi-modality rises with temperature."""
    s, m = (of[0, index] for of in family.means(once))
    curve_s, curve_m = (of[0, ::-1] for of in curve.means(once))
    assert (np.diff(curve_s) >= 0).all()
    return m - np.interp(s, curve_s, curve_m)


@pytest.mark.slow
def test_the_difference_of_the_learned_scalars(families, found):
    once = np.ones((1, 60))
    row = comparison(found, "learned", "SoftMax")
    expected = at_same_sparsity(families[PATH], LEARNED, families["SoftMax"], once)
    assert row["difference"]["value"] == pytest.approx(expected, abs=1e-5)
    parts = [
        at_same_sparsity(point, LEARNED, curve, once)
        for point, curve in zip(families[PATH].layers(), families["SoftMax"].layers(), strict=True)
    ]
    assert row["difference_by_layer"]["value"] == pytest.approx(np.mean(parts), abs=1e-5)
    for key in ("difference", "difference_by_layer"):
        of = row[key]
        assert 0 < of["low"] < of["value"] < of["high"]  # planted to be better
    assert row["examples"] == 60


def test_the_best_of_the_grid_is_chosen_on_other_examples(families, found):
    row = comparison(found, "best of the grid", "SoftMax")
    first, second = np.zeros((1, 60)), np.zeros((1, 60))
    first[0, ::2], second[0, 1::2] = 1, 1
    grid = families[GRID]
    gains = [
        at_same_sparsity(grid, i, families["SoftMax"], first) for i in range(len(grid.parameters))
    ]
    best = int(np.argmax(gains))
    assert {key: row[key] for key in grid.parameters[best]} == grid.parameters[best]
    expected = at_same_sparsity(grid, best, families["SoftMax"], second)
    assert row["difference"]["value"] == pytest.approx(expected, abs=1e-5)
    assert row["examples"] == 30


def test_over_softmax_of_temperature_one(families, found):
    once = np.ones((1, 60))
    row = comparison(found, "learned", "entmax")
    own = [of[0, LEARNED] for of in families[PATH].means(once)]
    base = [of[0, 80] for of in families["SoftMax"].means(once)]
    for key, one, other in zip(("sparsity", "multi_modality"), own, base, strict=True):
        assert row[key]["value"] == pytest.approx(one, abs=1e-5)
        assert row["over_softmax"][key]["value"] == pytest.approx(one - other, abs=2e-5)
    better = found["better_than_softmax_in_both"]
    grid = families[GRID]
    claimed = [i for i, p in enumerate(grid.parameters) if p["t_b"] > 1 and p["t_d"] < 1]
    s, m = (of[0] for of in grid.means(once))
    assert better == {
        "points": len(claimed),
        "better": sum(s[i] > base[0] and m[i] > base[1] for i in claimed),
    }


def test_areas_and_their_differences(families, found):
    once = np.ones((1, 60))
    areas = {name: area(*family.means(once))[0] for name, family in families.items()}
    for name, of in found["areas"].items():
        assert of["value"] == pytest.approx(areas[name], abs=1e-5)
        assert of["low"] < of["value"] < of["high"]
    for rival, of in found["area_differences"].items():
        assert of["value"] == pytest.approx(areas[GRID] - areas[rival], abs=2e-5)


def test_rows_and_named_points_are_counted(found):
    assert (found["examples"], found["rows"]) == (60, 120)
    assert found["rows_without_sparsity"] == 0
    named = [(p["normalizer"], p.get("alpha", p.get("temperature"))) for p in found["points"]]
    assert named[:3] == [("SoftMax", 1.0), ("entmax", 1.5), ("entmax", 2.0)]
    s = [p["sparsity"] for p in found["front"]]
    m = [p["multi_modality"] for p in found["front"]]
    assert s == sorted(s)
    assert m == sorted(m, reverse=True)
