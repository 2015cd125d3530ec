"""The figures of a model: those of a run, and the same again of its weights."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn

from multimax.tasks.base import Task
from multimax.training.config import Config


def build_accelerator(config: Config) -> Accelerator:
    """Devices, processes and precision of a configuration, with the same numbers each time.

    Raises:
        ValueError: its precision is not one of this machine.
    """
    precision = config.trainer.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("trainer.precision=fp16 needs a CUDA device: use bf16 or no on a CPU")
    # Same configuration and seed, same numbers: also on a GPU, where this costs a little speed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    return Accelerator(
        mixed_precision=precision,
        cpu=not torch.cuda.is_available(),
        # Ours is trainer.accumulation: without this, a variable of the environment would count.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Ours is trainer.compile; likewise.
        dynamo_backend="no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def evaluate(
    task: Task,
    averaged: nn.Module | None,
    accelerator: Accelerator,
    split: str,
    whole: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext,
) -> dict[str, float]:
    """Figures of one split over all processes.

    Args:
        task: with its model.
        averaged: a model with averaged weights, whose figures are called `ema_...`; or None.
        accelerator: of `build_accelerator`.
        split: of the data.
        whole: makes a model with all of its weights in this process, see `RunState.whole`.
    """
    figures: dict[str, float] = {}
    for prefix, model in {"": task.model, "ema_": averaged}.items():
        if model is not None:
            model.eval()
            with whole(model) as plain, torch.inference_mode(), accelerator.autocast():
                found = task.evaluate(plain, split, lambda t: cast(Tensor, accelerator.reduce(t)))
            figures |= {f"{prefix}{name}": value for name, value in found.items()}
    return figures


def evaluate_splits(
    task: Task, evaluate_split: Callable[[str], dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Figures of all evaluation splits, each with the number of its examples."""
    return {
        split: evaluate_split(split) | {"examples": examples}
        for split, examples in task.splits.items()
    }
