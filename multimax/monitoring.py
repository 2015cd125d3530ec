"""Measures of normalizers and what they learned, sent to a logger while a model trains."""

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from multimax.attention import ROWS
from multimax.functional import MASK_FLOOR
from multimax.normalizers import Normalizer
from multimax.parameters import flat_scalars, learned_scalars
from multimax.recording import Normalization, NormalizerRecorder


def monitor(model: nn.Module, every: int = 100, log: Any = None) -> "Monitor":
    """Send sparsity, multi-modality, entropy and the learned scalars of each layer to a logger.

        with multimax.monitor(model, every=100, log=print):
            train(model)

    The values have the names that this project's own runs have in Weights & Biases, such as
    "normalizers/blocks.0.attn/sparsity" and "learned/blocks.0.attn/t_b_1". A Trainer of
    transformers takes `multimax.integrations.transformers.MonitorCallback` instead.

    Passes that are not measured only count. A measured one looks at up to 512 rows of scores of
    each layer, beside the fused kernel that computes it. An error of the logger is an error of the
    training.

    Args:
        model: called as a whole, with `Normalizer` modules in it; also what `torch.compile` or DDP
            made of one, whose layers keep their names. Passes in training mode count, each by
            itself where gradients are accumulated. With `torch.distributed` only rank 0 measures
            and logs, its own share of the batch: no process waits for another. A measured pass is
            not compiled, and inside a compiled function none is seen: give the function's model as
            `torch.compile` returns it.
        every: measure each pass whose number, counted from 1, it divides.
        log: `log(values, step)` with dict[str, float]; or what has `add_scalar(name, value, step)`,
            as TensorBoard's SummaryWriter; or `log(values, step=step)`, as a run of wandb. The step
            is the number of the pass, in wandb that of the run where it is larger.

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
        check_normalizers(model)
        self._send = _sender(log)
        self.every: int = every
        self.step: int = 0
        self._sample: RowSample | None = None
        self._own: list[Any] = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),  # also after an error
        ]

    def remove(self) -> None:
        """Take every hook off the model."""
        self._stop()
        while self._own:
            self._own.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, model: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._stop()  # of a pass that the user interrupted
        if not model.training:
            return
        self.step += 1
        if self.step % self.every == 0 and _is_first_rank():
            self._sample = RowSample(model).__enter__()

    def _end(self, model: nn.Module, _: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        sample = self._stop()
        if sample is not None and output is not None:  # it is None after an error
            self._send(sample.values(), self.step)

    def _stop(self) -> "RowSample | None":
        sample, self._sample = self._sample, None
        if sample is not None:
            sample.__exit__(None, None, None)
        return sample


def check_normalizers(model: nn.Module) -> None:
    """Raise ValueError for a model without a normalizer."""
    if not any(isinstance(module, Normalizer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no normalizer: call replace_softmax first")


class RowSample(NormalizerRecorder):
    """Measures up to 512 rows of each layer in each pass inside its `with` blocks.

    The passes take the kernels that they take without it, but for `torch.compile`, whose functions
    run as plain Python.

    Args:
        model: see `monitor`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = _unwrapped(model)
        super().__init__(self.model)
        self._uncompiled = ExitStack()

    def __enter__(self) -> Self:
        if "torch._dynamo" in sys.modules:
            self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._uncompiled.close()

    def _hook(self, name: str) -> Callable[..., None]:
        hook = super()._hook(name)
        vars(hook)["takes_rows"] = True
        return hook

    def record(self, name: str, seen: Normalization) -> None:
        scores, dim = seen.scores, seen.dim
        leading = scores.movedim(dim, -1).shape[:-1]
        count = math.prod(leading)
        if count == 0 or scores.size(dim) == 0:
            return
        chosen = torch.arange(min(count, ROWS), device=scores.device) * count // min(count, ROWS)
        index = torch.unravel_index(chosen, leading) if leading else ()

        def rows(tensor: Tensor) -> Tensor:
            return tensor.expand(scores.shape).movedim(dim, -1)[index]

        shown = ~(rows(scores) <= MASK_FLOOR)  # masks may come inside the scores
        mask = shown if seen.mask is None else shown & rows(seen.mask)
        bias = None if seen.bias is None else rows(seen.bias)
        super().record(name, Normalization(rows(seen.probabilities), rows(scores), -1, mask, bias))

    def values(self) -> dict[str, float]:
        """The mean of each measure, where there is one, and the learned scalars, by full name."""
        values = flat_scalars(learned_scalars(self.model))
        for name, measures in self.summary().items():
            layer = name.removesuffix("normalizer").rstrip(".") or "model"
            values |= {
                f"normalizers/{layer}/{measure}": value
                for measure, value in measures.items()
                if not measure.endswith("_count") and measures[f"{measure}_count"]
            }
        return values


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` and DDP make of it, whose names are those of layers."""
    while True:
        inner = model._modules.get("_orig_mod")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _is_first_rank() -> bool:
    distributed = torch.distributed
    initialized = distributed.is_available() and distributed.is_initialized()
    return not initialized or distributed.get_rank() == 0


def _sender(log: Any) -> Callable[[dict[str, float], int], Any]:
    if hasattr(log, "add_scalar"):
        return lambda values, step: [log.add_scalar(n, v, step) for n, v in values.items()]
    if hasattr(log, "log"):  # a run of wandb drops what comes at a step before its own
        return lambda values, step: log.log(values, step=max(step, getattr(log, "step", 0)))
    if callable(log):
        return log
    raise ValueError(
        f"log must be log(values, step), a run of wandb or a SummaryWriter, got {log!r}"
    )
