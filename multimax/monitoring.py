"""Measures of normalizers and what they learned, sent to a logger while a model trains."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from multimax.functional import MASK_FLOOR
from multimax.normalizers import Normalizer
from multimax.parameters import flat_scalars, learned_scalars
from multimax.recording import Normalization, NormalizerRecorder

ROWS = 1024  # of the scores of a layer that are measured, evenly spaced


def monitor(model: nn.Module, every: int = 100, log: Any = None) -> "Monitor":
    """Send sparsity, multi-modality, entropy and the learned scalars of each layer to a logger.

        with multimax.monitor(model, every=100, log=print):
            train(model)

    The values have the names that this project's own runs have in Weights & Biases, such as
    "normalizers/blocks.0.attn/sparsity" and "learned/blocks.0.attn/t_b_1".

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
        if not any(isinstance(module, Normalizer) for module in model.modules()):
            raise ValueError(
                f"{type(model).__name__} has no normalizer: call replace_softmax first"
            )
        self._send = _sender(log)
        self.every: int = every
        self.step: int = 0
        self._sample: _Sample | None = None
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
        if not model.training:
            return
        self.step += 1
        if self.step % self.every == 0 and _is_first_rank():
            self._sample = _Sample(model).__enter__()

    def _end(self, model: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or self._sample is None or self._sample.ended:
            return
        self._sample.ended = True
        values = flat_scalars(learned_scalars(model))
        for name, measures in self._sample.summary().items():
            layer = name.removesuffix("normalizer").rstrip(".") or "model"
            values |= {
                f"normalizers/{layer}/{measure}": value
                for measure, value in measures.items()
                if not measure.endswith("_count") and measures[f"{measure}_count"]
            }
        self._send(values, self.step)

    def _unhook(self) -> None:
        """Only now, as gradient checkpointing repeats the pass and must take the same path."""
        if self._sample is not None:
            self._sample.__exit__(None, None, None)
            self._sample = None


class _Sample(NormalizerRecorder):
    """Measures some rows of each layer, in one pass and not in its repetition by checkpointing."""

    ended = False

    def record(self, name: str, seen: Normalization) -> None:
        scores, dim = seen.scores, seen.dim
        leading = scores.movedim(dim, -1).shape[:-1]
        count = math.prod(leading)
        if self.ended or count == 0 or scores.size(dim) == 0:
            return
        chosen = torch.arange(min(count, ROWS), device=scores.device) * count // min(count, ROWS)
        index = torch.unravel_index(chosen, leading) if leading else ()

        def rows(tensor: Tensor) -> Tensor:
            return tensor.expand(scores.shape).movedim(dim, -1)[index]

        shown = ~(rows(scores) <= MASK_FLOOR)  # masks may come inside the scores
        mask = shown if seen.mask is None else shown & rows(seen.mask)
        bias = None if seen.bias is None else rows(seen.bias)
        super().record(name, Normalization(rows(seen.probabilities), rows(scores), -1, mask, bias))


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
