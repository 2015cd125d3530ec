"""SoftMax over the k largest scores of a row."""

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from multimax.functional import check_mask, exporting, to_compute_precision
from multimax.kernels import c_rows
from multimax.normalizers.base import REFERENCE_LENGTH, LengthScale
from multimax.normalizers.truncated import TruncatedSoftMax, truncated_softmax


def topk(scores: Tensor, k: int, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """SoftMax over the k largest scores of each row, zero elsewhere.

    Scores that tie with the k-th largest are all kept, so that the result does not depend on the
    order of the entries.

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32.
        k: >= 1; a row with fewer (allowed) entries keeps them all.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, True where mass is allowed; the k largest are
            taken among these entries.

    Returns:
        Probabilities of the shape and dtype of `scores`: 0 where masked, all zeros for an
        all-masked row.

    Raises:
        ValueError: `k` is not a positive integer, or `mask` is not boolean.

    Source: Gupta et al., Memory-efficient Transformers via Top-k Attention, 2021; Wang et al.,
    KVT: k-NN Attention, ECCV 2022.
    """
    k = _checked_k(k)
    x = to_compute_precision(scores)
    check_mask(mask, x.shape)
    return truncated_softmax(x, _keep(x, k, dim, mask), dim, mask, 0.0).to(scores.dtype)


def _keep(scores: Tensor, k: int, dim: int, mask: Tensor | None) -> Tensor:
    scores = scores.detach()
    if scores.dim() == 0 or (not exporting() and k >= scores.size(dim)):
        return torch.ones_like(scores, dtype=torch.bool)
    if c_rows.usable(scores, "topk"):
        return ~(scores < c_rows.kth_largest(scores, k, dim, mask))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    candidates = scores
    if exporting():  # rows may have fewer entries than k or more, whatever the example's have
        candidates = F.pad(scores.movedim(dim, -1), (0, k), value=-torch.inf).movedim(-1, dim)
    largest = candidates.topk(k, dim).values
    # NaN, and so the whole row is kept and becomes NaN, if the first is NaN or infinite.
    spoilt = largest.narrow(dim, 0, 1) * 0
    return ~(scores < largest.narrow(dim, k - 1, 1) + spoilt)


def _checked_k(k: int) -> int:
    """`k`, also one of NumPy, as int."""
    if not isinstance(k, numbers.Integral) or k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k!r}")
    return int(k)


class TopK(TruncatedSoftMax):
    """SoftMax over the k largest scores of a row.

    Args:
        k: >= 1; k-NN attention uses 100 of the 197 tokens of DeiT.
        floor: in (0, 1); as an output layer, the share of their SoftMax weight that the other
            entries keep in the loss, which would be infinite without it.
        length_scale, reference_length, heads: as in `TruncatedSoftMax`.
    """

    def __init__(
        self,
        k: int = 100,
        floor: float = 1e-6,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
    ) -> None:
        super().__init__(floor, False, length_scale, reference_length, heads)
        self.k = _checked_k(k)

    def keep(self, scores: Tensor, dim: int, mask: Tensor | None) -> Tensor:
        return _keep(scores, self.k, dim, mask)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"k={self.k}", super().extra_repr()]))
