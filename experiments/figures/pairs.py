"""Runs of a study that differ in their normalizers alone: SoftMax and MultiMax, by seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments.scores import SCORES, Scores, load_scores
from experiments.selection import Run, select, settings_of, study_of
from multimax.training.config import hashed_settings, read_config

T = TypeVar("T")
STUDIES = {"deit": "table2", "lm": "table3", "mt": "table4"}
TITLES = {"deit": "DeiT", "lm": "Language model", "mt": "Translation"}
# The first one of which there is a run is compared with the baseline: it differs least.
CELLS = ("multimax2-attention", "multimax2-both")
CELL_TITLES = {
    "multimax2-attention": "MultiMax in the attention",
    "multimax2-both": "MultiMax in attention and output layer",
}


@dataclass(frozen=True)
class Pair(Generic[T]):
    """Two runs of one seed, with all but their normalizers in common.

    Attributes:
        cell: of the study, which the run with MultiMax belongs to.
        seed: of both.
        softmax, multimax: what there is of either.
    """

    cell: str
    seed: int
    softmax: T
    multimax: T


def pairs_of_task(task: str, runs: Mapping[str, tuple[dict[str, Any], T]]) -> list[Pair[T]]:
    """The pairs of a task by seed, all of one cell; none if there are none.

    Args:
        task: one of `STUDIES`.
        runs: by the place of each, its configuration as it was recorded, and what there is of it.

    Raises:
        ValueError: two runs have the same configuration and seed.
    """
    known = []
    for place, (recorded, _) in runs.items():
        config = read_config(recorded)
        known.append(Run(hashed_settings(config), config.seed, {}, place))
    study = study_of(STUDIES[task])
    baseline, *others = (
        {
            seed: runs[run.place][1]
            for seed, run in select(settings_of(*study.settings(cell)), known).runs.items()
        }
        for cell in (study.baseline, *CELLS)
    )
    for cell, runs_of_cell in zip(CELLS, others, strict=True):
        seeds = sorted(baseline.keys() & runs_of_cell.keys())
        if seeds:
            return [Pair(cell, seed, baseline[seed], runs_of_cell[seed]) for seed in seeds]
    return []


def measured_pairs(source: Path = SCORES) -> dict[str, list[Pair[Scores]]]:
    """The measured pairs of each task that has any.

    Raises:
        FileNotFoundError: no task has any.
        ValueError: as `load_scores`; or a run was measured twice.
    """
    runs = {place: (scores.config, scores) for place, scores in load_scores(source).items()}
    found = {task: pairs_of_task(task, runs) for task in STUDIES}
    found = {task: pairs for task, pairs in found.items() if pairs}
    if not found:
        raise FileNotFoundError(
            f"{source} has no run with SoftMax and one with MultiMax of the same seed: "
            "python train.py -m study=table2 cells=softmax,multimax2-attention seed=0 trains them, "
            "python -m experiments.measure outputs/small/deit/RUN ... measures them"
        )
    return found
