"""The monitor as a callback of the Trainer of Hugging Face transformers."""

import math
from typing import Any

from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from multimax.monitoring import RowSample, check_normalizers


class MonitorCallback(TrainerCallback):
    """Logs sparsity, multi-modality, entropy and the learned scalars of each layer.

        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.add_callback(MonitorCallback(trainer))

    The values of `multimax.monitor` go to `trainer.log`, and so to `trainer.state.log_history` and
    all of `report_to`, at the steps at which the Trainer logs its loss: `logging_steps`,
    `logging_first_step` and `logging_strategy` say which. They are of the whole batch of the step:
    of all its accumulated parts, and of all processes, which each measure up to 512 rows of
    scores of each layer and part.

    The hooks are on the model during the forward passes of those steps only, so that nothing is
    left behind by an error. A model that the Trainer compiles runs these passes uncompiled.

    Args:
        trainer: that it is added to.

    Raises:
        ValueError: when the training begins, if the model has no normalizer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._sample: RowSample | None = None  # of the present step, if that will be logged
        self._values: dict[str, float] = {}  # that wait for the Trainer to log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        check_normalizers(given["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self._sample, self._values = None, {}
        if _is_logged(args, state, given["train_dataloader"]):
            self._sample = RowSample(given["model"])
            _measure_next_pass(self._sample)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if self._sample is not None:
            _measure_next_pass(self._sample)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if self._sample is not None:
            accelerator: Any = self.trainer.accelerator
            if accelerator.num_processes > 1:
                self._sample.pool(lambda own: accelerator.reduce(own.to(accelerator.device), "sum"))
            self._sample, self._values = None, self._sample.values()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        values, self._values = self._values, {}  # the next line comes here again
        if values:
            self.trainer.log(values)


def _is_logged(args: TrainingArguments, state: TrainerState, loader: Any) -> bool:
    """Whether the Trainer will log the step that begins."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == "steps":
        return step % state.logging_steps == 0
    if args.logging_strategy == "epoch":
        return step == state.max_steps or step % _steps_of_an_epoch(args, loader) == 0
    return False


def _steps_of_an_epoch(args: TrainingArguments, loader: Any) -> float:
    try:
        return math.ceil(len(loader) / args.gradient_accumulation_steps)
    except TypeError:  # a stream, which is one epoch
        return math.inf


def _measure_next_pass(sample: RowSample) -> None:
    """Let a sample see the next pass of its model, and nothing after it."""

    def end(model: nn.Module, *_: Any) -> None:
        handle.remove()
        sample.__exit__(None, None, None)

    handle = sample.model.register_forward_hook(end, always_call=True)  # also after an error
    sample.__enter__()
