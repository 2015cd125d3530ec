"""The Triton kernel of the output of `multimax.kernels.triton_attention`.

    scores = score_scale query key^T                logits = sigma(scale scores + shift)
    P = softmax(logits)
    output = (D P) value      D: 0 where dropped, else 1 / (1 - dropout)

A bias is added to the logits, or to the scores; `multimax.kernels.triton_logits` has more steps.
FlashAttention-2 (Dao, 2023): the softmax of a row is corrected as its maximum grows, and its
logsumexp is kept for the backward pass.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton compiles these functions from their source; their arguments have no type a checker knows.

import triton
import triton.language as tl

from multimax.kernels.triton_logits import logits_of
from multimax.kernels.triton_modulation import load_coefficients
from multimax.kernels.triton_tiles import (
    dropout_factor,
    factor_of_rows,
    load_tile,
    of_head,
    place_of_program,
    shown_of_tile,
    store_tile,
    whole_keys,
)


@triton.jit
def forward_tile(
    state, q, key, value, mask, bias, factor, c, score_scale, row, batch, head, first, start,
    i, j, queries, keys, seed, dropout, order: tl.constexpr, causal: tl.constexpr,
    mask_by_query: tl.constexpr, bias_before: tl.constexpr, factor_first: tl.constexpr,
    softcap: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, block_keys: tl.constexpr,
    precision: tl.constexpr, dtype: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of weights and weighted mean of the rows, after another tile of keys."""
    maximum, total, mean = state
    k = load_tile(key, start, keys, block_keys, dim, width)
    v = load_tile(value, start, keys, block_keys, dim, width)
    scores = score_scale * tl.dot(q, tl.trans(k), input_precision=precision)
    if masked:
        scores, added, tile_mask = shown_of_tile(
            scores, mask, bias, batch, head, first, start, i, j, queries, keys, causal,
            mask_by_query, bias_before, dtype,
        )  # fmt: skip
        logits, _ = logits_of(scores, factor, c, order, factor_first, softcap)
        if bias is not None and not bias_before:
            logits += added
        logits = tl.where(tile_mask, logits, float("-inf"))
    else:
        logits, _ = logits_of(scores, factor, c, order, factor_first, softcap)
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    # A row that has seen nothing allowed has the maximum -inf, and -inf - -inf is NaN.
    anchor = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp(logits - anchor[:, None])
    shrink = tl.exp(maximum - anchor)
    total = total * shrink + tl.sum(weights, 1)
    if dropout is not None:
        weights *= dropout_factor(seed, dropout, row, first + i, start + j, queries, keys, dtype)
    mean = mean * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=precision)
    return new_maximum, total, mean


@triton.jit(do_not_specialize=["seed"])
def attention_forward(
    query,
    key,
    value,
    mask,
    bias,
    row_factor,
    coefficients,
    output,
    logsumexp,
    heads,
    group,
    queries,
    keys,
    seed,
    dropout,
    order: tl.constexpr,
    causal: tl.constexpr,
    mask_by_query: tl.constexpr,
    bias_before: tl.constexpr,
    factor_first: tl.constexpr,
    softcap: tl.constexpr,
    with_logsumexp: tl.constexpr,
    dim: tl.constexpr,
    width: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    precision: tl.constexpr,
):
    """One block of queries: its output, and the logsumexp of its rows.

    That of an empty row is 0 or, `with_logsumexp`, inf, which no other row has.
    """
    dtype: tl.constexpr = coefficients.dtype.element_ty
    row, batch, head, first = place_of_program(heads, queries, block_queries)
    key, value = of_head(key, batch, head // group), of_head(value, batch, head // group)
    c = load_coefficients(coefficients, order)
    score_scale = tl.load(coefficients + 2 + 4 * order)
    q = load_tile(of_head(query, batch, head), first, queries, block_queries, dim, width)
    i, j = tl.arange(0, block_queries)[:, None], tl.arange(0, block_keys)[None, :]
    factor = None
    if row_factor is not None:
        factor = factor_of_rows(row_factor, batch, head, first, i, queries)

    state = (
        tl.full((block_queries,), float("-inf"), dtype),
        tl.zeros((block_queries,), dtype),
        tl.zeros((block_queries, width), dtype),
    )
    end = tl.minimum(keys, first + block_queries + keys - queries) if causal else keys
    whole = 0
    if mask is None and bias is None:
        whole = whole_keys(first, queries, keys, block_keys, causal)
        for start in range(0, whole, block_keys):
            state = forward_tile(
                state, q, key, value, mask, bias, factor, c, score_scale, row, batch, head, first,
                start, i, j, queries, keys, seed, dropout, order, causal, mask_by_query,
                bias_before, factor_first, softcap, dim, width, block_keys, precision, dtype, False,
            )  # fmt: skip
    for start in range(whole, end, block_keys):
        state = forward_tile(
            state, q, key, value, mask, bias, factor, c, score_scale, row, batch, head, first,
            start, i, j, queries, keys, seed, dropout, order, causal, mask_by_query, bias_before,
            factor_first, softcap, dim, width, block_keys, precision, dtype, True,
        )  # fmt: skip

    maximum, total, mean = state
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output = of_head(output, batch, head)
    store_tile(output, mean / total[:, None], first, queries, block_queries, dim, width)
    i = first + tl.arange(0, block_queries)
    sums = tl.where(empty, float("inf") if with_logsumexp else 0.0, maximum + tl.log(total))
    tl.store(logsumexp + row * queries + i, sums, mask=i < queries)
