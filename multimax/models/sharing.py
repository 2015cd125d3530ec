"""Attention layers that share the scalars of their normalizers."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from multimax.normalizers import Normalizer


def take_shared(attention: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The options of the normalizer of attention, and whether the layers share its scalars."""
    own = dict(attention)
    return own, bool(own.pop("shared", False))


def check_shareable(normalizer: Normalizer) -> None:
    """Raise ValueError for a normalizer that learns nothing."""
    if not list(normalizer.parameters()):
        raise ValueError(f"shared needs learned scalars, of which {normalizer} has none")


def share_scalars(model: nn.Module, layers: Iterable[Any]) -> None:
    """Give all attention layers the parameters of the first one's normalizer.

    The state dict of the model keeps the names of every layer; one in which the layers differ is
    refused.

    Args:
        model: that the layers belong to.
        layers: with a normalizer each, all of one kind.

    Raises:
        ValueError: the normalizer has no parameters.
    """
    normalizers: list[Normalizer] = [layer.normalizer for layer in layers]
    for normalizer in normalizers:
        check_shareable(normalizer)
        for name, parameter in normalizers[0].named_parameters():
            setattr(normalizer, name, parameter)
    model.register_load_state_dict_pre_hook(_check_shared)


def _check_shared(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    # The names of a shared scalar are one tensor here: the last one would silently win.
    found: dict[nn.Parameter, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = state.get(prefix + name)
        if "normalizer" in name.split(".") and value is not None:
            first = found.setdefault(parameter, value)
            if first.shape == value.shape and not first.equal(value):
                raise ValueError(
                    f"the state dict has other scalars in {prefix}{name} than in the layer before, "
                    "but the model shares them: build it with shared=False in `attention`"
                )
