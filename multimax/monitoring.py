"""Measures of normalizers and what they learned, sent to a logger while a model trains."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from multimax.metrics import (
    entropy,
    mean_of_defined,
    multi_modality,
    row_mean,
    softmax_reference,
    sparsity,
)
from multimax.normalizers import EntMax, MultiMax, Normalizer, SoftMax

ROWS = 1024  # of the scores of a layer that are measured, evenly spaced


def monitor(model: nn.Module, every: int = 100, log: Any = None) -> "Monitor":
    """Send sparsity, multi-modality, entropy and the learned scalars of each layer to a logger.

        with multimax.monitor(model, every=100, log=print):
            train(model)

    Passes that are not measured only count. A measured one shows up to 1,024 rows of scores of each
    layer, which its fused kernel does not hold: it takes the definition instead, until the next
    pass of the model. An error of the logger is an error of the training. Passes under
    `torch.compile` are neither counted nor measured.

    Args:
        model: called as a whole, with `Normalizer` modules in it. Passes in training mode count;
            with `torch.distributed`, only those of rank 0 are measured.
        every: measure each pass whose number, counted from 1, it divides.
        log: `log(values, step)` with dict[str, float]; or what has `add_scalar(name, value, step)`,
            as TensorBoard's SummaryWriter; or `log(values, step=step)`, as a run of wandb.

    Returns:
        What ends it by `remove()` or at the end of a `with` block.

    Raises:
        ValueError: the model has no normalizer, `every` is not positive, or `log` is no logger.
    """
    return Monitor(model, every, log)


class Monitor:
    """See `monitor`."""

    def __init__(self, model: nn.Module, every: int, log: Any) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every!r}")
        self._modules = {n: m for n, m in model.named_modules() if isinstance(m, Normalizer)}
        if not self._modules:
            raise ValueError(
                f"{type(model).__name__} has no normalizer: call replace_softmax first"
            )
        self._send = _sender(log)
        self.every: int = every
        self.step: int = 0
        self._values: dict[str, float] | None = None
        self._hooks: list[Any] = []
        self._own: list[Any] = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end),
        ]

    def remove(self) -> None:
        """Take every hook off the model."""
        self._unhook()
        while self._own:
            self._own.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, model: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._unhook()
        self._values = None  # of a pass that an error ended
        if not model.training:
            return
        self.step += 1
        if self.step % self.every == 0 and _is_first_rank():
            self._values = {}
            for name, module in self._modules.items():
                hook = self._hook(name)
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def _end(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or self._values is None:
            return
        values, self._values = self._values, None
        for name, module in self._modules.items():
            values |= {f"{name}/{key}": value for key, value in learned(module).items()}
        self._send(values, self.step)

    def _unhook(self) -> None:
        """Only now, as gradient checkpointing repeats the pass and must take the same path."""
        while self._hooks:
            self._hooks.pop().remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, probabilities: Tensor) -> None:
            if self._values is not None:  # not in the repetition
                with torch.no_grad():
                    measured = _measure(probabilities, *args, **kwargs)
                self._values |= {f"{name}/{key}": value for key, value in measured.items()}

        return hook


def learned(module: Normalizer) -> dict[str, float]:
    """The scalars that a normalizer learned, under the paper's names where it has them."""
    if isinstance(module, MultiMax):
        named = {"t_b": module.t_b, "t_d": module.t_d, "b": module.b, "d": module.d}
        if module.affine:
            named |= {"scale": module.scale, "shift": module.shift}
    elif isinstance(module, SoftMax):
        named = {"temperature": module.temperature}
    elif isinstance(module, EntMax):
        named = {"alpha": module.alpha}
    else:
        return {}
    result = {}
    for name, values in named.items():
        numbers = torch.as_tensor(values).detach().flatten().tolist()
        numbered = len(numbers) > 1 or name in ("t_b", "t_d", "b", "d")
        result |= {f"{name}{n + 1}" if numbered else name: x for n, x in enumerate(numbers)}
    return result


def _measure(
    probabilities: Tensor,
    scores: Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> dict[str, float]:
    leading = scores.movedim(dim, -1).shape[:-1]
    count = math.prod(leading)
    if count == 0 or scores.size(dim) == 0:
        return {}
    chosen = torch.arange(min(count, ROWS), device=scores.device) * count // min(count, ROWS)
    index = torch.unravel_index(chosen, leading) if leading else ()

    def rows(tensor: Tensor) -> Tensor:
        return tensor.expand(scores.shape).movedim(dim, -1)[index]

    x = rows(scores) if bias is None else rows(scores) + rows(bias)
    p, allowed = rows(probabilities), None if mask is None else rows(mask)
    allowed = torch.isfinite(x) if allowed is None else allowed & torch.isfinite(x)
    x = x.masked_fill(~allowed, 0.0)
    threshold = row_mean(x, -1, allowed)
    reference = softmax_reference(x, -1, allowed)
    values = {
        "entropy": entropy(p).masked_fill(~allowed.any(-1), math.nan),
        "sparsity": sparsity(p, x, threshold, reference, -1, allowed),
        "multi_modality": multi_modality(p, x, threshold, -1, allowed),
    }
    means = {name: mean_of_defined(value) for name, value in values.items()}
    return {name: mean for name, (mean, defined) in means.items() if defined}


def _is_first_rank() -> bool:
    distributed = torch.distributed
    initialized = distributed.is_available() and distributed.is_initialized()
    return not initialized or distributed.get_rank() == 0


def _sender(log: Any) -> Callable[[dict[str, float], int], Any]:
    if hasattr(log, "add_scalar"):
        return lambda values, step: [log.add_scalar(n, v, step) for n, v in values.items()]
    if hasattr(log, "log"):
        return lambda values, step: log.log(values, step=step)
    if callable(log):
        return log
    raise ValueError(
        f"log must be log(values, step), a run of wandb or a SummaryWriter, got {log!r}"
    )
