"""Where a Triton attention program works: its tiles in memory, what they may see, what is dropped.

A tensor of four dimensions is a tuple (pointer, *strides), the matrix of one of its heads a tuple
(pointer, row stride, column stride). Places inside a tile are index vectors that broadcast to it,
(queries, 1) and (1, keys), or (1, queries) and (keys, 1) for a transposed one. What grows with the
whole tensor is int64, what stays inside a tile int32.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton compiles these functions from their source; their arguments have no type a checker knows.

import triton
import triton.language as tl

from multimax.kernels.triton_modulation import FLOOR


@triton.jit
def place_of_program(heads, length, size: tl.constexpr):
    """The program's row of (batch x heads), its batch and head, and where its block starts."""
    blocks = tl.cdiv(length, size)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, row // heads, row % heads, (tl.program_id(0) % blocks) * size


@triton.jit
def of_head(tensor, batch, head):
    """The matrix of one head."""
    return tensor[0] + batch * tensor[1] + head * tensor[2], tensor[3], tensor[4]


@triton.jit
def _tile(matrix, first, end, size: tl.constexpr, dim: tl.constexpr, width: tl.constexpr):
    """Pointers to `size` rows from `first` on, of `width` columns, and which of them exist.

    Rows exist before `end`, columns before `dim`.
    """
    rows, columns = tl.arange(0, size)[:, None], tl.arange(0, width)[None, :]
    inside = first + rows < end
    if dim < width:
        inside = inside & (columns < dim)
    start = matrix[0] + tl.cast(first, tl.int64) * matrix[1]
    return start + rows * matrix[1] + columns * matrix[2], inside


@triton.jit
def load_tile(matrix, first, end, size: tl.constexpr, dim: tl.constexpr, width: tl.constexpr):
    """A tile (size, width), zero where nothing exists."""
    pointers, inside = _tile(matrix, first, end, size, dim, width)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(
    matrix, tile, first, end, size: tl.constexpr, dim: tl.constexpr, width: tl.constexpr
):
    """Write what exists of a tile, in the dtype of the tensor."""
    pointers, inside = _tile(matrix, first, end, size, dim, width)
    tl.store(pointers, tile.to(matrix[0].dtype.element_ty), mask=inside)


@triton.jit
def mask_of_tile(
    mask,
    batch,
    head,
    first_query,
    first_key,
    query,
    key,
    queries,
    keys,
    causal: tl.constexpr,
    mask_by_query: tl.constexpr,
):
    """Which pairs of a tile exist and may attend.

    `mask` is a tensor of integers or None. If it is the same for all queries of a head, as padding
    is, only one row is read. Else the memory of its rows goes on to a multiple of 16 keys.
    """
    query_id, key_id = first_query + query, first_key + key
    tile_mask = (query_id < queries) & (key_id < keys)
    if mask is not None:
        start, query_stride, key_stride = of_head(mask, batch, head)
        pointers = start + tl.cast(first_key, tl.int64) * key_stride + key * key_stride
        if mask_by_query:
            pointers += tl.cast(first_query, tl.int64) * query_stride + query * query_stride
            readable = (query_id < queries) & (key_id < tl.cdiv(keys, 16) * 16)
            inside = tl.load(pointers, mask=readable, other=0)
        else:
            inside = tl.load(pointers, mask=key_id < keys, other=0)
        tile_mask = tile_mask & (inside != 0)
    if causal:
        tile_mask = tile_mask & (key_id <= query_id + (keys - queries))
    return tile_mask


@triton.jit
def whole_keys(first, queries, keys, block_keys: tl.constexpr, causal: tl.constexpr):
    """Before which key all tiles of a block of queries are whole: nothing in them is masked.

    A query that does not exist may attend: nothing of it is kept.
    """
    end = keys
    if causal:
        end = tl.maximum(0, tl.minimum(keys, first + keys - queries + 1))
    return end // block_keys * block_keys


@triton.jit
def bias_of_tile(
    bias, batch, head, first_query, first_key, query, key, queries, keys, dtype: tl.constexpr
):
    """The bias of a tile, 0 where nothing exists, and where it masks nothing."""
    start, query_stride, key_stride = of_head(bias, batch, head)
    query_id, key_id = first_query + query, first_key + key
    pointers = start + tl.cast(query_id, tl.int64) * query_stride
    pointers += tl.cast(key_id, tl.int64) * key_stride
    tile = tl.load(pointers, mask=(query_id < queries) & (key_id < keys), other=0.0).to(dtype)
    return tile, (tile > FLOOR) | (tile != tile)


@triton.jit
def shown_of_tile(
    scores, mask, bias, batch, head, first_query, first_key, query, key, queries, keys,
    causal: tl.constexpr, mask_by_query: tl.constexpr, bias_before: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Scores of a tile with a bias before the modulation, what is added after it, and the mask."""
    added = 0.0
    tile_mask = mask_of_tile(
        mask, batch, head, first_query, first_key, query, key, queries, keys, causal, mask_by_query
    )
    if bias is not None:
        added, shown = bias_of_tile(
            bias, batch, head, first_query, first_key, query, key, queries, keys, dtype
        )
        tile_mask = tile_mask & shown
        if bias_before:
            scores += added
            added = 0.0
    return scores, added, tile_mask


@triton.jit
def factor_of_rows(factor, batch, head, first, query, queries):
    """The factor of each row, of the shape of `query`, and 1 beyond the last row.

    `factor` is a tensor (B, H, queries, 1) in the dtype of the scores.
    """
    start, query_stride, _ = of_head(factor, batch, head)
    pointers = start + tl.cast(first + query, tl.int64) * query_stride
    return tl.load(pointers, mask=first + query < queries, other=1.0)


@triton.jit
def dropout_factor(seed, dropout, row, query_id, key_id, queries, keys, dtype: tl.constexpr):
    """D of a tile: a function of nothing but the seed and the place in the whole tensor."""
    place = (row * queries + query_id) * keys + key_id
    factor = 1.0 / (1.0 - tl.cast(dropout, dtype))
    return tl.where(tl.rand(seed, place) >= dropout, factor, 0.0)
