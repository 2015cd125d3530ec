"""Scaled dot-product attention over any normalizer: scale, modulate, mask, normalize, dropout."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from multimax.functional import (
    check_bias,
    check_device,
    check_heads,
    check_mask,
    check_not_nested,
    eager_attention,
    repeat_heads,
)
from multimax.kernels import c_rows
from multimax.kernels.backend import (
    check_backend,
    chosen_backend,
    refuse,
    triton_obstacle,
    use_backend,
)
from multimax.kernels.c_attention import c_attention
from multimax.normalizers import Normalizer
from multimax.normalizers.steps import kernel_steps, left_by_sink

LARGEST_TRITON_HEAD = 128
ROWS = 512  # of scores, at most, that a kernel shows to hooks which are content with some
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: Normalizer,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
    bias: Tensor | None = None,
    bias_place: str = "after",
) -> Tensor:
    """`normalizer(scale * query key^T) value`; masks act after the normalizer's modulation.

    Args:
        query: (..., queries, head_dim).
        key: (..., keys, head_dim). With (..., heads, queries, head_dim) for the query, it may have
            fewer heads, of which each serves as many consecutive query heads (grouped heads).
        value: (..., keys, value_dim), with the heads of `key`.
        normalizer: maps scores (..., queries, keys) to probabilities over the keys.
        mask: bool, broadcastable to (..., queries, keys), True where a key may be attended.
        causal: let query i attend to keys up to i + keys - queries, so that the last query sees
            all keys, as in incremental decoding. Combines with `mask`.
        dropout: in [0, 1), applied to the probabilities; pass 0 in evaluation.
        scale: factor on the scores; None is 1 / sqrt(head_dim).
        backend: see `multimax.kernels.backend.use_backend`, whose choice None takes. "auto" calls
            the normalizer (and so its hooks) unless it can be fused. A forward hook with an
            attribute `takes_rows` that is true is content with some rows, beside any kernel.
        bias: real, broadcastable to (..., queries, keys): relative positions, ALiBi. Entries of at
            most `functional.MASK_FLOOR`, such as -inf, mask; the others are added to the scores.
        bias_place: "after" adds it to the modulated scores, so that positions neither change what
            is modulated nor are modulated themselves; "before" adds it inside. The same where the
            normalizer has no modulation.

    Returns:
        (..., queries, value_dim); zeros for a query that may attend to nothing. Under autocast,
        query, key and value are cast to its dtype, which the result then has, as by
        `F.scaled_dot_product_attention`.

    Raises:
        ValueError: `mask` is not boolean, it or `bias` does not broadcast to the scores, the shapes
            of query, key and value do not fit together, `dropout` is out of range, or `bias_place`
            or `backend` is unknown or cannot compute this.
    """
    query, key, value = _autocast(query, key, value)
    _check(query, key, value, mask, dropout)
    _check_bias(query, key, bias, bias_place)
    if scale is None:
        scale = 1 / math.sqrt(query.size(-1))
    name = chosen_backend() if backend is None else backend
    kernel = _choose(name, query, key, value, normalizer, bias)
    if kernel is None:
        key, value = repeat_heads(query, key, value)
        with nullcontext() if backend is None else use_backend(backend):  # of the normalizer too
            return eager_attention(
                query, key, value, normalizer, mask, causal, dropout, scale, bias, bias_place
            )
    q, k, v, mask, bias, leading = _four_dimensions(query, key, value, mask, bias)
    dtype = torch.promote_types(query.dtype, torch.float32)
    coefficients = normalizer.coefficients(dtype, query.device)
    bias_before = bias is not None and bias_place == "before"
    if any(map(_takes_rows, normalizer._forward_hooks.values())):
        _show_rows(q, k, normalizer, mask, causal, scale, bias, bias_place)
    steps: dict[str, Any] = {}
    if normalizer.has_steps:
        steps = kernel_steps(normalizer, q, k.size(2), mask, causal, bias)
    out = kernel(q, k, v, coefficients, mask, causal, dropout, scale, bias, bias_before, **steps)
    if "with_logsumexp" in steps:
        out = left_by_sink(normalizer, *out)
    return out.reshape(*leading, *out.shape[-2:])


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast if it is enabled; it leaves fp64 alone."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    lower = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(tensor.to(dtype) if tensor.dtype in lower else tensor for tensor in tensors)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> None:
    """Raise ValueError for what the kernels, which take addresses, would not notice."""
    check_not_nested(query, key, value)
    check_device(query, key=key, value=value, mask=mask)
    dtypes = {query.dtype, key.dtype, value.dtype}
    if not dtypes <= DTYPES:
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: they must be "
            "float16, bfloat16, float32 or float64, use .float()"
        )
    if query.size(-1) != key.size(-1) or key.size(-2) != value.size(-2):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}: "
            "query and key must have one head_dim, key and value one number of keys"
        )
    if query.size(-1) == 0:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} have a head_dim of 0, the last "
            "dimension: it must be at least 1"
        )
    if mask is not None:
        check_mask(mask, (*_leading(query, key), query.size(-2), key.size(-2)))
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def _check_bias(query: Tensor, key: Tensor, bias: Tensor | None, place: str) -> None:
    if place not in ("after", "before"):
        raise ValueError(f"bias_place must be 'after' or 'before', got {place!r}")
    if bias is not None:
        check_device(query, bias=bias)
        check_bias(bias, (*_leading(query, key), query.size(-2), key.size(-2)))


def _leading(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """The dimensions of the scores before (queries, keys)."""
    of_query, of_key = query.shape[:-2], key.shape[:-2]
    if of_query == of_key:
        return tuple(of_query)
    if of_query and of_key:  # grouped heads are repeated
        of_key = (*of_key[:-1], 1)
    return tuple(torch.broadcast_shapes(of_query, of_key))


def _choose(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: Normalizer,
    bias: Tensor | None,
) -> Callable[..., Any] | None:
    """The kernel for this attention, None for the definition; ValueError if `name` cannot do it."""
    check_backend(name)
    if name == "eager":
        return None
    if name == "auto":
        if _hooked(normalizer):
            return None
        name = "triton" if query.device.type == "cuda" else "c"
        return None if _obstacle(name, query, key, value, normalizer, bias) else _KERNELS[name]
    obstacle = _obstacle(name, query, key, value, normalizer, bias)
    if obstacle:
        refuse(name, "this attention", f"{normalizer}: " * (obstacle == _NO_MODULATOR) + obstacle)
    return _KERNELS[name]


def _hooked(normalizer: Normalizer) -> bool:
    """Whether hooks, its own or those of all modules, want to see all scores and probabilities,
    which a kernel never holds.
    """
    own = (
        normalizer._forward_pre_hooks,
        not all(map(_takes_rows, normalizer._forward_hooks.values())),
        normalizer._backward_pre_hooks,
        normalizer._backward_hooks,
    )
    return any(map(bool, own)) or bool(torch_module._has_any_global_hook())


def _takes_rows(hook: Any) -> bool:
    return getattr(hook, "takes_rows", False)


@torch.no_grad()
def _show_rows(
    query: Tensor,
    key: Tensor,
    normalizer: Normalizer,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    bias: Tensor | None,
    bias_place: str,
) -> None:
    """Call the normalizer, and so its hooks, on up to `ROWS` rows: of all heads, and of items of
    the batch and queries that are spread evenly.
    """
    batch, heads, queries, _ = query.shape
    keys = key.size(2)
    items = _spread(batch, ROWS // max(heads, 1), query.device)
    rows = _spread(queries, ROWS // max(heads * len(items), 1), query.device)

    def chosen(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.expand(batch, heads, queries, keys)[items][:, :, rows]

    mask, bias = chosen(mask), chosen(bias)
    if causal:
        seen = torch.arange(keys, device=rows.device) <= rows[:, None] + keys - queries
        mask = seen if mask is None else mask & seen
    query, key = query[items][:, :, rows], key[items]
    key, nothing = repeat_heads(query, key, key[..., :0])
    eager_attention(query, key, nothing, normalizer, mask, False, 0.0, scale, bias, bias_place)


def _spread(size: int, count: int, device: torch.device) -> Tensor:
    """The middles of up to `count`, at least one, equal parts of `size` places."""
    count = min(size, max(count, 1))
    return (2 * torch.arange(count, device=device) + 1) * size // max(2 * count, 1)


def _obstacle(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    normalizer: Normalizer,
    bias: Tensor | None = None,
) -> str | None:
    """Why a kernel cannot compute an attention; None if it can."""
    if not normalizer.fusible:
        return _NO_MODULATOR
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}"
    if name == "c":
        return c_rows.obstacle(query)
    obstacle = triton_obstacle(query)
    if obstacle:
        return obstacle
    widest = max(query.size(-1), value.size(-1))
    if widest > LARGEST_TRITON_HEAD or query.size(-1) != value.size(-1):
        return (
            f"head dimensions are {query.size(-1)} and {value.size(-1)}, it takes equal ones of up "
            f"to {LARGEST_TRITON_HEAD}"
        )
    return None


def _triton(*arguments: Any, **steps: Any) -> Any:
    from multimax.kernels.triton_attention import triton_attention  # not everyone has Triton

    return triton_attention(*arguments, **steps)


# Without the normalizer, as torch.compile of torch 2.9 branches on no text made of a module.
_NO_MODULATOR = "it is no SoftMax of scores with a modulator of order <= 2"
_KERNELS = {"c": c_attention, "triton": _triton}


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, torch.Size]:
    """Tensors of (batch, heads, tokens, dim), as the kernels take them, their mask, their bias
    with its own sizes, and the dimensions of the result before (queries, dim).
    """
    fits = query.dim() == key.dim() == 4 and query.size(0) == key.size(0)
    if fits and key.shape[:-2] == value.shape[:-2]:
        check_heads(query, key, value)
        return query, key, value, mask, _bias_of_four(bias, query.shape[:-2]), query.shape[:-2]
    key, value = repeat_heads(query, key, value)
    leading = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    if mask is not None:
        mask = mask.expand(*leading, query.size(-2), key.size(-2))
    tensors = [t.expand(*leading, *t.shape[-2:]) for t in (query, key, value)]
    while tensors[0].dim() < 4:
        tensors = [t.unsqueeze(0) for t in tensors]
        mask = mask if mask is None else mask.unsqueeze(0)
    query, key, value = (t.flatten(0, -4) for t in tensors)
    mask = mask if mask is None else mask.flatten(0, -4)
    return query, key, value, mask, _bias_of_four(bias, leading), leading


def _bias_of_four(bias: Tensor | None, leading: torch.Size) -> Tensor | None:
    """A bias of four dimensions, of which none is expanded that does not need to be."""
    if bias is None:
        return None
    while bias.dim() < max(4, len(leading) + 2):
        bias = bias.unsqueeze(0)
    outer = bias.shape[:-3]  # are one dimension for the kernels
    if outer.numel() > 1:
        bias = bias.expand(*leading[:-1], *bias.shape[-3:])
    return bias.flatten(0, -4)
