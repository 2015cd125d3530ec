"""SoftMax over a part of the row: what top-k and evidential SoftMax share."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from multimax.functional import check_mask, masked_softmax, to_compute_precision
from multimax.kernels import c_rows
from multimax.normalizers.base import (
    REFERENCE_LENGTH,
    LengthScale,
    LogitNormalizer,
    Normalizer,
)


def truncated_softmax(
    scores: Tensor, keep: Tensor, dim: int, mask: Tensor | None, floor: float
) -> Tensor:
    """SoftMax whose weights outside `keep` are multiplied by `floor`, then renormalized.

    Args:
        scores: real, in compute precision.
        keep: bool, shape of `scores`.
        dim: the dimension that sums to one.
        mask: bool or None; True where mass is allowed.
        floor: in [0, 1); 0 gives exact zeros.
    """
    if floor:
        scores = floored_logits(scores, keep, floor)
    else:
        mask = keep if mask is None else keep & mask
    if c_rows.usable(scores, "SoftMax over a part of the row"):
        identity = torch.tensor([1.0, 0.0], dtype=scores.dtype, device=scores.device)
        return c_rows.modulated_softmax(scores, identity, dim, mask)
    return masked_softmax(scores, dim, mask)


def floored_logits(scores: Tensor, keep: Tensor, floor: float) -> Tensor:
    """Scores with log(floor) added outside `keep`, as a sum so that they keep their gradient."""
    return scores + math.log(floor) * (~keep).to(scores.dtype)


def check_floor(floor: float) -> None:
    """Raise ValueError for a floor that is not a share."""
    if not 0 <= floor < 1:
        raise ValueError(f"floor must be in [0, 1), got {floor}")


class TruncatedSoftMax(LogitNormalizer):
    """SoftMax over the entries that `keep` selects.

    Args:
        floor: what is left of the weight of the other entries while training, in (0, 1); in
            evaluation they get exactly 0. `training_floor=False` gives zeros in training too.
        length_scale, reference_length, heads: as in `Normalizer`.
    """

    def __init__(
        self,
        floor: float,
        training_floor: bool,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
    ) -> None:
        super().__init__(length_scale, reference_length, heads)
        check_floor(floor)
        if not floor:
            raise ValueError("floor must be > 0: the loss of an exact zero is infinite")
        self.floor = floor
        self.training_floor = training_floor

    @abstractmethod
    def keep(self, scores: Tensor, dim: int, mask: Tensor | None) -> Tensor:
        """bool, shape of `scores`: True for the entries that SoftMax runs over."""

    def forward(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        x = to_compute_precision(scores)
        check_mask(mask, x.shape)
        x = self.scaled_by_length(x, dim, mask)
        floor = self.floor if self.training and self.training_floor else 0.0
        return truncated_softmax(x, self.keep(x, dim, mask), dim, mask, floor).to(scores.dtype)

    def logits(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        x = to_compute_precision(scores)
        check_mask(mask, x.shape)
        x = self.scaled_by_length(x, dim, mask)
        return floored_logits(x, self.keep(x, dim, mask), self.floor)

    @property
    def sparse(self) -> bool:
        return True

    def log_probabilities(
        self, scores: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        # Not those of the logits, which have the floor of the loss.
        return Normalizer.log_probabilities(self, scores, dim, mask)
