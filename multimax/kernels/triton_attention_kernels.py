"""The three Triton kernels of `multimax.kernels.triton_attention`.

    scores = query key^T      modulated = sigma(scale scores + shift)      P = softmax(modulated)
    output = (D P) value      D: 0 where dropped, else 1 / (1 - dropout)

A bias is added to the modulated scores, or to the scores times a factor that follows the
coefficients in memory.

FlashAttention-2 (Dao, 2023) without atomic additions: the forward pass keeps the logsumexp of each
row, from which both backward kernels recompute P a tile at a time. One goes along the keys for a
block of queries (gradients of the query and of the scalars), the other along the queries for a
block of keys, over all query heads that share a key head. The gradient of a bias has a kernel of
its own in `multimax.kernels.triton_attention_bias`.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton compiles these functions from their source; their arguments have no type a checker knows.

import triton
import triton.language as tl

from multimax.kernels.triton_modulation import (
    add_to_sums,
    centred,
    fold,
    load_coefficients,
    modulate,
    store_coefficient_gradient,
    zero_sums,
)
from multimax.kernels.triton_tiles import (
    bias_of_tile,
    dropout_factor,
    load_tile,
    mask_of_tile,
    of_head,
    place_of_program,
    store_tile,
)


@triton.jit
def add_bias(
    scores, mask, bias, score_scale, batch, head, first, start, i, j, queries, keys,
    before: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Scores of a tile with a bias before the modulation, what is added after it, and the mask."""
    added = 0.0
    if bias is not None:
        added, shown = bias_of_tile(bias, batch, head, first, start, i, j, queries, keys, dtype)
        mask = mask & shown
        if before:
            scores = scores * score_scale + added
            added = 0.0
    return scores, added, mask


@triton.jit(do_not_specialize=["seed"])
def attention_forward(
    query,
    key,
    value,
    mask,
    bias,
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
    dim: tl.constexpr,
    width: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    precision: tl.constexpr,
):
    """One block of queries: its output, and the logsumexp of its rows (0 for an empty row)."""
    dtype: tl.constexpr = coefficients.dtype.element_ty
    row, batch, head, first = place_of_program(heads, queries, block_queries)
    key, value = of_head(key, batch, head // group), of_head(value, batch, head // group)
    c = load_coefficients(coefficients, order)
    score_scale = tl.load(coefficients + 2 + 4 * order)
    q = load_tile(of_head(query, batch, head), first, queries, block_queries, dim, width)
    i, j = tl.arange(0, block_queries)[:, None], tl.arange(0, block_keys)[None, :]

    maximum = tl.full((block_queries,), float("-inf"), dtype)
    total = tl.zeros((block_queries,), dtype)
    mean = tl.zeros((block_queries, width), dtype)
    end = tl.minimum(keys, first + block_queries + keys - queries) if causal else keys
    for start in range(0, end, block_keys):
        k = load_tile(key, start, keys, block_keys, dim, width)
        v = load_tile(value, start, keys, block_keys, dim, width)
        scores = tl.dot(q, tl.trans(k), input_precision=precision)
        tile_mask = mask_of_tile(
            mask, batch, head, first, start, i, j, queries, keys, causal, mask_by_query
        )
        scores, added, tile_mask = add_bias(
            scores, tile_mask, bias, score_scale, batch, head, first, start, i, j, queries, keys,
            bias_before, dtype,
        )  # fmt: skip
        modulated, _ = modulate(scores, c, order)
        if bias is not None and not bias_before:
            modulated += added
        modulated = tl.where(tile_mask, modulated, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(modulated, 1))
        # A row that has seen nothing allowed has the maximum -inf, and -inf - -inf is NaN.
        anchor = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp(modulated - anchor[:, None])
        shrink = tl.exp(maximum - anchor)
        total = total * shrink + tl.sum(weights, 1)
        if dropout is not None:
            weights *= dropout_factor(
                seed, dropout, row, first + i, start + j, queries, keys, dtype
            )
        mean *= shrink[:, None]
        mean += tl.dot(weights.to(v.dtype), v, input_precision=precision)
        maximum = new_maximum

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output = of_head(output, batch, head)
    store_tile(output, mean / total[:, None], first, queries, block_queries, dim, width)
    i = first + tl.arange(0, block_queries)
    sums = tl.where(empty, 0.0, maximum + tl.log(total))
    tl.store(logsumexp + row * queries + i, sums, mask=i < queries)


@triton.jit
def backward_tile(
    scores, added, tile_mask, logsumexp, delta, gradient, factor, c, order: tl.constexpr
):
    """Of a tile: P, the gradient by the modulated scores, d sigma / d x, the scores.

    `gradient` is output_gradient value^T, `added` the bias after the modulation. A score that is
    not allowed may overflow when it is modulated: it is replaced before, and what comes of it
    after.
    """
    scores = tl.where(tile_mask, scores, 0.0)
    modulated, slope = modulate(scores, c, order)
    probabilities = tl.where(tile_mask, tl.exp(modulated + added - logsumexp), 0.0)
    gradient = tl.where(tile_mask, probabilities * (gradient * factor - delta), 0.0)
    return probabilities, gradient, slope, scores


@triton.jit(do_not_specialize=["seed"])
def attention_backward_query(
    query,
    key,
    value,
    mask,
    bias,
    coefficients,
    output,
    logsumexp,
    output_gradient,
    delta,
    query_gradient,
    coefficient_gradient,
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
    dim: tl.constexpr,
    width: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    precision: tl.constexpr,
):
    """One block of queries: its gradient, its share of the scalars' (unless None), and its delta.

    delta = rowsum(output_gradient * output) is what the backward pass of SoftMax subtracts. The
    kernel for the keys, launched after this one, reads it. As the output is rounded, the gradients
    of a row of scores do not quite add up to 0. The sums for the scalars would multiply this rest
    by what their terms have in common, and in half precision drown in it, but for `centred`.
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
    lse = tl.load(logsumexp + place, mask=rows < queries, other=0.0)
    d = tl.sum(o.to(dtype) * do.to(dtype), 1)
    tl.store(delta + place, d, mask=rows < queries)

    i, j = tl.arange(0, block_queries)[:, None], tl.arange(0, block_keys)[None, :]
    dq = tl.zeros((block_queries, width), dtype)
    sums = zero_sums((block_queries, 4), dtype, order)
    means = zero_sums((block_queries, 4), dtype, order)
    residual = tl.zeros((block_queries, 4), dtype)
    end = tl.minimum(keys, first + block_queries + keys - queries) if causal else keys
    for start in range(0, end, block_keys):
        k = load_tile(key, start, keys, block_keys, dim, width)
        v = load_tile(value, start, keys, block_keys, dim, width)
        scores = tl.dot(q, tl.trans(k), input_precision=precision)
        gradient = tl.dot(do, tl.trans(v), input_precision=precision)
        tile_mask = mask_of_tile(
            mask, batch, head, first, start, i, j, queries, keys, causal, mask_by_query
        )
        scores, added, tile_mask = add_bias(
            scores, tile_mask, bias, score_scale, batch, head, first, start, i, j, queries, keys,
            bias_before, dtype,
        )  # fmt: skip
        factor = 1.0
        if dropout is not None:
            factor = dropout_factor(seed, dropout, row, first + i, start + j, queries, keys, dtype)
        probabilities, gradient, slope, scores = backward_tile(
            scores, added, tile_mask, lse[:, None], d[:, None], gradient, factor, c, order
        )
        if coefficient_gradient is not None:
            sums = add_to_sums(sums, gradient, scores, slope, c, order)
            means = add_to_sums(means, probabilities, scores, slope, c, order)
            residual += fold(gradient)
        dq += tl.dot((gradient * slope).to(k.dtype), k, input_precision=precision)

    query_gradient = of_head(query_gradient, batch, head)
    store_tile(query_gradient, score_scale * c[0] * dq, first, queries, block_queries, dim, width)
    if coefficient_gradient is not None:
        share = tl.program_id(0).to(tl.int64) * (2 + 4 * order)
        sums = centred(sums, means, residual, order)
        store_coefficient_gradient(coefficient_gradient + share, sums, 0.0, c, order)


@triton.jit(do_not_specialize=["seed"])
def attention_backward_key_value(
    query,
    key,
    value,
    mask,
    bias,
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

    dk = tl.zeros((block_keys, width), dtype)
    dv = tl.zeros((block_keys, width), dtype)
    begin = tl.maximum(0, first - (keys - queries)) // block_queries if causal else 0
    for head in range(key_head * group, (key_head + 1) * group):
        row = batch * heads + head
        query_of_head = of_head(query, batch, head)
        gradient_of_head = of_head(output_gradient, batch, head)
        for start in range(begin * block_queries, queries, block_queries):
            q = load_tile(query_of_head, start, queries, block_queries, dim, width)
            do = load_tile(gradient_of_head, start, queries, block_queries, dim, width)
            rows = start + tl.arange(0, block_queries)
            lse = tl.load(logsumexp + row * queries + rows, mask=rows < queries, other=0.0)
            d = tl.load(delta + row * queries + rows, mask=rows < queries, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=precision)
            gradient = tl.dot(v, tl.trans(do), input_precision=precision)
            tile_mask = mask_of_tile(
                mask, batch, head, start, first, i, j, queries, keys, causal, mask_by_query
            )
            scores, added, tile_mask = add_bias(
                scores, tile_mask, bias, score_scale, batch, head, start, first, i, j,
                queries, keys, bias_before, dtype,
            )  # fmt: skip
            factor = 1.0
            if dropout is not None:
                factor = dropout_factor(
                    seed, dropout, row, start + i, first + j, queries, keys, dtype
                )
            probabilities, gradient, slope, _ = backward_tile(
                scores, added, tile_mask, lse[None, :], d[None, :], gradient, factor, c, order
            )
            dv += tl.dot((probabilities * factor).to(do.dtype), do, input_precision=precision)
            dk += tl.dot((gradient * slope).to(q.dtype), q, input_precision=precision)

    key_gradient = of_head(key_gradient, batch, key_head)
    value_gradient = of_head(value_gradient, batch, key_head)
    store_tile(key_gradient, score_scale * c[0] * dk, first, keys, block_keys, dim, width)
    store_tile(value_gradient, dv, first, keys, block_keys, dim, width)
