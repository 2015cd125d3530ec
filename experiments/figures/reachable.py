"""What each normalizer can reach in retrieval with linear keys, beside what its runs did reach."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from experiments.comparison import Cells
from experiments.figures.retrieval_errors import FAMILIES, KEYS, recorded_cells
from experiments.figures.saving import save
from experiments.reachable import FILE, load_reached
from experiments.results import RUNS, load

CAPTION = (
    "Retrieval of marked items. Grey bars: mean total variation between the uniform distribution "
    "over the marked items and the nearest weights that each normalizer can reach when its scores "
    "are a linear function of the relevance, fitted at n = 64 with 4 marked items and kept "
    "elsewhere; 0 is the target, and a start of MultiMax is no other normalizer. Points: the "
    "squared error of the runs of the study, median over seeds and quartiles, with keys that are "
    "linear in the items and with those from an MLP, whose scores can be any function of the "
    "relevance; 1 is the error of predicting zero."
)
SETTINGS = {"n = 64": "error", "n = 4096": "n = 4096", "k = 1": "k = 1", "k = 16": "k = 16"}
TITLES = {"n = 64": "as in training: n = 64, k = 4", "n = 4096": "n = 4,096, k = 4",
          "k = 1": "n = 64, k = 1", "k = 16": "n = 64, k = 16"}  # fmt: skip
COLORS = {"linear": "#0072b2", "mlp": "#d55e00"}  # told apart by the colour-blind too
MARKERS = {"linear": "o", "mlp": "D"}


def draw(folder: Path, source: Path = RUNS, file: Path = FILE) -> list[Path]:
    """Write `reachable` as PNG and PDF.

    Raises:
        FileNotFoundError: the study has no runs, or nothing was computed to stand beside them.
    """
    reached = load_reached(file)
    return save(_figure(recorded_cells(load(source), source), reached), folder, "reachable")


def _figure(cells: Cells, reached: Mapping[str, Mapping[str, float]]) -> Figure:
    names = [name for family in FAMILIES.values() for name in family]
    figure, grid = plt.subplots(
        1, 2 * len(SETTINGS), figsize=(16, 6.6), sharey=True, layout="constrained",
        gridspec_kw={"width_ratios": [1, 1.4] * len(SETTINGS)},
    )  # fmt: skip
    heights = range(len(names))
    for (setting, column), bars, points in zip(
        SETTINGS.items(), grid[::2], grid[1::2], strict=True
    ):
        variation = [reached[f"linear-{name}"][setting] for name in names]
        bars.barh(heights, variation, color="0.6")
        for height, value in enumerate(variation):
            if not 0.005 <= value <= 1:  # no bar, or one that goes on
                text = f"{value:.1f} >" if value > 1 else "0"
                bars.text(min(value, 1), height, f" {text} ", fontsize=9, va="center",
                          ha="right" if value > 1 else "left")  # fmt: skip
        bars.set(xlim=(0, 1), xlabel="total variation")
        bars.set_title(TITLES[setting], fontsize=11, loc="left")
        for keys in KEYS:
            _draw_errors(points, cells, names, keys, column)
        points.axvline(1, color="0.8", linewidth=1)
        points.set(xscale="log", xlabel="squared error")
        points.xaxis.set_major_locator(LogLocator(numticks=5))
        for axes in (bars, points):
            axes.grid(axis="x", alpha=0.3)
            axes.tick_params(axis="y", length=0)
            axes.spines[["top", "right"]].set_visible(False)
    labels = [cells.study.cells[f"linear-{name}"].row[-1] for name in names]
    grid[0].set_yticks(heights, [label.replace("modulated", "\nmodulated") for label in labels])
    grid[0].set_ylim(len(names) - 0.4, -0.6)
    for number in np.cumsum([len(family) for family in FAMILIES.values()])[:-1]:
        for axes in grid:
            axes.axhline(number - 0.5, color="0.8", linewidth=1)
    handles = [
        Line2D([], [], color=COLORS[keys], marker=MARKERS[keys], linestyle="", label=title)
        for keys, title in KEYS.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    title = f"Retrieval, {cells.scale} scale: what linear keys can reach, and what was reached"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _draw_errors(axes: Axes, cells: Cells, names: list[str], keys: str, column: str) -> None:
    for height, name in enumerate(names):
        errors = [*cells.values(f"{keys}-{name}", column).values()]
        if errors:
            low, middle, high = np.quantile(errors, [0.25, 0.5, 0.75])
            axes.errorbar(
                middle, height + (0.15 if keys == "mlp" else -0.15),
                xerr=[[middle - low], [high - middle]], color=COLORS[keys], marker=MARKERS[keys],
                markersize=5, elinewidth=1.2,
            )  # fmt: skip
