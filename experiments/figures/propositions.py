"""Where the paper's propositions hold, on random scores and on those of trained models.

Also writes beside the folder of the figures `propositions.json`, all counts, and
`propositions.md`, a table of shares with their intervals.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.figures.pairs import TITLES, Pair, measured_pairs
from experiments.figures.saving import save
from experiments.pareto import learned_normalizer, rows_of
from experiments.propositions import (
    COUNTEREXAMPLE,
    QUANTILES,
    SCALARS_OF_COUNTEREXAMPLE,
    T_B,
    T_D,
    Improved,
    Rows,
    first_order,
    improved,
    loses_mass,
    proposition1,
    quantiles,
    random_scores,
    region,
)
from experiments.propositions_table import markdown
from experiments.scores import SCORES, Scores
from multimax import softmax
from multimax.files import write_atomically, write_json

CAPTION = (
    "Proposition 2 of the paper: with t_b > 1 and t_d < 1, MultiMax is both sparser and more "
    "multi-modal than SoftMax. The colour is the share of rows for which that is so, over t_b and "
    "t_d, with b and d at quantiles of the scores (columns); the white line is at one half. Where "
    "t_d presses the large scores down harder than t_b the small ones, the small ones gain mass. "
    "Below, one row of three scores, with the border of the region as derived, at which the "
    "smallest entry keeps its mass, and a counter-example (cross)."
)
DRAWN_AT_RANDOM = "normal, deviation 3, 49 keys"  # of `random_scores`: what the figure shows
COLORED: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": "viridis"}
MOST_ROWS = 1500  # of a layer's scores; they are sampled already


def draw(folder: Path, source: Path = SCORES) -> list[Path]:
    """Write `propositions` as PNG and PDF, `propositions.json` and `propositions.md`.

    Raises:
        FileNotFoundError: no scores of trained models are there.
        ValueError: a file of `source` is damaged.
    """
    measured = {task: pairs[0] for task, pairs in measured_pairs(source).items()}
    scores = random_scores()
    real = {
        f"{TITLES[task]}, trained with SoftMax": _pooled(pair) for task, pair in measured.items()
    }
    regions = {
        name: [region(x, *_b_and_d(x, of)) for of in QUANTILES]
        for name, x in {DRAWN_AT_RANDOM: scores[DRAWN_AT_RANDOM], **real}.items()
    }
    numbers = {
        "proposition_1": {name: proposition1(x) for name, x in {**scores, **real}.items()},
        "proposition_2": {
            "t_b": T_B,
            "t_d": T_D,
            "quantiles_of_b_and_d": QUANTILES,
            "rows": {name: found[0][0][0].rows for name, found in regions.items()},
            "undefined": {name: found[0][0][0].undefined for name, found in regions.items()},
            "share_with_both": {name: _shares(found).tolist() for name, found in regions.items()},
        },
        "learned": {TITLES[task]: _of_learned(pair) for task, pair in measured.items()},
        "counterexample": counterexample(),
    }
    path = folder.parent / "propositions.json"
    write_json(path, numbers)
    table = path.with_suffix(".md")
    write_atomically(table, lambda stream: stream.write(markdown(scores, real).encode()))
    return [*save(_figure(regions), folder, "propositions"), path, table]


def _pooled(pair: Pair[Scores]) -> torch.Tensor:
    """(rows, keys): the sampled rows of all layers of the run with SoftMax, evenly thinned."""
    rows = [torch.from_numpy(layer.scores).double() for layer in pair.softmax.layers.values()]
    keys = max(of.size(1) for of in rows)
    padded = [torch.nn.functional.pad(of, (0, keys - of.size(1)), value=-torch.inf) for of in rows]
    pooled = torch.cat(padded)
    return pooled[:: max(1, -(-len(pooled) // MOST_ROWS))]


def _b_and_d(scores: torch.Tensor, shares: tuple[float, float]) -> tuple[float, float]:
    b, d = quantiles(scores, shares)
    return b, d


def _shares(found: list[list[list[Improved]]]) -> np.ndarray:
    """(quantiles, t_b, t_d): the share of rows with both."""
    return np.array(
        [[[of.both / of.rows for of in line] for line in panel] for panel in found]
    ).round(4)


def _of_learned(pair: Pair[Scores]) -> dict[str, dict[str, int]]:
    """By layer, what the learned scalars do to the scores of their own model."""
    found = {}
    for name, layer in pair.multimax.layers.items():
        x, _, learned = rows_of(layer, layer.scalars)
        rows = Rows(x)
        with torch.no_grad():
            found[name] = improved(
                rows, learned_normalizer(learned)(x), rows.measured(softmax(x))
            )._asdict()
    return found


def counterexample() -> dict[str, Any]:
    """Probabilities before and after, of the row in which the smallest entry gains."""
    x = torch.tensor([COUNTEREXAMPLE], dtype=torch.float64)
    scalars = SCALARS_OF_COUNTEREXAMPLE
    before, after = softmax(x)[0], first_order(x, **scalars)[0]
    return {
        "scores": COUNTEREXAMPLE,
        **scalars,
        "softmax": before.tolist(),
        "multimax": after.tolist(),
    }


def _figure(regions: dict[str, list[list[list[Improved]]]]) -> Figure:
    height = len(regions) + 1
    size = 11.5, 2.3 * height + 0.6
    figure, grid = plt.subplots(height, len(QUANTILES), figsize=size, layout="constrained")
    for line, (name, found) in zip(grid, regions.items(), strict=False):
        for axes, share in zip(line, _shares(found), strict=True):
            axes.pcolormesh(T_D, T_B, share, **COLORED)
            if share.min() < 0.5 < share.max():
                axes.contour(T_D, T_B, share, [0.5], colors="white", linewidths=1)
        rows = f"{name.replace(', ', chr(10), 1)}\n(n = {found[0][0][0].rows:,})"
        line[0].set_ylabel(f"{rows}\n$t_b$")
    for axes, (b, d) in zip(grid[0], QUANTILES, strict=True):
        axes.set_title(f"b at quantile {b:g}, d at {d:g}", fontsize=10)
    for axes in grid[-2]:
        axes.set_xlabel("$t_d$")
    bar = figure.colorbar(grid[0, 0].collections[0], ax=grid[:-1], aspect=40)
    bar.set_label("share of rows both sparser and more multi-modal than with SoftMax")
    _draw_counterexample(grid[-1])
    figure.suptitle("Where Proposition 2 holds", x=0.01, ha="left")
    return figure


def _draw_counterexample(line: Any) -> None:
    first, beside = line[0], line[1]
    for axes in line[1:]:
        axes.axis("off")
    x = torch.tensor([COUNTEREXAMPLE], dtype=torch.float64)
    chosen = SCALARS_OF_COUNTEREXAMPLE
    b, d = chosen["b"], chosen["d"]
    t_b, t_d = np.linspace(1, 7, 91)[1:].tolist(), np.linspace(0, 1, 61)[:-1].tolist()
    both = [[of.both for of in found] for found in region(x, b, d, t_b, t_d)]
    lost = [[float(loses_mass(x, of_b, of_d, b, d)[0, -1]) for of_d in t_d] for of_b in t_b]
    first.pcolormesh(t_d, t_b, both, **COLORED)
    first.contour(t_d, t_b, lost, [0.5], colors="tab:red", linewidths=1.5)
    first.plot(chosen["t_d"], chosen["t_b"], "x", color="tab:red", mew=2, clip_on=False)
    row = ", ".join(f"{value:g}" for value in COUNTEREXAMPLE)
    first.set(
        xlabel="$t_d$", ylabel=f"x = ({row})\n$t_b$", title=f"b = {b:g}, d = {d:g}", ylim=(1, 7)
    )
    first.title.set_fontsize(10)
    given = {"va": "top", "fontsize": 10.5, "linespacing": 1.5, "transform": beside.transAxes}
    beside.text(0, 1, _explanation(), **given).set_in_layout(False)


def _explanation() -> str:
    numbers = counterexample()
    before, after = (
        ", ".join(f"{value:.2g}" for value in numbers[key]) for key in ("softmax", "multimax")
    )
    scalars = ", ".join(
        f"${name}$ = {value:g}" for name, value in SCALARS_OF_COUNTEREXAMPLE.items()
    )
    return (
        "An entry loses mass where its own push, $\\sigma(x) - x$, is below $\\log(Z'/Z)$,\n"
        "the average push weighted by SoftMax: red line, for the smallest entry.\n"
        f"Cross: {scalars}.\nSoftMax gives {before},\nMultiMax {after}: the smallest entry gains,\n"
        "as both large ones are pressed down and it hardly is."
    )
