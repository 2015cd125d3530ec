"""Sparsemax: the Euclidean projection of the scores onto the probability simplex."""

from torch import Tensor

from multimax.normalizers.entmax import FixedEntMax, entmax


def sparsemax(scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """The probability vector nearest to the scores, which is alpha-entmax with alpha = 2.

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, True where mass is allowed.

    Returns:
        Probabilities of the shape and dtype of `scores`: 0 where masked, all zeros for an
        all-masked row.

    Raises:
        ValueError: `mask` is not boolean.

    Source: Martins and Astudillo, From Softmax to Sparsemax, ICML 2016.
    """
    return entmax(scores, 2.0, dim, mask)


class SparseMax(FixedEntMax):
    """The Euclidean projection of the scores onto the probability simplex.

    Args:
        length_scale, reference_length, heads: as in `FixedEntMax`.
    """

    ALPHA = 2.0
