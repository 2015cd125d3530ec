"""Which recorded runs belong to a row of a table: those of its configuration, wherever they lie."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from experiments.results import Result, has_diverged
from multimax.registry import look_up
from multimax.training.command_line import complete_length
from multimax.training.config import Config, hashed_settings, read_config
from multimax.training.result import flat_summary
from multimax.training.studies import Study, read_study

CONFIGS = Path(__file__).parents[1] / "configs"
NORMALIZERS = ("attention", "output")
SCALES = sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml"))
STUDIES = sorted(path.stem for path in (CONFIGS / "study").glob("*.yaml"))


@cache  # the rows of a table, its claims and its figures ask for the same again
def config_of(*overrides: str) -> Config:
    """The configuration that a command line of `train.py` composes; not to be changed.

    Raises:
        ValueError: the settings do not compose.
    """
    return read_config(_composed(*overrides))


def _composed(*overrides: str) -> Any:
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("config", overrides=complete_length(overrides))
    except HydraException as error:
        raise ValueError(str(error).partition("\n")[0]) from error


def settings_of(*overrides: str) -> dict[str, Any]:
    """The settings of `config_of`, without those of no consequence and the seed."""
    return hashed_settings(config_of(*overrides))


@dataclass(frozen=True)
class Run:
    """A recorded run, as tables need it.

    Attributes:
        settings: that can change its numbers, but for the seed.
        seed: of the run.
        figures: such as "test/top1", by the names that Weights & Biases has too.
        place: where it is recorded.
        diverged: whether it did, and has no figures.
        device: that it ran on, where that is known.
    """

    settings: dict[str, Any]
    seed: int
    figures: dict[str, float]
    place: str
    diverged: bool = False
    device: str | None = None


@dataclass
class Selection:
    """The runs of a row.

    Attributes:
        runs: by seed.
        left_out: of runs with the row's task, scale and normalizers, but other settings: how often
            each setting is another one.
    """

    runs: dict[int, Run] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def run_of(result: Result, place: str = "") -> Run:
    """The run that a result records."""
    settings = hashed_settings(read_config(result["config"]))
    place = place or result["experiment"]
    device = result.get("hardware", {}).get("device")
    return Run(settings, result["seed"], flat_summary(result), place, has_diverged(result), device)


def study_of(name: str, *overrides: str) -> Study:
    """A study of `configs/study/`.

    Raises:
        ValueError: there is none of this name, or something in it is wrong.
    """
    look_up("study", dict.fromkeys(STUDIES), name)
    return read_study(_composed(f"study={name}", *overrides).study)


def has_scale(study: Study, scale: str) -> bool:
    """Whether the task of a study has a recipe at a scale."""
    task = config_of(*study.settings(study.baseline)).task.name
    return (CONFIGS / "recipe" / task / f"{scale}.yaml").exists()


def select(settings: dict[str, Any], runs: Iterable[Run]) -> Selection:
    """The runs with these settings, by seed.

    Raises:
        ValueError: two runs have the same settings and the same seed.
    """
    found = Selection()
    kind = ("task", "scale", *NORMALIZERS)
    for run in runs:
        if run.settings == settings:
            if run.seed in found.runs:
                raise ValueError(
                    f"seed {run.seed} is recorded twice with one configuration, in {run.place} and "
                    f"in {found.runs[run.seed].place}: delete one of the two results"
                )
            found.runs[run.seed] = run
        elif all(run.settings[key] == settings[key] for key in kind):
            found.left_out.update(differences(run.settings, settings))
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the settings that two configurations do not share, such as "optimizer.lr"."""
    names = []
    for section in {**one, **other}:
        left, right = one.get(section), other.get(section)
        if isinstance(left, dict) and isinstance(right, dict):
            keys = {**left, **right}
            names += [f"{section}.{key}" for key in keys if left.get(key) != right.get(key)]
        elif left != right:
            names.append(section)
    return names
