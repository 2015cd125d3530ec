"""Sweeps (`train.py -m`): every job runs whatever becomes of the others, and a summary at the end.

Each job adds a line to `jobs.jsonl` in the folder of the sweep, so that a launcher may run jobs in
other processes.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from multimax.files import make_folder
from multimax.training.config import Config, read_config, run_folder
from multimax.training.run import run
from multimax.training.trainer import InterruptedRunError

RECORD = "jobs.jsonl"
State = Literal["finished", "finished before", "failed", "interrupted"]


@dataclass(frozen=True)
class Job:
    """What became of a job.

    Attributes:
        settings: of its command line.
        state: "finished before" is a run that had its result already.
        said: the main metric of a finished run, or the reason why there is none.
        folder: of the run; None if it has none.
    """

    settings: list[str]
    state: State
    said: str
    folder: str | None


def run_job(config: DictConfig) -> None:
    """Run a job of a sweep inside Hydra; what goes wrong is printed and recorded, not raised.

    Raises:
        InterruptedRunError, KeyboardInterrupt: a signal arrived, which ends the sweep; the summary
            is printed before.
    """
    hydra = HydraConfig.get()
    record = Path(hydra.sweep.dir) / RECORD
    state: State = "interrupted"
    said, folder = "", None
    try:
        typed = read_config(config)
        folder = run_folder(typed)
        before = _has_result(typed)
        said = main_metric(run(typed))
        state = "finished before" if before else "finished"
    except InterruptedRunError:
        raise
    except (ValueError, OSError, FloatingPointError) as error:
        state, said = "failed", str(error)
        print(f"error: {error}\n", file=sys.stderr)
    except Exception as error:
        state, said = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        kept = None if folder is None or not folder.exists() else str(folder)
        if _main_process():
            _write(record, Job(list(hydra.overrides.task), state, said, kept))
        if state == "interrupted":
            print_summary(record)


def finished_before(config: DictConfig, settings: list[str], record: Path) -> bool:
    """Whether a run has its result already; it is recorded then, and needs no job.

    A run that cannot be read, or whose configuration is wrong, is left to its job to complain.
    """
    try:
        content: Any = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
        typed = read_config(content)
        folder = run_folder(typed)
        if not _has_result(typed):
            return False
        said = main_metric(json.loads((folder / "result.json").read_text()))
    except (ValueError, OSError, KeyError, TypeError):
        return False
    if _main_process():
        _write(record, Job(settings, "finished before", said, str(folder)))
    return True


def _has_result(config: Config) -> bool:
    """Whether a run is only to be read back."""
    again = config.resume == "never" or config.trainer.dry_run
    return not again and (run_folder(config) / "result.json").exists()


def _write(record: Path, job: Job) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a") as stream:
            stream.write(json.dumps(asdict(job)) + "\n")
    except OSError as error:  # which ends no other job
        print(f"error: {record} cannot be written ({error.strerror})", file=sys.stderr)


class SweepSummary(Callback):
    """Hydra's callback that prints the summary; the program then fails if a job did."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """SystemExit where nothing can be written, before anything is run."""
        try:
            make_folder(Path(config.hydra.sweep.dir))
        except OSError as error:
            raise SystemExit(f"error: {error}") from error

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the summary; SystemExit with code 1 if a job failed."""
        if _main_process() and print_summary(Path(config.hydra.sweep.dir) / RECORD):
            raise SystemExit(1)


def print_summary(record: Path) -> int:
    """Print what became of each job that is recorded; returns how many failed."""
    lines = record.read_text().splitlines(keepends=True) if record.exists() else []
    # A full disk cuts a line short.
    jobs = [Job(**json.loads(line)) for line in lines if line.endswith("\n")]
    print(*summary(jobs), sep="\n")
    return sum(job.state == "failed" for job in jobs)


def summary(jobs: list[Job]) -> list[str]:
    """A line for each job, with the settings in which it differs from the others."""
    states = [job.state for job in jobs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    shared = set.intersection(*(set(job.settings) for job in jobs)) if len(jobs) > 1 else set()
    rows = [
        (
            " ".join(setting for setting in job.settings if setting not in shared),
            job.state,
            "  ".join(filter(None, [job.said.partition("\n")[0], job.folder])),
        )
        for job in jobs
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in rows]
    return [f"sweep of {len(jobs)} jobs: {counts or 'none'}", *table]


def main_metric(result: dict[str, Any]) -> str:
    """The metric that a result is of, such as "test top1 86.2"; of a dry run how long it takes."""
    if "training_seconds" in result and "metrics" not in result:
        return f"about {result['training_seconds']:.0f} s"
    split = "test" if "test" in result["metrics"] else next(iter(result["metrics"]))
    name = result["best"]["metric"].partition("/")[2]
    return f"{split} {name} {result['metrics'][split][name]:.4g}"


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
