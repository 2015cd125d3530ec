"""Attention on the CPU by `csrc/attention.c`, a tile of queries at a time.

No queries x keys matrix is ever held: the forward pass keeps two numbers per row, from which the
backward pass computes the probabilities again. Memory grows linearly with the sequence.
"""

from typing import Any

import torch
from torch import Tensor

from multimax.functional import eager_attention, modulated_softmax, repeat_heads
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
) -> Tensor:
    """Attention with SoftMax of sigma(a * scale * query key^T + c), [a, c, ...] = coefficients.

    Args:
        query: (batch, heads, queries, head_dim), fp32, fp64 or half (computed in fp32).
        key: (batch, key_heads, keys, head_dim), heads a multiple of key_heads.
        value: (batch, key_heads, keys, value_dim).
        coefficients: (2 + 4 N,), `[scale, shift, ts, ranges]`, N = 0, 1 or 2.
        mask: bool, broadcastable to (batch, heads, queries, keys), or None.
        causal, dropout, scale: as in `multimax.attention.attention`.

    Returns:
        (batch, heads, queries, value_dim).
    """
    c_library.check_coefficients(coefficients, query)
    seed = torch.randint(2**62, (1,)) if dropout > 0 else None
    return _Attention.apply(query, key, value, coefficients, mask, seed, causal, dropout, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, coefficients, mask, seed, causal, dropout, scale):
        options = (mask, seed, causal, dropout, scale)
        out, statistics = torch.ops.multimax.attention_forward(
            query, key, value, coefficients, *options
        )
        ctx.save_for_backward(query, key, value, coefficients, mask, seed, out, statistics)
        ctx.options = options[2:]
        return out

    @staticmethod
    def backward(ctx, grad) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, coefficients, mask, seed, out, statistics = ctx.saved_tensors
        inputs = (query, key, value, coefficients)
        if torch.is_grad_enabled():
            grads = differentiable_gradients(_definition(inputs, mask, ctx.options), inputs, grad)
        else:
            learned = ctx.needs_input_grad[3]
            grads = torch.ops.multimax.attention_backward(
                *inputs, mask, seed, *ctx.options, out, statistics, grad, learned
            )
        return *grads, None, None, None, None, None


def _definition(inputs, mask, options) -> Tensor:
    """The attention in operations that can be differentiated again."""
    query, key, value, coefficients = inputs
    causal, dropout, scale = options
    if dropout > 0:
        raise RuntimeError(
            "second derivatives of attention with dropout need `with use_backend('eager')`"
        )

    def normalizer(scores, mask):
        return modulated_softmax(scores, coefficients, -1, mask)

    key, value = repeat_heads(query, key, value)
    return eager_attention(query, key, value, normalizer, mask, causal, 0.0, scale)


@torch.library.custom_op("multimax::attention_forward", mutates_args=())
def _attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = (_for_kernel(tensor) for tensor in (query, key, value))
    out = _new_out(q, v)
    statistics = q.new_empty(*q.shape[:-1], 2)
    arguments = _describe(q, k, v, coefficients, mask, seed, causal, dropout, scale)
    arguments.out, arguments.out_strides = address(out, q.dtype), _strides(out)
    arguments.statistics = address(statistics, q.dtype)
    c_library.call(q.dtype, "attention_forward", arguments)
    return out.to(query.dtype), statistics


@_attention_forward.register_fake
def _(query, key, value, coefficients, mask, seed, causal, dropout, scale):
    statistics = coefficients.new_empty(*query.shape[:-1], 2)
    return _new_out(query, value), statistics


@torch.library.custom_op("multimax::attention_backward", mutates_args=())
def _attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    out: Tensor,
    statistics: Tensor,
    grad: Tensor,
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, d_out = (_for_kernel(tensor) for tensor in (query, key, value, grad))
    of_out = _for_kernel(out)
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    sums = torch.zeros(coefficients.shape, dtype=torch.float64)
    arguments = _describe(q, k, v, coefficients, mask, seed, causal, dropout, scale)
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
    c_library.call(q.dtype, "attention_backward", arguments)
    sums[0] *= scale
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), sums.to(coefficients.dtype)


@_attention_backward.register_fake
def _(query, key, value, coefficients, *_):
    like = torch.contiguous_format
    grads = (torch.empty_like(t, memory_format=like) for t in (query, key, value, coefficients))
    return tuple(grads)


def _describe(q, k, v, coefficients, mask, seed, causal, dropout, scale) -> Any:
    """The attention for the kernels, but for what it writes; holds on to what is made here."""
    _check_shapes(q, k, v)
    c_library.check_order(coefficients)
    folded = coefficients.clone(memory_format=torch.contiguous_format)
    folded[0] *= scale
    arguments = c_library.Attention(
        batch=q.size(0), heads=q.size(1), key_heads=k.size(1), queries=q.size(2), keys=k.size(2),
        dim=q.size(3), value_dim=v.size(3),
        query=address(q, q.dtype), key=address(k, q.dtype), value=address(v, q.dtype),
        query_strides=_strides(q), key_strides=_strides(k), value_strides=_strides(v),
        causal=causal, dropout=dropout, seed=0 if seed is None else int(seed),
        threads=torch.get_num_threads(), order=order_of(coefficients),
        coefficients=address(folded, q.dtype),
    )  # fmt: skip
    arguments.held = [folded]
    if mask is not None:
        mask = contiguous_rows(mask.expand(*q.shape[:3], k.size(2)))
        arguments.mask, arguments.mask_strides = address(mask, torch.bool), _strides(mask)
        arguments.held.append(mask)
    return arguments


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
