"""How the runs of the study of retrieval learned, and what their modulators became."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from experiments.comparison import Cells
from experiments.figures.retrieval_errors import FAMILIES, KEYS, recorded_cells
from experiments.figures.saving import save
from experiments.modulators import modulators
from experiments.report.curves import LOSS, points
from experiments.results import RUNS, Result, load
from experiments.retrieval import Seeds, seeds_of
from multimax import modulate

CAPTION = (
    "Every run of the study of retrieval is a thin line; those that got stuck (more than "
    "ten times the error of the best seed of their cell) are orange. In the figures of "
    "curves: the squared error of the batch of an update. In the figure of modulators: what became "
    "of a score x before SoftMax and, where there is one, before the length scale; the dashed "
    "diagonal is SoftMax. Where the scores of a run lay is not recorded."
)
GOOD, BAD = "#0072b2", "#d55e00"  # told apart by the colour-blind too
SCORES = (-6.0, 6.0)  # that are drawn


def draw(folder: Path, source: Path = RUNS) -> list[Path]:
    """Write `retrieval_training_<keys>` and `retrieval_training_modulators` as PNG and PDF.

    Raises:
        FileNotFoundError: the study has no runs.
    """
    results = load(source)
    cells = recorded_cells(results, source)
    stuck = {name: seeds_of(cells, name) for name in cells.study.cells}
    paths = []
    for keys in KEYS:
        figure = _curves(cells, results, stuck, keys)
        paths += save(figure, folder, f"retrieval_training_{keys}")
    return paths + save(_modulators(cells, results, stuck), folder, "retrieval_training_modulators")


def _curves(
    cells: Cells, results: Mapping[Path, Result], stuck: Mapping[str, Seeds], keys: str
) -> Figure:
    figure, grid = plt.subplots(
        3, 6, figsize=(15, 8), sharex=True, sharey=True, layout="constrained"
    )
    for row, names in zip(grid, FAMILIES.values(), strict=True):
        for axes, name in zip(row, names, strict=True):
            cell = f"{keys}-{name}"
            for seed, run in cells.selections[cell].runs.items():
                if curve := points(results[Path(run.place)], LOSS):
                    updates, errors = zip(*curve, strict=True)
                    _line(axes, updates, errors, seed in stuck[cell].stuck)
            axes.set_yscale("log")
            axes.margins(y=0.2)  # room for the text
            _title(axes, cells, cell, stuck[cell], 0.04)
        row[0].set_ylabel("squared error of a batch")
    for axes in grid[-1]:
        axes.set_xlabel("update")
    _legend(figure, f"Retrieval, {cells.scale} scale, {KEYS[keys]}: training")
    return figure


def _modulators(cells: Cells, results: Mapping[Path, Result], stuck: Mapping[str, Seeds]) -> Figure:
    names = FAMILIES["MultiMax"]
    figure, grid = plt.subplots(
        len(KEYS), len(names), figsize=(15, 6), sharex=True, sharey=True, layout="constrained"
    )
    x = torch.linspace(*SCORES, 401)
    for keys, row in zip(KEYS, grid, strict=True):
        for axes, name in zip(row, names, strict=True):
            cell = f"{keys}-{name}"
            axes.plot(SCORES, SCORES, color="0.5", linestyle="--", linewidth=1)
            for seed, run in cells.selections[cell].runs.items():
                for ts, ranges in modulators(results[Path(run.place)]["learned_scalars"]).values():
                    y = modulate(x, ts, ranges).numpy()
                    _line(axes, x.numpy(), y, seed in stuck[cell].stuck)
            axes.set_ylim(3 * SCORES[0], 1.5 * SCORES[1])
            _title(axes, cells, cell, stuck[cell], 0.96)
        row[0].set_ylabel(f"{KEYS[keys]}\nmodulated score $\\sigma$(x)")
    for axes in grid[-1]:
        axes.set_xlabel("score x")
    _legend(figure, f"Retrieval, {cells.scale} scale: learned modulators")
    return figure


def _line(axes: Axes, x: ArrayLike, y: ArrayLike, stuck: bool) -> None:
    axes.plot(x, y, color=BAD if stuck else GOOD, linewidth=0.8, alpha=0.6, zorder=2 + stuck)


def _title(axes: Axes, cells: Cells, cell: str, seeds: Seeds, side: float) -> None:
    """The normalizer in short lines, and at the bottom how many of its runs got stuck."""
    axes.set_title(textwrap.fill(cells.study.cells[cell].row[-1], 28), fontsize=9)
    if seeds.errors:
        text = f"{len(seeds.stuck)} of {len(seeds.errors)} stuck"
        axes.text(
            side, 0.05, text, fontsize=9, ha="left" if side < 0.5 else "right",
            transform=axes.transAxes, color=BAD if seeds.stuck else "0.4",
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "no run yet", ha="center", color="0.4", transform=axes.transAxes)
    axes.grid(alpha=0.3)


def _legend(figure: Figure, title: str) -> None:
    handles = [
        Line2D([], [], color=GOOD, label="a seed"),
        Line2D([], [], color=BAD, label="one that got stuck"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
