"""What is known of the attention classes of each library, and how an unknown one is noticed."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from multimax.replacement.interception import intercept

NORMALIZES = {
    "softmax",
    "scaled_dot_product_attention",
    "dispatch_attention_fn",
    "multi_head_attention_forward",
    "flex_attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
}
# Names by which libraries call these numbers.
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
HEAD_DIM = ("head_dim", "attention_head_size", "dim_head", "dim_per_head", "key_value_proj_dim")


@dataclass(frozen=True)
class AttentionClass:
    """What must be known to put a normalizer into a class of attention modules.

    Args:
        biased_scores: its SoftMax gets scores to which a finite bias has been added already, so
            that only `bias_place="before"` is possible.
        finite_mask: it masks by adding a finite number such as -100, which a modulator could lift,
            so that only `bias_place="after"` is possible.
        refused: why no other normalizer can take the place of its SoftMax.
        not_attention: what its SoftMax is for, if not for attention: it is left alone.
        container: what its own code normalizes is no attention, but modules in it may attend.
        intercept: changes the class of a module so that its SoftMax goes to `module.normalizer`.
    """

    biased_scores: bool = False
    finite_mask: bool = False
    refused: str | None = None
    not_attention: str | None = None
    container: bool = False
    intercept: Callable[[Any], None] = intercept


def qualified_name(cls: type) -> str:
    """Such as "torch.nn.modules.activation.MultiheadAttention"."""
    return f"{cls.__module__}.{cls.__qualname__}"


def defining_class(cls: type[nn.Module]) -> type:
    """The class that the forward of a module class is written in."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def known_module(module: nn.Module) -> AttentionClass | None:
    """What is known of a module, by its class or the one that its forward is inherited from."""
    from multimax.replacement.diffusers_route import with_processor

    found = known_classes().get(qualified_name(defining_class(type(module))))
    return found(module) if callable(found) else found or with_processor(module)


@cache
def known_classes() -> dict[str, AttentionClass | Callable[[Any], AttentionClass]]:
    """All known attention classes by their qualified names; functions of a module where the class
    does not tell.
    """
    from multimax.replacement import (
        diffusers_classes,
        plain_torch,
        timm_classes,
        transformers_classes,
        x_transformers_classes,
    )

    return {
        **plain_torch.CLASSES,
        **timm_classes.CLASSES,
        **transformers_classes.CLASSES,
        **diffusers_classes.CLASSES,
        **x_transformers_classes.CLASSES,
    }


def normalizes(cls: type[nn.Module]) -> bool:
    """Whether the forward of a module class has SoftMax or attention in its code."""
    return bool(names_used(cls) & NORMALIZES)


def lets_normalize(module: nn.Module) -> bool:
    """Whether an object that a module holds, such as a processor of diffusers, normalizes."""
    held = (type(value) for value in vars(module).values() if not isinstance(value, nn.Module))
    calling = (cls for cls in held if isinstance(vars(cls).get("__call__"), FunctionType))
    return any(names_used(cls, "__call__", type(module)) & NORMALIZES for cls in calling)


def names_used(cls: type, method: str = "forward", caller: type | None = None) -> set[str]:
    """Names in the code of a method of a class, such as the forward of a module.

    Its own methods, those of `caller` and the functions of its package that it calls are read too;
    the modules in it are not.
    """
    package = cls.__module__.partition(".")[0]
    waiting: list[Any] = [inspect.unwrap(getattr(cls, method))]
    seen: set[CodeType] = set()
    used: set[str] = set()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        names = _names(function.__code__)
        used |= names
        for name in names:
            called = function.__globals__.get(name) or getattr(cls, name, None)
            called = called or getattr(caller, name, None)
            if str(getattr(called, "__module__", "")).partition(".")[0] == package:
                waiting.append(inspect.unwrap(called) if callable(called) else called)
    return used


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def size_of(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is an integer, of a module or of its configuration."""
    places = (module, getattr(module, "config", None))
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if isinstance(value, int)), None)
