"""What the modulators of the recorded runs of each task became."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.comparison import cells_of
from experiments.figures.pairs import STUDIES, TITLES
from experiments.figures.saving import save
from experiments.figures.scores import short_name
from experiments.modulators import colors_of, is_output, modulators
from experiments.results import RUNS, Result, load
from experiments.scores import SCORES, Scores, load_scores
from experiments.selection import Run, run_of, study_of
from multimax import modulate
from multimax.functional import MASK_FLOOR
from multimax.training.config import hashed_settings, read_config
from multimax.training.studies import Study

CAPTION = (
    "The learned modulator of every MultiMax layer of the runs in the tables, at small scale: "
    "what becomes of a score x before SoftMax, by place (columns) and order (rows). Thick lines "
    "are means over seeds, thin ones single seeds; they are solid where a run has MultiMax here "
    "only, with dots where it has it in both the attention and the output layer; the dashed "
    "diagonal is SoftMax. Below the curves, where the scores lay that these layers received on "
    "test examples, if they were measured; the curves then span all but 0.1 % of them at either "
    "end. A modulator counts where scores are. Below 0 a curve under the diagonal pushes small "
    "scores down, above 0 it holds large ones together; one over the diagonal at the left lifts "
    "small scores. Where a curve falls, at either end, it reverses the order of scores: at the "
    "right, the largest then get less than smaller ones."
)
SCALE = "small"
UNMEASURED = (-10.0, 10.0)  # the scores that are drawn where none were measured
OUTER = 0.001  # of the measured scores, at either end, are left out
BINS = 60
STYLES: dict[bool, Any] = {False: "-", True: "-."}  # of runs with MultiMax everywhere
PLACES = {"blocks": "attention", "encoder": "self-attention of the encoder",
          "decoder": "self-attention of the decoder"}  # fmt: skip


class Learned(NamedTuple):
    """A MultiMax layer of a run.

    Attributes:
        layer: its name in `modulators`.
        everywhere: whether attention and output layer of the run both have MultiMax.
        seed: of the run.
        ts, ranges: of the modulator.
        scores: that it received on test examples, if they were measured.
    """

    layer: str
    everywhere: bool
    seed: int
    ts: Tensor
    ranges: Tensor
    scores: np.ndarray | None = None

    @property
    def panel(self) -> tuple[int, str]:
        """The order of the modulator and the place of the layer."""
        return self.ts.numel() // 2, place_of(self.layer)


def draw(folder: Path, source: Path = RUNS, measured: Path = SCORES) -> list[Path]:
    """Write `responses_<task>` as PNG and PDF for each task with runs of MultiMax in its table.

    Raises:
        FileNotFoundError: no task has any.
        ValueError: a result or a file of scores is damaged, or a run is recorded twice.
    """
    results, scores = load(source), load_scores(measured)
    paths = []
    for task, name in STUDIES.items():
        study = study_of(name)
        if layers := recorded_layers(study, results):
            figure = _figure(task, layers, measured_layers(study, scores))
            paths += save(figure, folder, f"responses_{task}")
    if not paths:
        raise FileNotFoundError(
            f"{source} has no run with MultiMax: python train.py -m study=table2 trains them, "
            f"python -m experiments.results outputs/{SCALE} records them"
        )
    return paths


def recorded_layers(study: Study, results: Mapping[Path, Result]) -> list[Learned]:
    """The MultiMax layers of all recorded runs of a study."""
    runs = (run_of(result, str(file)) for file, result in results.items())
    found = []
    for run in _of_study(study, runs):
        layers = modulators(results[Path(run.place)]["learned_scalars"])
        everywhere = len({is_output(layer) for layer in layers}) == 2
        found += [Learned(name, everywhere, run.seed, *of) for name, of in layers.items()]
    return found


def measured_layers(study: Study, scores: Mapping[str, Scores]) -> list[Learned]:
    """The MultiMax attention layers of all measured runs of a study."""
    runs = (
        Run(hashed_settings(read_config(of.config)), of.seed, {}, place)
        for place, of in scores.items()
    )
    found = []
    for run in _of_study(study, runs):
        of = scores[run.place]
        everywhere = of.config["output"]["name"] == "multimax"
        for name, layer in of.layers.items():
            values = layer.scores[layer.scores > MASK_FLOOR]
            scalars = {f"{name}.{key}": given for key, given in layer.scalars.items()}
            found += [
                Learned(short, everywhere, run.seed, *learned, values)
                for short, learned in modulators(scalars).items()
            ]
    return found


def _of_study(study: Study, runs: Iterable[Run]) -> list[Run]:
    runs = [run for run in runs if f"task={run.settings['task']['name']}" in study.base]
    if not runs:
        return []
    selections = cells_of(study, SCALE, runs).selections.values()
    return [run for selection in selections for run in selection.runs.values()]


def place_of(layer: str) -> str:
    """Where a layer is: in the output, in cross-attention, or in attention of some kind."""
    if is_output(layer):
        return "output layer"
    parts = layer.split(".")
    return "cross-attention" if "encoder_attn" in parts else PLACES[parts[0]]


def _figure(task: str, layers: Sequence[Learned], measured: Sequence[Learned]) -> Figure:
    orders = sorted({of.panel[0] for of in layers})
    places = list(dict.fromkeys(of.panel[1] for of in layers))
    places.sort(key=lambda place: place == "output layer")  # last; the others as in the model
    with_scores = {of.panel[0] for of in measured}
    heights = [height for order in orders for height in (3, 1 if order in with_scores else 0.1)]
    figure, grid = plt.subplots(
        len(heights), len(places),
        figsize=(0.6 + 3.7 * len(places), 0.7 + 1.15 * sum(heights)),
        sharex="col", squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for column, place in zip(grid.T, places, strict=True):
        here = [of for of in measured if of.panel[1] == place]
        x = torch.linspace(*score_range(here), 401)
        for order, curves, histogram in zip(orders, column[::2], column[1::2], strict=True):
            of_panel = [of for of in layers if of.panel == (order, place)]
            colors = colors_of(sorted({of.layer for of in of_panel}))
            scores = [of for of in here if of.panel[0] == order]
            _draw_curves(curves, x, of_panel, colors)
            _draw_scores(histogram, x, scores, colors)
            curves.set_title(f"{place}, order {order}", fontsize=11)
            lowest = histogram if scores else curves
            lowest.tick_params(labelbottom=True)
            lowest.set_xlabel("score x")
    for axes in grid[::2, 0]:
        axes.set_ylabel("modulated score $\\sigma$(x)")
    seeds = ", ".join(str(seed) for seed in sorted({of.seed for of in layers}))
    figure.suptitle(f"{TITLES[task]}: learned modulators, seed {seeds}", x=0.01, ha="left")
    return figure


def score_range(layers: Sequence[Learned]) -> tuple[float, float]:
    """From the smallest to the largest score that is drawn."""
    scores = [of.scores for of in layers if of.scores is not None]
    if not scores:
        return UNMEASURED
    low, high = np.quantile(np.concatenate(scores), [OUTER, 1 - OUTER])
    return float(low), float(high)


def _draw_curves(axes: Axes, x: Tensor, layers: Sequence[Learned], colors: dict[str, Any]) -> None:
    if not layers:
        axes.text(0.5, 0.5, "no run", ha="center", color="0.4", transform=axes.transAxes)
        axes.set_yticks([])
        return
    axes.plot(x, x, color="0.5", linewidth=1.2, linestyle="--", zorder=1)
    handles = [
        Line2D([], [], color=color, linewidth=2, label=_label(layer))
        for layer, color in colors.items()
    ]
    for everywhere, style in STYLES.items():
        kind = [of for of in layers if of.everywhere == everywhere]
        for layer, color in colors.items():
            curves = [modulate(x, of.ts, of.ranges) for of in kind if of.layer == layer]
            if len(curves) > 1:
                for curve in curves:
                    axes.plot(x, curve, color=color, linestyle=style, linewidth=0.7, alpha=0.5)
            if curves:
                mean = torch.stack(curves).mean(0)
                axes.plot(x, mean, color=color, linestyle=style, linewidth=2)
        if kind:
            label = "at both places" if everywhere else "here only"
            label += f" (seeds: {len({of.seed for of in kind})})"
            handles.append(Line2D([], [], color="0.3", linestyle=style, label=label))
    axes.legend(handles=handles, fontsize=9, frameon=False)
    axes.grid(alpha=0.3)


def _label(layer: str) -> str:
    return "output layer" if is_output(layer) else short_name(layer).split(",")[0]


def _draw_scores(axes: Axes, x: Tensor, layers: Sequence[Learned], colors: dict[str, Any]) -> None:
    axes.set_yticks([])
    if not layers:
        axes.axis("off")
        return
    axes.spines[["top", "left", "right"]].set_visible(False)
    edges = np.linspace(x[0].item(), x[-1].item(), BINS + 1)
    total = 0
    for layer, color in colors.items():
        scores = [of.scores for of in layers if of.scores is not None and of.layer == layer]
        if scores:
            counts = np.histogram(np.concatenate(scores), edges)[0]
            axes.stairs(counts / counts.sum(), edges, color=color, linewidth=1.3)
            total += sum(of.size for of in scores)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the text
    text = f"where {total:,} scores of test examples lay"
    axes.text(0.02, 0.97, text, fontsize=9, color="0.3", va="top", transform=axes.transAxes)
