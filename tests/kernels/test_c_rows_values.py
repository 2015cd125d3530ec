"""The C kernels of normalizers where numbers end: NaN, infinities, extremes, what masks hide."""

import math

import pytest
import torch
from definition import (
    MODULATED,
    THRESHOLDS,
    assert_equal,
    assert_same_bits,
    build,
    normalized,
    random,
)
from kernels_here import needs_kernels

from multimax import MultiMax, SoftMax

pytestmark = needs_kernels


@pytest.fixture(params=[*MODULATED, *THRESHOLDS])
def module(request, _seed):
    return build(request.param)


@pytest.fixture(params=MODULATED)
def modulator(request, _seed):
    return build(request.param)


@pytest.fixture(params=["softmax", "softmax-cold", "softmax-learned", *THRESHOLDS])
def without_modulation(request, _seed):
    return build(request.param)


@pytest.fixture
def rows_and_mask(_seed):
    """Scores, dL/dp and a mask of which a row is all masked and one not at all."""
    mask = torch.rand(2, 3, 4, 7) < 0.6
    mask[0, 0, 0], mask[0, 0, 1] = False, True
    return random(2, 3, 4, 7, spread=2), random(2, 3, 4, 7), mask


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_a_masked_score_does_not_matter(module, rows_and_mask, garbage):
    scores, upstream, mask = rows_and_mask
    expected = normalized(module, scores, mask, upstream=upstream)
    found = normalized(module, scores.masked_fill(~mask, garbage), mask, upstream=upstream)
    assert_same_bits(found, expected)
    assert all((tensor[~mask] == 0).all() for tensor in found[:2])


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_a_masked_gradient_does_not_matter(modulator, rows_and_mask, garbage):
    """The entropy of the result, for one, has NaN at the zeros of a mask."""
    scores, upstream, mask = rows_and_mask
    expected = normalized(modulator, scores, mask, upstream=upstream)
    upstream = upstream.masked_fill(~mask, garbage)
    assert_equal(normalized(modulator, scores, mask, upstream=upstream), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_stays_nan_and_in_its_row(module, value, masked):
    scores, mask = random(5, 3000), torch.ones(5, 3000, dtype=torch.bool)
    if masked:
        mask = torch.rand(5, 3000) < 0.9
        mask[2, 77] = True
    expected = normalized(module, scores, mask)
    scores[2, 77] = value
    p, gradient, *_ = normalized(module, scores, mask if masked else None)
    assert p[2][mask[2]].isnan().all()
    assert (p[2][~mask[2]] == 0).all()
    assert (gradient[2][~mask[2]] == 0).all()
    others = torch.arange(5) != 2
    assert_same_bits([p[others], gradient[others]], [t[others] for t in expected[:2]])


def test_nothing_but_nan(module):
    p, _, *scalars = normalized(module, torch.full((2, 9), math.nan, dtype=torch.float64))
    assert p.isnan().all()
    assert all(gradient.isnan().all() for gradient in scalars)


def test_minus_infinity_gets_exactly_zero(without_modulation):
    scores = random(3, 9)
    without = normalized(without_modulation, scores[:, 1:].contiguous())[0]
    scores[:, 0] = -math.inf
    p, gradient, *_ = normalized(without_modulation, scores)
    assert (p[:, 0] == 0).all()
    assert (gradient[:, 0] == 0).all()
    assert_equal(p[:, 1:], without)


@pytest.mark.parametrize("largest", [1e4, 1e30])
@pytest.mark.parametrize("masked", [False, True])
def test_extreme_scores(module, largest, masked):
    rows = [[-1.0, 1, 0.5, 0], [1, 1, -1, 0], [0, 0, 0, 1], [-1, -1, -1, 0]]
    scores = largest * torch.tensor(rows)
    mask = torch.tensor([[True, True, False, True]]) if masked else None
    expected = normalized(module, scores.double(), mask, backend="eager")
    found = normalized(module, scores.double(), mask)
    assert_equal(found[:2], expected[:2])
    # For the scalars, squares of scores that tie cancel.
    assert_equal(found[2:], expected[2:], atol=1e-14 * largest**2)
    if largest == 1e4 or not isinstance(module, MultiMax) or module.order == 1:
        p = normalized(module.float(), scores, mask)[0]  # fp32 holds no square of 1e30
        torch.testing.assert_close(p.double(), expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "lowest", "most"), [(torch.float32, -87, 2.5), (torch.float64, -708, 4)]
)
def test_the_exponential(dtype, lowest, most):
    """p_1 / p_0 of a row (0, x) is exp(x), with the rounding of 1 / sum twice on top."""
    x = torch.linspace(lowest, 0, 200_001, dtype=dtype)
    p = SoftMax()(torch.stack([torch.zeros_like(x), x], -1)).double()
    error = p[:, 1] / p[:, 0] / x.double().exp() - 1
    assert error.abs().max() < most * torch.finfo(dtype).eps
    below = torch.tensor([0.0, 1.001 * lowest, 10 * lowest, torch.finfo(dtype).min], dtype=dtype)
    assert SoftMax()(below).tolist() == [1, 0, 0, 0]
