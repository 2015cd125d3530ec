"""Attention on the CPU by `csrc/attention.c`, a tile of queries at a time.

No queries x keys matrix is ever held: the forward pass keeps two numbers per row, from which the
backward pass computes the probabilities again. Memory grows linearly with the sequence.
"""

import math
from typing import Any

import torch
from torch import Tensor

from multimax.functional import (
    masked_logsumexp,
    masked_scores,
    masked_softmax,
    modulated_logits,
    repeat_heads,
    to_compute_precision,
)
from multimax.kernels import c_attention_operators as operators
from multimax.kernels import c_library
from multimax.kernels.c_rows import differentiable_gradients


def c_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    bias: Tensor | None = None,
    bias_before: bool = False,
    factor: Tensor | None = None,
    factor_first: bool = False,
    softcap: float | None = None,
    with_logsumexp: bool = False,
) -> Any:
    """Attention with SoftMax of sigma(a * scale * query key^T + c), [a, c, ...] = coefficients.

    Args:
        query: (batch, heads, queries, head_dim), fp32, fp64 or half (computed in fp32).
        key: (batch, key_heads, keys, head_dim), heads a multiple of key_heads.
        value: (batch, key_heads, keys, value_dim).
        coefficients: (2 + 4 N,), `[scale, shift, ts, ranges]`, N = 0, 1 or 2.
        mask: bool, broadcastable to (batch, heads, queries, keys), or None.
        causal, dropout, scale: as in `multimax.attention.attention`.
        bias: real, of four dimensions that broadcast to (batch, heads, queries, keys), or None. Its
            gradient has its shape; both are copied if it has another dtype than the computation.
        bias_before: add it to scale * query key^T and not to sigma of it.
        factor: > 0, of four dimensions that broadcast to (batch, heads, queries, 1), or None;
            multiplies sigma, before a bias that is added to it.
        factor_first: it multiplies scale * query key^T, with a bias of `bias_before`, instead.
        softcap: c > 0 of c tanh(sigma / c), before a factor that multiplies sigma; or None.
        with_logsumexp: return also log sum exp of what SoftMax is taken of.

    Returns:
        (batch, heads, queries, value_dim), and (batch, heads, queries) in fp32 or wider if asked
        for: -inf for a query that may attend to nothing, without gradients.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
    """
    c_library.check_coefficients(coefficients, query)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None, got {softcap!r}")
    seed = torch.randint(2**62, (1,)) if dropout > 0 else None
    options = (mask, seed, with_logsumexp, causal, dropout, scale, bias_before)
    steps = (factor_first, softcap)
    return _Attention.apply(query, key, value, coefficients, bias, factor, *options, *steps)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, coefficients, bias, factor, mask, seed, with_logsumexp, *options
    ):
        inputs = (query, key, value, coefficients, bias, factor)
        out, statistics = operators.attention_forward(*inputs, mask, seed, *options)
        ctx.save_for_backward(*inputs, mask, seed, out, statistics)
        ctx.options = options
        if not with_logsumexp:
            return out
        highest, inverse = statistics.unbind(-1)
        return out, (highest - inverse.log()).masked_fill(inverse == 0, -torch.inf)

    @staticmethod
    def backward(ctx, grad, grad_logsumexp=None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, mask, seed, out, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            *first, factor = inputs
            *options, factor_first, softcap = ctx.options
            with_logsumexp = grad_logsumexp is not None
            outputs = attention_definition(
                first, mask, options, factor, factor_first, softcap, with_logsumexp
            )
            given = (grad, grad_logsumexp) if with_logsumexp else grad
            grads = differentiable_gradients(outputs, inputs, given)
        else:
            learned, of_bias, of_factor = ctx.needs_input_grad[3:6]
            *others, d_bias, d_factor = operators.attention_backward(
                *inputs, mask, seed, *ctx.options, out, statistics, grad, grad_logsumexp,
                learned, of_bias, of_factor,
            )  # fmt: skip
            grads = *others, d_bias if of_bias else None, d_factor if of_factor else None
        return *grads, *[None] * 9


def attention_definition(
    inputs, mask, options, factor=None, factor_first=False, softcap=None, with_logsumexp=False
) -> Any:
    """The attention in operations that can be differentiated again.

    Args:
        inputs: query, key, value, coefficients and bias, as in `c_attention`.
        mask: as there.
        options: causal, dropout, scale and bias_before, as there.
        factor, factor_first, softcap, with_logsumexp: as there.
    """
    query, key, value, coefficients, bias = inputs
    causal, dropout, scale, bias_before = options
    if dropout > 0:
        raise RuntimeError(
            "second derivatives of attention with dropout need `with use_backend('eager')`"
        )
    key, value = repeat_heads(query, key, value)
    scores, mask, bias = masked_scores(query, key, mask, causal, scale, bias)
    scores = to_compute_precision(scores)
    if bias_before and bias is not None:
        scores, bias = scores + bias.to(scores.dtype), None
    factor = factor if factor is None else factor.to(scores.dtype)
    logits = modulated_logits(scores, coefficients, mask, bias, factor, factor_first, softcap)
    out = masked_softmax(logits, -1, None).to(value.dtype) @ value
    return (out, masked_logsumexp(logits, -1)) if with_logsumexp else out
