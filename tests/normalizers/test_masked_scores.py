"""Scores that come already masked: with -inf, or with a fill that a modulator could lift."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import multimax
from multimax import MultiMax, SoftMax, build_normalizer, output_loss, use_backend
from multimax.attention import attention
from multimax.functional import MASK_FLOOR

BACKENDS = ["auto", "eager"]
FILLS = [-math.inf, -1e4, -1e9, "min"]


def filled(scores, mask, fill):
    fill = torch.finfo(scores.dtype).min if fill == "min" else fill
    return scores.masked_fill(~mask, fill)


def scores_and_mask(dtype=torch.float64):
    scores = 3 * torch.randn(4, 2, 7, 9, dtype=torch.float64)
    mask = torch.rand(4, 1, 7, 9) < 0.7
    mask[..., 0] = True
    return scores.to(dtype), mask.expand(4, 2, 7, 9)


def result(normalizer, scores, mask=None, backend="auto"):
    """Probabilities, and gradients of scores and scalars for a fixed upstream gradient."""
    scores = scores.clone().requires_grad_()
    upstream = torch.arange(scores.numel(), dtype=scores.dtype).reshape(scores.shape).sin()
    with use_backend(backend):
        p = normalizer(scores, mask=mask)
    wanted = [scores, *normalizer.parameters()]
    return p.detach(), *torch.autograd.grad((p * upstream).sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("options", [{}, {"order": 1}, {"order": 3}, {"affine": True}])
def test_a_fill_is_the_mask_for_multimax(options, fill, backend):
    for seed in range(20):
        torch.manual_seed(seed)
        module = MultiMax(**options).double()
        with torch.no_grad():
            for parameter in (module.ts, module.ranges):
                parameter.mul_(20)  # strong enough to lift
        scores, mask = scores_and_mask()
        got = result(module, filled(scores, mask, fill), None, backend)
        expected = result(module, scores, mask, backend)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert (got[0][~mask] == 0).all()
        assert (got[1][~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_is_the_mask_for_every_normalizer(normalizer, backend):
    normalizer = normalizer.double()
    scores, mask = scores_and_mask()
    got = result(normalizer, filled(scores, mask, -math.inf), None, backend)
    expected = result(normalizer, scores, mask, backend)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (got[0][~mask] == 0).all()


@pytest.mark.parametrize("scale", [0.0, -2.0, 0.5])
@pytest.mark.parametrize("fill", FILLS)
def test_a_fill_is_masked_whatever_the_learned_scale(scale, fill):
    module = MultiMax(affine=True).double()
    with torch.no_grad():
        module.scale.fill_(scale)
        module.ts.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    scores, mask = scores_and_mask()
    expected = result(module, scores, mask, "eager")
    for backend in BACKENDS:
        got = result(module, filled(scores, mask, fill), None, backend)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    log_probabilities = module.log_probabilities(filled(scores, mask, fill))
    torch.testing.assert_close(log_probabilities.exp(), expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_row_of_minus_infinity_is_zeros(normalizer, backend, with_mask):
    scores, mask = scores_and_mask(torch.float32)
    scores[0, 0, :3] = -math.inf
    mask = mask.clone() if with_mask else None
    for got in result(normalizer.float(), scores, mask, backend):
        assert got is None or torch.isfinite(got).all()
    p, gradient, *_ = result(normalizer, scores, mask, backend)
    assert (p[0, 0, :3] == 0).all()
    assert (gradient[0, 0, :3] == 0).all()
    if normalizer.sums_to_one:
        assert (p[1].sum(-1) > 0.99).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_agree_with_modules(backend):
    row = torch.full((2, 5), -math.inf)
    ts, ranges = torch.tensor([0.5, -0.5, 0.3, 0.2]), torch.zeros(4)
    with use_backend(backend):
        for p in (
            multimax.softmax(row), multimax.softmax(row, temperature=torch.tensor(2.0)),
            multimax.topk(row, 2), multimax.sparsemax(row), multimax.entmax15(row),
            multimax.entmax(row, 1.2), multimax.entmax(row, 1.0), multimax.evsoftmax(row),
            multimax.multimax(row, ts, ranges),
        ):  # fmt: skip
            assert (p == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fill", FILLS)
def test_every_dtype_knows_the_fills(dtype, fill):
    module = MultiMax()
    with torch.no_grad():
        module.ts.copy_(torch.tensor([-1.0, 0.5, 1.0, 1.0]))
    scores, mask = scores_and_mask(dtype)
    fill = max(-1e4, fill) if dtype == torch.float16 and fill in (-1e9,) else fill
    p = module(filled(scores, mask, fill))
    assert (p[~mask] == 0).all()
    torch.testing.assert_close(p, module(scores, mask=mask))


def test_softmax_still_ignores_a_shift():
    scores = torch.randn(3, 6, dtype=torch.float64)
    for backend in BACKENDS:
        with use_backend(backend):
            shifted = SoftMax()(scores + 2 * MASK_FLOOR)
        torch.testing.assert_close(shifted, torch.softmax(scores, -1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_agrees_where_scores_pass_the_floor(backend):
    module = MultiMax().double()
    query = torch.tensor([[[[1.0]]]], dtype=torch.float64)
    key = torch.tensor([[[[1.0], [2.0], [-2e4]]]], dtype=torch.float64)
    value = torch.eye(3, dtype=torch.float64)[None, None]
    with torch.no_grad():
        module.ts.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))  # lifts what is far below
    out = attention(query, key, value, module, scale=1.0, backend=backend)[0, 0, 0]
    expected = module(torch.tensor([1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(out, torch.cat([expected, torch.zeros(1, dtype=torch.float64)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("learned", [0.5, -0.5])
@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize(
    ("low", "added", "place"),
    [(-15e3, None, "after"), (-15e3, 4e3, "after"), (-8e3, -7e3, "before")],
)
def test_attention_masks_what_comes_in_below_the_floor(
    backend, order, learned, scale, low, added, place
):
    """That is the score, with a bias if it is added before: a learned scale could lift it."""
    module = MultiMax(order, affine=True).double()
    with torch.no_grad():
        module.scale.fill_(learned)
        module.ts[-2] = 0.7  # lifts what is far below
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    scores = torch.tensor([1.0, 2.0, low], dtype=torch.float64)
    value = torch.eye(3, dtype=torch.float64)[None, None]
    bias = None if added is None else torch.tensor([0.3, -0.2, added], dtype=torch.float64)
    key = (scores / scale).reshape(1, 1, 3, 1).requires_grad_()
    options = dict(scale=scale, bias=bias, bias_place=place, backend=backend)
    out = attention(query, key, value, module, **options).flatten()
    x, kept = scores[:2], 0.0 if bias is None else bias[:2]
    y = module.modulate(x + kept) if place == "before" else module.modulate(x) + kept
    torch.testing.assert_close(out[:2], torch.softmax(y, -1))
    assert out[2] == 0
    (gradient,) = torch.autograd.grad(out[0], key)
    assert gradient[..., 2, :] == 0
    assert (gradient[..., :2, :] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("scale", [0.5, -2.0])
def test_a_filled_class_has_no_share_of_the_loss(scale, fill, backend):
    module = MultiMax(affine=True).double()
    with torch.no_grad():
        module.scale.fill_(scale)
        module.ts.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    scores, target = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    mask = (torch.arange(6) != 3).expand(4, 6)
    x = filled(scores, mask, fill).requires_grad_()
    with use_backend(backend):
        loss = output_loss(module, x, target)
    (gradient,) = torch.autograd.grad(loss, x)
    y = module.modulate(scores).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(loss, cross_entropy(y, target))
    assert (gradient[:, 3] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["softmax", "multimax"])
def test_forbidden_classes_have_a_finite_loss(name, backend):
    torch.manual_seed(1)
    module = build_normalizer(name).double()
    scores = torch.randn(6, 8, dtype=torch.float64)
    forbidden = torch.zeros(6, 8, dtype=torch.bool)
    forbidden[:, 2] = forbidden[3, 5] = True
    target = torch.tensor([0, 1, 3, 4, 6, 7])
    x = scores.masked_fill(forbidden, -math.inf).requires_grad_()
    with use_backend(backend):
        loss = output_loss(module, x, target)
    (gradient,) = torch.autograd.grad(loss, x)
    modulated = module.modulate(scores).masked_fill(forbidden, -math.inf).requires_grad_()
    torch.testing.assert_close(loss, cross_entropy(modulated, target))
    assert torch.isfinite(gradient).all()
    assert (gradient[forbidden] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_hidden(normalizer, backend):
    scores = torch.randn(3, 4, 5)
    scores[1, 2, 3] = math.nan
    with use_backend(backend), torch.no_grad():
        p = normalizer.float()(scores)
    assert p[1, 2].isnan().any()
    assert torch.isfinite(p[0]).all()


def test_the_floor_is_one_number():
    from importlib import resources

    source = (resources.files("multimax.kernels") / "csrc" / "modulator.h").read_text()
    assert f"#define MASK_FLOOR ((real) - {-MASK_FLOOR:.0f})" in source
    assert torch.tensor(-1e4, dtype=torch.bfloat16) <= MASK_FLOOR
