"""One trainer for all tasks, on one CPU, one GPU, or many processes under torchrun."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor.experimental import implicit_replication

from multimax.data.workers import STOP_SIGNALS
from multimax.parameters import normalizer_parameters
from multimax.tasks.base import DivergedError, Task
from multimax.training.config import Config
from multimax.training.evaluation import evaluate
from multimax.training.loggers import Logger, ProgressDisplay
from multimax.training.non_finite import describe_non_finite
from multimax.training.random_state import restore_random_state, seed_everything
from multimax.training.sharding import average_gradients, no_exchange
from multimax.training.signals import StopSignal
from multimax.training.state import RunState


class InterruptedRunError(Exception):
    """The run was asked to stop; its state is saved.

    Attributes:
        signals: the numbers of those that asked, whichever process they came to.
    """

    def __init__(self, message: str, signals: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.signals: tuple[int, ...] = tuple(signals)


class Trainer(RunState):
    """Trains the model of a task, evaluates it now and then, and keeps its state on disk.

    Args:
        task, config, folder, accelerator, first_weights: as in `RunState`.
        loggers: receive the metrics; empty except in the main process.
        display: the progress bar.
    """

    def __init__(
        self,
        task: Task,
        config: Config,
        folder: Path,
        accelerator: Accelerator,
        loggers: list[Logger],
        display: ProgressDisplay | None,
        first_weights: str | None = None,
    ) -> None:
        super().__init__(task, config, folder, accelerator, first_weights)
        self.loggers: list[Logger] = loggers
        self.display: ProgressDisplay | None = display
        self._stop = StopSignal()
        task.before_batch = self._stop_in_evaluation

    def fit(self, stop_after: int | None = None) -> None:
        """Train to the end, or until `stop_after` updates; the state is then on disk.

        Raises:
            InterruptedRunError: a signal arrived (see `StopSignal`); the state is on disk.
            DivergedError: the loss is not finite; the message says which tensor is to blame.
        """
        end = self.total_updates if stop_after is None else min(stop_after, self.total_updates)
        with self._stop, self.display or contextlib.nullcontext():
            if self.display:
                self.display.start_at(self.position.update, self.total_updates)
            if self.position.due:
                self._evaluate_and_save()
            while self.position.update < end:
                self._run_epoch(end)
            if self.position.update < self.total_updates:
                self.save()

    def _run_epoch(self, end: int) -> None:
        position = self.position
        seed_everything(self.config.seed, position.epoch, self.accelerator.process_index)
        start = position.epoch_update
        batches = self.task.train_loader.batches(position.epoch, start * self.accumulation)
        if self.saved_random_state is not None:
            restore_random_state(self.saved_random_state)
            self.saved_random_state = None
        for update in range(start, self.updates_per_epoch):
            if position.update >= end:
                return
            started = time.monotonic()
            group = list(itertools.islice(batches, self.accumulation))
            metrics = self._update(group)
            elapsed = time.monotonic() - started
            position.update += 1
            position.epoch_update = update + 1
            position.seconds += elapsed
            self._report(metrics, elapsed)
            if update + 1 == self.updates_per_epoch:
                position.epoch, position.epoch_update = position.epoch + 1, 0
            self._after_update()

    def _update(self, group: list[Any]) -> dict[str, float]:
        """One optimizer update from the batches of `group`; returns its metrics."""
        if len(group) < self.accumulation:
            raise RuntimeError("the train loader ended before its length: its __len__ is wrong")
        self.model.train()
        self.learning_rate.set(self.position.update)
        weights = [self.task.weight(batch) for batch in group]
        processes = self.accelerator.num_processes
        total = self._sum(torch.tensor(float(sum(weights)), device=self.accelerator.device)).item()
        loss_sum = torch.zeros((), device=self.accelerator.device)
        for index, (batch, weight) in enumerate(zip(group, weights, strict=True)):
            # Processes exchange gradients once an update, with the last of its batches.
            last = index == len(group) - 1
            with contextlib.nullcontext() if last else self._no_exchange():
                with self.accelerator.autocast():
                    loss = self.task.loss(self.model, batch)
                share = weight / total
                # Gradients are averaged over processes; `share` already counts all of them.
                self.accelerator.backward(loss * (share * processes))
            loss_sum += loss.detach().float() * share
        if self.sharded:
            average_gradients(normalizer_parameters(self.task.model), self.accelerator)
        mean_loss = self._sum(loss_sum).item()
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norms = self.clip.norms()
        # The scaler of fp16 leaves out an update whose gradients are not finite.
        finite = self.accelerator.scaler is not None or all(math.isfinite(norm) for norm in norms)
        if not (math.isfinite(mean_loss) and finite):
            with self.accelerator.autocast():
                raise DivergedError(
                    describe_non_finite(self.task, group, self.position.update, mean_loss)
                )
        self.clip.clip(norms)
        # Lists of parameters have whole ones, the scalars, beside sharded ones.
        with implicit_replication() if self.sharded else contextlib.nullcontext():
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.task.model)
        self.optimizer.zero_grad()
        return {
            "train/loss": mean_loss,
            "train/gradient_norm": norms[0].item(),
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "train/units": total,
        }

    def _no_exchange(self) -> contextlib.AbstractContextManager[None]:
        return no_exchange(self.model) if self.sharded else self.accelerator.no_sync(self.model)

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return cast(Tensor, self.accelerator.reduce(tensor))

    def _report(self, metrics: dict[str, float], elapsed: float) -> None:
        rate = metrics.pop("train/units") / elapsed
        position = self.position
        if self.display:
            loss, learning_rate = metrics["train/loss"], metrics["train/learning_rate"]
            self.display.show(position.update, position.epoch, loss, learning_rate, rate)
        if position.update % self.config.trainer.log_every == 0:
            self.log({**metrics, "train/rate": rate})

    def _after_update(self) -> None:
        """Evaluate and save where the configuration asks for it, and stop where a signal does."""
        options, position = self.config.trainer, self.position
        units, odd = divmod(position.update, self.updates_per_unit)
        done = position.update == self.total_updates
        signals = self._signals()
        position.due = done or (not odd and units % options.evaluate_every == 0)
        if position.due or signals:
            self.save()  # before an evaluation, which can last longer than a cluster waits
        if signals:
            raise self._interrupted(signals)
        if position.due:
            self._evaluate_and_save()

    def _evaluate_and_save(self) -> None:
        self.evaluate_and_keep_best()
        self.keep()
        self.position.due = False
        self.save()

    def _interrupted(self, signals: Iterable[int]) -> InterruptedRunError:
        said = f"stopped by a signal after update {self.position.update}"
        return InterruptedRunError(said, signals)

    def evaluate_and_keep_best(self) -> None:
        """Evaluate on the split of the task's monitored metric and keep the weights if best.

        Does nothing without that split.
        """
        split = self.monitored_split
        if split not in self.task.splits:
            return
        metrics = self.evaluate(split)
        self.log({f"{split}/{name}": value for name, value in metrics.items()})
        value = metrics[self.task.monitor.split("/")[1]]
        best = self.position.best
        if best is None or (value > best if self.task.higher_is_better else value < best):
            self.position.best, self.position.best_update = value, self.position.update
            self.save_best()
        if self.display:
            listed = "  ".join(f"{name} {number:.4g}" for name, number in metrics.items())
            self.display.print(f"after update {self.position.update}: {split}  {listed}")

    def evaluate(self, split: str) -> dict[str, float]:
        """Figures of one split; with EMA also those of the averaged weights, as `ema_...`."""
        averaged = None if self.ema is None else self.ema.module
        try:
            return evaluate(self.task, averaged, self.accelerator, split, self.whole)
        except RuntimeError:
            self._stop_in_evaluation()  # another process has gone for the same reason
            raise

    def inspect(self) -> dict[str, dict[str, float]]:
        """Figures of each normalizer on a few evaluation batches, by module name."""
        self.task.model.eval()
        # A compiled model would not call the hooks that look at its normalizers.
        with (
            self.whole(self.task.model) as model,
            torch.inference_mode(),
            self.accelerator.autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            return self.task.inspect(model)

    def log(self, metrics: dict[str, float]) -> None:
        """Send metrics of the current update to all loggers."""
        for logger in self.loggers:
            logger.log(self.position.update, metrics)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A wish to stop ends the evaluations inside; what is on disk is the end of training."""
        with self._stop:
            yield

    def _stop_in_evaluation(self) -> None:
        """End an evaluation at once: `save` came before it, and its processes need not agree."""
        if self._stop.requested:
            raise self._interrupted(self._stop.received)

    def _signals(self) -> set[int]:
        """Those that any process got; all of them must agree on the update to stop after."""
        received = self._stop.received
        if self.accelerator.num_processes == 1:
            return received
        flags = [float(number in received) for number in STOP_SIGNALS]
        counts = self._sum(torch.tensor(flags, device=self.accelerator.device)).tolist()
        return {number for number, count in zip(STOP_SIGNALS, counts, strict=True) if count}
