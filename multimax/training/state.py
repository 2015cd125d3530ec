"""What training changes: model, average, optimizer and position of a run, in memory and on disk."""

import contextlib
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import nn

from multimax.files import load_checkpoint, save_checkpoint
from multimax.parameters import GradientClipping
from multimax.tasks.base import Task
from multimax.training.checkpoints import (
    Inputs,
    Position,
    check_complete,
    check_inputs,
    check_position,
    load_weights,
    restore_optimizer,
    weights,
)
from multimax.training.config import Config
from multimax.training.folder import KEPT, kept
from multimax.training.optimization import LearningRate, build_optimizer
from multimax.training.random_state import random_state
from multimax.training.sharding import WholeModel, gathered, shard, without_weights


class RunState:
    """The state of a run, which `save` writes and `resume` takes over.

    Args:
        task: data, model and loss.
        config: the composed configuration; `trainer`, `optimizer`, `schedule` and `seed` are read.
        folder: the run folder; `last.pt` and `best.pt` are written there.
        accelerator: devices, processes and precision.
        first_weights: digest of the file that the model's weights came from; None if they are new.

    Raises:
        ValueError: the training data gives no update, or an option of the optimizer is wrong.
    """

    def __init__(
        self,
        task: Task,
        config: Config,
        folder: Path,
        accelerator: Accelerator,
        first_weights: str | None = None,
    ) -> None:
        self.task: Task = task
        self.config: Config = config
        self.folder: Path = folder
        self.accelerator: Accelerator = accelerator
        self.inputs: Inputs = Inputs(task.data_fingerprint, first_weights)
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
        self.position: Position = Position()

        if not options.shard:  # which moves it by its layers
            task.model.to(accelerator.device)
        if options.channels_last:
            cast(Any, task.model).to(memory_format=torch.channels_last)
        decay = options.ema_decay
        self.ema: ModelEmaV3 | None = None
        if decay is not None:
            # A state dict has a tied tensor twice: it would be averaged twice, parameters are once.
            start = without_weights(task.model) if options.shard else task.model
            self.ema = ModelEmaV3(start, decay=decay, exclude_buffers=True)
        self._whole: WholeModel | None = None
        if options.shard:
            self._whole = WholeModel(task.model)
            averaged = None if self.ema is None else self.ema.module
            shard(task.model, accelerator.device, averaged)
        if options.compile:
            task.model.compile()
        optimizer = build_optimizer(task.model, config.optimizer)
        schedule = config.schedule, length, self.updates_per_unit
        self.learning_rate: LearningRate = LearningRate(optimizer, *schedule)
        self.clip: GradientClipping = GradientClipping(task.model, options.clip_norm)
        if options.shard:
            self.model, self.optimizer = task.model, accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        self.saved_random_state: dict[str, Any] | None = None

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights, see `multimax.training.sharding`."""
        return self._whole is not None

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

    def whole(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """A model with all of its weights in this process, of `task.model` or of its average."""
        return contextlib.nullcontext(model) if self._whole is None else self._whole.of(model)

    def save(self) -> None:
        """Write `last.pt`: all that resuming needs, of all processes."""
        scaler = self.accelerator.scaler
        main = self.accelerator.is_main_process
        self._save(
            self.last_checkpoint,
            updates_per_epoch=self.updates_per_epoch,
            optimizer_name=self.config.optimizer.name,
            optimizer=gathered(self.optimizer.state_dict(), main),
            scaler=None if scaler is None else scaler.state_dict(),
            # Of a resumed run that has not trained yet, the generators are still elsewhere.
            random_states=gather_object([self.saved_random_state or random_state()]),
        )
        self.accelerator.wait_for_everyone()

    def save_best(self) -> None:
        """Write `best.pt`: the weights as they are now."""
        self._save(self.best_checkpoint)

    def keep(self) -> None:
        """Write `update-<update>.pt`, as `best.pt`, and remove older ones than `trainer.keep`."""
        number = self.config.trainer.keep
        if number is not None:
            self._save(self.folder / KEPT.replace("*", str(self.position.update)))
            if self.accelerator.is_main_process:
                for path in kept(self.folder)[:-number]:
                    path.unlink()

    def load_best(self) -> None:
        """Put the weights of `best.pt` into the model."""
        self._load_weights(load_checkpoint(self.best_checkpoint), self.best_checkpoint)

    def resume(self, path: Path) -> bool:
        """Take over the state that `save` wrote; the optimizer keeps the settings it has here.

        Returns:
            Whether it is this run's own state; else it is that of a run that this one goes on from.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a checkpoint of this configuration, or it is of other data.
        """
        own = path.resolve() == self.last_checkpoint.resolve()
        state = load_checkpoint(path)
        check_complete(state, path)
        check_inputs(state["inputs"], self.inputs, path, own)
        length = self.total_updates, self.config.trainer.epochs is not None
        position = check_position(state, path, self.updates_per_epoch, *length)
        self._load_weights(state, path)
        restore_optimizer(self.optimizer, self.config.optimizer.name, state, path)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if not own:
            resumed = f"resumed from {path} at update {position.update}"
            position.origin = "; ".join(filter(None, (position.origin, resumed)))
        if not own or not self.best_checkpoint.exists():  # it stayed in another folder
            position.best, position.best_update = None, 0
            position.due |= position.update == self.total_updates
        self.position = position
        if position.update:  # the rate that the last update had, which is saved again
            self.learning_rate.set(position.update - 1)
        states = state["random_states"]
        if position.epoch_update and len(states) == self.accelerator.num_processes:
            self.saved_random_state = states[self.accelerator.process_index]
        return own

    def _save(self, path: Path, **state: Any) -> None:
        ema = None if self.ema is None else self.ema.module
        main = self.accelerator.is_main_process
        now = self.position, self.task.fingerprint, self.inputs
        networks = weights(self.task.model, ema, *now, keep=main)
        if main:
            save_checkpoint(path, networks | state)

    def _load_weights(self, state: dict[str, Any], path: Path) -> None:
        ema = None if self.ema is None else self.ema.module
        load_weights(self.task.model, ema, state, self.task.fingerprint, path)
