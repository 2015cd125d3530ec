"""What all normalizers share: the module interface, masking and precision."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


def to_compute_precision(scores: Tensor) -> Tensor:
    """Half-precision scores as fp32 (fp16 squares overflow at 256), all others as they are.

    Raises:
        ValueError: `scores` is not a real floating-point tensor.
    """
    if not scores.is_floating_point():
        raise ValueError(f"scores must be real floating-point, got {scores.dtype}: use .float()")
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def check_mask(mask: Tensor | None) -> None:
    """Raise ValueError for a mask that is not boolean; an additive mask would be misread."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be boolean (True = may receive mass), got {mask.dtype}: "
            "for an additive mask use `mask > -inf`, for 0/1 use `mask.bool()`"
        )


def masked_softmax(scores: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """SoftMax over the entries where `mask` is True and exactly 0 elsewhere.

    The fill is finite so that an all-masked row (all zeros) stays free of NaN in both directions;
    the second `masked_fill` makes its zeros and its zero gradients exact. Modulation comes BEFORE
    this function: a filled score that is modulated afterwards can end up with all the mass.
    """
    if mask is None:
        return torch.softmax(scores, dim)
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~mask, lowest), dim).masked_fill(~mask, 0.0)


class Normalizer(nn.Module, ABC):
    """A learned or fixed map from a row of scores to a probability distribution.

    Attention calls it on scores over the keys, the output layer on scores over the classes. Both
    use nothing but this interface.
    """

    @abstractmethod
    def forward(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Probabilities of the shape and dtype of `scores` that sum to one along `dim`.

        Args:
            scores: real, any shape; fp16 and bf16 are computed in fp32.
            dim: the dimension that sums to one.
            mask: bool, broadcastable to `scores`, True where mass is allowed. Masked entries get
                exactly 0; an all-masked row is all zeros with zero gradients.
        """


class LogitNormalizer(Normalizer):
    """A normalizer that is SoftMax of some logits, so that its loss is cross-entropy."""

    @abstractmethod
    def logits(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Logits (fp32 or wider) whose SoftMax is the distribution trained with cross-entropy."""
