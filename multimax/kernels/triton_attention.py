"""Attention over modulated scores in Triton, without a (queries, keys) matrix in memory.

Compared with the eager function in Triton's interpreter and compiled for NVIDIA GPUs of capability
8.0, 9.0, 10.0 and 12.0, but neither run nor timed on one.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from multimax.functional import check_bias, check_mask
from multimax.kernels.triton_attention_bias import attention_backward_bias
from multimax.kernels.triton_attention_kernels import (
    attention_backward_key_value,
    attention_backward_query,
    attention_forward,
)
from multimax.kernels.triton_modulation import check_device, compute_dtype, order_of

LARGEST_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    bias: Tensor | None = None,
    bias_before: bool = False,
) -> Tensor:
    """`softmax(sigma(c0 x + c1)) value` with `x = scale * query key^T`; masks act after sigma.

    What `multimax.attention.attention` computes with MultiMax of order 1 or 2 or with SoftMax, in
    memory that grows with the length instead of its square. All gradients are the same to the bit
    in every run; those of the coefficients have the precision of fp32 for fp16 and bf16, too.

    Args:
        query: (B, H, queries, D), on a GPU, of any strides; fp16, bf16, fp32 or fp64, and D at
            most 128 (16, 32, 64 and 128 waste nothing).
        key: (B, H', keys, D), where H' divides H: query head h reads key head h // (H / H').
        value: (B, H', keys, D).
        coefficients: (2 + 4N,) `[c0, c1, ts (2N), ranges (2N)]` of order N = 0, 1 or 2, with the
            `ts` and `ranges` of `multimax.normalizers.multimax.modulate`; used in fp32 or wider.
            MultiMax has c0 = 1 and c1 = 0 unless it is affine. N = 0 is SoftMax of temperature
            1 / c0.
        mask: bool, broadcastable to (B, H, queries, keys), True where a key may be attended. It is
            never expanded in memory, but copied if its rows differ and are no multiples of 16.
        causal: let query i attend to keys up to i + keys - queries. Combines with `mask`.
        dropout: in [0, 1), applied to the probabilities; pass 0 in evaluation. The seed is drawn
            from torch's default CPU generator.
        scale: factor on the products of queries and keys; None is 1 / sqrt(D).
        bias: real, of four dimensions that broadcast to (B, H, queries, keys); added to sigma, and
            masking with entries of at most `functional.MASK_FLOOR`. It is never expanded in memory.
        bias_before: add the bias to x, inside of sigma.

    Returns:
        (B, H, queries, D) in the dtype of `query`; zeros for a query that may attend to nothing.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.

    Source: Dao, FlashAttention-2, 2023 (the algorithm), with the modulator before its SoftMax.
    """
    _check(query, key, value, mask, dropout)
    order_of(coefficients, query.device)
    if mask is not None:
        mask = _expanded(mask, query, key.size(2))
    scale = 1 / math.sqrt(query.size(3)) if scale is None else scale
    if bias is not None:
        _check_bias(bias, query, key.size(2))
    options = (mask, causal, dropout, scale, bias is not None and bias_before)
    return _Attention.apply(query, key, value, coefficients, bias, *options)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> None:
    check_device("query", query)
    check_mask(mask)
    if query.dim() != 4 or not 1 <= query.size(3) <= LARGEST_HEAD_DIM:
        raise ValueError(
            f"query must be (batch, heads, queries, head_dim) with head_dim in 1 ... "
            f"{LARGEST_HEAD_DIM}, got shape {tuple(query.shape)}: reshape it, or use "
            "multimax.attention.attention"
        )
    batch, heads, _, dim = query.shape
    if key.dim() != 4 or (key.size(0), key.size(3)) != (batch, dim):
        raise ValueError(
            f"key must be ({batch}, key heads, keys, {dim}) to fit query, got shape "
            f"{tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}: for "
            "another head_dim use multimax.attention.attention"
        )
    if key.size(1) == 0 or heads % key.size(1):
        raise ValueError(
            f"key must have a number of heads that divides the {heads} of query, got {key.size(1)}"
        )
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                f"query, key and value must have one real floating-point dtype, got {name} in "
                f"{tensor.dtype} and query in {query.dtype}: use .to(...)"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on the device of query, {query.device}, got {tensor.device}: use "
                f".to({str(query.device)!r})"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def _check_bias(bias: Tensor, query: Tensor, keys: int) -> None:
    if bias.dim() != 4 or bias.device != query.device:
        raise ValueError(
            f"bias must have four dimensions on {query.device}, got shape {tuple(bias.shape)} on "
            f"{bias.device}"
        )
    check_bias(bias, (*query.shape[:3], keys))


def _expanded(mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """The mask as integers of shape (B, H, queries, keys), broadcast by strides of 0."""
    if mask.device != query.device:
        raise ValueError(
            f"mask must be on the device of query, {query.device}, got {mask.device}: use "
            f".to({str(query.device)!r})"
        )
    shape = (*query.shape[:3], keys)
    try:
        mask = mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mask must broadcast to (batch, heads, queries, keys) = {shape}, got shape "
            f"{tuple(mask.shape)}"
        ) from None
    mask = mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride())]
    # A tile of a mask is read 16 entries at a time, for which its rows must begin and end there.
    if min(mask.shape[2:]) > 1 and (keys % 16 or mask.stride(2) % 16 or mask.stride(3) != 1):
        mask = F.pad(mask, (0, -keys % 16))[..., :keys]
    # Triton 3.8 does not compile fp64 products with what depends on a load of narrower numbers.
    integers = mask.long() if query.dtype == torch.float64 else mask.view(torch.uint8)
    return integers.expand(shape)


class Blocks(NamedTuple):
    """The size of a tile, and the warps and pipeline stages of the program that computes it."""

    queries: int
    keys: int
    warps: int
    stages: int


def block_sizes(width: int, dtype: torch.dtype) -> tuple[Blocks, Blocks, Blocks]:
    """For the output, for the gradient of the query, and for those of key and value.

    Read off the compiler's report for order 2, with and without causal, mask and dropout, on
    capability 8.0 and 9.0: the largest tiles whose programs keep (nearly) all in registers and, on
    8.0, fit into the 99 KB of shared memory of the smaller GPUs. The backward passes hold several
    tiles of scores at once, and the query's the sums for the coefficients. fp32 has no tensor cores
    unless TF32 is allowed; fp64 serves to check the others.
    """
    if dtype == torch.float64:
        blocks = Blocks(16, 16, warps=4, stages=1)
        return blocks, blocks, blocks
    if dtype == torch.float32:
        blocks = Blocks(32, 32, warps=8, stages=2)
        return blocks, blocks, blocks
    return (
        Blocks(128, 64, warps=8, stages=2),
        Blocks(128, 16, warps=8, stages=2),
        Blocks(32, 128 if width <= 64 else 64, warps=8, stages=2),
    )


def _width(query: Tensor) -> int:
    """The head dimension of a tile: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(query.size(3)))


def _options(query: Tensor, blocks: Blocks) -> dict[str, Any]:
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "dim": query.size(3),
        "width": _width(query),
        "block_queries": blocks.queries,
        "block_keys": blocks.keys,
        "precision": "tf32" if tf32 and query.dtype == torch.float32 else "ieee",
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _programs(tensor: Tensor, block: int) -> tuple[int]:
    return (tensor.size(0) * tensor.size(1) * triton.cdiv(tensor.size(2), block),)


def _strided(**tensors: Tensor | None) -> dict[str, Any]:
    return {name: t if t is None else (t, *t.stride()) for name, t in tensors.items()}


class _Attention(Function):
    @staticmethod
    def forward(
        ctx, query, key, value, coefficients, bias, mask, causal, dropout, scale, bias_before
    ):
        # The kernels see products of queries and keys: `scale` becomes a part of c0, but for a bias
        # that is added to the scores.
        c = torch.cat([coefficients, coefficients.new_ones(1)]).to(compute_dtype(query.dtype))
        c[-1 if bias_before else 0] *= scale
        arguments = {
            "heads": query.size(1),
            "group": query.size(1) // key.size(1),
            "queries": query.size(2),
            "keys": key.size(2),
            "seed": int(torch.randint(2**31 - 1, (), device="cpu")) if dropout else 0,
            "dropout": float(dropout) if dropout else None,
            "order": order_of(coefficients, query.device),
            "causal": bool(causal),
            "mask_by_query": mask is not None and mask.stride(2) != 0,
            "bias_before": bias_before,
        }
        output = torch.empty_like(query)
        logsumexp = c.new_empty(query.shape[:3])
        blocks, _, _ = block_sizes(_width(query), query.dtype)
        with torch.cuda.device_of(query):
            attention_forward[_programs(query, blocks.queries)](
                **_strided(query=query, key=key, value=value, mask=mask, output=output),
                **_strided(bias=_expanded_bias(bias, query, key)),
                coefficients=c,
                logsumexp=logsumexp,
                **arguments,
                **_options(query, blocks),
            )
        ctx.save_for_backward(query, key, value, bias, mask, c, output, logsumexp)
        ctx.arguments, ctx.scale, ctx.coefficients_dtype = arguments, scale, coefficients.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, bias, mask, c, output, logsumexp = ctx.saved_tensors
        _, of_query, of_key = block_sizes(_width(query), query.dtype)
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        programs = _programs(query, of_query.queries)
        parts = c.new_empty(*programs, c.numel() - 1) if ctx.needs_input_grad[3] else None
        delta = torch.empty_like(logsumexp)
        common = _strided(
            query=query, key=key, value=value, mask=mask, output_gradient=output_gradient
        )
        common |= _strided(bias=_expanded_bias(bias, query, key))
        common |= {"coefficients": c, "logsumexp": logsumexp, "delta": delta, **ctx.arguments}
        with torch.cuda.device_of(query):
            attention_backward_query[programs](
                **common,
                **_strided(output=output, query_gradient=dq),
                coefficient_gradient=parts,
                **_options(query, of_query),
            )
            attention_backward_key_value[_programs(key, of_key.keys)](
                **common,
                **_strided(key_gradient=dk, value_gradient=dv),
                **_options(query, of_key),
            )
        of_bias = _bias_gradient(bias, common, query, of_query) if ctx.needs_input_grad[4] else None
        gradient = None if parts is None else _coefficient_gradient(parts, ctx)
        return dq, dk, dv, gradient, of_bias, *[None] * 5


def _expanded_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(*query.shape[:3], key.size(2))


def _bias_gradient(bias: Tensor, common: dict[str, Any], query: Tensor, blocks: Blocks) -> Tensor:
    """Of the shape of the bias: a sum over what it is broadcast over, always in the same order."""
    gradient = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    sizes = (*query.shape[:3], common["keys"])
    names = ("by_batch", "by_head", "by_query", "by_key")
    own = {name: n == whole for name, n, whole in zip(names, bias.shape, sizes, strict=True)}
    programs = bias.size(0) * bias.size(1)
    programs *= triton.cdiv(common["queries"], blocks.queries) if own["by_query"] else 1
    programs *= triton.cdiv(common["keys"], blocks.keys) if own["by_key"] else 1
    if programs:
        with torch.cuda.device_of(query):
            attention_backward_bias[(programs,)](
                **common,
                **_strided(bias_gradient=gradient),
                batches=query.size(0),
                of_heads=bias.size(1),
                **own,
                **_options(query, blocks),
            )
    return gradient


def _coefficient_gradient(parts: Tensor, ctx: Any) -> Tensor:
    """The sum of what the programs wrote, in fp64: there can be many, of both signs."""
    gradient = parts.sum(0, dtype=torch.float64)
    if not ctx.arguments["bias_before"]:
        gradient[0] *= ctx.scale
    return gradient.to(ctx.coefficients_dtype)
