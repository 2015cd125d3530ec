"""Where each normalizer can put three scores on the simplex (the paper's Figure 1)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import mpltern  # noqa: F401 (registers the projection)
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.figures.saving import save
from experiments.propositions import first_order
from multimax import entmax, evsoftmax, softmax, sparsemax, topk

CAPTION = (
    "All distributions over three entries are a triangle. At a corner one entry has everything "
    "(most sparse, one mode); on an edge the opposite entry has exactly nothing; on the dotted "
    "line entries 1 and 2 have the same, and in the centre all three. A curve is what a "
    "normalizer makes of the scores x as its parameter changes; the ring is the distribution that "
    "is sparse and multi-modal at once: equal shares for the relevant scores, those above 1, and "
    "nothing for the others. One MultiMax (star, the same scalars in all panels) comes close to "
    "every ring; its scalars were chosen for that. SoftMax of any temperature passes the ring of "
    "two relevant entries at a distance: what makes it more multi-modal makes it less sparse. "
    "Scaled sparsemax follows the edge and comes closer, but where the two scores are apart it "
    "leaves the edge before they have the same, and no one scale is as near to all four rings."
)
# Scores, what they are an example of, and which of them are relevant.
EXAMPLES = (
    ((2.0, 1.8, 0.0), "two relevant entries, close", 2),
    ((3.0, 2.0, 0.0), "two relevant entries, apart", 2),
    ((2.0, 1.9, 1.8), "three relevant entries", 3),
    ((3.0, 0.2, 0.0), "one relevant entry", 1),
)
TEMPERATURES = np.geomspace(0.05, 20, 161)
MARKED_TEMPERATURES = (0.5, 1.0, 2.0)
ALPHAS = np.linspace(1, 4, 61)
FLOORS = np.concatenate([[0.0], np.geomspace(1e-4, 1 - 1e-9, 40)])
RANGE = 1.0  # b = d of the star and of the region
LARGEST_T_B = 4.0
SMALLEST_T_D = 0.25
RANGES = np.linspace(-1, 4, 201)  # of b = d, from below all scores to above all


READING = (
    "corner: one entry has everything (sparse, one mode); edge: the opposite entry has exactly "
    "nothing (sparse);\n"
    "dotted line: entries 1 and 2 have the same (two modes); +: all three have the same"
)
RING: dict[str, Any] = {
    "color": "black", "marker": "o", "markersize": 19, "markerfacecolor": "none",
    "linestyle": "", "markeredgewidth": 1.3,
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What a normalizer makes of a row as its parameter changes.

    Attributes:
        label: its name and parameter.
        points: (steps, 3), each row a distribution; one row is drawn as a point.
        style: of the line or the point.
    """

    label: str
    points: np.ndarray
    style: dict[str, Any]


def curves(scores: Iterable[float]) -> list[Curve]:
    """The trajectories of three scores."""
    x = torch.tensor(list(scores), dtype=torch.float64)

    def stacked(rows: Iterable[Tensor]) -> np.ndarray:
        return torch.stack(list(rows)).numpy()

    return [
        Curve(
            "SoftMax, temperature from 0.05 to 20",
            stacked(softmax(x, temperature=t) for t in TEMPERATURES),
            {"color": "tab:blue", "linewidth": 2.2},
        ),
        Curve(
            "SoftMax, temperature 0.5, 1, 2",
            stacked(softmax(x, temperature=t) for t in MARKED_TEMPERATURES),
            {"color": "tab:blue", "marker": "o", "markersize": 6, "linestyle": ""},
        ),
        Curve(
            "top-k, k = 1, 2 (3: SoftMax)",
            stacked(topk(x, k) for k in (1, 2)),
            {"color": "black", "marker": "^", "markersize": 10, "linestyle": "",
             "markerfacecolor": "none", "zorder": 4},
        ),
        Curve(
            "evidential SoftMax, floor from 1 (SoftMax) to 0",
            stacked(evsoftmax(x, floor=floor) for floor in FLOORS[::-1]),
            {"color": "tab:brown", "linewidth": 1.8, "linestyle": (0, (1, 1))},
        ),
        Curve(
            "entmax, alpha from 1 (SoftMax) to 4",
            stacked(entmax(x, alpha) for alpha in ALPHAS),
            {"color": "tab:purple", "linewidth": 1.8},
        ),
        Curve(
            "sparsemax (entmax, alpha = 2)",
            stacked([sparsemax(x)]),
            {"color": "tab:purple", "marker": "s", "markersize": 7, "linestyle": ""},
        ),
        Curve(
            "sparsemax of x / t, t from 0.05 to 20",
            stacked(sparsemax(x / t) for t in TEMPERATURES),
            {"color": "tab:green", "linewidth": 1.6, "linestyle": (0, (4, 2))},
        ),
        Curve(
            f"MultiMax, b = d from {RANGES[0]:g} to {RANGES[-1]:g} "
            f"($t_b$ = {LARGEST_T_B:g}, $t_d$ = {SMALLEST_T_D:g})",
            stacked(first_order(x, LARGEST_T_B, SMALLEST_T_D, c, c) for c in RANGES),
            {"color": "tab:orange", "linewidth": 2.2},
        ),
        Curve(
            f"MultiMax, $t_b$ = {LARGEST_T_B:g}, $t_d$ = {SMALLEST_T_D:g}, b = d = {RANGE:g}",
            stacked([first_order(x, LARGEST_T_B, SMALLEST_T_D, RANGE, RANGE)]),
            {"color": "tab:red", "marker": "*", "markersize": 15, "markeredgecolor": "white",
             "linestyle": "", "zorder": 5},
        ),
    ]  # fmt: skip


def region(scores: Iterable[float], steps: int = 41) -> np.ndarray:
    """(4 steps, 3): the border of what MultiMax reaches over t_b and t_d, with b = d fixed."""
    x = torch.tensor(list(scores), dtype=torch.float64)
    t_b, t_d = np.linspace(1, LARGEST_T_B, steps), np.linspace(1, SMALLEST_T_D, steps)
    ones = np.ones(steps)
    border = [
        *zip(t_b, ones, strict=True),
        *zip(LARGEST_T_B * ones, t_d, strict=True),
        *zip(t_b[::-1], SMALLEST_T_D * ones, strict=True),
        *zip(ones, t_d[::-1], strict=True),
    ]
    return torch.stack([first_order(x, b, d, RANGE, RANGE) for b, d in border]).numpy()


def wanted(relevant: int) -> np.ndarray:
    """(3,): the same for each of the first entries, nothing for the others."""
    return (np.arange(3) < relevant) / relevant


def draw(folder: Path) -> list[Path]:
    """Write `simplex` as PNG and PDF."""
    figure = plt.figure(figsize=(11, 11.6))
    for number, (scores, title, relevant) in enumerate(EXAMPLES):
        row, column = divmod(number, 2)
        place = (0.04 + 0.48 * column, 0.575 - 0.405 * row, 0.44, 0.30)
        axes: Any = figure.add_axes(place, projection="ternary")
        _draw_panel(axes, scores, relevant)
        x = ", ".join(f"{score:g}" for score in scores)
        axes.set_title(f"x = ({x}): {title}", fontsize=12, pad=30)
    figure.suptitle("Three scores on the simplex", fontsize=14, y=0.99)
    figure.text(0.5, 0.953, READING, ha="center", va="center", fontsize=11, linespacing=1.4)
    figure.legend(handles=_handles(), loc="lower center", ncols=2, fontsize=11, frameon=False)
    return save(figure, folder, "simplex")


def _draw_panel(axes: Any, scores: tuple[float, ...], relevant: int) -> None:
    axes.plot([0.5, 0], [0.5, 0], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
    axes.plot([1 / 3], [1 / 3], [1 / 3], "+", color="0.5", markersize=9)
    axes.fill(*region(scores).T, color="tab:red", alpha=0.25, linewidth=0)
    for curve in curves(scores):
        axes.plot(*curve.points.T, **curve.style, clip_on=False)
    axes.plot(*wanted(relevant)[:, None], **RING, clip_on=False)
    axes.set_tlabel("entry 1", labelpad=10)
    axes.set_llabel("entry 2")
    axes.set_rlabel("entry 3")
    for axis in (axes.taxis, axes.laxis, axes.raxis):
        axis.set_label_position("corner")
        axis.set_label_rotation_mode("horizontal")
        axis.set_ticks([])


def _handles() -> list[Any]:
    of_curves = [Line2D([], [], label=of.label, **of.style) for of in curves(EXAMPLES[0][0])]
    of_region = Patch(
        color="tab:red",
        alpha=0.25,
        label=f"MultiMax, $t_b$ from 1 to {LARGEST_T_B:g}, $t_d$ from 1 to {SMALLEST_T_D:g} "
        f"(b = d = {RANGE:g})",
    )
    ring: dict[str, Any] = RING | {"markersize": 12}
    of_ring = Line2D([], [], label="sparse and multi-modal at once", **ring)
    return [*of_curves[:-2], of_region, *of_curves[-2:], of_ring]
