"""The two passes of attention in `csrc/attention.c` as operators that `torch.compile` keeps."""

from typing import Any

import torch
from torch import Tensor

from multimax.functional import broadcasts, check_bias
from multimax.kernels import c_library
from multimax.kernels.c_library import address
from multimax.kernels.c_rows import check_shape, contiguous_rows, order_of


@torch.library.custom_op("multimax::attention_forward", mutates_args=())
def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    bias_before: bool,
    factor_first: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The result, and of each row the highest logit and 1 / sum exp(logit - highest), 0 if empty.

    The arguments are those of `c_attention`, and the seed of dropout.
    """
    q, k, v = (_for_kernel(tensor) for tensor in (query, key, value))
    out = _new_out(q, v)
    statistics = q.new_empty(*q.shape[:-1], 2)
    options = (mask, seed, causal, dropout, scale, bias_before, factor_first, softcap)
    arguments = _describe(q, k, v, coefficients, bias, factor, *options)
    arguments.out, arguments.out_strides = address(out, q.dtype), _strides(out)
    arguments.statistics = address(statistics, q.dtype)
    c_library.call(q.dtype, "attention_forward", arguments)
    return out.to(query.dtype), statistics


@attention_forward.register_fake
def _(query, key, value, coefficients, *_):
    statistics = coefficients.new_empty(*query.shape[:-1], 2)
    return _new_out(query, value), statistics


@torch.library.custom_op("multimax::attention_backward", mutates_args=())
def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    bias_before: bool,
    factor_first: bool,
    softcap: float | None,
    out: Tensor,
    statistics: Tensor,
    grad: Tensor,
    grad_logsumexp: Tensor | None,
    learned: bool,
    of_bias: bool,
    of_factor: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, coefficients, bias and factor; of no size if not wanted.

    The arguments are those of `attention_forward`, what it has returned, the gradients of that, and
    of which inputs gradients are wanted.
    """
    q, k, v, d_out = (_for_kernel(tensor) for tensor in (query, key, value, grad))
    of_out = _for_kernel(out)
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    sums = torch.zeros(coefficients.shape, dtype=torch.float64)
    options = (mask, seed, causal, dropout, scale, bias_before, factor_first, softcap)
    arguments = _describe(q, k, v, coefficients, bias, factor, *options)
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
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.contiguous()
        check_shape(q.shape[:3], grad_logsumexp)
        arguments.d_logsumexp = address(grad_logsumexp, q.dtype)
    d_bias = q.new_zeros(0 if bias is None or not of_bias else bias.shape)
    if of_bias:
        arguments.d_bias, arguments.d_bias_strides = address(d_bias, q.dtype), _broadcast(d_bias)
    shape = 0 if factor is None or not of_factor else factor.shape
    d_factor = torch.zeros(shape, dtype=torch.float64)
    if of_factor:
        d_rows = torch.zeros(q.shape[:3], dtype=torch.float64)
        arguments.d_rows = address(d_rows, torch.float64)
        arguments.d_factor = address(d_factor, torch.float64)
        arguments.d_factor_strides = _broadcast(d_factor)[:3]
    c_library.call(q.dtype, "attention_backward", arguments)
    (dq if _scales_query(bias_before, factor, softcap) else sums[0]).mul_(scale)
    d_bias = d_bias if bias is None else d_bias.to(bias.dtype)
    d_factor = d_factor.to(q.dtype if factor is None else factor.dtype)
    d_coefficients = sums.to(coefficients.dtype)
    gradients = (dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), d_coefficients)
    return *gradients, d_bias, d_factor


@attention_backward.register_fake
def _(query, key, value, coefficients, bias, factor, *options):
    like = torch.contiguous_format
    inputs = (query, key, value, coefficients)
    grads = [torch.empty_like(tensor, memory_format=like) for tensor in inputs]
    for tensor, wanted in zip((bias, factor), options[-2:], strict=True):
        is_none = tensor is None
        grads.append(
            query.new_empty(0) if is_none else tensor.new_empty(tensor.shape if wanted else 0)
        )
    return tuple(grads)


def _describe(
    q, k, v, coefficients, bias, factor, mask, seed, causal, dropout, scale, bias_before,
    factor_first, softcap,
) -> Any:  # fmt: skip
    """The attention for the kernels, but for what it writes; holds on to what is made here."""
    _check_shapes(q, k, v)
    c_library.check_order(coefficients)
    coefficients = coefficients.contiguous()
    if _scales_query(bias_before, factor, softcap):
        q, scale = q * scale, 1.0
    arguments = c_library.Attention(
        batch=q.size(0), heads=q.size(1), key_heads=k.size(1), queries=q.size(2), keys=k.size(2),
        dim=q.size(3), value_dim=v.size(3),
        query=address(q, q.dtype), key=address(k, q.dtype), value=address(v, q.dtype),
        query_strides=_strides(q), key_strides=_strides(k), value_strides=_strides(v),
        causal=causal, dropout=dropout, score_scale=scale, seed=0 if seed is None else int(seed),
        threads=torch.get_num_threads(), order=order_of(coefficients),
        coefficients=address(coefficients, q.dtype), softcap=softcap or 0.0,
    )  # fmt: skip
    arguments.held = [q, coefficients]
    if bias is not None:
        arguments.bias_before, bias = bias_before, _bias_for_kernel(bias, q, k)
        arguments.bias, arguments.bias_strides = address(bias, q.dtype), _broadcast(bias)
        arguments.held.append(bias)
    if factor is not None:
        arguments.factor_first, factor = factor_first, _factor_for_kernel(factor, q)
        arguments.factor, arguments.factor_strides = address(factor, q.dtype), _strides(factor)
        arguments.held.append(factor)
    if mask is not None:
        mask = contiguous_rows(mask.expand(*q.shape[:3], k.size(2)))
        arguments.mask, arguments.mask_strides = address(mask, torch.bool), _strides(mask)
        arguments.held.append(mask)
    return arguments


def _scales_query(bias_before: bool, factor: Tensor | None, softcap: float | None) -> bool:
    """Whether something acts on scaled scores, which the kernel then finds as products."""
    return bias_before or factor is not None or softcap is not None


def _factor_for_kernel(factor: Tensor, q: Tensor) -> Tensor:
    """The factors in the dtype of the computation, expanded to all rows."""
    shape = (*q.shape[:3], 1)
    if factor.dim() != 4 or not factor.is_floating_point() or not broadcasts(factor.shape, shape):
        raise ValueError(
            f"factor must be real and broadcast to {shape}, got {factor.dtype} of shape "
            f"{tuple(factor.shape)}"
        )
    return factor.to(q.dtype).expand(shape)


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
