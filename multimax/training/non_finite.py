"""Finding the tensor in which a NaN or an infinity first appeared."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from multimax.tasks.base import Task
from multimax.training.sharding import local


def describe_non_finite(task: Task, group: list[Any], update: int, loss: float) -> str:
    """Say where the numbers broke, from the parameters, the batch and a forward pass with hooks.

    Processes that share a model out look at their own parts of it. All of them must call this.

    Call it in the precision of training, before the gradients are clipped.
    """
    sharded = isinstance(task.model, FSDPModule)
    output = _first_output(task, group) if sharded else None  # a pass needs all processes
    culprit = (
        _first("parameter", task.model.named_parameters())
        or _first("buffer", task.model.named_buffers())
        or _first("input", ((str(i), t) for batch in group for i, t in enumerate(_tensors(batch))))
        or (output if sharded else _first_output(task, group))
        or (math.isfinite(loss) and _first("gradient of", _gradients(task.model)))
        or "no single tensor: the loss itself overflows"
    )
    return (
        f"the loss is {loss} at update {update}; first non-finite: {culprit}. The last checkpoint "
        "is intact. Lower optimizer.lr, set trainer.clip_norm, or use trainer.precision=no or bf16"
    )


def _gradients(model: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [(name, parameter.grad) for name, parameter in model.named_parameters()]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _first(kind: str, named: Any) -> str | None:
    for name, tensor in named:
        if tensor is None or not tensor.is_floating_point():
            continue
        finite = torch.isfinite(local(tensor))
        if not finite.all():
            return f"{kind} {name} ({int((~finite).sum())} of its {finite.numel()} entries)"
    return None


def _first_output(task: Task, group: list[Any]) -> str | None:
    """The first module, in order of execution, whose output is not finite."""
    found: list[str] = []

    def hook(name: str):
        def check(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found:
                hit = _first("output of", ((name or "the model", t) for t in _tensors(output)))
                found.extend([hit] if hit else [])

        return check

    handles = [m.register_forward_hook(hook(name)) for name, m in task.model.named_modules()]
    try:
        # A compiled model would not call the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in group:
                task.loss(task.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
