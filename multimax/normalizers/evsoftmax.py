"""Evidential SoftMax: SoftMax over the scores that are at least the mean of their row."""

import torch
from torch import Tensor

from multimax.functional import check_mask, hidden_entries, to_compute_precision
from multimax.normalizers.base import REFERENCE_LENGTH, LengthScale
from multimax.normalizers.truncated import TruncatedSoftMax, check_floor, truncated_softmax


def evsoftmax(
    scores: Tensor, dim: int = -1, mask: Tensor | None = None, *, floor: float = 0.0
) -> Tensor:
    """SoftMax over the entries that are at least the mean of their row.

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, True where mass is allowed; the mean is taken over
            these entries.
        floor: what is left of the SoftMax weight below the mean, in [0, 1). 0 gives exact zeros;
            training uses 1e-6, so that those entries keep a gradient.

    Returns:
        Probabilities of the shape and dtype of `scores`: 0 where masked, all zeros for an
        all-masked row.

    Raises:
        ValueError: `floor` is outside [0, 1), or `mask` is not boolean.

    Source: Chen et al., Evidential Softmax, NeurIPS 2021, Eq. 3.
    """
    check_floor(floor)
    x = to_compute_precision(scores)
    check_mask(mask, x.shape)
    return truncated_softmax(x, _keep(x, dim, mask), dim, mask, floor).to(scores.dtype)


def _keep(scores: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    scores = scores.detach()
    if scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    # Differences to the maximum: their mean keeps its digits when all scores share a large offset,
    # and is at most 0, so that rounding cannot put it above the maximum.
    hidden = hidden_entries(scores, mask)
    largest = scores.masked_fill(hidden, -torch.inf).amax(dim, keepdim=True)
    shifted = (scores - largest).masked_fill(hidden, 0.0)
    count = (~hidden).sum(dim, keepdim=True)
    mean = shifted.sum(dim, keepdim=True) / count.clamp_min(1)
    return ~(shifted < mean)  # a NaN is kept, so that the row becomes NaN


class EvSoftMax(TruncatedSoftMax):
    """Evidential SoftMax: SoftMax over the scores that are at least the mean of their row.

    Args:
        floor: in (0, 1), what is left of the SoftMax weight below the mean in training and in the
            loss; in evaluation it is 0.
        length_scale, reference_length, heads: as in `TruncatedSoftMax`.
    """

    def __init__(
        self,
        floor: float = 1e-6,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
    ) -> None:
        super().__init__(floor, True, length_scale, reference_length, heads)

    def keep(self, scores: Tensor, dim: int, mask: Tensor | None) -> Tensor:
        return _keep(scores, dim, mask)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"floor={self.floor:g}", super().extra_repr()]))
