"""MultiMax of scores that are scaled after the modulation: c sigma(x / c), c = 1 / sqrt(d)."""

import math

import pytest
import torch
from kernels_here import needs_kernels

from multimax import MultiMax, modulator_health
from multimax.attention import attention
from multimax.normalizers import build_for_attention

HEAD_DIM = 6
SCALE = HEAD_DIM**-0.5


def build(order=2, affine=False, score_scale=SCALE):
    """With scalars away from the start, in float64."""
    module = MultiMax(order, affine=affine, score_scale=score_scale).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def sigma(x, module):
    """The modulator as the paper writes it, with the scalars as they are."""
    if module.affine:
        x = module.scale * x + module.shift
    total = x
    for n in range(1, module.order + 1):
        below = (module.b[n - 1] - x).clamp_min(0) ** n
        above = (x - module.d[n - 1]).clamp_min(0) ** n
        total = total + (1 - module.t_b[n - 1]) * below + (module.t_d[n - 1] - 1) * above
    return total


def query_key_value():
    return [
        torch.randn(2, 3, tokens, HEAD_DIM, dtype=torch.float64, requires_grad=True)
        for tokens in (5, 7, 7)
    ]


def scalars_and(tensors, module):
    return [*tensors, *module.parameters()]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", ["eager", pytest.param("auto", marks=needs_kernels)])
def test_attention_is_softmax_of_the_scaled_modulated_dot_products(order, affine, backend):
    """The values, and the gradients of query, key, value and each learned scalar."""
    module, tensors = build(order, affine), query_key_value()
    query, key, value = tensors
    mask = torch.rand(5, 7) < 0.7
    mask[:, 0] = True
    got = attention(query, key, value, module, mask, backend=backend)
    scores = sigma(query @ key.transpose(-2, -1), module) / math.sqrt(HEAD_DIM)
    expected = torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ value
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    weights = torch.randn_like(got)
    inputs = scalars_and(tensors, module)
    gradients = torch.autograd.grad((got * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_gradients_are_those_of_finite_differences(order, affine):
    module = build(order, affine)
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def probabilities(scores, *scalars):
        state = dict(zip(names, scalars, strict=True))
        return torch.func.functional_call(module, state, (scores,))

    assert torch.autograd.gradcheck(probabilities, scalars_and([scores], module))


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradients_of_the_scalars_follow_the_chain_rule(order):
    """ts_n counts as c^(1 - n) ts_n and a range as c times itself, in the units of the scores."""
    module, plain = build(order), build(order, score_scale=1.0)
    powers = SCALE ** -torch.arange(order, dtype=torch.float64).repeat_interleave(2)
    with torch.no_grad():
        plain.ts.copy_(powers * module.ts)
        plain.ranges.copy_(SCALE * module.ranges)
    scores = torch.randn(4, 6, dtype=torch.float64)
    weights = torch.randn_like(scores)
    for normalizer in (module, plain):
        (normalizer(scores) * weights).sum().backward()
    torch.testing.assert_close(module(scores), plain(scores))
    torch.testing.assert_close(module.ts.grad, powers * plain.ts.grad)
    torch.testing.assert_close(module.ranges.grad, SCALE * plain.ranges.grad)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_derivative_and_health(order, affine):
    module = build(order, affine)
    scores = torch.randn(200, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(sigma(scores / SCALE, module).sum() * SCALE, scores)
    torch.testing.assert_close(module.derivative(scores), slopes)
    health = modulator_health(module, scores)
    assert health["decreasing_share"] == (slopes < 0).double().mean().item()
    names = [f"{name}{n}" for n in range(1, order + 1) for name in ("t_b", "t_d", "b", "d")]
    assert set(health) - {"decreasing_share", "scale", "shift"} == set(names)
    assert health[f"b{order}"] == module.ranges[-2].item()  # as it is learned


def test_without_it_the_kernels_get_the_scalars_as_they_are():
    module = build(score_scale=1.0)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    expected = torch.cat([one, zero, module.ts, module.ranges])
    assert torch.equal(module.coefficients(torch.float64, module.ts.device), expected)
    assert "score_scale" not in repr(module)
    assert "score_scale=0.4082" in repr(build())


def test_half_precision_scalars_are_scaled_in_single():
    module = build().bfloat16()
    exact = MultiMax(score_scale=SCALE).double()
    exact.load_state_dict(module.state_dict())
    got = module.coefficients(torch.float32, module.ts.device)
    expected = exact.coefficients(torch.float64, exact.ts.device)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)


def test_attention_layers_know_their_head_dim():
    module = build_for_attention({"name": "multimax", "before_scale": True}, 4, 64)
    assert module.score_scale == 0.125
    for options in ({}, {"before_scale": False}):
        assert build_for_attention({"name": "multimax", **options}, 4, 64).score_scale == 1
    with pytest.raises(ValueError, match="before_scale is for multimax, not for softmax"):
        build_for_attention({"name": "softmax", "before_scale": True}, 4, 64)


@pytest.mark.parametrize("score_scale", [0, -1.0, math.inf, math.nan])
def test_a_scale_is_a_positive_number(score_scale):
    with pytest.raises(ValueError, match="score_scale must be a positive number"):
        MultiMax(score_scale=score_scale)
