"""Softpick: a rectified SoftMax whose weights need not sum to one."""

import math

import torch
from torch import Tensor

from multimax.functional import MASK_FLOOR, check_mask, hidden_entries, to_compute_precision
from multimax.kernels import c_rows
from multimax.normalizers.base import REFERENCE_LENGTH, LengthScale, Normalizer


def softpick(
    scores: Tensor, dim: int = -1, mask: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Softpick: `relu(exp(x_i) - 1) / (sum_j |exp(x_j) - 1| + eps)`.

    Negative scores get exactly 0 and still count in the denominator, so that a row sums to less
    than one, to 0 where no score is positive. It changes when all scores are shifted.

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32. Those of at most
            `functional.MASK_FLOOR` are masked.
        dim: the dimension that the denominator sums over.
        mask: bool, broadcastable to `scores`, True where mass is allowed.
        eps: > 0, so that a row of zeros is 0.

    Returns:
        Weights in [0, 1) of the shape and dtype of `scores`: 0 where masked.

    Raises:
        ValueError: `eps` is not a positive number, or `mask` is not boolean.

    Source: Zuhri et al., Softpick: No Attention Sink, No Massive Activations with Rectified
    Softmax, 2025, arXiv 2504.20966.
    """
    _check_eps(eps)
    x = to_compute_precision(scores)
    check_mask(mask, x.shape)
    c_rows.usable(x, "softpick", "it has no kernel")  # one asked for by name is an error
    hidden = hidden_entries(x, mask, MASK_FLOOR)
    x = x.masked_fill(hidden, 0.0)  # exp(0) - 1 is nothing
    positive, negative = x.where(~(x <= 0), 0.0), x.where(~(x >= 0), 0.0)  # both NaN of NaN
    if x.numel() == 0:
        return (positive - negative).to(scores.dtype)
    # All is divided by exp(m), which leaves no trace in the ratio; expm1 keeps digits around 0.
    m = positive.detach().amax(dim, keepdim=True)
    above = -torch.exp(positive - m) * torch.expm1(-positive)
    below = -torch.exp(-m) * torch.expm1(negative)
    total = (above + below).sum(dim, keepdim=True) + eps * torch.exp(-m)
    return (above / total).masked_fill(hidden, 0.0).to(scores.dtype)


def _check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a positive number, got {eps!r}")


class Softpick(Normalizer):
    """Softpick, whose weights need not sum to one.

    Args:
        eps: > 0, in the denominator.
        length_scale, reference_length, heads: as in `Normalizer`.
    """

    def __init__(
        self,
        eps: float = 1e-6,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
    ) -> None:
        super().__init__(length_scale, reference_length, heads)
        _check_eps(eps)
        self.eps = eps

    @property
    def sums_to_one(self) -> bool:
        return False

    def forward(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        x = to_compute_precision(scores)
        check_mask(mask, x.shape)
        scaled = self.scaled_by_length(x, dim, mask)
        return softpick(scaled, dim, mask, eps=self.eps).to(scores.dtype)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"eps={self.eps:g}", super().extra_repr()]))
