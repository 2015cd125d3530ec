"""The table of the propositions, against single rows and the formula of Wilson's interval."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import propositions_table
from experiments.propositions import QUANTILES, quantiles
from experiments.propositions_table import markdown, outcome, share, smallest_counterexample

B, D = 0.0, 1.0
BETTER = [3.0, 2.5, 0.3, -2.0]
BELOW_B = [-1.0, -1.5, -2.0, -6.0]  # SoftMax of temperature 1/2: M falls
ABOVE_D = [9.0, 8.0, 6.0, 2.0]  # of temperature 2: S falls
BETWEEN = [0.9, 0.8, 0.5, 0.1]  # stays as it is
WITHOUT_M = [3.0, 3.0, 0.0, 0.0]


def rows(*lists):
    return torch.tensor(lists, dtype=torch.float64)


def by_hand(row, b, d):
    """S and M with SoftMax and with MultiMax of t_b = 2, t_d = 0.5."""
    sigma = [b - 2 * (b - x) if x < b else d + 0.5 * (x - d) if x > d else x for x in row]
    mean, found = sum(row) / len(row), []
    s = min(math.exp(x) for x in row) / sum(math.exp(x) for x in row)
    for scores in (row, sigma):
        total = sum(math.exp(x) for x in scores)
        p = [math.exp(x) / total for x in scores]
        small = [math.exp(-q / s) for x, q in zip(row, p, strict=True) if x < mean]
        large = [max(p) - q for x, q in zip(row, p, strict=True) if mean < x < max(row)]
        found.append((sum(small) / len(small), 1 - sum(large) / len(large)))
    return found


def test_the_outcome_of_rows_of_each_kind():
    found = outcome(rows(BETTER, BELOW_B, ABOVE_D, BETWEEN, WITHOUT_M), B, D)
    assert found.both.tolist() == [True, False, False, False, False]
    assert found.worse.tolist() == [False, True, True, False, False]
    assert found.defined.tolist() == [True, True, True, True, False]
    (s, m), (s_after, m_after) = by_hand(BELOW_B, B, D)
    assert (s_after > s, m_after < m) == (True, True)
    (s, m), (s_after, m_after) = by_hand(ABOVE_D, B, D)
    assert (s_after < s, m_after > m) == (True, True)


@given(st.lists(st.floats(-8, 8), min_size=4, max_size=7, unique=True))
def test_outcomes_are_those_of_single_rows(row):
    found = outcome(rows(row), B, D)
    if found.defined.item():
        (s, m), (s_after, m_after) = by_hand(row, B, D)
        if abs(s_after - s) > 1e-9 and abs(m_after - m) > 1e-9:
            assert found.both.item() == (s_after > s and m_after > m)
            assert found.worse.item() == (s_after < s or m_after < m)


@pytest.mark.parametrize(("successes", "trials"), [(0, 40), (7, 40), (40, 40)])
def test_shares_have_wilson_intervals(successes, trials):
    z, p = NormalDist().inv_cdf(0.975), successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    low, high = 100 * max(centre - half, 0), 100 * min(centre + half, 1)
    assert share(successes, trials) == f"{100 * p:.1f} [{low:.1f}, {high:.1f}]"


def test_without_rows_a_share_is_empty():
    assert share(0, 0) == ""


def test_the_smallest_counterexample(monkeypatch):
    monkeypatch.setattr(propositions_table, "quantiles", lambda x, of: [B, D])
    long = rows([-1.0, -1.1, -1.2, -1.3, -1.5])  # of less spread, but of more scores
    found = smallest_counterexample({"long": long, "short": rows(BETTER, ABOVE_D, BELOW_B)})
    assert found == {"scores": BELOW_B, "b": B, "d": D, "t_b": 2.0, "t_d": 0.5}
    assert smallest_counterexample({"good": rows(BETTER, BETWEEN)}) is None


def test_the_table_counts_the_rows_of_each_kind():
    x = rows(BETTER, BELOW_B, ABOVE_D, BETWEEN, WITHOUT_M)
    head, _, line, *rest = markdown({}, {"planted": x}).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
    assert (cells["scores"], cells["rows"], cells["with S and M"]) == ("planted", "5", "4")
    assert cells["1: S falls, %"] == share(5, 5)
    assert cells["1: M rises, %"] == share(4, 4)
    for b, d in QUANTILES:
        found = outcome(x, *quantiles(x, (b, d)))
        worse = 25.0 * int(found.worse.sum())
        expected = f"{share(int(found.both.sum()), 4)}, worse {worse:.1f}"
        assert cells[f"2: b, d at {b:g}, {d:g}; both better, %"] == expected
    assert not any("the shortest of the random rows" in text for text in rest)
    assert "the shortest of the random rows" in markdown({"planted": x}, {})


def test_a_contradiction_of_proposition_1_is_counted(monkeypatch):
    counted = {"rows_with_s": 4, "rows_with_m": 2, "rows_where_s_rises": 3, "rows_where_m_falls": 1}
    monkeypatch.setattr(propositions_table, "proposition1", lambda x: [counted])
    _, _, line, *_ = markdown({}, {"planted": rows(BETTER)}).splitlines()
    assert line.split(" | ")[3:5] == [share(1, 4), share(1, 2)]
