"""The error of each normalizer in the study of retrieval, over n and over k."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from experiments.comparison import Cells, cells_of
from experiments.figures.saving import save
from experiments.results import RUNS, Result, load
from experiments.selection import run_of, study_of

CAPTION = (
    "Retrieval of marked items: squared error on test sets (median over seeds, bars from the first "
    "to the third quartile) over the number of items n, 4 of them marked, or over the number of "
    "marked items k of 64. Trained with n = 64 and k = 4 (vertical line). 1 is the error of "
    "predicting zero. Rows: keys linear in the items, or from an MLP. Columns: families of "
    "normalizers; SoftMax and sparsemax stand in grey where they are not of the family."
)
STUDY, SCALE = "retrieval", "small"
# Cells of the study, but for their keys, of which no two of a panel have one look.
FAMILIES = {
    "SoftMax, sigmoid, Softpick": (
        "softmax", "scaled-softmax", "softcap", "sink", "sigmoid", "softpick",
    ),
    "sparse": ("sparsemax", "entmax15", "entmax", "asentmax", "topk", "evsoftmax"),
    "MultiMax": (
        "multimax1", "multimax2", "multimax2-separated", "multimax2-scaled",
        "multimax2-scaled-first", "multimax2-scaled-separated",
    ),
}  # fmt: skip
REFERENCES: dict[str, Any] = {"softmax": "--", "sparsemax": ":"}
KEYS = {"linear": "linear keys", "mlp": "keys from an MLP"}
# Of Okabe and Ito, without yellow: they are told apart by the colour-blind too.
COLORS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
MARKERS = "osD^vP"
DODGE = 0.035  # between neighbours, as a share of the axis, so that bars do not cover each other
AXES = {"n": "items n, 4 of them marked", "k": "marked items k, of 64"}
TRAINED = {"n": 64, "k": 4}


def draw(folder: Path, source: Path = RUNS) -> list[Path]:
    """Write `retrieval_errors_n` and `retrieval_errors_k` as PNG and PDF.

    Raises:
        FileNotFoundError: the study has no runs.
    """
    cells = recorded_cells(load(source), source)
    return [
        path
        for over in AXES
        for path in save(_figure(cells, over), folder, f"retrieval_errors_{over}")
    ]


def recorded_cells(results: Mapping[Path, Result], source: Path = RUNS) -> Cells:
    """The cells of the study with their runs.

    Raises:
        FileNotFoundError: there are none.
    """
    task = study_of(STUDY).name
    runs = [run_of(of, str(file)) for file, of in results.items() if of["task"] == task]
    cells = cells_of(study_of(STUDY), SCALE, runs) if runs else None
    if cells is None or not cells.count():
        raise FileNotFoundError(
            f"{source} has no run of study {STUDY}: python train.py -m study={STUDY} trains them, "
            f"python -m experiments.results outputs/{SCALE} records them"
        )
    return cells


def points(cells: Cells, cell: str, over: str) -> dict[int, list[float]]:
    """The errors of all seeds of a cell by n or by k, from small to large."""
    found = {}
    for column, figure in cells.study.columns.items():
        # The main column has the name of neither: it is both.
        number = re.fullmatch(rf"test/mse_{over}(\d+)", figure)
        if number or column == cells.main_column:
            size = int(number[1]) if number else TRAINED[over]
            if errors := [*cells.values(cell, column).values()]:
                found[size] = errors
    return dict(sorted(found.items()))


def _figure(cells: Cells, over: str) -> Figure:
    figure, grid = plt.subplots(len(KEYS), len(FAMILIES), figsize=(13, 9), sharex=True, sharey=True)
    figure.subplots_adjust(0.06, 0.25, 0.985, 0.92, wspace=0.06, hspace=0.14)
    for (keys, title), row in zip(KEYS.items(), grid, strict=True):
        for (family, names), axes in zip(FAMILIES.items(), row, strict=True):
            _panel(axes, cells, keys, names, over)
            axes.set_title(f"{family}; {title}", fontsize=11)
        row[0].set_ylabel("squared error")
    for column, (family, names) in zip(grid.T, FAMILIES.items(), strict=True):
        column[-1].set_xlabel(AXES[over])
        column[-1].legend(
            handles=_handles(cells, family, names), loc="upper left", bbox_to_anchor=(-0.04, -0.16),
            fontsize=8.5, frameon=False,
        )  # fmt: skip
    figure.suptitle(f"Retrieval, {cells.scale} scale: error over {over}", x=0.01, ha="left")
    return figure


def _panel(axes: Axes, cells: Cells, keys: str, names: Sequence[str], over: str) -> None:
    axes.axhline(1, color="0.8", linewidth=1)
    axes.axvline(TRAINED[over], color="0.8", linewidth=1)
    for name, style in REFERENCES.items():
        found = points(cells, f"{keys}-{name}", over)
        if name not in names and found:
            medians = [np.median(errors) for errors in found.values()]
            axes.plot([*found], medians, style, color="0.6", linewidth=1.5)
    for index, name in enumerate(names):
        if found := points(cells, f"{keys}-{name}", over):
            _line(axes, found, index, len(names))
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(LogLocator(4 if over == "n" else 2))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=10)


def _line(axes: Axes, found: Mapping[int, Sequence[float]], index: int, of: int) -> None:
    sizes = np.array([*found], dtype=float)
    dodged = sizes * (sizes[-1] / sizes[0]) ** (DODGE * (index / (of - 1) - 0.5))
    low, middle, high = np.array([np.quantile(e, [0.25, 0.5, 0.75]) for e in found.values()]).T
    axes.errorbar(
        dodged, middle, [middle - low, high - middle], color=COLORS[index], marker=MARKERS[index],
        markersize=5, linewidth=1.4, elinewidth=1.2, capsize=2,
    )  # fmt: skip


def _handles(cells: Cells, family: str, names: Sequence[str]) -> list[Line2D]:
    labels = {
        name.removeprefix("linear-"): cell.row[-1] for name, cell in cells.study.cells.items()
    }
    handles = []
    for index, name in enumerate(names):
        label = labels.get(name, name).removeprefix(f"{family}, ")
        handles.append(Line2D([], [], color=COLORS[index], marker=MARKERS[index], label=label))
    for name, style in REFERENCES.items():
        if name not in names:
            label = labels.get(name, name)
            handles.append(Line2D([], [], color="0.6", linestyle=style, label=label))
    return handles
