"""Attention over modulated scores in Triton, without a (queries, keys) matrix in memory.

Compared with the eager function in Triton's interpreter and on an H200, where it was timed
(`benchmarks.gpu`); compiled for GPUs of capability 8.0, 10.0 and 12.0, but not run on them.
"""

import math
from typing import Any

import torch
from torch import Tensor

from multimax.kernels import triton_launch
from multimax.kernels.c_attention import attention_definition
from multimax.kernels.c_rows import differentiable_gradients
from multimax.kernels.triton_arguments import (
    check_attention,
    check_attention_bias,
    check_attention_mask,
    check_attention_steps,
)
from multimax.kernels.triton_modulation import order_of


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
    factor: Tensor | None = None,
    factor_first: bool = False,
    softcap: float | None = None,
    with_logsumexp: bool = False,
) -> Any:
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
        factor: real, of four dimensions that broadcast to (B, H, queries, 1), > 0; multiplies the
            scores of its row. Used in fp32 or wider; its gradient has its shape.
        factor_first: multiply x, and a bias in it, instead of sigma and before a bias after it.
        softcap: c > 0 of c tanh(sigma / c), which bounds sigma before a factor that comes after;
            a program is compiled for each.
        with_logsumexp: also return the logsumexp of each row, with a gradient.

    A row with a factor or a cap masks scores of at most `functional.MASK_FLOOR` that come in.

    Returns:
        (B, H, queries, D) in the dtype of `query`; zeros for a query that may attend to nothing.
        And `with_logsumexp` (B, H, queries) in fp32 or wider; -inf, without a gradient, for such.

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
    check_attention_steps(factor, softcap, query)
    scale = 1 / math.sqrt(query.size(3)) if scale is None else scale
    seed = torch.randint(2**31 - 1, (1,), device="cpu") if dropout else None
    options = (mask, seed, causal, dropout, scale, bias is not None and bias_before)
    steps = (factor is not None and factor_first, softcap, with_logsumexp)
    return _Attention.apply(query, key, value, coefficients, bias, factor, *options, *steps)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, coefficients, bias, factor, mask, seed, *options):
        inputs = (query, key, value, coefficients, bias, factor)
        output, logsumexp, scalars = triton_launch.forward(*inputs, mask, seed, *options)
        ctx.save_for_backward(*inputs, mask, seed, output, logsumexp, scalars)
        ctx.options = options
        if not options[-1]:
            return output
        return output, logsumexp.masked_fill(logsumexp == torch.inf, -torch.inf)

    @staticmethod
    def backward(ctx, *gradients) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, mask, seed, output, logsumexp, scalars = ctx.saved_tensors
        *options, with_logsumexp = ctx.options
        if torch.is_grad_enabled():
            first, steps = ctx.options[:4], (inputs[5], *ctx.options[4:])
            definition = attention_definition(inputs[:5], mask, first, *steps)
            upstream = gradients if with_logsumexp else gradients[0]
            found = differentiable_gradients(definition, inputs, upstream)
        else:
            wanted = ctx.needs_input_grad[3:6]
            statistics = (output, logsumexp, scalars)
            upstream = gradients if with_logsumexp else (*gradients, None)
            found = triton_launch.backward(
                *inputs, mask, seed, *options, *statistics, *upstream, *wanted
            )
            scalars_and_rows = zip(found[3:], wanted, strict=True)
            found = [*found[:3], *(g if is_wanted else None for g, is_wanted in scalars_and_rows)]
        return *found, *[None] * (2 + len(ctx.options))
