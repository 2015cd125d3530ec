"""The settings that a study tried for its cells, and which of them are the best.

    python train.py -m study=retrieval tuning=true
    python -m experiments.tuning retrieval outputs/small/retrieval    # reads what is finished
    python -m experiments.tuning retrieval                            # shows what was read

What was read is kept in results/tuning/<study>.json, where the figure of a run is found by its
cell, the number of its settings and its seed. The best of them is what `chosen` of a cell must be.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.results import read_finished
from experiments.selection import config_of, run_of, study_of
from multimax.files import write_json
from multimax.training.config import hashed_settings
from multimax.training.studies import Study

FOLDER = Path("results/tuning")
Figures = dict[str, list[dict[str, float]]]  # of each cell, of each setting, by seed


def read(study: Study, scale: str, folders: list[Path]) -> Figures:
    """The figures of the runs below `folders` by which the settings of the cells are chosen."""
    tuning = study.tuning
    if tuning is None:
        raise ValueError(f"study {study.name} has nothing to choose")
    found: dict[str, dict[str, float]] = {}
    for file, result in read_finished(folders):
        run = run_of(result, str(file))
        if run.seed in tuning.seeds:
            key = json.dumps(run.settings, sort_keys=True)
            found.setdefault(key, {})[str(run.seed)] = run.figures[tuning.figure]

    def of(cell: str, index: int) -> dict[str, float]:
        settings = *study.tried(cell, index), *tuning.settings, f"scale={scale}"
        key = json.dumps(hashed_settings(config_of(*settings)), sort_keys=True)
        return dict(sorted(found.get(key, {}).items()))

    return {
        name: [of(name, index) for index in range(len(cell.tried))]
        for name, cell in study.cells.items()
    }


def means(study: Study, figures: list[dict[str, float]]) -> list[float]:
    """The mean figure of each setting; NaN where a seed is missing or has diverged."""
    seeds = len(study.tuning.seeds) if study.tuning else 0
    return [
        statistics.fmean(by_seed.values()) if len(by_seed) == seeds else math.nan
        for by_seed in figures
    ]


def best(study: Study, figures: list[dict[str, float]]) -> int | None:
    """The number of the best setting, the first one of equals; None if no one has all its runs."""
    lower = study.tuning is None or study.tuning.lower
    ranked = [
        (mean if lower else -mean, index)
        for index, mean in enumerate(means(study, figures))
        if not math.isnan(mean)
    ]
    return min(ranked)[1] if ranked else None


def show(study: Study, figures: Figures) -> Table:
    """The means of all settings of each cell, and the best one."""
    title = f"{study.tuning.figure if study.tuning else ''}, mean over seeds"
    table = Table("cell", "best", "its settings", "all of them, in order", title=title)
    for name, of_cell in figures.items():
        index = best(study, of_cell)
        settings = "" if index is None else " ".join(study.cells[name].tried[index])
        values = "  ".join(f"{mean:.4g}" for mean in means(study, of_cell))
        table.add_row(name, "" if index is None else str(index), settings, values)
    return table


def main() -> None:
    """Read the runs that the command line names, and show the best settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study")
    parser.add_argument("folders", nargs="*", type=Path, help="with finished runs")
    parser.add_argument("--scale", default="small")
    arguments = parser.parse_args()
    try:
        study = study_of(arguments.study)
        file = FOLDER / f"{study.name}.json"
        if arguments.folders:
            write_json(file, read(study, arguments.scale, arguments.folders))
        if not file.exists():
            raise ValueError(f"there is no {file}: name the folder of the finished runs")
        figures: Figures = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    Console().print(show(study, figures))
    missing = sum(
        math.isnan(mean) for of_cell in figures.values() for mean in means(study, of_cell)
    )
    if missing:
        print(f"{missing} settings have not all their runs: they have diverged, or are to come")


if __name__ == "__main__":
    main()
