"""The counts of both propositions, against loops over single rows (proofs: `test_claims`)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import propositions
from experiments.propositions import (
    COUNTEREXAMPLE,
    SCALARS_OF_COUNTEREXAMPLE,
    T_B,
    T_D,
    THRESHOLDS,
    Rows,
    first_order,
    improved,
    loses_mass,
    proposition1,
    quantiles,
    random_scores,
    region,
)
from multimax import softmax, sparsemax

INF = math.inf
ROWS = [
    [3.0, 2.5, 2.0, -1.0],
    [0.1, 0.0, 4.0, -2.0],
    [1.0, -3.0, 2.0, -INF],
    [1.0, 0.0, -INF, -INF],
]
scores = st.lists(st.floats(-20, 20), min_size=2, max_size=12)


def rows(*lists):
    return torch.tensor(lists, dtype=torch.float64)


def by_hand(row, p):
    """S and M of one row, None where they are not defined."""
    kept = [(x, q) for x, q in zip(row, p, strict=True) if x > -INF]
    exponentials = [math.exp(x) for x, _ in kept]
    mean, s = sum(x for x, _ in kept) / len(kept), min(exponentials) / sum(exponentials)
    small = [math.exp(-q / s) for x, q in kept if x < mean]
    largest = max(x for x, _ in kept)
    relevant = [max(p) - q for x, q in kept if mean < x < largest]
    return (
        sum(small) / len(small) if small else None,
        1 - sum(relevant) / len(relevant) if relevant else None,
    )


def test_improvements_are_counted_row_by_row():
    x = rows(*ROWS)
    for normalize in (sparsemax, lambda x: softmax(x, temperature=3.0), lambda x: softmax(x)):
        expected = dict.fromkeys(("sparser", "more_multi_modal", "both", "rows", "undefined"), 0)
        for row, p, q in zip(ROWS, normalize(x).tolist(), softmax(x).tolist(), strict=True):
            (s, m), (s_before, m_before) = by_hand(row, p), by_hand(row, q)
            if s is None or m is None:
                expected["undefined"] += 1
                continue
            expected["rows"] += 1
            expected["sparser"] += s > s_before
            expected["more_multi_modal"] += m > m_before
            expected["both"] += s > s_before and m > m_before
        of = Rows(x)
        found = improved(of, normalize(x), of.measured(softmax(x)))
        assert found._asdict() == expected
    assert found[:4] == (0, 0, 0, 2)  # SoftMax itself improves nothing


def test_the_counterexample_gains():
    x = rows(COUNTEREXAMPLE)
    t_b, t_d, b, d = SCALARS_OF_COUNTEREXAMPLE.values()
    pressed = [10 + (t_d - 1) * (10 - d), 9 + (t_d - 1) * (9 - d), (1 - t_b) * b]
    expected = math.exp(pressed[2]) / sum(math.exp(y) for y in pressed)
    p = first_order(x, **SCALARS_OF_COUNTEREXAMPLE)[0]
    assert p[2].item() == pytest.approx(expected, rel=1e-12)
    assert p[2] > 50 * softmax(x)[0, 2]
    assert region(x, b, d, [t_b], [t_d])[0][0][:3] == (0, 1, 0)
    assert not loses_mass(x, **SCALARS_OF_COUNTEREXAMPLE)[0, 2]
    # The bound that is enough: (t_b - 1) (b - 0) >= (1 - t_d) (10 - d).
    assert region(x, b, d, [1 + (1 - t_d) * (10 - d) / b], [t_d])[0][0].both == 1


@pytest.mark.slow
@given(scores, st.floats(1, 9), st.floats(0, 1), st.floats(-20, 20), st.floats(-20, 20))
def test_who_loses_mass(row, t_b, t_d, b, d):
    x = rows(row)
    before, after = softmax(x).log(), first_order(x, t_b, t_d, b, d).log()
    told = loses_mass(x, t_b, t_d, b, d)
    clear = (after - before).abs() > 1e-9
    assert torch.equal(told[clear], (after < before)[clear])
    if (t_b - 1) * (b - min(row)) >= (1 - t_d) * max(max(row) - d, 0) and b > min(row):
        assert (after <= before + 1e-9)[x == min(row)].all()


def test_proposition_1_is_counted(monkeypatch):
    found = proposition1(rows(*ROWS))
    assert [of["threshold"] for of in found] == list(THRESHOLDS)
    assert found[0] == {
        "threshold": 0.0,
        "rows_with_s": 4,
        "rows_with_m": 2,
        "rows_where_s_rises": 0,
        "rows_where_m_falls": 0,
    }
    assert found[-1]["rows_with_m"] == 0
    upside_down = lambda x, temperature: softmax(x, temperature=1 / temperature)  # noqa: E731
    monkeypatch.setattr(propositions, "softmax", upside_down)
    found = proposition1(rows(*ROWS))
    assert (found[0]["rows_where_s_rises"], found[0]["rows_where_m_falls"]) == (4, 2)


def test_the_region_goes_over_t_b_and_t_d():
    x = torch.from_numpy(np.random.default_rng(1).normal(0, 2, (30, 9)))
    found = region(x, 0.0, 1.0)
    assert (len(found), {len(line) for line in found}) == (len(T_B), {len(T_D)})
    rows_of = Rows(x)
    p = first_order(x, T_B[3], T_D[5], 0.0, 1.0)
    assert found[3][5] == improved(rows_of, p, rows_of.measured(softmax(x)))
    assert 0 < found[3][5].both < 30


def test_thresholds_go_from_the_mean_to_the_largest():
    x = rows([4.0, 1.0, 1.0, -INF])
    for share, expected in ((0.0, 2.0), (0.5, 3.0), (0.9, 3.8)):
        assert Rows(x, share).threshold.item() == pytest.approx(expected)


def test_quantiles_are_of_what_is_not_masked():
    assert quantiles(rows([0.0, 1.0, 2.0], [3.0, 4.0, -INF]), (0.25, 0.5)) == [1.0, 2.0]


def test_random_scores_are_always_the_same():
    one, other = random_scores(), random_scores()
    assert all(torch.equal(one[name], other[name]) for name in one)
    shapes = {name: tuple(x.shape) for name, x in one.items()}
    assert shapes["uniform in [-5, 5], 49 keys"] == (1000, 49)
    assert len(shapes) == 12
    assert one["normal, deviation 3, 196 keys"].std() == pytest.approx(3, rel=0.01)
