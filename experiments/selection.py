"""Which recorded runs belong to a row of a table: those of its configuration, wherever they lie."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from experiments.results import Result
from multimax.training.command_line import complete_length
from multimax.training.config import hashed_settings, read_config

CONFIGS = Path(__file__).parents[1] / "configs"
NORMALIZERS = ("attention", "output")


@dataclass
class Selection:
    """The runs of a row.

    Attributes:
        runs: by seed.
        left_out: of runs with the row's task, scale and normalizers, but other settings: how often
            each setting is another one.
    """

    runs: dict[int, Result] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def settings_of(*overrides: str) -> dict[str, Any]:
    """The settings that a command line of `train.py` composes, without those of no consequence.

    Raises:
        ValueError: they do not compose.
    """
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose("config", overrides=complete_length(overrides))
    except HydraException as error:
        raise ValueError(str(error).partition("\n")[0]) from error
    return hashed_settings(read_config(composed))


def recorded_settings(result: Result) -> dict[str, Any]:
    """The settings that a run recorded, in the same form."""
    return hashed_settings(read_config(result["config"]))


def select(settings: dict[str, Any], results: list[tuple[dict[str, Any], Result]]) -> Selection:
    """The runs with these settings, by seed.

    Args:
        settings: of `settings_of`.
        results: recorded settings and results.

    Raises:
        ValueError: two runs have the same settings and the same seed.
    """
    found = Selection()
    kind = ("task", "scale", *NORMALIZERS)
    for recorded, result in results:
        if recorded == settings:
            seed = result["seed"]
            if seed in found.runs:
                raise ValueError(
                    f"seed {seed} is recorded twice for {result['experiment']}, with one "
                    f"configuration ({result['config_hash']}): delete one of the two results"
                )
            found.runs[seed] = result
        elif all(recorded[key] == settings[key] for key in kind):
            found.left_out.update(differences(recorded, settings))
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
