"""Scaled dot-product attention over any normalizer: scale, modulate, mask, normalize, dropout."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from multimax.normalizers import Normalizer
from multimax.normalizers.base import check_mask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: Normalizer,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """`normalizer(scale * query key^T) value`; masks act after the normalizer's modulation.

    Args:
        query: (..., queries, head_dim).
        key: (..., keys, head_dim).
        value: (..., keys, value_dim).
        normalizer: maps scores (..., queries, keys) to probabilities over the keys.
        mask: bool, broadcastable to (..., queries, keys), True where a key may be attended.
        causal: let query i attend to keys up to i + keys - queries, so that the last query sees
            all keys, as in incremental decoding. Combines with `mask`.
        dropout: in [0, 1), applied to the probabilities; pass 0 in evaluation.
        scale: factor on the scores; None is 1 / sqrt(head_dim).

    Returns:
        (..., queries, value_dim); zeros for a query that may attend to nothing.

    Raises:
        ValueError: `mask` is not boolean.
    """
    check_mask(mask)
    if scale is None:
        scale = 1 / math.sqrt(query.size(-1))
    scores = (query * scale) @ key.transpose(-2, -1)
    if causal:
        allowed = causal_mask(query.size(-2), key.size(-2), query.device)
        mask = allowed if mask is None else mask & allowed
    probabilities = normalizer(scores, mask=mask)
    return F.dropout(probabilities, dropout) @ value


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """(queries, keys) bool, True where query i may attend: keys up to i + keys - queries."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
