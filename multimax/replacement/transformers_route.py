"""Attention of Hugging Face transformers, through its interfaces for attention and masks.

A module that asks the interface for its attention keeps its class; what the interface gives it is
`attend`, which finds the normalizer as `module.normalizer`. Masks are those that transformers makes
for torch's attention: an implementation without a mask function of its own would get none.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from multimax.attention import attention
from multimax.normalizers import Normalizer
from multimax.replacement.additive import split_additive
from multimax.replacement.classes import names_used

IMPLEMENTATION = "multimax"
# Arguments of attention functions that change what is normalized, and what each is.
REFUSED = {
    "softcap": "scores are capped by tanh before SoftMax",
    "s_aux": "SoftMax has a learned sink beside the keys",
}
# Attributes of modules that come with those arguments.
REFUSED_ATTRIBUTES = {"attn_logit_softcapping": "softcap", "sinks": "s_aux"}


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
    if not type(module).__module__.startswith("transformers."):
        return None
    if re.search("Router|Gate|Moe|MoE|Experts", name):
        return "it chooses experts"
    return "it is a loss" if re.search("Loss|Criterion", name) else None


def is_model(module: nn.Module) -> bool:
    """Whether it is a model of transformers: what its own code normalizes is no attention."""
    loaded = sys.modules.get("transformers.modeling_utils")
    return loaded is not None and isinstance(module, loaded.PreTrainedModel)


def obstacle(module: nn.Module) -> str | None:
    """Why no other normalizer can take the place of SoftMax in a module; None if one can."""
    for attribute, argument in REFUSED_ATTRIBUTES.items():
        if getattr(module, attribute, None) is not None:
            return REFUSED[argument]
    return None


def install(module: Any, normalizer: Normalizer, bias_place: str) -> None:
    """Put a normalizer where `attend` finds it."""
    module.normalizer = normalizer
    module.bias_place = bias_place


def switch_on(model: nn.Module) -> None:
    """Let all models of transformers in a model use `attend`."""
    for pretrained in pretrained_models(model):
        if any(map(is_replaced, pretrained.modules())):
            register()
            pretrained.softmax_implementation = _implementations(pretrained)
            pretrained.set_attn_implementation(IMPLEMENTATION)


def switch_off(model: nn.Module) -> None:
    """Let them use the attention that they had before."""
    for pretrained in pretrained_models(model):
        before = vars(pretrained).pop("softmax_implementation", None)
        if before is not None:
            pretrained.set_attn_implementation(before)
            vars(pretrained.config).pop("multimax", None)
            vars(pretrained.config).pop("attn_implementation", None)


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
            pretrained.set_attn_implementation(IMPLEMENTATION)


def is_replaced(module: nn.Module) -> bool:
    """Whether `attend` finds a normalizer in a module."""
    return isinstance(getattr(module, "normalizer", None), Normalizer) and asks_interface(
        type(module)
    )


def record(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Note in the configurations of models how they were replaced, for `load_pretrained`.

    The name of the implementation goes with it, so that nothing else can load the model silently.
    """
    for pretrained in pretrained_models(model):
        if "softmax_implementation" in vars(pretrained):
            pretrained.config.multimax = dict(arguments)
            pretrained.config.attn_implementation = IMPLEMENTATION


def register() -> None:
    """Make the implementation known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _implementations(pretrained: Any) -> dict[str, Any]:
    """What `set_attn_implementation` takes to bring the present state back."""
    config = pretrained.config
    return {"": config._attn_implementation} | {
        name: getattr(config, name)._attn_implementation
        for name in config.sub_configs
        if getattr(config, name, None) is not None
    }


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the normalizer of a module, as transformers calls it.

    Args:
        module: that calls it.
        query: (batch, heads, queries, head_dim).
        key: (batch, key_heads, keys, head_dim).
        value: (batch, key_heads, keys, value_dim).
        attention_mask: (batch, 1 or heads, queries, keys); None is all keys, or the causal ones.
        dropout: of the probabilities.
        scaling: of the scores.
        is_causal: whether no mask means the causal one; None is as the module says.
        position_bias: added to the scores.
        options: what else a model passes.

    Returns:
        (batch, queries, heads, value_dim), and the probabilities if `output_attentions` is set.

    Raises:
        RuntimeError: the module has no normalizer.
        ValueError: an option changes what is normalized.
    """
    for name, reason in REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__}: {reason}, which MultiMax does not know")
    normalizer = getattr(module, "normalizer", None)
    if normalizer is None:
        if not getattr(module, "keeps_softmax", False):
            raise RuntimeError(
                f"{type(module).__name__} has no normalizer, but its model was saved with one: "
                "load it by multimax.load_pretrained(model_class, folder)"
            )
        from multimax.normalizers import SoftMax

        normalizer = SoftMax()
    mask, bias = split_additive(attention_mask)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries = query.size(2)
    causal = queries > 1 and attention_mask is None and bool(is_causal)
    if causal and key.size(2) > queries:  # an empty cache of fixed size: the rest is not filled
        key, value = key[:, :, :queries], value[:, :, :queries]
        bias = bias if bias is None else bias[..., :queries]
    arguments = {
        "mask": mask,
        "causal": causal,
        "dropout": dropout,
        "scale": scaling,
        "bias": bias,
        "bias_place": getattr(module, "bias_place", "after"),
    }
    if not options.get("output_attentions"):
        out = attention(query, key, value, normalizer, **arguments)
        return out.transpose(1, 2).contiguous(), None
    unit = torch.eye(key.size(2), dtype=value.dtype, device=value.device)
    unit = unit.expand(*key.shape[:2], -1, -1)
    probabilities = attention(query, key, unit, normalizer, **arguments)
    value = value.repeat_interleave(query.size(1) // value.size(1), dim=1)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def load_pretrained(model_class: Any, name: str, **options: Any) -> Any:
    """A model of transformers that was saved after `replace_softmax`, with its scalars.

        model = load_pretrained(AutoModelForCausalLM, "folder")

    Args:
        model_class: a model class or an "Auto" class of transformers.
        name: a folder, or a name on the hub.
        options: of `from_pretrained`.

    Raises:
        ValueError: it was not saved with another normalizer.
    """
    from transformers import AutoConfig

    from multimax.replacement.replace import replace_softmax

    register()
    config = options.pop("config", None) or AutoConfig.from_pretrained(name)
    arguments = getattr(config, "multimax", None)
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{name} was not saved with another normalizer: use "
            f"{model_class.__name__}.from_pretrained and replace_softmax"
        )
    own = model_class
    if hasattr(model_class, "_model_mapping"):
        own = model_class._model_mapping[type(config)]

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own.__init__(self, *args, **kwargs)
        self.set_attn_implementation("sdpa")
        replace_softmax(self, **arguments)

    members = {
        "__init__": init,
        "__module__": own.__module__,
        "_keep_in_fp32_modules_strict": [
            *(own._keep_in_fp32_modules_strict or []),
            "normalizer",
        ],
    }
    model = type(own.__name__, (own,), members).from_pretrained(name, config=config, **options)
    model.__class__ = own
    return model
