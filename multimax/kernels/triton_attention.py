"""Attention over modulated scores in Triton, without a (queries, keys) matrix in memory.

Compared with the eager function in Triton's interpreter and, before the last change, on an H200,
where it was timed (`benchmarks.gpu`); compiled for GPUs of capability 8.0, 10.0 and 12.0, but
not run on them.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from multimax.kernels.c_attention import attention_definition
from multimax.kernels.c_rows import differentiable_gradients
from multimax.kernels.triton_arguments import (
    Blocks,
    block_sizes,
    check_attention,
    check_attention_bias,
    check_attention_mask,
    expanded_mask,
    launch_options,
    programs_of,
    strided,
)
from multimax.kernels.triton_attention_backward import (
    attention_backward_key_value,
    attention_backward_query,
)
from multimax.kernels.triton_attention_bias import attention_backward_bias
from multimax.kernels.triton_attention_forward import attention_forward
from multimax.kernels.triton_modulation import compute_dtype, order_of


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
    check_attention(query, key, value, dropout)
    order_of(coefficients, query.device)
    if mask is not None:
        check_attention_mask(mask, query, key.size(2))
    if bias is not None:
        check_attention_bias(bias, query, key.size(2))
    scale = 1 / math.sqrt(query.size(3)) if scale is None else scale
    seed = torch.randint(2**31 - 1, (1,), device="cpu") if dropout else None
    options = (mask, seed, causal, dropout, scale, bias is not None and bias_before)
    return _Attention.apply(query, key, value, coefficients, bias, *options)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, coefficients, bias, mask, seed, *options):
        inputs = (query, key, value, coefficients, bias)
        output, logsumexp, scalars = torch.ops.multimax.triton_attention_forward(
            *inputs, mask, seed, *options
        )
        ctx.save_for_backward(*inputs, mask, seed, output, logsumexp, scalars)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx, gradient) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, mask, seed, output, logsumexp, scalars = ctx.saved_tensors
        if torch.is_grad_enabled():
            definition = attention_definition(inputs, mask, ctx.options)
            gradients = differentiable_gradients(definition, inputs, gradient)
        else:
            learned, of_bias = ctx.needs_input_grad[3:5]
            *gradients, d_coefficients, d_bias = torch.ops.multimax.triton_attention_backward(
                *inputs,
                mask,
                seed,
                *ctx.options,
                output,
                logsumexp,
                scalars,
                gradient,
                learned,
                of_bias,
            )
            of_coefficients = d_coefficients if learned else None
            gradients = [*gradients, of_coefficients, d_bias if of_bias else None]
        return *gradients, *[None] * 6


# Operations that torch.compile takes as they are.
@torch.library.custom_op("multimax::triton_attention_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    bias_before: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scalars = _new_scalars(query, coefficients)
    scalars[:-1].copy_(coefficients)
    scalars[-1].fill_(scale)  # to assign a number would make the host wait
    options = (causal, dropout, bias_before)
    common = _arguments(query, key, value, scalars, bias, mask, seed, *options)
    output, logsumexp = _new_output(query), _new_statistics(query)
    blocks, _, _ = block_sizes(query.dtype, common["order"])
    with torch.cuda.device_of(query):
        attention_forward[programs_of(query, blocks.queries)](
            **common,
            **strided(output=output),
            logsumexp=logsumexp,
            **launch_options(query, blocks),
        )
    return output, logsumexp, scalars


@_forward.register_fake
def _(query, key, value, coefficients, *_):
    return _new_output(query), _new_statistics(query), _new_scalars(query, coefficients)


@torch.library.custom_op("multimax::triton_attention_backward", mutates_args=())
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    bias_before: bool,
    output: Tensor,
    logsumexp: Tensor,
    scalars: Tensor,
    gradient: Tensor,
    learned: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = (causal, dropout, bias_before)
    common = _arguments(query, key, value, scalars, bias, mask, seed, *options)
    common |= strided(output_gradient=gradient)
    common |= {"logsumexp": logsumexp, "delta": torch.empty_like(logsumexp)}
    _, of_query, of_key = block_sizes(query.dtype, common["order"])
    dq, dk, dv, d_coefficients, d_bias = _new_gradients(
        query, key, value, coefficients, bias, of_bias
    )
    programs = programs_of(query, of_query.queries)
    parts = None
    if learned:
        parts = logsumexp.new_empty(*programs, coefficients.numel())
    with torch.cuda.device_of(query):
        attention_backward_query[programs](
            **common,
            **strided(output=output, query_gradient=dq),
            coefficient_gradient=parts,
            **launch_options(query, of_query),
        )
        attention_backward_key_value[programs_of(key, of_key.keys)](
            **common,
            **strided(key_gradient=dk, value_gradient=dv),
            **launch_options(query, of_key),
        )
        if of_bias and bias is not None:
            _bias_gradient(d_bias.zero_(), common, query, of_query)
    if parts is not None:  # in fp64: there can be many, of both signs
        d_coefficients.copy_(parts.sum(0, dtype=torch.float64))
    return dq, dk, dv, d_coefficients, d_bias


@_backward.register_fake
def _(query, key, value, coefficients, bias, *options):
    return _new_gradients(query, key, value, coefficients, bias, options[-1])


def _new_output(query: Tensor) -> Tensor:
    """(B, H, queries, D) in the memory of (B, queries, H, D).

    Merging the heads is then a view, so that the output projection saves the same memory as this.
    """
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)


def _new_statistics(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))


def _new_scalars(query: Tensor, coefficients: Tensor) -> Tensor:
    """For the coefficients and, after them, `scale`."""
    return query.new_empty(coefficients.numel() + 1, dtype=compute_dtype(query.dtype))


def _new_gradients(query, key, value, coefficients, bias, of_bias) -> tuple[Tensor, ...]:
    """Not filled, but for the bias of no size if its gradient is not wanted."""
    inputs = (query, key, value, coefficients)
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    if bias is None or not of_bias:
        return *gradients, query.new_empty(0)
    return *gradients, torch.empty_like(bias, memory_format=torch.contiguous_format)


def _arguments(
    query, key, value, scalars, bias, mask, seed, causal, dropout, bias_before
) -> dict[str, Any]:
    """What all kernels are given."""
    if mask is not None:
        mask = expanded_mask(mask, query, key.size(2))
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.size(2))
    return {
        **strided(query=query, key=key, value=value, mask=mask, bias=bias),
        "coefficients": scalars,
        "heads": query.size(1),
        "group": query.size(1) // key.size(1),
        "queries": query.size(2),
        "keys": key.size(2),
        "seed": 0 if seed is None else int(seed),
        "dropout": dropout or None,
        "order": order_of(scalars[:-1], query.device),
        "causal": causal,
        "mask_by_query": mask is not None and mask.stride(2) != 0,
        "bias_before": bias_before,
    }


def _bias_gradient(gradient: Tensor, common: dict[str, Any], query: Tensor, blocks: Blocks) -> None:
    """Add to a gradient of the bias's shape: a sum over what it is broadcast over."""
    sizes = (*query.shape[:3], common["keys"])
    names = ("by_batch", "by_head", "by_query", "by_key")
    own = {name: n == whole for name, n, whole in zip(names, gradient.shape, sizes, strict=True)}
    programs = gradient.size(0) * gradient.size(1)
    programs *= triton.cdiv(common["queries"], blocks.queries) if own["by_query"] else 1
    programs *= triton.cdiv(common["keys"], blocks.keys) if own["by_key"] else 1
    if programs:
        attention_backward_bias[(programs,)](
            **common,
            **strided(bias_gradient=gradient),
            batches=query.size(0),
            of_heads=gradient.size(1),
            **own,
            **launch_options(query, blocks),
        )
