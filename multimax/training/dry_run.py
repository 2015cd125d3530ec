"""Two updates of a run with made data: how long the run takes, and how much memory."""

import math
import time
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from multimax.tasks import TASKS, build_task
from multimax.tasks.base import MADE_UPDATES
from multimax.training.config import Config
from multimax.training.random_state import seed_everything
from multimax.training.result import peak_memory_mib, print_rows
from multimax.training.trainer import Trainer

NOWHERE = Path("/dev/null")  # as a run folder: nothing can be written there


def dry_run(config: Config, accelerator: Accelerator, console: Console) -> dict[str, Any]:
    """Two full-size updates and an evaluation with made data, by the real trainer.

    The made data is that of `Task.make_data`: nothing is read, and nothing is written. Model,
    optimizer, precision, average of weights, processes and accumulation are those of the run.

    Args:
        config: of the run.
        accelerator: of `build_accelerator`.
        console: where the main process reports to.

    Returns:
        What was measured, the largest of all processes: seconds of each update, units per second
        and the seconds of the whole training by the last update, those of the evaluation, and peak
        memory in MiB.

    Raises:
        ValueError: the data set does not say how large it is; or as `multimax.training.run.run`.
    """
    trainer = made_trainer(config, accelerator)
    task, seconds, units = trainer.task, [], 0.0
    for update in range(MADE_UPDATES):
        group = list(islice(task.train_loader.batches(update), trainer.accumulation))
        metrics, elapsed = _timed(accelerator, lambda group=group: trainer._update(group))
        trainer.position.update += 1
        seconds.append(elapsed)
        units = metrics["train/units"]
    split = next((name for name in (trainer.monitored_split, "test") if name in task.splits), None)
    evaluation = 0.0
    if split is not None:
        _, evaluation = _timed(accelerator, lambda: trainer.evaluate(split))
    memory = peak_memory_mib()
    measured = _largest(accelerator, [*seconds, evaluation, *memory.values()])
    *seconds, evaluation, host, cuda = measured
    report = {
        "seconds_per_update": seconds,
        "units_per_update": units,
        "units_per_second": units / seconds[-1],
        "updates": trainer.total_updates,
        "training_seconds": seconds[-1] * trainer.total_updates,
        "evaluation_seconds": evaluation,
        "peak_memory_mib": {"host": host, "cuda": cuda},
    }
    if accelerator.is_main_process:
        rows = task.describe() | _rows(report, config, accelerator, task.unit)
        print_rows(console, rows)
    accelerator.wait_for_everyone()
    return report


def made_trainer(config: Config, accelerator: Accelerator) -> Trainer:
    """The trainer of a run with made data, which reads and writes nothing; else as `dry_run`."""
    seed_everything(config.seed, 0, accelerator.process_index)
    place = accelerator.process_index, accelerator.num_processes, accelerator.device
    kind = TASKS[config.task.name]
    source = kind.make_data(config, accelerator.num_processes)
    task = build_task(config, *place, (source, kind.build_model(config, source)))
    return Trainer(task, config, NOWHERE, accelerator, [], None)


def _timed(accelerator: Accelerator, work: Any) -> tuple[Any, float]:
    """What `work()` returns, and the seconds until the device has done it."""
    _synchronize(accelerator.device)
    started = time.monotonic()
    result = work()
    _synchronize(accelerator.device)
    return result, time.monotonic() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _largest(accelerator: Accelerator, numbers: list[float]) -> list[float]:
    """The largest of each number over all processes."""
    own = torch.tensor([numbers], device=accelerator.device)
    return cast(Tensor, accelerator.gather(own)).amax(0).tolist()


def _rows(
    report: dict[str, Any], config: Config, accelerator: Accelerator, unit: str
) -> dict[str, str]:
    first, *_, last = report["seconds_per_update"]
    memory = report["peak_memory_mib"]
    rate = report["units_per_second"]
    lasts = timedelta(seconds=math.ceil(report["training_seconds"]))
    return {
        "device": f"{accelerator.num_processes} x {accelerator.device}, "
        f"{torch.get_num_threads()} threads, precision {config.trainer.precision}",
        "update": f"{last:.3g} s, {report['units_per_update']:,.0f} {unit}, {rate:,.1f} {unit}/s; "
        f"the first one {first:.3g} s",
        "memory": f"{memory['host']:,.0f} MiB of the host"
        + f", {memory['cuda']:,.0f} MiB of the GPU" * (accelerator.device.type == "cuda")
        + ", at the peak of a process",
        "training": f"{report['updates']:,} updates take about {lasts}, without reading data, "
        "evaluations and checkpoints",
        "evaluate": f"{report['evaluation_seconds']:.3g} s for about a batch of each process",
        "dry run": "with random data; nothing was written",
    }
