"""Attention probabilities of trained models, SoftMax beside MultiMax (the paper's Figure 2).

Of all attention of the test split, by layer: on a logarithmic axis, so that small probabilities
can be told apart, with what lies above 0.1 and up to 0.001 as numbers.
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.figures.pairs import CELL_TITLES, TITLES, Pair, measured_pairs
from experiments.figures.saving import save
from experiments.scores import EDGES, SCORES, LayerScores, Scores

COLUMNS = 4
LARGE, SMALL = 0.1, 1e-3
LEFT_END = 1e-7  # what is smaller is drawn in the first bin
COLORS = {"SoftMax": "tab:blue", "MultiMax": "tab:red"}


def draw(folder: Path, source: Path = SCORES) -> list[Path]:
    """Write `scores_<task>` as PNG and PDF for each task that has both runs.

    Raises:
        FileNotFoundError: no task has.
        ValueError: a file of `source` is damaged.
    """
    return [
        path
        for task, pairs in measured_pairs(source).items()
        for path in _draw_task(task, pairs[0], folder)
    ]


def _draw_task(task: str, pair: Pair[Scores], folder: Path) -> list[Path]:
    layers = list(pair.softmax.layers)
    columns = min(len(layers), COLUMNS)
    rows = -(-len(layers) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(3 * columns, 0.9 + 2.9 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, name in zip(grid.flat, layers, strict=False):
        _draw_layer(axes, pair.softmax.layers[name], pair.multimax.layers[name])
        axes.set_title(short_name(name), fontsize=11)
    grid[0, 0].set_ylim(top=1.3 * grid[0, 0].get_ylim()[1])  # room for the numbers
    unused = list(grid.flat)[len(layers) :]
    for axes in unused:
        axes.axis("off")
        above = grid[-2, list(grid[-1]).index(axes)]  # is the lowest of its column
        above.tick_params(labelbottom=True)
    figure.supxlabel("attention probability (the first bar has all that is smaller, too)")
    figure.supylabel("share of all probabilities, %")
    if unused:
        unused[0].legend(*grid[0, 0].get_legend_handles_labels(), fontsize=11, loc="center")
    else:
        grid[0, 0].legend(fontsize=10, loc="center left", frameon=False)
    figure.suptitle(
        f"{TITLES[task]}: SoftMax and {CELL_TITLES[pair.cell]}, seed {pair.seed}, "
        f"{pair.softmax.split_examples:,} {pair.softmax.split} examples",
        x=0.01,
        ha="left",
    )
    return save(figure, folder, f"scores_{task}")


def short_name(layer: str) -> str:
    """Of a normalizer's module, for a reader: "block 0", "decoder 1, cross-attention"."""
    parts = layer.split(".")
    number = next(part for part in parts if part.isdecimal())
    if parts[0] == "blocks":
        return f"block {number}"
    kind = "cross-attention" if "encoder_attn" in parts else "self-attention"
    return f"{parts[0]} {number}, {kind}"


def _draw_layer(axes: Axes, softmax: LayerScores, multimax: LayerScores) -> None:
    heights = [0.97, 0.88]
    for label, layer, height in zip(COLORS, (softmax, multimax), heights, strict=True):
        edges, shares = shown_shares(layer)
        color = COLORS[label]
        axes.stairs(100 * shares, edges, fill=True, color=color, alpha=0.3, label=label)
        axes.stairs(100 * shares, edges, color=color, linewidth=1.2)
        small, large = 100 * layer.share_up_to(SMALL), 100 * layer.share_above(LARGE)
        text = f"≤ {SMALL:g}: {small:.1f} %     > {LARGE:g}: {large:.1f} %"
        place = {"transform": axes.transAxes, "va": "top", "backgroundcolor": "white"}
        axes.text(0.03, height, text, fontsize=9, color=color, **place)
    for edge in (SMALL, LARGE):
        axes.axvline(edge, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xscale="log", xlim=(LEFT_END, 1))
    axes.spines[["top", "right"]].set_visible(False)


def shown_shares(layer: LayerScores) -> tuple[np.ndarray, np.ndarray]:
    """Edges from `LEFT_END` on, and the shares between them.

    The first bin has all that is smaller too, exact zeros among them.
    """
    first = int(np.abs(EDGES - LEFT_END).argmin())
    counts = layer.histogram[first:].astype(float)
    counts[0] += layer.histogram[:first].sum() + layer.zeros
    return EDGES[first:], counts / layer.probabilities
