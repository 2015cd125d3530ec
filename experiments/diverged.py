"""Runs that diverged: they leave no result, but a line in the record of their sweep."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from experiments.results import RUNS, Result
from experiments.selection import config_of
from multimax.files import write_json
from multimax.training.config import Config, run_folder
from multimax.training.result import SCHEMA
from multimax.training.sweep import RECORD, Job

SAID = re.compile(r"the (\w+ )?loss is (nan|-?inf)\b")  # what training says then


def collect_diverged(folders: Iterable[Path], target: Path = RUNS) -> list[Path]:
    """Record the runs of the sweeps below `folders` that diverged, as results without figures.

    They are `target/<scale>/<experiment>/<run>.json`, where the result of a run is. One that has a
    result is left out, as are those of `debug=two_updates` and those that settings were chosen by.

    Raises:
        ValueError: a record is damaged, or its settings do not compose any more.
    """
    written = []
    for file in sorted(file for folder in folders for file in folder.rglob(RECORD)):
        for job in _jobs(file):
            if job.state != "failed" or not SAID.match(job.said):
                continue
            config = config_of(*job.settings)
            folder = run_folder(config)
            path = target / config.scale.name / config.name / f"{folder.name}.json"
            unwanted = {"tuning", "debug"} & {config.name, *config.tags}
            if not (unwanted or path.exists() or (folder / "result.json").exists()):
                write_json(path, _record(config, job.said))
                written.append(path)
    return written


def _jobs(file: Path) -> list[Job]:
    try:
        return [Job(**json.loads(line)) for line in file.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it") from error


def _record(config: Config, said: str) -> Result:
    return {
        "schema": SCHEMA,
        "experiment": config.name,
        "task": config.task.name,
        "scale": config.scale.name,
        "seed": config.seed,
        "config": config.recorded(),
        "diverged": said,
        "metrics": {},
        "normalizers": {},
        "learned_scalars": {},
    }
