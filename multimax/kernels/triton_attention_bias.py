"""The Triton kernel of the gradient of a bias, see `multimax.kernels.triton_attention_backward`.

A program adds up what one block of the bias is broadcast over, without atomic additions.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton compiles these functions from their source; their arguments have no type a checker knows.

import triton
import triton.language as tl

from multimax.kernels.triton_logits import backward_tile
from multimax.kernels.triton_modulation import load_coefficients
from multimax.kernels.triton_tiles import (
    dropout_factor,
    factor_of_rows,
    load_tile,
    of_head,
    shown_of_tile,
)


@triton.jit(do_not_specialize=["seed"])
def attention_backward_bias(
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
    bias_gradient,
    batches,
    of_heads,
    heads,
    group,
    queries,
    keys,
    seed,
    dropout,
    by_batch: tl.constexpr,
    by_head: tl.constexpr,
    by_query: tl.constexpr,
    by_key: tl.constexpr,
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
    """One block of the gradient of a bias: the sum over the dimensions in which its size is 1."""
    dtype: tl.constexpr = coefficients.dtype.element_ty
    c = load_coefficients(coefficients, order)
    score_scale = tl.load(coefficients + 2 + 4 * order)
    key_blocks = tl.cdiv(keys, block_keys) if by_key else 1
    query_blocks = tl.cdiv(queries, block_queries) if by_query else 1
    program = tl.program_id(0)
    own_row = program // (key_blocks * query_blocks)
    own_batch, own_head = own_row // of_heads, own_row % of_heads
    first_query = program // key_blocks % query_blocks * block_queries
    first_key = program % key_blocks * block_keys
    end_query = tl.minimum(queries, first_query + block_queries) if by_query else queries
    end_key = tl.minimum(keys, first_key + block_keys) if by_key else keys
    first_batch, end_batch = (own_batch, own_batch + 1) if by_batch else (0, batches)
    first_head, end_head = (own_head, own_head + 1) if by_head else (0, heads)
    i, j = tl.arange(0, block_queries)[:, None], tl.arange(0, block_keys)[None, :]

    total = tl.zeros((block_queries, block_keys), dtype)
    for batch in range(first_batch, end_batch):
        for head in range(first_head, end_head):
            row = tl.cast(batch, tl.int64) * heads + head
            sample, head_of = row // heads, row % heads  # int64
            k_of_head, v_of_head = (
                of_head(key, sample, head_of // group),
                of_head(value, sample, head_of // group),
            )
            for start in range(first_query, end_query, block_queries):
                q = load_tile(
                    of_head(query, sample, head_of), start, queries, block_queries, dim, width
                )
                do = load_tile(
                    of_head(output_gradient, sample, head_of),
                    start,
                    queries,
                    block_queries,
                    dim,
                    width,
                )
                rows = start + tl.arange(0, block_queries)
                lse = tl.load(logsumexp + row * queries + rows, mask=rows < queries, other=0.0)
                d = tl.load(delta + row * queries + rows, mask=rows < queries, other=0.0)
                factor = None
                if row_factor is not None:
                    factor = factor_of_rows(row_factor, sample, head_of, start, i, queries)
                for at in range(first_key, end_key, block_keys):
                    k = load_tile(k_of_head, at, keys, block_keys, dim, width)
                    v = load_tile(v_of_head, at, keys, block_keys, dim, width)
                    scores = score_scale * tl.dot(q, tl.trans(k), input_precision=precision)
                    gradient = tl.dot(do, tl.trans(v), input_precision=precision)
                    scores, added, tile_mask = shown_of_tile(
                        scores, mask, bias, sample, head_of, start, at, i, j, queries, keys, causal,
                        mask_by_query, bias_before, dtype,
                    )  # fmt: skip
                    kept = 1.0
                    if dropout is not None:
                        kept = dropout_factor(
                            seed, dropout, row, start + i, at + j, queries, keys, dtype
                        )
                    _, gradient, derivatives = backward_tile(
                        scores, added, tile_mask, lse[:, None], d[:, None], gradient, kept, factor,
                        c, order, factor_first, softcap,
                    )  # fmt: skip
                    if bias_before:
                        by_modulated, slope, _, _ = derivatives
                        gradient = gradient * by_modulated * (c[0] * slope)
                        if factor_first:
                            gradient *= factor
                    total += gradient

    start, query_stride, key_stride = of_head(
        bias_gradient, tl.cast(own_batch, tl.int64), tl.cast(own_head, tl.int64)
    )
    if not by_query:
        total = tl.sum(total, 0, keep_dims=True)
    if not by_key:
        total = tl.sum(total, 1, keep_dims=True)
    i = first_query + (i if by_query else tl.zeros((1, 1), tl.int32))
    j = first_key + (j if by_key else tl.zeros((1, 1), tl.int32))
    pointers = start + tl.cast(i, tl.int64) * query_stride + tl.cast(j, tl.int64) * key_stride
    exists = (i < end_query) & (j < end_key)
    tl.store(pointers, total.to(bias_gradient[0].dtype.element_ty), mask=exists)
