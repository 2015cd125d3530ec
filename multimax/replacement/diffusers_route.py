"""Attention of diffusers.

Most of its modules leave their attention to a processor, an object that can be exchanged. Those of
diffusers call torch's attention or `get_attention_scores` once, but for some that are refused.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from multimax.normalizers import Normalizer
from multimax.replacement.classes import NORMALIZES, AttentionClass, names_used, qualified_name
from multimax.replacement.diffusers_classes import BACKENDS, IMAGES, LINEAR, REFUSED
from multimax.replacement.interception import (
    derive,
    intercepted_forward,
    original_class,
    with_bias,
)


def with_processor(module: Any) -> AttentionClass | None:
    """What is known of a module of diffusers that has a processor; None if it is no such module."""
    processor = getattr(module, "processor", None)
    ours = any(base.__module__.startswith("diffusers.") for base in type(module).__mro__)
    if processor is None or not ours:
        return None
    name = type(processor).__name__
    if re.search(LINEAR, name):
        return AttentionClass(not_attention="it is linear, without a SoftMax")
    return AttentionClass(refused=_obstacle(module, processor), intercept=_intercept)


def _obstacle(module: Any, processor: Any) -> str | None:
    """Why no other normalizer can take the place of SoftMax in a processor; None if one can."""
    name = type(processor).__name__
    for pattern, reason in REFUSED.items():
        if re.search(pattern, name):
            return f"{name}: {reason}"
    caller = original_class(module) or type(module)
    used = names_used(type(processor), "__call__", caller) & NORMALIZES
    if not type(processor).__module__.startswith("diffusers.") or not used:
        return (
            f"its processor {qualified_name(type(processor))} is not known: name it in also= if "
            "one call normalizes exactly once, scores over keys"
        )
    images = getattr(module, "add_k_proj", None) or getattr(module, "k_img", None)
    if re.search(IMAGES, name) and images is not None:
        return f"{name}: text and images have a SoftMax each"
    if getattr(module, "use_differential", False):
        return f"{name}: it mixes two SoftMax distributions"
    if "dispatch_attention_fn" in used and _backend(processor) not in BACKENDS:
        return (
            f"the attention backend {_backend(processor)} normalizes inside its kernel: use "
            'model.set_attention_backend("native")'
        )
    return None


def _backend(processor: Any) -> str:
    """The name of the attention backend that a processor uses."""
    dispatch: Any = sys.modules["diffusers.models.attention_dispatch"]
    own = getattr(processor, "_attention_backend", None)
    return str((own or dispatch._AttentionBackendRegistry.get_active_backend()[0]).value)


def _intercept(module: Any) -> None:
    base = original_class(module) or type(module)
    members = {"processor_class": type(module.processor), "set_processor": _set_processor}
    if hasattr(base, "get_attention_scores"):
        members["get_attention_scores"] = _get_attention_scores
    module.__class__ = derive(base, _processed_forward, **members)


def _processed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if type(self.processor) is not type(self).processor_class:
        raise RuntimeError(
            f"{type(self).__name__} has another normalizer and got another processor, "
            f"{type(self.processor).__name__}: use set_processor, which looks whether that fits"
        )
    return intercepted_forward(self, *args, **kwargs)


def _set_processor(self: Any, processor: Any) -> None:
    obstacle = _obstacle(self, processor)
    if obstacle and type(processor) is not type(self).processor_class:
        raise ValueError(
            f"{type(self).__name__} has another normalizer, and {obstacle}; or take the "
            "normalizers out by restore_softmax(model)"
        )
    type(self).replaced_class.set_processor(self, processor)
    _intercept(self)


def _get_attention_scores(
    self: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    original: Any = super(type(self), self)
    return with_bias(attention_mask, original.get_attention_scores, query, key)


def record(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Note in the configurations of models how they were replaced, for `load_pretrained`.

    diffusers warns of what it does not know in a configuration or in the weights.
    """
    for pretrained in _pretrained_models(model):
        if any(isinstance(module, Normalizer) for module in pretrained.modules()):
            pretrained.register_to_config(multimax=dict(arguments))


def forget(model: nn.Module) -> None:
    """Take such notes out again."""
    for pretrained in _pretrained_models(model):
        config = pretrained._internal_dict
        if "multimax" in config:
            kept = {name: value for name, value in config.items() if name != "multimax"}
            pretrained._internal_dict = type(config)(kept)


def _pretrained_models(model: nn.Module) -> Iterator[Any]:
    loaded: Any = sys.modules.get("diffusers.models.modeling_utils")
    if loaded is not None:
        yield from (module for module in model.modules() if isinstance(module, loaded.ModelMixin))
