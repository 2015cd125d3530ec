"""The Triton kernels of the gradients of `multimax.kernels.triton_attention`.

FlashAttention-2 (Dao, 2023) without atomic additions: both recompute P from the logsumexp of each
row, a tile at a time. One goes along the keys for a block of queries (gradients of the query and of
the scalars), the other along the queries for a block of keys, over all query heads that share a key
head. The gradient of a bias has a kernel of its own in `multimax.kernels.triton_attention_bias`.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton compiles these functions from their source; their arguments have no type a checker knows.

import triton
import triton.language as tl

from multimax.kernels.triton_logits import add_row_sums, backward_tile, zero_row_sums
from multimax.kernels.triton_modulation import (
    centred,
    fold,
    load_coefficients,
    store_coefficient_gradient,
)
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
def backward_query_tile(
    state, q, do, key, value, mask, bias, factor, c, score_scale, lse, d, row, batch, head, first,
    start, i, j, queries, keys, seed, dropout, order: tl.constexpr, causal: tl.constexpr,
    mask_by_query: tl.constexpr, bias_before: tl.constexpr, factor_first: tl.constexpr,
    softcap: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, block_keys: tl.constexpr,
    precision: tl.constexpr, dtype: tl.constexpr, learned: tl.constexpr, shifted: tl.constexpr,
    of_factor: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries and the sums of their rows, after another tile of keys."""
    dq, sums, means, residual = state
    k = load_tile(key, start, keys, block_keys, dim, width)
    v = load_tile(value, start, keys, block_keys, dim, width)
    scores = score_scale * tl.dot(q, tl.trans(k), input_precision=precision)
    gradient = tl.dot(do, tl.trans(v), input_precision=precision)
    tile_mask, added = None, 0.0
    if masked:
        scores, added, tile_mask = shown_of_tile(
            scores, mask, bias, batch, head, first, start, i, j, queries, keys, causal,
            mask_by_query, bias_before, dtype,
        )  # fmt: skip
    kept = 1.0
    if dropout is not None:
        kept = dropout_factor(seed, dropout, row, first + i, start + j, queries, keys, dtype)
    probabilities, gradient, derivatives = backward_tile(
        scores, added, tile_mask, lse[:, None], d[:, None], gradient, kept, factor, c, order,
        factor_first, softcap,
    )  # fmt: skip
    if learned or of_factor:
        sums = add_row_sums(sums, gradient, derivatives, c, order, learned, shifted, of_factor)
        means = add_row_sums(
            means, probabilities, derivatives, c, order, learned, shifted, of_factor
        )
        residual += fold(gradient)
    by_modulated, slope, _, _ = derivatives
    by_x = gradient * by_modulated * slope
    dq += tl.dot(by_x.to(k.dtype), k, input_precision=precision)
    return dq, sums, means, residual


@triton.jit(do_not_specialize=["seed"])
def attention_backward_query(
    query,
    key,
    value,
    mask,
    bias,
    row_factor,
    coefficients,
    output,
    logsumexp,
    output_gradient,
    logsumexp_gradient,
    delta,
    query_gradient,
    coefficient_gradient,
    factor_gradient,
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
    dim: tl.constexpr,
    width: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    precision: tl.constexpr,
):
    """One block of queries: its gradient, its share of the scalars', its factors', and its delta.

    The gradients of scalars and factors are not computed where they are None.

    delta = rowsum(output_gradient * output) is what the backward pass of SoftMax subtracts, here
    less the gradient of the logsumexp. The kernel for the keys, launched after this one, reads it.
    As the output is rounded, the gradients of a row of logits do not quite add up to 0, or to that
    of the logsumexp. The sums for the scalars would multiply this rest by what their terms have in
    common, and in half precision drown in it, but for `centred`.
    """
    dtype: tl.constexpr = coefficients.dtype.element_ty
    row, batch, head, first = place_of_program(heads, queries, block_queries)
    key, value = of_head(key, batch, head // group), of_head(value, batch, head // group)
    c = load_coefficients(coefficients, order)
    score_scale = tl.load(coefficients + 2 + 4 * order)
    q = load_tile(of_head(query, batch, head), first, queries, block_queries, dim, width)
    o = load_tile(of_head(output, batch, head), first, queries, block_queries, dim, width)
    do = load_tile(of_head(output_gradient, batch, head), first, queries, block_queries, dim, width)
    rows = first + tl.arange(0, block_queries)
    place = row * queries + rows
    lse = tl.load(logsumexp + place, mask=rows < queries, other=float("inf"))  # so P is 0
    d = tl.sum(o.to(dtype) * do.to(dtype), 1)
    g = 0.0
    if logsumexp_gradient is not None:
        g = tl.load(logsumexp_gradient + place, mask=rows < queries, other=0.0)
        g = tl.where(lse == float("inf"), 0.0, g)  # of an empty row
        d -= g
    tl.store(delta + place, d, mask=rows < queries)

    i, j = tl.arange(0, block_queries)[:, None], tl.arange(0, block_keys)[None, :]
    factor = None
    if row_factor is not None:
        factor = factor_of_rows(row_factor, batch, head, first, i, queries)
    learned: tl.constexpr = coefficient_gradient is not None
    # Else the logits of a row grow alike with the shift.
    shifted: tl.constexpr = softcap is not None or logsumexp_gradient is not None
    of_factor: tl.constexpr = factor_gradient is not None
    state = (
        tl.zeros((block_queries, width), dtype),
        zero_row_sums(block_queries, dtype, order, shifted, of_factor),
        zero_row_sums(block_queries, dtype, order, shifted, of_factor),
        tl.zeros((block_queries, 4), dtype),
    )
    end = tl.minimum(keys, first + block_queries + keys - queries) if causal else keys
    whole = 0
    if mask is None and bias is None:
        whole = whole_keys(first, queries, keys, block_keys, causal)
        for start in range(0, whole, block_keys):
            state = backward_query_tile(
                state, q, do, key, value, mask, bias, factor, c, score_scale, lse, d, row, batch,
                head, first, start, i, j, queries, keys, seed, dropout, order, causal,
                mask_by_query, bias_before, factor_first, softcap, dim, width, block_keys,
                precision, dtype, learned, shifted, of_factor, False,
            )  # fmt: skip
    for start in range(whole, end, block_keys):
        state = backward_query_tile(
            state, q, do, key, value, mask, bias, factor, c, score_scale, lse, d, row, batch, head,
            first, start, i, j, queries, keys, seed, dropout, order, causal, mask_by_query,
            bias_before, factor_first, softcap, dim, width, block_keys, precision, dtype, learned,
            shifted, of_factor, True,
        )  # fmt: skip
    dq, sums, means, residual = state
    if logsumexp_gradient is not None:
        residual -= 0.25 * g[:, None]

    query_gradient = of_head(query_gradient, batch, head)
    dq = score_scale * c[0] * dq
    if factor_first:
        dq *= factor
    store_tile(query_gradient, dq, first, queries, block_queries, dim, width)
    if learned or of_factor:
        share = tl.program_id(0).to(tl.int64) * (2 + 4 * order)
        sums = centred(sums, means, residual)
        if learned:
            store_coefficient_gradient(
                coefficient_gradient + share,
                sums,
                tl.sum(sums[1 + 4 * order]) if shifted else 0.0,
                c,
                order,
            )
        if of_factor:
            tl.store(factor_gradient + place, sums[len(sums) - 1], mask=rows < queries)


@triton.jit
def backward_key_value_tile(
    state, k, v, query, output_gradient, logsumexp, delta, mask, bias, row_factor, c, score_scale,
    batch, head, heads, start, first, i, j, queries, keys, seed, dropout, order: tl.constexpr,
    causal: tl.constexpr, mask_by_query: tl.constexpr, bias_before: tl.constexpr,
    factor_first: tl.constexpr, softcap: tl.constexpr, dim: tl.constexpr, width: tl.constexpr,
    block_queries: tl.constexpr, precision: tl.constexpr, dtype: tl.constexpr,
    masked: tl.constexpr,
):  # fmt: skip
    """The gradients of the keys and values, after another tile of queries.

    What keys that do not exist receive is not kept: only causal tiles and those with a mask need
    to be masked.
    """
    dk, dv = state
    row = batch * heads + head
    q = load_tile(of_head(query, batch, head), start, queries, block_queries, dim, width)
    do = load_tile(of_head(output_gradient, batch, head), start, queries, block_queries, dim, width)
    rows = start + tl.arange(0, block_queries)
    place = row * queries + rows
    lse = tl.load(logsumexp + place, mask=rows < queries, other=float("inf"))  # so P is 0
    d = tl.load(delta + place, mask=rows < queries, other=0.0)
    scores = score_scale * tl.dot(k, tl.trans(q), input_precision=precision)
    gradient = tl.dot(v, tl.trans(do), input_precision=precision)
    tile_mask, added = None, 0.0
    if masked:
        scores, added, tile_mask = shown_of_tile(
            scores, mask, bias, batch, head, start, first, i, j, queries, keys, causal,
            mask_by_query, bias_before, dtype,
        )  # fmt: skip
    kept = 1.0
    if dropout is not None:
        kept = dropout_factor(seed, dropout, row, start + i, first + j, queries, keys, dtype)
    factor = None
    if row_factor is not None:
        factor = factor_of_rows(row_factor, batch, head, start, i, queries)
    probabilities, gradient, derivatives = backward_tile(
        scores, added, tile_mask, lse[None, :], d[None, :], gradient, kept, factor, c, order,
        factor_first, softcap,
    )  # fmt: skip
    dv += tl.dot((probabilities * kept).to(do.dtype), do, input_precision=precision)
    by_modulated, slope, _, _ = derivatives
    by_x = gradient * by_modulated * slope
    if factor_first:
        by_x *= factor
    dk += tl.dot(by_x.to(q.dtype), q, input_precision=precision)
    return dk, dv


@triton.jit(do_not_specialize=["seed"])
def attention_backward_key_value(
    query,
    key,
    value,
    mask,
    bias,
    row_factor,
    coefficients,
    logsumexp,
    output_gradient,
    delta,
    key_gradient,
    value_gradient,
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
    dim: tl.constexpr,
    width: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    precision: tl.constexpr,
):
    """One block of keys: its gradient and its values', over all query heads that read it.

    Tiles are transposed, (keys, queries), as the two products with P^T want them.
    """
    dtype: tl.constexpr = coefficients.dtype.element_ty
    _row, batch, key_head, first = place_of_program(heads // group, keys, block_keys)
    c = load_coefficients(coefficients, order)
    k = load_tile(of_head(key, batch, key_head), first, keys, block_keys, dim, width)
    score_scale = tl.load(coefficients + 2 + 4 * order)
    v = load_tile(of_head(value, batch, key_head), first, keys, block_keys, dim, width)
    i, j = tl.arange(0, block_queries)[None, :], tl.arange(0, block_keys)[:, None]

    state = tl.zeros((block_keys, width), dtype), tl.zeros((block_keys, width), dtype)
    begin, whole = 0, 0
    if causal:
        begin = tl.maximum(0, first - (keys - queries)) // block_queries * block_queries
        whole = tl.cdiv(tl.maximum(0, first + block_keys - 1 - (keys - queries)), block_queries)
        whole = tl.minimum(whole * block_queries, queries)
    if mask is not None or bias is not None:
        whole = queries
    for head in range(key_head * group, (key_head + 1) * group):
        for start in range(begin, whole, block_queries):
            state = backward_key_value_tile(
                state, k, v, query, output_gradient, logsumexp, delta, mask, bias, row_factor, c,
                score_scale, batch, head, heads, start, first, i, j, queries, keys, seed, dropout,
                order, causal, mask_by_query, bias_before, factor_first, softcap, dim, width,
                block_queries, precision, dtype, True,
            )  # fmt: skip
        if mask is None and bias is None:
            for start in range(whole, queries, block_queries):
                state = backward_key_value_tile(
                    state, k, v, query, output_gradient, logsumexp, delta, mask, bias, row_factor,
                    c, score_scale, batch, head, heads, start, first, i, j, queries, keys, seed,
                    dropout, order, causal, mask_by_query, bias_before, factor_first, softcap, dim,
                    width, block_queries, precision, dtype, False,
                )  # fmt: skip
    dk, dv = state

    key_gradient = of_head(key_gradient, batch, key_head)
    value_gradient = of_head(value_gradient, batch, key_head)
    store_tile(key_gradient, score_scale * c[0] * dk, first, keys, block_keys, dim, width)
    store_tile(value_gradient, dv, first, keys, block_keys, dim, width)
