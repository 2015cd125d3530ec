"""Sparsity against multi-modality of every normalizer on scores of trained models.

Also writes `pareto.json` beside the folder of the figures: the front, and the paper's claim that
MultiMax is the more efficient as differences with bootstrap intervals (`experiments.efficiency`).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.efficiency import (
    BOOTSTRAP_SEED,
    CONFIDENCE,
    MEASURES,
    REPLICATES,
    outcome,
)
from experiments.figures.pairs import CELL_TITLES, TITLES, Pair, measured_pairs
from experiments.figures.saving import save
from experiments.pareto import FAMILIES, GRID, PATH, Family, Rows, named_points, rows_of
from experiments.scores import SCORES, Scores
from multimax.files import write_json

COLORS = {
    "SoftMax": "tab:blue",
    "top-k": "tab:green",
    "entmax": "tab:purple",
    "evidential SoftMax": "tab:brown",
    GRID: "tab:orange",
    PATH: "tab:red",
}


def draw(folder: Path, source: Path = SCORES) -> list[Path]:
    """Write `pareto_<task>` as PNG and PDF for each task that has both runs, and `pareto.json`.

    Raises:
        FileNotFoundError: no task has.
        ValueError: a file of `source` is damaged.
    """
    paths, results = [], {}
    for task, pairs in measured_pairs(source).items():
        families = {
            of: {name: family(layers) for name, family in FAMILIES.items()}
            for of, layers in layers_of(pairs).items()
        }
        results[task] = {
            "cell": pairs[0].cell,
            "seeds": [pair.seed for pair in pairs],
            "replicates": REPLICATES,
            "bootstrap_seed": BOOTSTRAP_SEED,
            "confidence": CONFIDENCE,
            "scores_of": {of: outcome(found) for of, found in families.items()},
        }
        paths += _draw_task(task, pairs, families, results[task], folder)
    numbers = folder.parent / "pareto.json"
    write_json(numbers, results)
    return [*paths, numbers]


def layers_of(pairs: Iterable[Pair[Scores]]) -> dict[str, list[Rows]]:
    """The layers of all seeds with SoftMax, and of all with MultiMax.

    Either goes with the learned scalars of the run with MultiMax, layer by layer.
    """
    layers: dict[str, list[Rows]] = {"SoftMax": [], "MultiMax": []}
    for pair in pairs:
        for name, layer in pair.multimax.layers.items():
            layers["SoftMax"].append(rows_of(pair.softmax.layers[name], layer.scalars))
            layers["MultiMax"].append(rows_of(layer, layer.scalars))
    return layers


def _draw_task(
    task: str,
    pairs: list[Pair[Scores]],
    families: dict[str, dict[str, Family]],
    result: dict[str, Any],
    folder: Path,
) -> list[Path]:
    figure, panels = plt.subplots(1, 2, figsize=(12, 6.2), sharey=True, layout="constrained")
    for axes, (of, found) in zip(panels, families.items(), strict=True):
        numbers = result["scores_of"][of]
        _draw_panel(axes, found, numbers)
        counts = f"{numbers['rows']:,} rows, {numbers['examples']:,} examples"
        axes.set_title(f"scores of models trained with {of}: {counts}", fontsize=11)
        axes.set_xlabel("sparsity S")
    panels[0].set_ylabel("multi-modality M")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10)
    seeds = ", ".join(str(pair.seed) for pair in pairs)
    title = f"{TITLES[task]}: normalizers of the same scores; learned scalars of "
    figure.suptitle(f"{title}{CELL_TITLES[pairs[0].cell]}, seed {seeds}", x=0.01, ha="left")
    return save(figure, folder, f"pareto_{task}")


def _draw_panel(axes: Axes, families: dict[str, Family], result: dict[str, Any]) -> None:
    best = np.array([(p["sparsity"], p["multi_modality"]) for p in result["front"]])
    axes.step(*best.T, where="pre", color="0.75", linewidth=5, label="front of all", zorder=0)
    once = np.ones((1, families[GRID].examples))
    for name, family in families.items():
        s, m = (of[0] for of in family.means(once))
        color = COLORS[name]
        if name == GRID:
            axes.scatter(s, m, s=9, color=color, alpha=0.7, label=name, linewidths=0)
        else:
            axes.plot(s, m, color=color, linewidth=1.8, label=name)
        for index, text in named_points(name, family).items():
            place = s[index], m[index]
            axes.plot(*place, "o", color=color, markersize=5)
            right = s[index] > 0.5
            axes.annotate(
                text,
                place,
                xytext=(-8, -13) if right else (-4, -15),
                textcoords="offset points",
                fontsize=9,
                color=color,
                ha="right" if right else "center",
                bbox={"color": "white", "alpha": 0.8, "pad": 0.3},
            )
    _draw_learned(axes, result["comparisons"][0])
    axes.text(
        0.02,
        0.02,
        "\n".join(_lines(result["comparisons"])),
        transform=axes.transAxes,
        fontsize=9,
        va="bottom",
    )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_learned(axes: Axes, learned: dict[str, Any]) -> None:
    (s, *s_ends), (m, *m_ends) = (learned[key].values() for key in MEASURES)
    axes.errorbar(
        [s],
        [m],
        xerr=np.abs(np.array(s_ends) - s)[:, None],
        yerr=np.abs(np.array(m_ends) - m)[:, None],
        fmt="*",
        markersize=14,
        color=COLORS[PATH],
        markeredgecolor="black",
        label="MultiMax as learned (95 %)",
        zorder=5,
    )


def _lines(found: list[dict[str, Any]]) -> list[str]:
    """The comparisons as text."""
    lines = ["M minus that of a curve at the same S, by layer (95 %)"]
    for row in found:
        if row["difference_by_layer"]:
            value, low, high = row["difference_by_layer"].values()
            numbers = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
            lines.append(f"{row['multimax']} against {row['against']}: {numbers}")
    return lines
