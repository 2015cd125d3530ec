"""Attention of Hugging Face transformers, through its interfaces for attention and masks.

A module that asks the interface for its attention keeps its class; what the interface gives it is
`attend`, which finds the normalizer as `module.normalizer`. Masks are those that transformers makes
for torch's attention: an implementation without a mask function of its own would get none.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn

from multimax.normalizers import Normalizer
from multimax.replacement.classes import names_used
from multimax.replacement.transformers_attention import REFUSED, attend

IMPLEMENTATION = "multimax"
# The same with masks that are added to scores, for models whose other attention wants such masks.
ADDITIVE = "multimax_additive"
# Saved in the place of an implementation, which nobody has: transformers refuses to load the model,
# and names what is to be used.
SAVED_IMPLEMENTATION = "multimax.load_pretrained"
# What SoftMax in a class of transformers is for, by its name, if not for attention.
NOT_ATTENTION = {
    r"Router|Gat(e|ing)$|MoE|Moe|Experts": "it chooses experts",
    r"Loss|Criterion|HungarianMatcher": "it is part of a loss",
    r"GumbelVectorQuantizer": "it chooses codes",
}
# Settings by which models change the scores after their output layer, and when they do not.
AFTER_THE_HEAD = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}


def pretrained_models(model: nn.Module) -> list[Any]:
    """The models of transformers in a model, the outermost of nested ones."""
    found: list[Any] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if is_model(module) and module not in inside:
            found.append(module)
            inside |= set(module.modules())
    return found


@cache
def asks_interface(cls: type[nn.Module]) -> bool:
    """Whether the forward of a module class asks transformers for its attention function."""
    if not any(base.__module__.startswith("transformers.") for base in cls.__mro__):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in names_used(cls)


def not_attention(module: nn.Module) -> str | None:
    """What the SoftMax of a module that asks for no attention is for, if that is known."""
    name = type(module).__name__
    if not type(module).__module__.startswith("transformers.") or "Attention" in name:
        return None
    return next((use for pattern, use in NOT_ATTENTION.items() if re.search(pattern, name)), None)


def is_model(module: nn.Module) -> bool:
    """Whether it is a model of transformers: what its own code normalizes is no attention."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(module, loaded.PreTrainedModel)


def obstacle(module: nn.Module) -> str | None:
    """Why no other normalizer can take the place of SoftMax in a module; None if one can."""
    for name in _keywords(type(module)) & REFUSED.keys():
        if name != "s_aux" or getattr(module, "sinks", ...) is not None:
            return REFUSED[name]
    return None


@cache
def _keywords(cls: type[nn.Module]) -> set[str]:
    """The names of keyword arguments in the forward of a module class."""
    constants = inspect.unwrap(cls.forward).__code__.co_consts
    return {name for names in constants if isinstance(names, tuple) for name in names}


def install(module: Any, normalizer: Normalizer, bias_place: str) -> None:
    """Put a normalizer where `attend` finds it."""
    module.normalizer = normalizer
    module.bias_place = bias_place


def switch_on(model: nn.Module) -> None:
    """Let all models of transformers in a model use `attend`.

    Raises:
        ValueError: an attention module does not, since it is in no such model.
    """
    for pretrained in pretrained_models(model):
        if any(map(is_replaced, pretrained.modules())):
            register()
            pretrained.softmax_implementation = _implementations(pretrained.config)
            pretrained.set_attn_implementation(_implementation(pretrained))
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if is_replaced(module) and config._attn_implementation not in (IMPLEMENTATION, ADDITIVE):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) asks the configuration of its "
                "model for its attention, and the model is not there: use replace_softmax on the "
                "whole model"
            )


def switch_off(model: nn.Module) -> None:
    """Let them use the attention that they had before."""
    for pretrained in pretrained_models(model):
        before = vars(pretrained).pop("softmax_implementation", None)
        if before is not None:
            pretrained.set_attn_implementation(before)
        if vars(pretrained).pop("_tied_weights_keys", None) is not None:
            pretrained.all_tied_weights_keys = pretrained.get_expanded_tied_weights_keys(True)
        for config in configurations(pretrained.config):
            vars(config).pop("multimax", None)
            vars(config).pop("attn_implementation", None)


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """The attention that they had before, inside a `with` block."""
    switched = [m for m in pretrained_models(model) if "softmax_implementation" in vars(m)]
    for pretrained in switched:
        pretrained.set_attn_implementation(pretrained.softmax_implementation)
    try:
        yield
    finally:
        for pretrained in switched:
            pretrained.set_attn_implementation(_implementation(pretrained))


def is_replaced(module: nn.Module) -> bool:
    """Whether `attend` finds a normalizer in a module."""
    return isinstance(getattr(module, "normalizer", None), Normalizer) and asks_interface(
        type(module)
    )


def record(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Note in the configurations of models how they were replaced, for `load_pretrained`.

    They name an implementation that does not exist, so that nothing else loads the model silently.
    Shared scalars are declared, as transformers wants it before it saves them.
    """
    for pretrained in pretrained_models(model):
        if not any(isinstance(module, Normalizer) for module in pretrained.modules()):
            continue
        for config in configurations(pretrained.config):
            config.multimax = dict(arguments)
            config.attn_implementation = SAVED_IMPLEMENTATION
        tied = _shared_scalars(pretrained)
        if tied:
            pretrained._tied_weights_keys = {**(pretrained._tied_weights_keys or {}), **tied}
            pretrained.all_tied_weights_keys = {**pretrained.all_tied_weights_keys, **tied}


def _shared_scalars(model: nn.Module) -> dict[str, str]:
    """The names of shared scalars, each with the first name of the same."""
    first: dict[nn.Parameter, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "normalizer" in name.split(".") and first.setdefault(parameter, name) != name:
            names[name] = first[parameter]
    return names


def configurations(config: Any) -> Iterator[Any]:
    """A configuration and those in it."""
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from configurations(getattr(config, name))


def _implementation(pretrained: Any) -> str:
    """Ours that goes with the masks of all attention in a model."""
    inside = [module for module in pretrained.modules() if is_model(module)]
    return IMPLEMENTATION if all(module._supports_sdpa for module in inside) else ADDITIVE


def _implementations(config: Any) -> dict[str, Any]:
    """What `set_attn_implementation` takes to bring the present state back."""
    inside = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {"": config._attn_implementation}
    return own | {name: _implementations(sub) for name, sub in inside.items() if sub is not None}


def register() -> None:
    """Make the implementations known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for name, mask in ((IMPLEMENTATION, sdpa_mask), (ADDITIVE, eager_mask)):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, mask)


def head_obstacle(model: Any) -> str | None:
    """Why scores modulated in its output layer would not be those that a model returns."""
    if not is_model(model):
        return None
    for name, harmless in AFTER_THE_HEAD.items():
        value = getattr(model.config.get_text_config(), name, harmless)
        if value not in (None, harmless):
            return f"it changes the scores after its output layer ({name}={value})"
    bias = getattr(model, "final_logits_bias", None)
    if bias is not None and bias.any():
        return "it adds final_logits_bias to the scores after its output layer"
    problem = getattr(model.config, "problem_type", None)
    labels = "ForSequenceClassification" in type(model).__name__ and model.config.num_labels
    if labels == 1 or problem in ("regression", "multi_label_classification"):
        return "its loss is not the cross-entropy of a SoftMax"
    return None
