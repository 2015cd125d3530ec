"""Attention on the CPU by `csrc/attention.c`, a tile of queries at a time.

No queries x keys matrix is ever held: the forward pass keeps two numbers per row, from which the
backward pass computes the probabilities again. Memory grows linearly with the sequence.
"""

from typing import Any

import torch
from torch import Tensor

from multimax.functional import check_bias, eager_attention, modulated_softmax, repeat_heads
from multimax.kernels import c_library
from multimax.kernels.c_library import address
from multimax.kernels.c_rows import (
    check_shape,
    contiguous_rows,
    differentiable_gradients,
    order_of,
)


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
) -> Tensor:
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

    Returns:
        (batch, heads, queries, value_dim).
    """
    c_library.check_coefficients(coefficients, query)
    seed = torch.randint(2**62, (1,)) if dropout > 0 else None
    options = (mask, seed, causal, dropout, scale, bias_before)
    return _Attention.apply(query, key, value, coefficients, bias, *options)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, coefficients, bias, mask, seed, *options):
        inputs = (query, key, value, coefficients, bias)
        out, statistics = torch.ops.multimax.attention_forward(*inputs, mask, seed, *options)
        ctx.save_for_backward(*inputs, mask, seed, out, statistics)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, grad) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, mask, seed, out, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = differentiable_gradients(
                attention_definition(inputs, mask, ctx.options), inputs, grad
            )
        else:
            learned, of_bias = ctx.needs_input_grad[3:5]
            *grads, d_bias = torch.ops.multimax.attention_backward(
                *inputs, mask, seed, *ctx.options, out, statistics, grad, learned, of_bias
            )
            grads = [*grads, d_bias if of_bias else None]
        return *grads, *[None] * 6


def attention_definition(inputs, mask, options) -> Tensor:
    """The attention in operations that can be differentiated again."""
    query, key, value, coefficients, bias = inputs
    causal, dropout, scale, bias_before = options
    if dropout > 0:
        raise RuntimeError(
            "second derivatives of attention with dropout need `with use_backend('eager')`"
        )
    key, value = repeat_heads(query, key, value)
    tensors = (query, key, value, _Normalizer(coefficients), mask)
    place = "before" if bias_before else "after"
    return eager_attention(*tensors, causal, 0.0, scale, bias, place)


class _Normalizer:
    """What coefficients stand for, with the interface of a `Normalizer`."""

    def __init__(self, coefficients: Tensor) -> None:
        self.coefficients = coefficients

    def __call__(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return modulated_softmax(scores, self.coefficients, -1, mask)

    def biased(self, scores: Tensor, bias: Tensor, mask: Tensor, place: str) -> Tensor:
        if place == "before":
            return self(scores + bias.to(scores.dtype), mask)
        return modulated_softmax(scores, self.coefficients, -1, mask, bias)


@torch.library.custom_op("multimax::attention_forward", mutates_args=())
def _attention_forward(
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
) -> tuple[Tensor, Tensor]:
    q, k, v = (_for_kernel(tensor) for tensor in (query, key, value))
    out = _new_out(q, v)
    statistics = q.new_empty(*q.shape[:-1], 2)
    options = (mask, seed, causal, dropout, scale, bias_before)
    arguments = _describe(q, k, v, coefficients, bias, *options)
    arguments.out, arguments.out_strides = address(out, q.dtype), _strides(out)
    arguments.statistics = address(statistics, q.dtype)
    c_library.call(q.dtype, "attention_forward", arguments)
    return out.to(query.dtype), statistics


@_attention_forward.register_fake
def _(query, key, value, coefficients, *_):
    statistics = coefficients.new_empty(*query.shape[:-1], 2)
    return _new_out(query, value), statistics


@torch.library.custom_op("multimax::attention_backward", mutates_args=())
def _attention_backward(
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
    out: Tensor,
    statistics: Tensor,
    grad: Tensor,
    learned: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, d_out = (_for_kernel(tensor) for tensor in (query, key, value, grad))
    of_out = _for_kernel(out)
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    sums = torch.zeros(coefficients.shape, dtype=torch.float64)
    options = (mask, seed, causal, dropout, scale, bias_before)
    arguments = _describe(q, k, v, coefficients, bias, *options)
    check_shape((*q.shape[:3], v.size(3)), of_out, d_out)
    check_shape((*q.shape[:3], 2), statistics)
    arguments.out, arguments.out_strides = address(of_out, q.dtype), _strides(of_out)
    arguments.statistics = address(statistics, q.dtype)
    arguments.d_out, arguments.d_out_strides = address(d_out, q.dtype), _strides(d_out)
    arguments.d_query, arguments.d_key, arguments.d_value = (
        address(t, q.dtype) for t in (dq, dk, dv)
    )
    if learned:
        arguments.sums = address(sums, torch.float64)
    d_bias = q.new_zeros(0 if bias is None or not of_bias else bias.shape)
    if of_bias:
        arguments.d_bias, arguments.d_bias_strides = address(d_bias, q.dtype), _broadcast(d_bias)
    c_library.call(q.dtype, "attention_backward", arguments)
    (dq if bias_before else sums[0]).mul_(scale)
    d_bias = d_bias if bias is None else d_bias.to(bias.dtype)
    d_coefficients = sums.to(coefficients.dtype)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), d_coefficients, d_bias


@_attention_backward.register_fake
def _(query, key, value, coefficients, bias, *options):
    like = torch.contiguous_format
    inputs = (query, key, value, coefficients)
    grads = [torch.empty_like(tensor, memory_format=like) for tensor in inputs]
    d_bias = (
        query.new_empty(0) if bias is None else bias.new_empty(bias.shape if options[-1] else 0)
    )
    return *grads, d_bias


def _describe(q, k, v, coefficients, bias, mask, seed, causal, dropout, scale, bias_before) -> Any:
    """The attention for the kernels, but for what it writes; holds on to what is made here."""
    _check_shapes(q, k, v)
    c_library.check_order(coefficients)
    coefficients = coefficients.contiguous()
    if bias_before:  # the scores are scaled before it is added
        q, scale = q * scale, 1.0
    arguments = c_library.Attention(
        batch=q.size(0), heads=q.size(1), key_heads=k.size(1), queries=q.size(2), keys=k.size(2),
        dim=q.size(3), value_dim=v.size(3),
        query=address(q, q.dtype), key=address(k, q.dtype), value=address(v, q.dtype),
        query_strides=_strides(q), key_strides=_strides(k), value_strides=_strides(v),
        causal=causal, dropout=dropout, score_scale=scale, seed=0 if seed is None else int(seed),
        threads=torch.get_num_threads(), order=order_of(coefficients),
        coefficients=address(coefficients, q.dtype),
    )  # fmt: skip
    arguments.held = [q, coefficients]
    if bias is not None:
        arguments.bias_before, bias = bias_before, _bias_for_kernel(bias, q, k)
        arguments.bias, arguments.bias_strides = address(bias, q.dtype), _broadcast(bias)
        arguments.held.append(bias)
    if mask is not None:
        mask = contiguous_rows(mask.expand(*q.shape[:3], k.size(2)))
        arguments.mask, arguments.mask_strides = address(mask, torch.bool), _strides(mask)
        arguments.held.append(mask)
    return arguments


def _bias_for_kernel(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The bias in the dtype of the computation, of size 1 where it is broadcast."""
    shape = (*q.shape[:3], k.size(2))
    if bias.dim() != 4:
        raise ValueError(f"bias must have four dimensions, got shape {tuple(bias.shape)}")
    check_bias(bias, shape)
    return bias[tuple(slice(1) if n == 0 else slice(None) for n in bias.stride())].to(q.dtype)


def _broadcast(bias: Tensor) -> Any:
    """The strides by which a tensor is expanded."""
    return tuple(0 if n == 1 else step for n, step in zip(bias.shape, bias.stride(), strict=True))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for tensors that do not belong together; attention() says more."""
    fits = q.dim() == k.dim() == v.dim() == 4 and k.size(1) > 0 and q.size(1) % k.size(1) == 0
    if not fits or (q.size(0), q.size(3)) != (k.size(0), k.size(3)) or k.shape[:3] != v.shape[:3]:
        shapes = (tuple(t.shape) for t in (q, k, v))
        raise ValueError("query {}, key {} and value {} do not fit together".format(*shapes))


def _new_out(query: Tensor, value: Tensor) -> Tensor:
    """(batch, heads, queries, value_dim) in the memory of (batch, queries, heads, value_dim).

    Merging the heads is then a view, so that the output projection saves the same memory as this.
    """
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.size(-1)).transpose(1, 2)


def _strides(tensor: Tensor) -> Any:
    return tensor.stride()[:3]


def _for_kernel(tensor: Tensor) -> Tensor:
    """fp32 or fp64, with stride 1 in the last dimension."""
    tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
