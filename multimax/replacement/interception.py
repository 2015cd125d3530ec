"""Modules whose SoftMax is taken on its way: another normalizer gets what they hand to SoftMax.

The forward of such a module runs as its library wrote it. Only its calls of SoftMax and of torch's
attention functions go to the module's `normalizer`, by torch's protocol for overriding functions,
which `torch.compile`, `torch.export` and gradient checkpointing follow too.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from multimax.attention import attention
from multimax.functional import MASK_FLOOR
from multimax.normalizers import Normalizer
from multimax.replacement.additive import split_additive
from multimax.replacement.multi_head import multi_head_attention

SOFTMAX = {torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax}
# What would compute SoftMax where no normalizer can be put.
UNREACHABLE = {
    torch._transformer_encoder_layer_fwd: "the fused encoder layer of torch",
    torch._native_multi_head_attention: "the fused attention of torch",
    torch.ops.higher_order.flex_attention: "flex_attention",
}


class _Guard(TorchFunctionMode):
    """Refuses what computes SoftMax where no normalizer can be put."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in UNREACHABLE:
            raise RuntimeError(f"{UNREACHABLE[func]} was called, which has SoftMax inside")
        return func(*args, **(kwargs or {}))


class Interception(_Guard):
    """Gives what is normalized inside a `with` block to a normalizer, and counts it.

    Args:
        normalizer: takes the place of SoftMax.
        bias_place: of a bias that comes with the mask of torch's attention functions, see
            `multimax.attention.attention`.
    """

    def __init__(self, normalizer: Normalizer, bias_place: str) -> None:
        super().__init__()
        self.normalizer: Normalizer = normalizer
        self.bias_place: str = bias_place
        self.bias: Tensor | None = None  # of `with_bias`
        self.calls: int = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAX:
            self.calls += 1
            return self._softmax(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            self.calls += 1
            return multi_head_attention(self.normalizer, self.bias_place, *args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def _softmax(self, scores: Tensor, dim: int, *rest: Any, dtype: Any = None, **_: Any) -> Tensor:
        dtypes = [option for option in (*rest, dtype) if isinstance(option, torch.dtype)]
        scores = scores.to(dtypes[0]) if dtypes else scores
        if self.bias is None:
            return self.normalizer(scores, dim)
        hidden = self.bias <= MASK_FLOOR
        bias = self.bias.masked_fill(hidden, 0)
        return self.normalizer.biased(scores, bias, ~hidden, self.bias_place)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        mask, bias = split_additive(attn_mask)
        queries, keys = query.size(-2), key.size(-2)
        if is_causal and queries != keys:  # torch lets query i see keys up to i
            triangle = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
            mask, is_causal = triangle if mask is None else mask & triangle, False
        return attention(
            query,
            key,
            value,
            self.normalizer,
            mask=mask,
            causal=is_causal,
            dropout=dropout_p,
            scale=scale,
            bias=bias,
            bias_place=self.bias_place,
        )


def with_bias(bias: Tensor | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function in an intercepted forward returns, called with scores that have no bias yet.

    Args:
        bias: is added to what it hands to SoftMax, over the last dimension, as `bias_place` says.
            Entries of at most `functional.MASK_FLOOR` mask.
        function: calls SoftMax.
        args: of it.
        kwargs: of it.

    Raises:
        RuntimeError: no intercepted forward is at work.
    """
    modes = _get_current_function_mode_stack()
    current = next((mode for mode in reversed(modes) if isinstance(mode, Interception)), None)
    if current is None:
        raise RuntimeError(
            f"{function.__qualname__} was called outside of the attention layer that has its "
            "normalizer: call that layer"
        )
    current.bias = bias
    try:
        return function(*args, **kwargs)
    finally:
        current.bias = None


def intercept(module: nn.Module) -> None:
    """Let a module, which has a `normalizer`, be of the subclass whose SoftMax goes there.

    It keeps everything that it has, and can be copied and pickled.
    """
    module.__class__ = derive(type(module), intercepted_forward)


def guarded(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module class whose fused form, which has SoftMax inside, is not used."""
    return derive(base, _guarded_forward)


def original_class(module: nn.Module) -> type[nn.Module] | None:
    """What the class of a module was before; None if it is still that."""
    return getattr(type(module), "replaced_class", None)


@cache
def derive(base: type[nn.Module], forward: Callable[..., Any], **others: Any) -> type[nn.Module]:
    """The subclass of a module class with another forward, which finds it as `replaced_class`.

    Args:
        base: the class.
        forward: of the subclass.
        others: further members.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        _, _, *state = base.__reduce_ex__(self, protocol)
        return _new, (base, forward, others), *state

    members = {"forward": forward, "replaced_class": base, "__reduce_ex__": reduce, **others}
    return type(base.__name__, (base,), {**members, "__module__": base.__module__})


def _new(
    base: type[nn.Module], forward: Callable[..., Any], others: Mapping[str, Any]
) -> nn.Module:
    derived = derive(base, forward, **others)
    return derived.__new__(derived)


def intercepted_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of the class that it was, over `self.normalizer`."""
    base = type(self).replaced_class
    interception = Interception(self.normalizer, self.bias_place)
    # Not `base.forward`: torch.compile takes some classes of diffusers for functions.
    original: Any = super(type(self), self)
    with interception:
        result = original.forward(*args, **kwargs)
    if interception.calls != 1:
        raise RuntimeError(
            f"{base.__qualname__} normalized {interception.calls} times in one forward pass, where "
            "exactly one SoftMax was to be replaced: take the attention processor, backend or "
            "kernel that it had before; restore_softmax(model) undoes the replacement"
        )
    return result


def _guarded_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _Guard():  # any mode makes torch take its ordinary path
        return type(self).replaced_class.forward(self, *args, **kwargs)
