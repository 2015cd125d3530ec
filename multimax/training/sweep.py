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
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from multimax.files import make_folder
from multimax.tasks.base import DivergedError
from multimax.training import slurm
from multimax.training.config import Config, check_processes, read_config, run_folder
from multimax.training.run import run
from multimax.training.trainer import InterruptedRunError

RECORD = "jobs.jsonl"
State = Literal["launched", "finished", "finished before", "failed", "interrupted"]
OPEN = ("launched", "interrupted")  # what another line on the same job may follow


@dataclass(frozen=True)
class Job:
    """What became of a job.

    Attributes:
        settings: of its command line.
        state: "finished before" is a run that had its result already; "launched" is all that is
            known of a job which has not ended in an orderly way.
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
        InterruptedRunError, KeyboardInterrupt: a signal arrived, which ends the sweep.
        SystemExit: one of several processes failed, which ends the sweep too: the others are still
            in this job, and wait for it.
    """
    hydra = HydraConfig.get()
    record = Path(hydra.sweep.dir) / RECORD
    state: State = "interrupted"
    said, folder = "", None
    alone = False  # whether what goes wrong may do so in this process only
    try:
        slurm.adopt(os.environ)  # which train.py has not done where submitit calls this
        typed = read_config(config)
        check_processes(typed, _processes())
        folder = run_folder(typed)
        before = _has_result(typed)
        alone = _processes() > 1
        said = main_metric(run(typed))
        state = "finished before" if before else "finished"
    except InterruptedRunError as stop:
        said = str(stop)
        raise
    except (ValueError, OSError, FloatingPointError) as error:
        state, said = "failed", str(error)
        alone &= not isinstance(error, DivergedError)
        print(f"error: {error}\n", file=sys.stderr)
    except Exception as error:
        state, said = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        kept = None if folder is None or not folder.exists() else str(folder)
        failed_alone = alone and state == "failed"
        if main_process() or failed_alone:
            _write(record, Job(list(hydra.overrides.task), state, said, kept))
    if failed_alone:
        raise SystemExit(1)


def record_launched(jobs: list[list[str]], record: Path) -> None:
    """Record jobs, by their settings, before they are begun: one that is killed has no more."""
    if main_process():
        said = "killed, still running, or not begun"
        _write(record, *(Job(settings, "launched", said, None) for settings in jobs))


def finished_before(
    config: DictConfig, settings: list[str], record: Path, results: Path | None = None
) -> bool:
    """Whether a run has its result already; it is recorded then, and needs no job.

    A run that cannot be read, or whose configuration is wrong, is left to its job to complain.

    Args:
        config: of the job.
        settings: of its command line.
        record: of the sweep.
        results: where `experiments.results` keeps what was run elsewhere, which counts too.
    """
    try:
        content: Any = OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"])
        typed = read_config(content)
        place = run_folder(typed)
        file = place / "result.json"
        if not _has_result(typed):
            if results is None:
                return False
            place = file = results / typed.scale.name / typed.name / f"{place.name}.json"
        said = main_metric(json.loads(file.read_text()))
    except (ValueError, OSError, KeyError, TypeError):
        return False
    if main_process():
        _write(record, Job(settings, "finished before", said, str(place)))
    return True


def _has_result(config: Config) -> bool:
    """Whether a run is only to be read back."""
    again = config.resume == "never" or config.trainer.dry_run
    return not again and (run_folder(config) / "result.json").exists()


def _write(record: Path, *jobs: Job) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a") as stream:
            stream.write("".join(json.dumps(asdict(job)) + "\n" for job in jobs))
    except OSError as error:  # which ends no other job
        print(f"error: {record} cannot be written ({error.strerror})", file=sys.stderr)


class SweepSummary(Callback):
    """Hydra's callback that prints the summary; the program then fails if a job did."""

    _record: ClassVar[Path | None] = None  # of a sweep that is not summed up yet

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """SystemExit where nothing can be written, before anything is run."""
        if _processes() > 1:
            _share_time(config)
        folder = Path(config.hydra.sweep.dir)
        try:
            make_folder(folder)
        except OSError as error:
            raise SystemExit(f"error: {error}") from error
        SweepSummary._record = folder / RECORD

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the summary; SystemExit with code 1 if a job has no result."""
        SweepSummary._record = None
        if main_process() and print_summary(Path(config.hydra.sweep.dir) / RECORD):
            raise SystemExit(1)

    @classmethod
    def close(cls) -> None:
        """Print the summary of a sweep that has ended early, of which Hydra tells no callback."""
        record, cls._record = cls._record, None
        if main_process() and record is not None and record.exists():
            print_summary(record)


def _share_time(config: DictConfig) -> None:
    """Give all processes the time of the main one, of which the folder of the sweep has its name.

    Each job has a copy of what `now` gave here.
    """
    PartialState(cpu=not torch.cuda.is_available())
    _ = config.hydra.sweep.dir  # which calls it
    times = [OmegaConf.get_cache(config)["now"]]
    broadcast_object_list(times)
    OmegaConf.get_cache(config)["now"] = times[0]


def print_summary(record: Path) -> int:
    """Print what became of each job that is recorded; returns how many have no result."""
    lines = record.read_text().splitlines(keepends=True) if record.exists() else []
    # A full disk cuts a line short.
    jobs = last_words([Job(**json.loads(line)) for line in lines if line.endswith("\n")])
    print(*summary(jobs), sep="\n")
    return sum(not job.state.startswith("finished") for job in jobs)


def last_words(jobs: list[Job]) -> list[Job]:
    """Each job once: without what was said before it was queued again, or after it failed.

    Other processes of a job fail because one has.
    """
    known: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        if known.setdefault(tuple(job.settings), job).state in OPEN:
            known[tuple(job.settings)] = job
    return list(known.values())


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
    split = "test" if "test" in result["metrics"] else "valid"
    name = result["best"]["metric"].partition("/")[2]
    return f"{split} {name} {result['metrics'][split][name]:.4g}"


def main_process() -> bool:
    """Whether this is the one that reports, of those that torchrun or `srun` started."""
    return os.environ.get("RANK", "0") == "0"


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))
