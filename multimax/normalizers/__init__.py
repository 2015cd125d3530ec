"""The normalizers, and the registry that builds one from its name."""

from collections.abc import Mapping
from typing import Any

import torch

from multimax.functional import modulate, modulate_derivative
from multimax.normalizers.asentmax import ASEntMax
from multimax.normalizers.base import LogitNormalizer, Normalizer, check_has_loss
from multimax.normalizers.entmax import EntMax, EntMax15, entmax, entmax15
from multimax.normalizers.evsoftmax import EvSoftMax, evsoftmax
from multimax.normalizers.modulated import ModulatedSoftMax
from multimax.normalizers.multimax import MultiMax, multimax
from multimax.normalizers.sigmoid import Sigmoid, sigmoid
from multimax.normalizers.softmax import SoftMax, softmax
from multimax.normalizers.softpick import Softpick, softpick
from multimax.normalizers.sparsemax import SparseMax, sparsemax
from multimax.normalizers.topk import TopK, topk
from multimax.registry import build

NORMALIZERS: dict[str, type[Normalizer]] = {
    "softmax": SoftMax,
    "softpick": Softpick,
    "sigmoid": Sigmoid,
    "topk": TopK,
    "sparsemax": SparseMax,
    "entmax15": EntMax15,
    "asentmax": ASEntMax,
    "entmax": EntMax,
    "evsoftmax": EvSoftMax,
    "multimax": MultiMax,
}

__all__ = [
    "NORMALIZERS",
    "ASEntMax",
    "EntMax",
    "EntMax15",
    "EvSoftMax",
    "LogitNormalizer",
    "ModulatedSoftMax",
    "MultiMax",
    "Normalizer",
    "Sigmoid",
    "SoftMax",
    "Softpick",
    "SparseMax",
    "TopK",
    "build_for_attention",
    "build_for_output",
    "build_normalizer",
    "build_preserving_rng",
    "entmax",
    "entmax15",
    "evsoftmax",
    "modulate",
    "modulate_derivative",
    "multimax",
    "options_in_attention",
    "registered_normalizers",
    "sigmoid",
    "softmax",
    "softpick",
    "sparsemax",
    "topk",
]


def registered_normalizers() -> list[str]:
    """Names that `build_normalizer` knows."""
    return list(NORMALIZERS)


def build_normalizer(name: str, **options: Any) -> Normalizer:
    """A new normalizer module.

    Args:
        name: one of `registered_normalizers()`.
        options: arguments of its class, such as `temperature` or `k`.

    Raises:
        ValueError: the name or an option is unknown (the message lists the known ones), or an
            option is out of range.
    """
    return build("normalizer", NORMALIZERS, name, options)


def build_preserving_rng(options: Mapping[str, Any]) -> Normalizer:
    """`build_normalizer(**options)` that leaves the global generator as it was.

    A seed then gives the same other weights whatever the normalizer draws for itself, so that runs
    that differ in the normalizer alone are pairs.
    """
    with torch.random.fork_rng(devices=[]):
        return build_normalizer(**options)


def build_for_attention(options: Mapping[str, Any], num_heads: int, head_dim: int) -> Normalizer:
    """`build_preserving_rng` for attention with `num_heads` heads of `head_dim`.

    Args:
        options: also "before_scale": let MultiMax modulate the dot products of query and key before
            they are scaled by 1 / sqrt(head_dim).
        num_heads: heads of the query.
        head_dim: of query and key.

    Raises:
        ValueError: as there, as `options_in_attention`, or the normalizer has scalars for another
            number of heads.
    """
    normalizer = build_preserving_rng(options_in_attention(options, head_dim))
    heads = getattr(normalizer, "heads", None)
    if heads not in (None, 1, num_heads):
        raise ValueError(
            f"heads={heads} of the attention normalizer does not go with num_heads={num_heads}: "
            f"use heads={num_heads}, or None for scalars that the heads share"
        )
    return normalizer


def build_for_output(options: Mapping[str, Any]) -> Normalizer:
    """`build_preserving_rng` for an output layer.

    Raises:
        ValueError: as there, or no loss belongs to the normalizer.
    """
    normalizer = build_preserving_rng(options)
    check_has_loss(normalizer)
    return normalizer


def options_in_attention(options: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The options of `build_normalizer` for those of `build_for_attention`.

    Raises:
        ValueError: "before_scale" is for a normalizer that has no modulator.
    """
    own = {name: value for name, value in options.items() if name != "before_scale"}
    if options.get("before_scale"):
        if own.get("name") != "multimax":
            raise ValueError(f"before_scale is for multimax, not for {own.get('name')}")
        own["score_scale"] = head_dim**-0.5
    return own
