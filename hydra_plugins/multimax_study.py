"""Hydra's way to the runs of a study: `python train.py -m study=table2`, with any launcher.

Hydra takes plug-ins from this folder only.
"""

import itertools
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from multimax.training.studies import read_study
from multimax.training.sweep import RECORD, finished_before, record_launched

RESULTS = Path("results/runs")  # of `experiments.results`


class StudySweeper(Sweeper):
    """Launches the runs of `config.study` that have no result yet.

    On the command line, `cells=a,b` and `seed=0,1` choose a part, `recorded=skip` what
    `results/runs` has not yet, and `tuning=true` the runs by which settings are chosen; all else
    holds for every run, and may be a sweep of its own.
    """

    _context: HydraContext
    _config: DictConfig
    _launcher: Launcher
    _results: Path | None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `sweep`."""
        self._context, self._config = hydra_context, config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch what is missing, given the settings of the command line; SystemExit if wrong."""
        folder = Path(self._config.hydra.sweep.dir)
        try:
            jobs = self._jobs(arguments)
            missing = [job for job in jobs if not self._finished(job, folder)]
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._config, folder / "multirun.yaml")
        record_launched(missing, folder / RECORD)
        try:
            return self._launcher.launch(missing, initial_job_idx=0) if missing else []
        except RuntimeError as error:  # of a launcher: no SLURM is here, or a process was killed
            raise SystemExit(f"error: {error}") from error

    def _jobs(self, arguments: list[str]) -> list[list[str]]:
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        chosen: dict[str, list[str]] = {}
        others: list[list[str]] = []
        for override in parser.parse_overrides(arguments):
            key = override.get_key_element()
            if override.is_sweep_override():
                values = [str(value) for value in override.sweep_string_iterator()]
            else:
                values = [override.get_value_element_as_str()]
            if key == "tuning":
                chosen[key] = [value.lower() for value in values]  # Hydra makes True of true
            elif key in ("cells", "seed", "recorded"):
                chosen[key] = values
            elif key != "study":
                others.append([f"{key}={value}" for value in values])
        study, tuning = read_study(self._config.study), chosen.get("tuning", ["false"])
        if tuning not in (["true"], ["false"]):
            raise ValueError(f"tuning={','.join(tuning)} must be true or false")
        recorded = chosen.get("recorded", ["run"])
        if recorded not in (["run"], ["skip"]):
            raise ValueError(f"recorded={','.join(recorded)} must be run or skip")
        self._results = RESULTS if recorded == ["skip"] else None
        return [
            job
            for settings in itertools.product(*others)
            for job in study.jobs(
                chosen.get("cells"), chosen.get("seed"), settings, tuning == ["true"]
            )
        ]

    def _finished(self, job: list[str], folder: Path) -> bool:
        config = self._context.config_loader.load_sweep_config(self._config, job)
        return finished_before(config, job, folder / RECORD, self._results)
