"""Checks of settings that need each other, or what a library knows, before data is loaded."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from multimax.models.sharing import check_shareable, take_shared
from multimax.normalizers import Normalizer, build_for_attention, build_for_output
from multimax.options import as_typed
from multimax.training.optimization import build_optimizer


def check_settings(config: Any) -> None:
    """Raise ValueError for settings that do not go with each other; the message names one."""
    _check_heads(config)
    _check_normalizer("attention", config.attention.given(), _build_shared_attention)
    _check_normalizer("output", config.output.given(), build_for_output)
    _check_attention_of_model(config)
    _check_length(config)
    _check_rates(config)
    _check_best(config)
    build_optimizer(_StandIn(), config.optimizer)


class _StandIn(nn.Module):
    """A model of a weight and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.bias = nn.Parameter(torch.zeros(2))


def _build_attention(options: Mapping[str, Any]) -> Normalizer:
    return build_for_attention(options, num_heads=options.get("heads") or 1, head_dim=1)


def _build_shared_attention(options: Mapping[str, Any]) -> Normalizer:
    own, shared = take_shared(options)
    normalizer = _build_attention(own)
    if shared:
        check_shareable(normalizer)
    return normalizer


def _check_normalizer(
    place: str, options: Mapping[str, Any], build: Callable[[Mapping[str, Any]], Normalizer]
) -> None:
    try:
        build(options)
    except (ValueError, TypeError) as error:
        named = re.match(r"\w+", str(error))
        dot = "." if named and named[0] in options else ": "  # before the option that is to blame
        raise ValueError(f"{place}{dot}{error}") from None
    except RuntimeError as error:  # of torch, which has no memory for so many scalars
        raise ValueError(f"{place}={as_typed(options)}: {error}") from None


def _normalizers_of_model(config: Any) -> dict[str, Mapping[str, Any]]:
    """Normalizers that the model names beside `attention` and `output`, by setting."""
    chosen = {
        name: getattr(config.model, name)
        for name in type(config.model).model_fields
        if name.endswith("_attention")
    }
    return {
        f"model.{name}": {"name": value} if isinstance(value, str) else value
        for name, value in chosen.items()
        if value is not None
    }


def _check_attention_of_model(config: Any) -> None:
    for place, options in _normalizers_of_model(config).items():
        if not isinstance(options.get("name"), str):
            raise ValueError(
                f"{place}={as_typed(options)} must have a name, as in {{name: topk, k: 8}}"
            )
        _check_normalizer(place, options, _build_attention)


def _check_heads(config: Any) -> None:
    there = getattr(config.model, "num_heads", None)
    places = {"attention": config.attention.given(), **_normalizers_of_model(config)}
    for place, options in places.items():
        heads = options.get("heads")
        if there is not None and heads not in (None, 1, there):
            raise ValueError(
                f"{place}.heads={heads} is not model.num_heads={there}: use {place}.heads={there}, "
                "or null for scalars that the heads share"
            )
    heads = config.output.given().get("heads")
    if heads is not None:
        raise ValueError(f"output.heads={heads}: an output layer has no heads, set it to null")


def _check_length(config: Any) -> None:
    trainer, schedule = config.trainer, config.schedule
    if (trainer.epochs is None) == (trainer.updates is None):
        raise ValueError(
            f"trainer.epochs={as_typed(trainer.epochs)} and "
            f"trainer.updates={as_typed(trainer.updates)}: give one of them and set the other to "
            "null"
        )
    length = trainer.epochs or trainer.updates or 0
    # The warm-up of the other schedules is in updates, which only the data makes epochs of.
    known = schedule.name == "cosine" or trainer.updates is not None
    if known and schedule.warmup >= length:
        raise ValueError(
            f"schedule.warmup={schedule.warmup} leaves nothing of "
            f"trainer.{'epochs' if trainer.epochs else 'updates'}={length}: use fewer than {length}"
        )


def _check_rates(config: Any) -> None:
    for name in ("warmup_lr", "min_lr"):
        rate = getattr(config.schedule, name)
        if rate is not None and rate > config.optimizer.lr:
            raise ValueError(
                f"schedule.{name}={rate!r} is above optimizer.lr={config.optimizer.lr!r}, the "
                "largest learning rate: use a smaller one"
            )


def _check_best(config: Any) -> None:
    if config.trainer.report == "best" and getattr(config.data, "valid_size", None) == 0:
        raise ValueError(
            "data.valid_size=0 leaves nothing to choose the best weights on: use "
            "trainer.report=last, or hold out some images"
        )
