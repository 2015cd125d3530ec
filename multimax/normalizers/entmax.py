"""alpha-entmax: sparse distributions between SoftMax (alpha = 1) and sparsemax (alpha = 2)."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multimax.functional import (
    check_mask,
    check_not_nested,
    function_transforms_active,
    masked_log_softmax,
    masked_softmax,
    to_compute_precision,
    values_known,
)
from multimax.kernels import c_rows
from multimax.normalizers.base import REFERENCE_LENGTH, LengthScale, Normalizer
from multimax.normalizers.entmax_solver import NEAR_ONE, curvature, solve


def entmax(
    scores: Tensor,
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """alpha-entmax: `p_i = relu((alpha - 1) x_i - tau)^(1 / (alpha - 1))`, summing to one.

    The threshold tau is exact to rounding: Newton's method from the left for alpha <= 2, where the
    sum is convex in tau and the method cannot overshoot; bisection above. The backward is
    closed-form. Near alpha = 1 both are computed in a form that goes over into SoftMax.

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32.
        alpha: >= 1; 1 is SoftMax, 2 is sparsemax. A tensor must broadcast to `scores` and have size
            1 along `dim`; it gets a gradient. Its values are checked on the CPU only, outside of
            torch.compile and function transforms.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, True where mass is allowed.

    Returns:
        Probabilities of the shape and dtype of `scores`: 0 where masked, all zeros for an
        all-masked row.

    Raises:
        ValueError: `alpha` is out of range or varies along `dim`, or `mask` is not boolean.

    Source: Peters et al., Sparse Sequence-to-Sequence Models, ACL 2019; Correia et al., Adaptively
    Sparse Transformers, EMNLP 2019 (gradient with respect to alpha).
    """
    if not isinstance(alpha, Tensor):
        check_alpha(alpha)
        return entmax_of_excess(scores, alpha - 1, dim, mask)
    check_not_nested(scores)
    _check_alpha_shape(alpha, scores, dim)
    check_least_alpha(alpha)
    excess = excess_of(alpha, alpha - 1, to_compute_precision(scores.new_empty(())).dtype)
    return entmax_of_excess(scores, excess, dim, mask)


def entmax_of_excess(
    scores: Tensor, excess: float | Tensor, dim: int = -1, mask: Tensor | None = None
) -> Tensor:
    """`entmax` with alpha = 1 + `excess`, which has digits where alpha rounds to 1."""
    x = to_compute_precision(scores)
    check_mask(mask, x.shape)
    fixed = None if isinstance(excess, Tensor) else excess
    lacks = None if fixed in (0.5, 1) else "only alpha = 1.5 and alpha = 2 have a kernel"
    if c_rows.usable(x, "entmax", lacks):
        return c_rows.threshold(x, fixed == 0.5, dim, mask).to(scores.dtype)
    if fixed == 0 or x.dim() == 0 or x.numel() == 0:
        return masked_softmax(x, dim, mask).to(scores.dtype)
    if isinstance(excess, Tensor):
        excess = excess.to(x.dtype)
        excess = excess.reshape((1,) * (x.dim() - excess.dim()) + excess.shape)
    if mask is not None:
        x = x.masked_fill(~mask, -math.inf)
    function = _EntMaxForward if function_transforms_active() else _EntMax
    return function.apply(x, excess, dim).contiguous().to(scores.dtype)


def excess_of(alpha: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """alpha - 1 in `dtype`: that of the rounded alpha, or where that is near 1 the `exact` one."""
    exact = exact.to(dtype)
    return exact.where(exact < NEAR_ONE, alpha.to(dtype) - 1)


def check_alpha(alpha: float) -> None:
    """Raise ValueError for an alpha that defines no entmax."""
    if not (alpha >= 1 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a finite number >= 1, got {alpha}")


def check_least_alpha(alpha: Tensor) -> None:
    """Raise ValueError for values that define no entmax, where they may be looked at."""
    if values_known(alpha) and (alpha < 1).any():
        raise ValueError(f"alpha must be >= 1, got {alpha.min().item():g}")


def _check_alpha_shape(alpha: Tensor, scores: Tensor, dim: int) -> None:
    fits = alpha.dim() <= scores.dim()
    aligned = (1,) * (scores.dim() - alpha.dim()) + alpha.shape
    if not fits or (aligned and aligned[dim] != 1):
        raise ValueError(
            f"alpha of shape {aligned} must broadcast to scores of shape "
            f"{tuple(scores.shape)} and have size 1 along dim {dim}"
        )


class _EntMax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scores, excess, dim):
        largest = scores.amax(dim, keepdim=True)
        spoilt = ~(largest < torch.inf)  # rows with inf or NaN, which become NaN
        p = solve(scores - largest.clamp_min(torch.finfo(scores.dtype).min), excess, dim)
        if values_known(spoilt) and not spoilt.any():
            return p
        row = torch.full_like(scores, torch.nan).masked_fill(scores == -torch.inf, 0.0)
        return row.where(spoilt, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, excess, ctx.dim = inputs
        ctx.fixed_excess = None if isinstance(excess, Tensor) else excess
        saved = [output] if ctx.fixed_excess is not None else [output, excess]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)  # the Fenchel-Young loss sends none in its first backward

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None, None
        # Differentiable operations of the saved output, so that second derivatives exist too.
        p, excess, slope, share = _jacobian(ctx)
        grad_scores = _product(slope, share, grad, ctx.dim)
        grad_excess = None
        if ctx.needs_input_grad[1]:
            by_excess = _derivative_by_excess(p, share, excess, ctx.dim)
            grad_excess = (grad * by_excess).sum_to_size(excess.shape)
        return grad_scores, grad_excess, None


class _EntMaxForward(_EntMax):
    """With a forward derivative too, which torch.compile cannot trace."""

    @staticmethod
    def jvp(ctx, tangent, excess_tangent, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        p, excess, slope, share = _jacobian(ctx)
        result = torch.zeros_like(p)
        if tangent is not None:
            result = _product(slope, share, tangent, ctx.dim)
        if excess_tangent is not None:
            by_excess = _derivative_by_excess(p, share, excess, ctx.dim)
            result = result + by_excess * excess_tangent
        return result


def _jacobian(ctx) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Output, excess, and `slope` and `share` of the Jacobian `diag(slope) - share slope^T`."""
    p, *rest = ctx.saved_tensors
    excess = rest[0] if rest else ctx.fixed_excess
    slope = _support_power(p, 2 - (1 + excess))
    total = slope.sum(ctx.dim, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return p, excess, slope, slope / total


def _product(slope: Tensor, share: Tensor, vector: Tensor, dim: int) -> Tensor:
    """Of the Jacobian, which is symmetric, and a vector; exactly 0 off the support, also of NaN."""
    total = (slope * vector).sum(dim, keepdim=True)
    product = slope * vector - share * total
    spoilt = total.isnan()
    if values_known(spoilt) and not spoilt.any():
        return product
    return product.masked_fill(spoilt & (slope == 0), 0.0)


def _derivative_by_excess(p: Tensor, share: Tensor, excess: Tensor, dim: int) -> Tensor:
    near = excess < NEAR_ONE
    log_p = p.where(p > 0, 1.0).log()
    p_log_p = p * log_p
    total = p_log_p.sum(dim, keepdim=True)
    a = excess.where(~near, 1.0)
    far = (p - share * p.sum(dim, keepdim=True)) / (a * a)
    far = far - (p_log_p - share * total) / a
    if values_known(near) and not near.any():
        return far
    # The same without the terms in 1 / excess, which cancel.
    change = p_log_p * log_p * curvature(excess.where(near, 0.0) * log_p)
    return torch.where(near, change - share * change.sum(dim, keepdim=True), far)


def _support_power(p: Tensor, exponent: float | Tensor) -> Tensor:
    """`p ** exponent` on the support and 0 off it, with finite derivatives at p = 0."""
    if not isinstance(exponent, Tensor) and exponent == 0:
        return p.detach().where(~(p > 0), 1.0)  # NaN of NaN
    support = ~(p <= 0)
    if not isinstance(exponent, Tensor) and exponent == 0.5:
        return p.where(support, 1.0).sqrt() * support
    return p.where(support, 1.0) ** exponent * support


class EntMax(Normalizer):
    """alpha-entmax with a fixed or learned alpha.

    Args:
        alpha: >= 1 if fixed; in (1, 2), where it starts, if learned (it stays in that interval).
        learned: train alpha, as in Correia et al. 2019.
        heads: with `learned`, one alpha for each of this many heads; scores must then be of shape
            (..., heads, queries, keys). None shares one alpha. With `length_scale` one factor too.
        length_scale, reference_length: as in `Normalizer`.

    Raises:
        ValueError: `alpha` is out of range, or `heads` is given and nothing is learned.
    """

    def __init__(
        self,
        alpha: float = 1.5,
        learned: bool = False,
        heads: int | None = None,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
    ) -> None:
        super().__init__(length_scale, reference_length, heads, other_heads=learned)
        check_alpha(alpha)
        if learned and not 1 < alpha < 2:
            raise ValueError(f"a learned alpha must start inside (1, 2), got {alpha}")
        self.fixed_alpha: float | None = None if learned else float(alpha)
        if learned:
            self.alpha_logit: nn.Parameter = nn.Parameter(
                torch.full((heads or 1,), math.log((alpha - 1) / (2 - alpha)))
            )

    @property
    def alpha(self) -> float | Tensor:
        """alpha in use: a float if fixed, else a tensor of shape (heads or 1,) in (1, 2)."""
        if self.fixed_alpha is not None:
            return self.fixed_alpha
        return 1 + self.alpha_logit.sigmoid()

    @property
    def excess(self) -> float | Tensor:
        """alpha - 1, of the shape of `alpha`, with its digits where alpha rounds to 1."""
        alpha = self.alpha
        if not isinstance(alpha, Tensor):
            return alpha - 1
        return excess_of(alpha, self.alpha_logit.sigmoid(), alpha.dtype)

    def forward(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        excess = self.excess
        if isinstance(excess, Tensor) and self.heads:
            excess = excess[:, None, None]  # one for each head
        return entmax_of_excess(self.scaled(scores, dim, mask), excess, dim, mask).to(scores.dtype)

    def scaled(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """The scores, in fp32 or wider, whose entmax `forward` is: times a length scale."""
        x = to_compute_precision(scores)
        check_mask(mask, x.shape)
        return self.scaled_by_length(x, dim, mask)

    @property
    def sparse(self) -> bool:
        return self.fixed_alpha != 1

    def log_probabilities(
        self, scores: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        if self.sparse:
            return super().log_probabilities(scores, dim, mask)
        return masked_log_softmax(self.scaled(scores, dim, mask), dim, mask)

    def extra_repr(self) -> str:
        fixed = self.fixed_alpha
        shown = "alpha=learned" if fixed is None else f"alpha={fixed:g}"
        return ", ".join(filter(None, [shown, super().extra_repr()]))


def entmax15(scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """1.5-entmax; arguments, result and source are those of `entmax`."""
    return entmax(scores, 1.5, dim, mask)


class FixedEntMax(EntMax):
    """alpha-entmax with the alpha of its class.

    Args:
        length_scale, reference_length, heads: as in `Normalizer`.
    """

    ALPHA: ClassVar[float]

    def __init__(
        self,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
    ) -> None:
        super().__init__(self.ALPHA, False, heads, length_scale, reference_length)


class EntMax15(FixedEntMax):
    """1.5-entmax.

    Args:
        length_scale, reference_length, heads: as in `Normalizer`.
    """

    ALPHA = 1.5
