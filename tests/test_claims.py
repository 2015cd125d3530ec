"""The paper's two claims on sparsity S and multi-modality M, tested instead of assumed."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multimax import (
    multi_modality,
    multimax,
    row_mean,
    softmax,
    softmax_reference,
    sparsity,
)

rows = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=12)


def measures(p, x, threshold, reference):
    return sparsity(p, x, threshold, reference).item(), multi_modality(p, x, threshold).item()


@pytest.mark.slow
@given(
    row=rows,
    threshold=st.floats(-6, 6),
    temperatures=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    reference=st.one_of(st.none(), st.floats(1e-4, 1)),
)
def test_claim_1_a_higher_temperature_raises_m_and_lowers_s(
    row, threshold, temperatures, reference
):
    """For every row, threshold and fixed reference: proof in `experiments/propositions.py`."""
    x = torch.tensor(row, dtype=torch.float64)
    s = softmax_reference(x) if reference is None else reference
    low, high = sorted(temperatures)
    s_low, m_low = measures(softmax(x, temperature=low), x, threshold, s)
    s_high, m_high = measures(softmax(x, temperature=high), x, threshold, s)
    assert not m_high < m_low - 1e-12  # NaN, without a relevant entry, is no counterexample
    assert not s_high > s_low + 1e-12


def test_claim_1_is_strict_on_an_ordinary_row():
    x = torch.tensor([3.0, 2.5, 1.0, -1.0, -2.0], dtype=torch.float64)
    threshold, s = row_mean(x), softmax_reference(x)
    results = [
        measures(softmax(x, temperature=t), x, threshold, s) for t in (0.25, 0.5, 1, 2, 4, 8)
    ]
    for (s_low, m_low), (s_high, m_high) in itertools.pairwise(results):
        assert m_high > m_low
        assert s_high < s_low


def test_claim_1_needs_a_reference_that_is_fixed():
    """With s from the row that is scored, a single irrelevant entry always scores exp(-1)."""
    x = torch.tensor([3.0, 2.5, -1.0], dtype=torch.float64)
    for temperature in (0.25, 1.0, 4.0):
        p = softmax(x, temperature=temperature)
        assert sparsity(p, x, 0.0, p.amin()).item() == pytest.approx(math.exp(-1))


def first_order(x, t_b, t_d, b, d):
    ts = torch.tensor([1 - t_b, t_d - 1], dtype=torch.float64)
    return multimax(x, ts, torch.tensor([b, d], dtype=torch.float64))


def test_claim_2_has_a_counterexample():
    """t_b > 1 and t_d < 1, but flattening the top gives more to the bottom than t_b takes away."""
    x, b, d = torch.tensor([10.0, 9.0, 0.0], dtype=torch.float64), 1.0, 5.0
    plain, p = softmax(x), first_order(x, 1.001, 0.1, b, d)
    z = math.exp(5.5) + math.exp(5.4) + math.exp(-0.001)
    assert p[2].item() == pytest.approx(math.exp(-0.001) / z, rel=1e-12)
    assert p[2] > 60 * plain[2]
    reference = softmax_reference(x)
    s_plain, m_plain = measures(plain, x, row_mean(x), reference)
    s, m = measures(p, x, row_mean(x), reference)
    assert s < s_plain
    assert m > m_plain


def test_claim_2_holds_where_the_bottom_is_pushed_down_enough():
    x = torch.tensor([10.0, 9.0, 0.0], dtype=torch.float64)
    reference = softmax_reference(x)
    s_plain, m_plain = measures(softmax(x), x, row_mean(x), reference)
    s, m = measures(first_order(x, 20.0, 0.1, 1.0, 5.0), x, row_mean(x), reference)
    assert s > s_plain
    assert m > m_plain


def test_claim_2_has_a_counterexample_for_m_too():
    """Pushing down a bottom that holds nearly all mass lifts the top, and its gaps with it."""
    x = torch.tensor([2.0, 1.9] + [0.0] * 1000, dtype=torch.float64)
    _, m_plain = measures(softmax(x), x, 1.8, softmax_reference(x))
    _, m = measures(first_order(x, 5.0, 0.9, 1.0, 1.8), x, 1.8, softmax_reference(x))
    assert m_plain == pytest.approx(1 - (math.exp(2) - math.exp(1.9)) / 1014.07, rel=1e-5)
    assert m < m_plain - 0.01


def test_claim_2_holds_in_a_region():
    """Let K = log(Z / Z') be what the modulation takes from the normalizer, with b <= d.

    An entry below b loses mass if and only if (t_b - 1)(b - x) > K; if all do, S (threshold b) is
    better. If (1 - t_d)(x_max - d) >= K the largest probability does not grow, and M (threshold d)
    is better. Both conditions are sufficient, and without them either can fail.
    """
    b, d = -0.5, 0.5
    x = 3 * torch.randn(400, 6, dtype=torch.float64)
    reference = softmax_reference(x)
    plain, counts = softmax(x), torch.zeros(4)
    for t_b in (1.001, 1.5, 4.0, 10.0):
        for t_d in (0.1, 0.5, 0.95):
            p = first_order(x, t_b, t_d, b, d)
            modulated = x - (t_b - 1) * torch.relu(b - x) - (1 - t_d) * torch.relu(x - d)
            k = (x.logsumexp(-1) - modulated.logsumexp(-1)).unsqueeze(-1)
            below, loses = x < b, (t_b - 1) * (b - x) > k
            assert torch.equal((p < plain)[below], loses[below])
            better_s = sparsity(p, x, b, reference) - sparsity(plain, x, b, reference)
            better_m = multi_modality(p, x, d) - multi_modality(plain, x, d)
            pushed = (loses | ~below).all(-1) & ~better_s.isnan()
            flattened = ((1 - t_d) * (x.amax(-1) - d) >= k.squeeze(-1)) & ~better_m.isnan()
            assert (better_s[pushed] > 0).all()
            assert (better_m[flattened] > 0).all()
            worse = better_s[~pushed] < 0, better_m[~flattened] < 0
            counts += torch.tensor([pushed.sum(), flattened.sum(), *(w.sum() for w in worse)])
    assert (counts > 20).all()  # each side of both conditions was met
