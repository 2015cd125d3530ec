"""One run from a composed configuration to its result."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from rich.console import Console

from multimax.files import digest_file, locked, write_json
from multimax.parameters import learned_scalars
from multimax.tasks import build_task, data_fingerprint
from multimax.tasks.base import Task
from multimax.training.checkpoints import Inputs, check_inputs, load_initial_weights
from multimax.training.config import (
    Config,
    check_processes,
    config_hash,
    read_config,
    run_folder,
)
from multimax.training.dry_run import dry_run
from multimax.training.evaluation import build_accelerator, evaluate_splits
from multimax.training.folder import left_only_if_used, save_config, set_aside, wandb_id
from multimax.training.loggers import (
    METRICS,
    JsonLinesLogger,
    Logger,
    ProgressDisplay,
    WandbLogger,
)
from multimax.training.random_state import seed_everything
from multimax.training.result import (
    SCHEMA,
    environment,
    flat_summary,
    now,
    print_result,
    print_rows,
)
from multimax.training.slurm import requeued
from multimax.training.trainer import Trainer

# What a result that is read back must have to be shown.
SHOWN = (
    "experiment", "scale", "metrics", "normalizers", "learned_scalars", "updates",
    "training_seconds", "peak_memory_mib", "inputs",
)  # fmt: skip
INITIALIZATION = 2**32 - 1  # the "epoch" whose random stream draws the initial weights


def run(config: Any, console: Console | None = None) -> dict[str, Any]:
    """Train, evaluate and write `result.json`; a finished run is only read back.

    With `trainer.dry_run` nothing is written, see `multimax.training.dry_run`.

    Args:
        config: composed from `configs/`, see `read_config`.
        console: where the main process reports to; None is the terminal.

    Returns:
        The content of `result.json`; of a dry run what it measured.

    Raises:
        ValueError: a setting is out of range, another process has the run folder, or what the run
            folder holds is of other data.
        FileNotFoundError: data, or the checkpoint to begin with, is missing.
        FloatingPointError: training diverged.
        InterruptedRunError: a signal arrived; the same command goes on from here.
        OSError: a file cannot be written, for example because the disk is full.
    """
    config = read_config(config)
    check_processes(config, PartialState(cpu=not torch.cuda.is_available()).num_processes)
    accelerator = build_accelerator(config)
    try:
        if config.trainer.dry_run:
            return dry_run(config, accelerator, console or Console())
        folder = run_folder(config)
        if requeued(os.environ):
            config = _going_on(config, folder)
        if not accelerator.is_main_process:
            accelerator.wait_for_everyone()
            return _run(config, accelerator, folder, Console(quiet=True))
        with _held(folder, config.resume):
            accelerator.wait_for_everyone()
            return _run(config, accelerator, folder, console or Console())
    finally:
        # A sweep makes one Accelerator after another; their settings would otherwise be shared.
        AcceleratorState._reset_state()


@contextmanager
def _held(folder: Path, resume: str) -> Iterator[None]:
    """Keep other processes out of the folder; of a finished run, the folder is only read."""
    if resume != "never" and (folder / "result.json").exists():
        yield
        return
    with locked(folder), left_only_if_used(folder):
        if resume == "never":
            set_aside(folder)
        yield


def _run(
    config: Config, accelerator: Accelerator, folder: Path, console: Console
) -> dict[str, Any]:
    result_file = folder / "result.json"
    first_weights = _digest_of_weights(config)
    if result_file.exists():
        inputs = Inputs(data_fingerprint(config), first_weights)
        return _finished(result_file, inputs, console)
    seed_everything(config.seed, INITIALIZATION, 0)
    task = build_task(
        config, accelerator.process_index, accelerator.num_processes, accelerator.device
    )
    _describe(console, config, accelerator, task, folder)
    origin = ""
    if config.weights is not None:
        origin = load_initial_weights(task.model, Path(config.weights), task.fingerprint)
    display = ProgressDisplay(console, task.unit) if accelerator.is_main_process else None
    trainer = Trainer(task, config, folder, accelerator, [], display, first_weights)
    trainer.position.origin = origin
    checkpoint = _checkpoint_to_resume(config, trainer)
    own = checkpoint is None or trainer.resume(checkpoint)
    if checkpoint or origin:
        start = f"resuming from {checkpoint}" if checkpoint else f"beginning with {origin}"
        line = f"{start} at update {trainer.position.update}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if accelerator.is_main_process:
        if not own:  # what is here is of another beginning
            set_aside(folder)
        save_config(config, folder)
        trainer.loggers = _loggers(config, folder)
    try:
        for logger in trainer.loggers:
            logger.resume(trainer.position.update, not trainer.position.due)
        trainer.fit()
        return _finish(config, trainer, trainer.loggers, folder, console)
    except BaseException:
        for logger in trainer.loggers:
            logger.abort()
        raise


def _finish(
    config: Config, trainer: Trainer, loggers: list[Logger], folder: Path, console: Console
) -> dict[str, Any]:
    if config.trainer.report == "best":
        trainer.load_best()
    task, position = trainer.task, trainer.position
    with trainer.interruptible():
        metrics = evaluate_splits(task, trainer.evaluate)
        normalizers = _without_nan(trainer.inspect())
    result = {
        "schema": SCHEMA,
        "experiment": config.name,
        "task": config.task.name,
        "scale": config.scale.name,
        "seed": config.seed,
        "config_hash": config_hash(config),
        "config": config.recorded(),
        "inputs": asdict(trainer.inputs),
        "origin": position.origin or None,
        "metrics": metrics,
        "notes": task.notes,
        "reported_weights": config.trainer.report,
        "best": {"metric": task.monitor, "value": position.best, "update": position.best_update},
        "normalizers": normalizers,
        "learned_scalars": learned_scalars(task.model),
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "updates": position.update,
        "training_seconds": round(position.seconds, 2),
        "processes": trainer.accelerator.num_processes,
        **environment(),
        "finished": now(),
    }
    if trainer.accelerator.is_main_process:
        write_json(folder / "result.json", result)
    for logger in loggers:
        logger.finish(flat_summary(result))
    print_result(console, result, folder)
    trainer.accelerator.wait_for_everyone()
    return result


def _without_nan(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    return {
        name: {key: None if math.isnan(value) else value for key, value in row.items()}
        for name, row in rows.items()
    }


def _finished(result_file: Path, inputs: Inputs, console: Console) -> dict[str, Any]:
    try:
        result = json.loads(result_file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{result_file} is damaged ({error}): resume=never keeps it aside and runs again"
        ) from error
    missing = [key for key in SHOWN if not isinstance(result, dict) or key not in result]
    if missing:
        raise ValueError(
            f"{result_file} is of an earlier version or damaged (it lacks {', '.join(missing)}): "
            "resume=never keeps it aside and runs again"
        )
    check_inputs(result["inputs"], inputs, result_file)
    console.print(
        "this configuration and seed is finished; here is its result (resume=never runs it "
        "again and keeps this one aside)"
    )
    print_result(console, result, result_file.parent)
    return result


def _describe(
    console: Console, config: Config, accelerator: Accelerator, task: Task, folder: Path
) -> None:
    devices = f"{accelerator.num_processes} x {accelerator.device}"
    scale = config.scale.name
    rows = {
        "run": f"{config.name}: {config.task.name} at {scale} scale, seed {config.seed}",
        **task.describe(),
        "device": f"{devices}, {torch.get_num_threads()} threads, precision "
        f"{config.trainer.precision}",
        "results": str(folder),
    }
    print_rows(console, rows)


def _loggers(config: Config, folder: Path) -> list[Logger]:
    run = {
        "name": folder.name,
        "id": wandb_id(folder / "wandb_id"),
        "group": config.group or config.name,
        "tags": config.tags,
        "config": config.recorded(),
    }
    return [
        JsonLinesLogger(folder / METRICS),
        WandbLogger(config.logger.wandb, folder, run),
    ]


def _digest_of_weights(config: Config) -> str | None:
    """Of the file that the configuration names as first weights; None if it names none."""
    if config.weights is None:
        return None
    path = Path(config.weights)
    if config.resume not in ("auto", "never"):
        raise ValueError(
            f"weights={path} and resume={config.resume} both say where to begin: give one of them; "
            "weights= begins a new run, resume= goes on with one"
        )
    if not path.is_file():
        raise FileNotFoundError(f"weights={path} must be a checkpoint file: there is none")
    return digest_file(path)


def _going_on(config: Config, folder: Path) -> Config:
    """A configuration whose `resume` has been heeded before, by the same job of a cluster."""
    begun = config.resume == "never" or (folder / "last.pt").exists()
    return config.model_copy(update={"resume": "auto"}) if begun else config


def _checkpoint_to_resume(config: Config, trainer: Trainer) -> Path | None:
    if config.resume in ("auto", "never"):
        return trainer.last_checkpoint if trainer.last_checkpoint.exists() else None
    path = Path(config.resume)
    return path / "last.pt" if path.is_dir() else path
