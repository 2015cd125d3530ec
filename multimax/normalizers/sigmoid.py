"""Sigmoid attention: each weight by itself, less the logarithm of the length of its row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from multimax.functional import MASK_FLOOR, check_mask, hidden_entries, to_compute_precision
from multimax.kernels import c_rows
from multimax.normalizers.base import REFERENCE_LENGTH, LengthScale, Normalizer


def sigmoid(scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """`1 / (1 + exp(-(x_i - log(n))))`, n being the number of allowed entries of the row.

    With scores of 0 a row sums to n / (n + 1); else to anything between 0 and n. It changes when
    all scores are shifted.

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32. Those of at most
            `functional.MASK_FLOOR` are masked and do not count. As everywhere, an inf or NaN spoils
            its row.
        dim: the dimension of the rows.
        mask: bool, broadcastable to `scores`, True where mass is allowed.

    Returns:
        Weights in [0, 1] of the shape and dtype of `scores`: 0 where masked.

    Raises:
        ValueError: `mask` is not boolean.

    Source: Ramapuram et al., Theory, Analysis, and Best Practices for Sigmoid Self-Attention, ICLR
    2025, arXiv 2409.04431.
    """
    x = to_compute_precision(scores)
    check_mask(mask, x.shape)
    c_rows.usable(x, "sigmoid", "it has no kernel")  # one asked for by name is an error
    shifted, hidden = _shifted(x, dim, mask)
    return torch.sigmoid(shifted).masked_fill(hidden, 0.0).to(scores.dtype)


def _shifted(scores: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores less the logarithm of the length, 0 where hidden, and what is hidden."""
    hidden = hidden_entries(scores, mask, MASK_FLOOR)
    x = scores.masked_fill(hidden, 0.0)
    nothing = (x.detach() * 0).sum(dim, keepdim=True)  # NaN of a row with inf or NaN
    length = (~hidden).sum(dim, keepdim=True).clamp_min(1).to(x.dtype)
    return x - (length.log() + nothing), hidden


class Sigmoid(Normalizer):
    """Sigmoid attention, whose weights need not sum to one.

    Args:
        length_scale, reference_length, heads: as in `Normalizer`.
    """

    def __init__(
        self,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
    ) -> None:
        super().__init__(length_scale, reference_length, heads)

    @property
    def sums_to_one(self) -> bool:
        return False

    @property
    def sparse(self) -> bool:
        return False

    def forward(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        x = to_compute_precision(scores)
        check_mask(mask, x.shape)
        return sigmoid(self.scaled_by_length(x, dim, mask), dim, mask).to(scores.dtype)

    def log_probabilities(
        self, scores: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        x = to_compute_precision(scores)
        check_mask(mask, x.shape)
        shifted, hidden = _shifted(self.scaled_by_length(x, dim, mask), dim, mask)
        return F.logsigmoid(shifted).masked_fill(hidden, -torch.inf)
