"""alpha-entmax: sparse distributions between SoftMax (alpha = 1) and sparsemax (alpha = 2)."""

import math

import torch
from torch import Tensor, nn

from multimax.functional import (
    check_mask,
    masked_log_softmax,
    masked_softmax,
    to_compute_precision,
)
from multimax.kernels import c_rows
from multimax.normalizers.base import Normalizer

MAX_STEPS = 200  # a bound, not a setting: Newton needs about 10, bisection as many as it has bits


def entmax(
    scores: Tensor,
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """alpha-entmax: `p_i = relu((alpha - 1) x_i - tau)^(1 / (alpha - 1))`, summing to one.

    The threshold tau is exact to rounding: Newton's method from the left for alpha <= 2, where the
    sum is convex in tau and the method cannot overshoot; bisection above. The backward is
    closed-form.

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32.
        alpha: >= 1; 1 is SoftMax, 2 is sparsemax. A tensor must be > 1, broadcast to `scores` and
            have size 1 along `dim`; it gets a gradient.
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
    check_mask(mask)
    x = to_compute_precision(scores)
    fixed_alpha = None if isinstance(alpha, Tensor) else alpha
    if isinstance(alpha, Tensor):
        alpha = _check_alpha_tensor(alpha.to(x.dtype), x, dim)
    else:
        check_alpha(alpha)
    lacks = None if fixed_alpha in (1.5, 2) else "only alpha = 1.5 and alpha = 2 have a kernel"
    if c_rows.usable(x, "entmax", lacks):
        return c_rows.threshold(x, fixed_alpha == 1.5, dim, mask).to(scores.dtype)
    if fixed_alpha == 1:
        return masked_softmax(x, dim, mask).to(scores.dtype)
    if mask is not None:
        x = x.masked_fill(~mask, -math.inf)
    return _EntMax.apply(x, alpha, dim).to(scores.dtype)


def check_alpha(alpha: float) -> None:
    """Raise ValueError for an alpha that defines no entmax."""
    if not (alpha >= 1 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a finite number >= 1, got {alpha}")


def _check_alpha_tensor(alpha: Tensor, scores: Tensor, dim: int) -> Tensor:
    alpha = alpha.reshape((1,) * (scores.dim() - alpha.dim()) + alpha.shape)
    if alpha.dim() > scores.dim() or alpha.size(dim) != 1:
        raise ValueError(
            f"alpha of shape {tuple(alpha.shape)} must broadcast to scores of shape "
            f"{tuple(scores.shape)} and have size 1 along dim {dim}"
        )
    return alpha


class _EntMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, alpha, dim):
        largest = scores.amax(dim, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        scaled = (scores - largest) * (alpha - 1)
        probabilities = _solve(scaled, alpha, dim)
        ctx.dim, ctx.fixed_alpha = dim, None if isinstance(alpha, Tensor) else alpha
        ctx.save_for_backward(probabilities, *([alpha] if ctx.fixed_alpha is None else []))
        ctx.set_materialize_grads(False)  # the Fenchel-Young loss sends none in its first backward
        return probabilities

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None, None
        # Differentiable operations of the saved output, so that second derivatives exist too.
        p, *saved = ctx.saved_tensors
        alpha = saved[0] if saved else ctx.fixed_alpha
        slope = _support_power(p, 2 - alpha)
        share = slope / slope.sum(ctx.dim, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        grad_scores = slope * grad - share * (slope * grad).sum(ctx.dim, keepdim=True)
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            p_log_p = p * p.where(p > 0, 1.0).log()
            total = p_log_p.sum(ctx.dim, keepdim=True)
            a = alpha - 1
            d_alpha = (p - share * p.sum(ctx.dim, keepdim=True)) / (a * a)
            d_alpha = d_alpha - (p_log_p - share * total) / a
            grad_alpha = (grad * d_alpha).sum_to_size(alpha.shape)
        return grad_scores, grad_alpha, None


def _support_power(p: Tensor, exponent: float | Tensor) -> Tensor:
    """`p ** exponent` on the support and 0 off it, with finite derivatives at p = 0."""
    support = p > 0
    if isinstance(exponent, float | int):
        if exponent == 0:
            return support.to(p.dtype)
        if exponent == 0.5:
            return p.where(support, 1.0).sqrt() * support
    return p.where(support, 1.0) ** exponent * support


def _solve(scaled: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
    """Probabilities from `(alpha - 1) x` shifted so that each row's maximum is 0."""
    above_two = bool((alpha > 2).any()) if isinstance(alpha, Tensor) else alpha > 2
    threshold = (_bisect if above_two else _newton)(scaled, alpha, dim)
    p = torch.relu(scaled - threshold)
    if not isinstance(alpha, Tensor) and alpha in (1.5, 2):
        return p * p if alpha == 1.5 else p
    p = p ** (1 / (alpha - 1))
    # Large exponents and exponents below 1 magnify the rounding of the threshold.
    return p / p.sum(dim, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def _newton(scaled: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
    """The threshold by Newton's method from -1, where the mass is at least the maximum's 1."""
    exponent = 1 / (alpha - 1)
    threshold = torch.full_like(scaled.narrow(dim, 0, 1), -1.0)
    resolution = 2 * torch.finfo(scaled.dtype).eps
    for _ in range(MAX_STEPS):
        mass, slope = _mass_and_slope(scaled, threshold, alpha, exponent, dim)
        step = ((mass - 1) / slope).clamp_min(0).nan_to_num(0.0, 0.0, 0.0)
        threshold = threshold + step
        if not (step > resolution * threshold.abs()).any():
            break
    return threshold


def _mass_and_slope(scaled, threshold, alpha, exponent, dim) -> tuple[Tensor, Tensor]:
    """Sum of relu(scaled - threshold)^exponent, and minus its derivative by the threshold."""
    base = torch.relu(scaled - threshold)
    if isinstance(alpha, Tensor) or alpha not in (1.5, 2):
        power = base.where(base > 0, 1.0) ** (exponent - 1) * (base > 0)
        return (power * base).sum(dim, keepdim=True), exponent * power.sum(dim, keepdim=True)
    if alpha == 2:
        support = (base > 0).to(base.dtype)
        return base.sum(dim, keepdim=True), support.sum(dim, keepdim=True)
    mass = torch.linalg.vector_norm(base, dim=dim, keepdim=True).square()
    return mass, 2 * base.sum(dim, keepdim=True)


def _bisect(scaled: Tensor, alpha: float | Tensor, dim: int) -> Tensor:
    exponent = 1 / (alpha - 1)
    low = torch.full_like(scaled.narrow(dim, 0, 1), -1.0)
    high = torch.zeros_like(low)
    for _ in range(MAX_STEPS):
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():
            break
        enough = (torch.relu(scaled - middle) ** exponent).sum(dim, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


class EntMax(Normalizer):
    """alpha-entmax with a fixed or learned alpha.

    Args:
        alpha: >= 1 if fixed; in (1, 2), where it starts, if learned (it stays in that interval).
        learned: train alpha, as in Correia et al. 2019.
        heads: with `learned`, one alpha for each of this many heads; scores must then be of shape
            (..., heads, queries, keys). None shares one alpha.

    Raises:
        ValueError: `alpha` is out of range, or `heads` is given for a fixed alpha.
    """

    def __init__(self, alpha: float = 1.5, learned: bool = False, heads: int | None = None) -> None:
        super().__init__()
        check_alpha(alpha)
        if heads is not None and (not learned or heads < 1):
            raise ValueError(f"heads={heads} needs learned=True and heads >= 1")
        if learned and not 1 < alpha < 2:
            raise ValueError(f"a learned alpha must start inside (1, 2), got {alpha}")
        self.fixed_alpha: float | None = None if learned else float(alpha)
        self.heads = heads
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

    def broadcast_alpha(self) -> float | Tensor:
        """alpha in a shape that broadcasts to the scores: (heads, 1, 1) for one alpha per head."""
        alpha = self.alpha
        return alpha[:, None, None] if isinstance(alpha, Tensor) and self.heads else alpha

    def forward(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        return entmax(scores, self.broadcast_alpha(), dim, mask)

    @property
    def sparse(self) -> bool:
        return self.fixed_alpha != 1

    def log_probabilities(
        self, scores: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        if self.sparse:
            return super().log_probabilities(scores, dim, mask)
        check_mask(mask)
        return masked_log_softmax(to_compute_precision(scores), dim, mask)

    def extra_repr(self) -> str:
        if self.fixed_alpha is not None:
            return f"alpha={self.fixed_alpha:g}"
        return "alpha=learned" + (f", heads={self.heads}" if self.heads else "")


def entmax15(scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """1.5-entmax; arguments, result and source are those of `entmax`."""
    return entmax(scores, 1.5, dim, mask)


class EntMax15(EntMax):
    """1.5-entmax."""

    def __init__(self) -> None:
        super().__init__(alpha=1.5)
