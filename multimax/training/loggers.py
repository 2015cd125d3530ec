"""Where a run reports to: its own JSON lines, the terminal, and Weights & Biases."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from multimax.files import write_atomically
from multimax.training.neighbours import Neighbours, advice

log: logging.Logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"  # in the run folder
PROJECT = "multimax"  # in Weights & Biases
SECONDS_FOR_NEIGHBOURS = 5.0  # of training, after which their use of the cores is known
SECONDS_FOR_WANDB = 60.0  # until its server must have answered


class Logger(Protocol):
    """Receives the metrics of a run; `update` counts the optimizer updates since its start."""

    def resume(self, update: int, evaluated: bool = True) -> None:
        """Forget what was logged after `update`, which will be logged again.

        `evaluated` tells whether the evaluation after that very update counts as before it.
        """

    def log(self, update: int, metrics: dict[str, float]) -> None:
        """Record metrics by name, such as `train/loss`."""

    def finish(self, summary: dict[str, float]) -> None:
        """Record the final metrics and close."""

    def abort(self) -> None:
        """Close without a result: the run failed, or was asked to stop."""


def entries_until(path: Path, update: int, evaluated: bool) -> list[dict[str, Any]]:
    """What a `metrics.jsonl` has that a run which resumes will not log again."""
    lines = path.read_text().splitlines() if update and path.exists() else []
    kept = []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that a kill cut short
        trained = any(name.startswith("train/") for name in entry)
        if entry["update"] < update + (evaluated or trained):
            kept.append(entry)
    return kept


class JsonLinesLogger:
    """`metrics.jsonl` in the run folder, one object a line; always on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resume(self, update: int, evaluated: bool = True) -> None:
        kept = entries_until(self.path, update, evaluated)
        content = "".join(json.dumps(entry) + "\n" for entry in kept).encode()
        write_atomically(self.path, lambda stream: stream.write(content))

    def log(self, update: int, metrics: dict[str, float]) -> None:
        # fp16 skips updates with infinite gradients, but JSON has no infinity.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self.path.open("a") as stream:
            stream.write(json.dumps({"update": update, **finite}) + "\n")

    def finish(self, summary: dict[str, float]) -> None:
        pass

    def abort(self) -> None:
        pass


class WandbLogger:
    """A mirror of the run in Weights & Biases; any failure there is said once and costs no run.

    Without an answer from its server the mirror is made offline. A mirror that does not go on with
    one on the server begins with what `metrics.jsonl` has, so that the last one is whole.

    Args:
        mode: "auto" is online if the user is logged in and offline otherwise; "online", "offline"
            or "disabled" force it.
        folder: the run folder; W&B's own files go below it.
        run: `name`, `id`, `group`, `tags` and `config` of the run.
    """

    def __init__(self, mode: str, folder: Path, run: dict[str, Any]) -> None:
        self.run = None
        self.metrics: Path = folder / METRICS
        if mode == "disabled":
            return
        try:
            import wandb

            options = {"project": PROJECT, "dir": folder, "resume": "allow", **run}
            with _without_cluster_token():
                self.run = _begin(wandb, wandb_mode(mode, wandb), options)
            self.run.define_metric("*", step_metric="update")
        except Exception as error:  # a broken mirror must not stop the run
            self._give_up(error)

    def resume(self, update: int, evaluated: bool = True) -> None:
        # W&B keys its history by the `update` metric: what the server has simply comes again.
        if self.run is not None and not self.run.resumed:
            for entry in entries_until(self.metrics, update, evaluated):
                known = {name: value for name, value in entry.items() if value is not None}
                self.log(known.pop("update"), known)

    def log(self, update: int, metrics: dict[str, float]) -> None:
        if self.run is not None:
            try:
                self.run.log({"update": update, **metrics})
            except Exception as error:
                self._give_up(error)

    def finish(self, summary: dict[str, float]) -> None:
        if self.run is not None:
            try:
                self.run.summary.update(summary)
                self.run.finish()
            except Exception as error:
                self._give_up(error)
            self.run = None

    def abort(self) -> None:
        # Left open, it would take in the next run of this process.
        if self.run is not None:
            try:
                self.run.finish(exit_code=1)
            except Exception as error:
                self._give_up(error)
            self.run = None

    def _give_up(self, error: Exception) -> None:
        self.run: Any = None
        log.warning(
            "Weights & Biases is off for this run (%s: %s); the run goes on and metrics.jsonl has "
            "everything. Silence this with logger.wandb=disabled",
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "no message",
        )


def _begin(wandb: Any, mode: str, options: dict[str, Any]) -> Any:
    """A run of W&B, offline where its server does not answer."""
    settings = wandb.Settings(
        init_timeout=SECONDS_FOR_WANDB,
        finish_timeout=5 * SECONDS_FOR_WANDB,
        silent=True,
        console="off",
    )
    try:
        return wandb.init(mode=mode, settings=settings, **options)
    except wandb.errors.CommError as error:
        if mode == "offline":
            raise
        log.warning(
            "Weights & Biases does not answer (%s): this run is mirrored offline",
            str(error).splitlines()[0],
        )
        wandb.teardown()  # or the identifier of the run is taken
        return wandb.init(mode="offline", settings=settings, **options)


@contextlib.contextmanager
def _without_cluster_token() -> Iterator[None]:
    """W&B records all variables of SLURM, among them the token that speaks for the user."""
    token = os.environ.pop("SLURM_JWT", None)
    try:
        yield
    finally:
        if token is not None:
            os.environ["SLURM_JWT"] = token


def wandb_mode(mode: str, wandb: Any) -> Literal["online", "offline"]:
    """What "auto" stands for: "online" if the user is logged in; other modes are as they are."""
    if mode != "auto":
        return "online" if mode == "online" else "offline"
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return "offline"
    known = os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False, verify=False)
    return "online" if known else "offline"


class ProgressDisplay:
    """A bar with loss, rate and remaining time on a terminal, a plain line now and then elsewhere.

    Args:
        console: where to.
        unit: what the rate counts, such as "images".
        every: seconds between two plain lines.
    """

    def __init__(self, console: Console, unit: str, every: float = 10.0) -> None:
        self.console: Console = console
        self.total: int = 0
        self.unit: str = unit
        self.every: float = every
        self.bar: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.row: TaskID = self.bar.add_task("training", total=None, state="")
        self.started: float = time.monotonic()
        self.printed: float = self.started
        self.first_update: int = 0
        self.neighbours: Neighbours | None = None

    def __enter__(self) -> "ProgressDisplay":
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def start_at(self, update: int, total: int) -> None:
        """Begin at an update of a run of `total` updates; the rate counts what comes from here."""
        self.first_update, self.total = update, total
        self.printed = self.started = time.monotonic()
        self.bar.reset(self.row, total=total, completed=update, state="")
        # Where a GPU or several processes train, threads of the host are not what is waited for.
        alone = os.environ.get("WORLD_SIZE", "1") == "1" and not torch.cuda.is_available()
        self.neighbours = Neighbours() if alone else None

    def show(self, update: int, epoch: int, loss: float, learning_rate: float, rate: float) -> None:
        """Show the state after an update; `rate` in units per second."""
        state = f"loss {loss:.4f}  {rate:,.0f} {self.unit}/s"
        self.bar.update(self.row, completed=update, description=f"epoch {epoch + 1}", state=state)
        now = time.monotonic()
        if self.neighbours and now - self.started > SECONDS_FOR_NEIGHBOURS:
            if said := advice(torch.get_num_threads(), self.neighbours.cores()):
                self.print(said)
            self.neighbours = None
        if not self.console.is_terminal and (now - self.printed > self.every):
            self.printed = now
            per_update = (now - self.started) / max(update - self.first_update, 1)
            left = (self.total - update) * per_update
            self.print(
                f"epoch {epoch + 1}  update {update}/{self.total}  {state}  "
                f"lr {learning_rate:.2e}  {left:.0f} s left"
            )

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(line, highlight=False, soft_wrap=True, markup=False)
