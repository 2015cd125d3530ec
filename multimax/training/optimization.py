"""Optimizer, learning-rate schedule and gradient clipping of a run."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from multimax.normalizers import Normalizer


def build_optimizer(model: nn.Module, config: DictConfig) -> torch.optim.Optimizer:
    """The optimizer of timm by name; one-dimensional parameters get no weight decay."""
    options: dict[str, Any] = {
        str(key): tuple(value) if key == "betas" else value
        for key, value in config.items()
        if key != "name"
    }
    return create_optimizer_v2(model, opt=config.name, **options)


class LearningRate:
    """timm's cosine schedule with linear warm-up, as a function of the update that comes next.

    Args:
        optimizer: whose rate is set.
        config: `warmup` and `warmup_lr`, `min_lr`, `per_epoch`; warm-up in the unit of `length`.
        length: of the whole schedule, in epochs or in updates.
        updates_per_unit: updates in one unit of length.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: DictConfig,
        length: int,
        updates_per_unit: int,
    ) -> None:
        self.per_epoch = config.per_epoch
        self.updates_per_unit = updates_per_unit
        steps = 1 if config.per_epoch else updates_per_unit
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=length * steps,
            lr_min=config.min_lr,
            warmup_t=config.warmup * steps,
            warmup_lr_init=config.warmup_lr,
            t_in_epochs=config.per_epoch,
        )

    def set(self, update: int) -> None:
        """Set the rate for the update with this index, counted from 0."""
        if self.per_epoch:
            self.scheduler.step(update // self.updates_per_unit)
        else:
            self.scheduler.step_update(update)


def normalizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scalars of all normalizers below `model`."""
    modules = (module for module in model.modules() if isinstance(module, Normalizer))
    return [parameter for module in modules for parameter in module.parameters()]


class GradientClipping:
    """Clips the gradient norm of the weights and of the normalizers' scalars apart from each other.

    The few scalars of an output layer collect a gradient from every score, so that their norm grows
    with the square root of the vocabulary; within one global norm they would shrink every other
    gradient of the model.
    """

    def __init__(self, model: nn.Module, max_norm: float | None) -> None:
        scalars = normalizer_parameters(model)
        scalar_ids = {id(parameter) for parameter in scalars}
        weights = [parameter for parameter in model.parameters() if id(parameter) not in scalar_ids]
        self.groups = [group for group in (weights, scalars) if group]
        self.max_norm = math.inf if max_norm is None else max_norm

    def __call__(self) -> Tensor:
        """Clip in place; return the norm of the weights' gradient before it."""
        norms = [_clip(group, self.max_norm) for group in self.groups]
        return norms[0]


def _clip(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    if math.isinf(max_norm):
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
