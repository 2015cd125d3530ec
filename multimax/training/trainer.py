"""One trainer for all tasks, on one CPU, one GPU, or many processes under torchrun."""

import contextlib
import itertools
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from multimax.files import load_checkpoint, save_checkpoint
from multimax.tasks.base import Task
from multimax.training.checkpoints import Position, check_complete, load_weights, weights
from multimax.training.config import Config
from multimax.training.loggers import Logger, ProgressDisplay
from multimax.training.non_finite import describe_non_finite
from multimax.training.optimization import GradientClipping, LearningRate, build_optimizer
from multimax.training.random_state import random_state, restore_random_state, seed_everything
from multimax.training.signals import StopSignal


class InterruptedRunError(Exception):
    """The run was asked to stop; its state is saved."""


class Trainer:
    """Trains the model of a task, evaluates it now and then, and keeps its state on disk.

    Args:
        task: data, model and loss.
        config: the composed configuration; `trainer`, `optimizer`, `schedule` and `seed` are read.
        folder: the run folder; `last.pt` and `best.pt` are written there.
        accelerator: devices, processes and precision.
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
    ) -> None:
        self.task: Task = task
        self.config: Config = config
        self.folder: Path = folder
        self.accelerator: Accelerator = accelerator
        self.loggers: list[Logger] = loggers
        self.display: ProgressDisplay | None = display
        options = config.trainer
        self.accumulation: int = options.accumulation
        self.updates_per_epoch: int = len(task.train_loader) // self.accumulation
        if not self.updates_per_epoch:
            raise ValueError(
                f"trainer.batch_size={options.batch_size} is more than the training data: "
                f"trainer.accumulation={self.accumulation} needs as many batches, of which there "
                f"are {len(task.train_loader)}; use a smaller trainer.batch_size"
            )
        if options.report == "best" and self.monitored_split not in task.splits:
            raise ValueError(
                f"trainer.report=best needs a split {self.monitored_split!r}, of which the data "
                "has none: use trainer.report=last"
            )
        self.updates_per_unit: int = self.updates_per_epoch if options.epochs else 1
        length = options.epochs or options.updates or 0
        self.total_updates: int = length * self.updates_per_unit
        self.position = Position()

        task.model.to(accelerator.device)
        decay = options.ema_decay
        self.ema: ModelEmaV3 | None = None if decay is None else ModelEmaV3(task.model, decay=decay)
        if options.compile:
            task.model.compile()
        optimizer = build_optimizer(task.model, config.optimizer)
        schedule = config.schedule, length, self.updates_per_unit
        self.learning_rate: LearningRate = LearningRate(optimizer, *schedule)
        self.clip: GradientClipping = GradientClipping(task.model, options.clip_norm)
        self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        self._saved_random_state: dict[str, Any] | None = None
        self._stop = StopSignal()

    @property
    def monitored_split(self) -> str:
        """The split of the task's monitored metric; without it there is no best checkpoint."""
        return self.task.monitor.partition("/")[0]

    @property
    def last_checkpoint(self) -> Path:
        """The whole state of the run, to resume from."""
        return self.folder / "last.pt"

    @property
    def best_checkpoint(self) -> Path:
        """The weights at the best value of the task's monitored metric."""
        return self.folder / "best.pt"

    def fit(self, stop_after: int | None = None) -> None:
        """Train to the end, or until `stop_after` updates; the state is then on disk.

        Raises:
            InterruptedRunError: SIGTERM or SIGINT arrived; the state is on disk.
            FloatingPointError: the loss is not finite; the message says which tensor is to blame.
        """
        end = self.total_updates if stop_after is None else min(stop_after, self.total_updates)
        with self._stop, self.display or contextlib.nullcontext():
            if self.display:
                self.display.start_at(self.position.update, self.total_updates)
            while self.position.update < end:
                self._run_epoch(end)
            if self.position.update < self.total_updates:
                self.save()

    def _run_epoch(self, end: int) -> None:
        position = self.position
        seed_everything(self.config.seed, position.epoch, self.accelerator.process_index)
        batches = self.task.train_loader.batches(position.epoch, position.batch)
        if self._saved_random_state is not None:
            restore_random_state(self._saved_random_state)
            self._saved_random_state = None
        for update in range(position.batch // self.accumulation, self.updates_per_epoch):
            if position.update >= end:
                return
            started = time.monotonic()
            group = list(itertools.islice(batches, self.accumulation))
            metrics = self._update(group)
            elapsed = time.monotonic() - started
            position.update += 1
            position.batch += self.accumulation
            position.seconds += elapsed
            self._report(metrics, elapsed)
            if update + 1 == self.updates_per_epoch:
                position.epoch, position.batch = position.epoch + 1, 0
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
            # DDP exchanges gradients once an update, with the last of its batches.
            last = index == len(group) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self.task.loss(self.model, batch)
                share = weight / total
                # DDP averages gradients over processes; `share` already counts all of them.
                self.accelerator.backward(loss * (share * processes))
            loss_sum += loss.detach().float() * share
        mean_loss = self._sum(loss_sum).item()
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norms = self.clip.norms()
        # The scaler of fp16 leaves out an update whose gradients are not finite.
        finite = self.accelerator.scaler is not None or all(math.isfinite(norm) for norm in norms)
        if not (math.isfinite(mean_loss) and finite):
            with self.accelerator.autocast():
                raise FloatingPointError(
                    describe_non_finite(self.task, group, self.position.update, mean_loss)
                )
        self.clip.clip(norms)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.task.model)
        return {
            "train/loss": mean_loss,
            "train/gradient_norm": norms[0].item(),
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "train/units": total,
        }

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        alone = self.accelerator.num_processes == 1
        return tensor if alone else cast(Tensor, self.accelerator.reduce(tensor))

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
        stop = self._stop_requested() and not done
        due = done or (not odd and units % options.evaluate_every == 0)
        if due:
            self.evaluate_and_keep_best()
        if due or stop:
            self.save()
        if stop:
            raise InterruptedRunError(f"stopped by a signal after update {position.update}")

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
            if self.accelerator.is_main_process:
                save_checkpoint(self.best_checkpoint, self._weights())
        if self.display:
            listed = "  ".join(f"{name} {number:.4g}" for name, number in metrics.items())
            self.display.print(f"after update {self.position.update}: {split}  {listed}")

    def evaluate(self, split: str) -> dict[str, float]:
        """Figures of one split; with EMA also those of the averaged weights, as `ema_...`."""
        metrics = self._evaluate_model(self.task.model, split)
        if self.ema is not None:
            averaged = self._evaluate_model(self.ema.module, split)
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
        return metrics

    def _evaluate_model(self, model: nn.Module, split: str) -> dict[str, float]:
        model.eval()
        with torch.inference_mode(), self.accelerator.autocast():
            return self.task.evaluate(model, split, self._sum)

    def inspect(self) -> dict[str, dict[str, float]]:
        """Figures of each normalizer on a few evaluation batches, by module name."""
        self.task.model.eval()
        # A compiled model would not call the hooks that look at its normalizers.
        with (
            torch.inference_mode(),
            self.accelerator.autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            return self.task.inspect(self.task.model)

    def log(self, metrics: dict[str, float]) -> None:
        """Send metrics of the current update to all loggers."""
        for logger in self.loggers:
            logger.log(self.position.update, metrics)

    def _weights(self) -> dict[str, Any]:
        ema = None if self.ema is None else self.ema.module
        return weights(self.task.model, ema, self.position, self.task.fingerprint)

    def save(self) -> None:
        """Write `last.pt`: all that resuming needs, of all processes."""
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = self._weights() | {
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random_states": random_states,
            }
            save_checkpoint(self.last_checkpoint, state)
        self.accelerator.wait_for_everyone()

    def resume(self, path: Path) -> None:
        """Take over the state that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a checkpoint of this configuration.
        """
        state = load_checkpoint(path)
        check_complete(state, path)
        self._load_weights(state, path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.position: Position = Position(**state["position"])
        if not self.best_checkpoint.exists():  # it stayed in another folder
            self.position.best, self.position.best_update = None, 0
        states = state["random_states"]
        if self.position.batch and len(states) == self.accelerator.num_processes:
            self._saved_random_state = states[self.accelerator.process_index]
        for logger in self.loggers:
            logger.resume(self.position.update)

    def load_best(self) -> None:
        """Put the weights of `best.pt` into the model."""
        self._load_weights(load_checkpoint(self.best_checkpoint), self.best_checkpoint)

    def _load_weights(self, state: dict[str, Any], path: Path) -> None:
        ema = None if self.ema is None else self.ema.module
        load_weights(self.task.model, ema, state, self.task.fingerprint, path)

    def _stop_requested(self) -> bool:
        """Whether any process got a signal; all of them must agree on the update to stop after."""
        if self.accelerator.num_processes == 1:
            return self._stop.requested
        flag = torch.tensor(float(self._stop.requested), device=self.accelerator.device)
        return self._sum(flag).item() > 0
