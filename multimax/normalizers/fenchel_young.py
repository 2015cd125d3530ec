"""The Fenchel-Young loss of entmax and its derivatives, row by row."""

from typing import Any

import torch
from torch import Tensor

from multimax.functional import function_transforms_active, to_compute_precision
from multimax.normalizers.entmax import entmax_of_excess
from multimax.normalizers.entmax_solver import NEAR_ONE, curvature


def fenchel_young_rows(
    excess: float | Tensor, scores: Tensor, target: Tensor, label_smoothing: float
) -> Tensor:
    """The Fenchel-Young loss of each row, `multimax.losses.fenchel_young_loss`.

    Args:
        excess: alpha - 1, >= 0; a tensor of one element gets a gradient.
        scores: (rows, C), real.
        target: (rows,) int64 class indices in [0, C), or (rows, C) probabilities.
        label_smoothing: in [0, 1).

    Returns:
        (rows,), fp32 or wider.
    """
    x = to_compute_precision(scores)
    if isinstance(excess, Tensor):
        excess = excess.reshape(1, 1).to(x.dtype)
    if target.is_floating_point():
        target = target.to(x.dtype)
        if label_smoothing:
            target = (1 - label_smoothing) * target + label_smoothing / x.size(-1)
    function = _FenchelYoungForward if function_transforms_active() else _FenchelYoung
    return function.apply(x, entmax_of_excess(x, excess), excess, target, label_smoothing)


class _FenchelYoung(torch.autograd.Function):
    """The loss of (rows, C) scores and their entmax `p`, which must be connected in the graph.

    `p` maximizes the part of the loss that depends on it, so its own gradient is zero, and the
    gradients by the scores and by alpha are the partial ones. They depend on `p`, through which
    the second derivatives flow. The only (rows, C) tensor that is kept is `p`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scores, p, excess, target, label_smoothing):
        # Differences to the maximum keep their digits; both p and y sum to one.
        scores = scores - scores.amax(-1, keepdim=True)
        expected = (p * scores.where(p > 0, 0.0)).sum(-1)
        observed = _expectation(scores, target, label_smoothing)
        entropy = _entropy(p, excess).sum(-1)
        entropy_target = _sum_over_target(_entropy, excess, target, label_smoothing, p)
        return (expected - observed + entropy - entropy_target).clamp_min(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, p, excess, target, ctx.label_smoothing = inputs
        saved = [p, target, *([excess] if isinstance(excess, Tensor) else [])]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_scores = grad_excess = None
        if ctx.needs_input_grad[0]:
            p, target, *_ = ctx.saved_tensors
            grad_scores = grad.unsqueeze(-1) * _minus_target(p, target, ctx.label_smoothing)
        if ctx.needs_input_grad[2]:
            grad_excess = (grad * _slope(ctx)).sum().reshape(1, 1)
        return grad_scores, None, grad_excess, None, None


class _FenchelYoungForward(_FenchelYoung):
    """With a forward derivative too, which torch.compile cannot trace."""

    @staticmethod
    def jvp(ctx, tangent, p_tangent, excess_tangent, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        p, target, *_ = ctx.saved_tensors
        result = torch.zeros_like(p[:, 0])
        if tangent is not None:
            result = (tangent * _minus_target(p, target, ctx.label_smoothing)).sum(-1)
        if excess_tangent is not None:
            result = result + (_slope(ctx) * excess_tangent).reshape(result.shape)
        return result


def _slope(ctx: Any) -> Tensor:
    """d loss / d excess of each row, where p is held."""
    p, target, excess = ctx.saved_tensors
    of_target = _sum_over_target(_entropy_slope, excess, target, ctx.label_smoothing, p)
    return _entropy_slope(p, excess).sum(-1) - of_target


def _expectation(values: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """The (rows,) mean of `values` (rows, C) under the target; 0 times -inf is 0."""
    if target.is_floating_point():
        return (target * values.where(target > 0, 0.0)).sum(-1)
    observed = values.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if not label_smoothing:
        return observed
    return (1 - label_smoothing) * observed + label_smoothing * values.mean(-1)


def _minus_target(p: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """`p - y` without building the one-hot y."""
    if target.is_floating_point():
        return p - target
    observed = target.unsqueeze(-1)
    residual = p.scatter_add(-1, observed, p.new_full(observed.shape, label_smoothing - 1))
    return residual - label_smoothing / p.size(-1) if label_smoothing else residual


def _sum_over_target(function, excess, target, label_smoothing, p) -> Tensor:
    """The sum of `function(y_i, excess)` over the classes: (rows,), or (1,) for class indices."""
    if target.is_floating_point():
        return function(target, excess).sum(-1)
    rest = label_smoothing / p.size(-1)
    values = function(p.new_tensor([[1 - label_smoothing + rest, rest]]), excess)
    return values[:, 0] + (p.size(-1) - 1) * values[:, 1]


def _entropy(p: Tensor, excess: float | Tensor) -> Tensor:
    """Each entry's part of the Tsallis entropy H; `expm1` keeps its digits for alpha near 1."""
    if not isinstance(excess, Tensor) and excess == 0:
        return torch.special.entr(p)
    log_p = p.where(p > 0, 1.0).log()
    alpha = 1 + excess
    if not isinstance(excess, Tensor):
        return -p * torch.expm1(excess * log_p) / (alpha * excess)
    near = excess < NEAR_ONE
    a = excess.where(~near, 1.0)
    far = -p * torch.expm1(a * log_p) / (alpha * a)
    return torch.where(near, -p * _growth(log_p, excess.where(near, 0.0)) / alpha, far)


def _growth(log_p: Tensor, excess: Tensor) -> Tensor:
    """`expm1(excess log_p) / excess`, which is log_p at excess 0."""
    y = excess * log_p
    tiny = y.abs() < 2**-18
    divisor = excess.where(excess > 0, 1.0)
    return torch.where(tiny, log_p * (1 + y / 2 + y * y / 6), torch.expm1(y) / divisor)


def _entropy_slope(p: Tensor, excess: Tensor) -> Tensor:
    """d `_entropy` / d excess."""
    log_p = p.where(p > 0, 1.0).log()
    near = excess < NEAR_ONE
    a = excess.where(~near, 1.0)
    alpha = 1 + a
    power_slope = -p * log_p * torch.exp(a * log_p)  # d(-p^alpha) / d alpha
    far = (power_slope - (2 * alpha - 1) * _entropy(p, a)) / (alpha * a)
    # The same without the terms in 1 / excess, which cancel.
    a = excess.where(near, 0.0)
    alpha = 1 + a
    growth_slope = -log_p * log_p * torch.exp(a * log_p) * curvature(a * log_p)
    close = -p * (growth_slope / alpha - _growth(log_p, a) / (alpha * alpha))
    return torch.where(near, close, far)
