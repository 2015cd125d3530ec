"""Optimizer, learning-rate schedule and gradient clipping of a run."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import nn

from multimax.parameters import normalizer_parameters
from multimax.training.schedules import FORMULAS, SCHEDULES


def build_optimizer(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    """The optimizer of timm that `config.optimizer` describes.

    Raises:
        ValueError: timm knows no such optimizer, or it does not take one of the options.
    """
    given = {key: value for key, value in config.given().items() if value is not None}
    options: dict[str, Any] = {
        key: tuple(value) if key == "betas" else value for key, value in given.items()
    }
    del options["name"]
    own = {key: options.pop(key, None) for key in ("decay_scalars", "scalars_lr_scale")}
    if "adahessian" in config.name.lower():
        raise ValueError(
            f"optimizer.name={config.name!r} needs second derivatives, which training does not keep"
        )
    try:
        optimizer = create_optimizer_v2(model, opt=config.name, **options)
    except Exception as error:  # each optimizer of timm has its own
        close = difflib.get_close_matches(config.name, list_optimizers(), n=1)
        suggestion = f", did you mean {close[0]}?" if close and close[0] != config.name else ""
        betas = "optimizer.betas=null for its own, " if "betas" in options else ""
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(
            f"optimizer.name={config.name!r} cannot be built with these options ({reason})"
            f"{suggestion}: try {betas}or another name of timm.optim.list_optimizers()"
        ) from error
    if any(value is not None for value in own.values()):
        _regroup_scalars(optimizer, model, config.weight_decay, **own)
    return optimizer


def _regroup_scalars(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    weight_decay: float,
    decay_scalars: bool | None,
    scalars_lr_scale: float | None,
) -> None:
    """Move the scalars of the normalizers into a group with a weight decay and a rate of its own.

    All of them are of one dimension, and so were in one group.
    """
    scalars = normalizer_parameters(model)
    if not scalars:
        return
    ids = {id(parameter) for parameter in scalars}
    own: dict[str, Any] = {"params": scalars}
    for group in optimizer.param_groups:
        others = [p for p in group["params"] if id(p) not in ids]
        if len(others) < len(group["params"]):
            own["weight_decay"] = group["weight_decay"]
        group["params"] = others
    if decay_scalars is not None:
        own["weight_decay"] = weight_decay if decay_scalars else 0.0
    if scalars_lr_scale is not None:
        own["lr_scale"] = scalars_lr_scale  # which timm's schedules multiply by
    optimizer.add_param_group(own)


class LearningRate:
    """The learning rate as a function of the update that comes next, by `schedule.name`.

    `cosine` is timm's, over the whole length. `inverse_sqrt` and `cosine_restarts` are fairseq's,
    see `multimax.training.schedules`; their warm-up is in updates.

    Args:
        optimizer: whose rate is set.
        config: `config.schedule`; the warm-up of `cosine` is in the unit of `length`.
        length: of the whole schedule, in epochs or in updates.
        updates_per_unit: updates in one unit of length.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: Any,
        length: int,
        updates_per_unit: int,
    ) -> None:
        self.optimizer: Any = optimizer
        self.updates_per_unit: int = updates_per_unit
        self.formula: Callable[[int, float], float] | None = None
        if config.name == "cosine":
            self.per_epoch: bool = config.per_epoch
            steps = 1 if config.per_epoch else updates_per_unit
            self.scheduler: CosineLRScheduler = CosineLRScheduler(
                optimizer,
                t_initial=length * steps,
                lr_min=config.min_lr,
                warmup_t=config.warmup * steps,
                warmup_lr_init=config.warmup_lr,
                t_in_epochs=config.per_epoch,
            )
        else:
            options = {name: getattr(config, name) for name in SCHEDULES[config.name]}
            self.formula = partial(FORMULAS[config.name], **options)
            self.peaks: list[float] = [group["lr"] for group in optimizer.param_groups]

    def set(self, update: int) -> None:
        """Set the rate for the update with this index, counted from 0."""
        if self.formula is not None:
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = self.formula(update, peak) * group.get("lr_scale", 1.0)
        elif self.per_epoch:
            self.scheduler.step(update // self.updates_per_unit)
        else:
            self.scheduler.step_update(update)
