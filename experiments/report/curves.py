"""Learning curves as small SVG pictures, one for each group of runs that differ in their seed."""

import base64
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.results import Result

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")  # by seed, in turn
LOSS = "train/loss"
Points = list[tuple[int, float]]
Limits = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """The learning curves of one group of runs.

    Attributes:
        label: of the group.
        source: the picture as a data URI.
        alt: what it shows, in words.
    """

    label: str
    source: str
    alt: str


def points(result: Result, name: str) -> Points:
    """(update, value) of a curve, such as "valid/top1", where it has a finite value."""
    curve = [(line["update"], line.get(name)) for line in result.get("curve", ())]
    return [(u, v) for u, v in curve if isinstance(v, int | float) and math.isfinite(v)]


def validation_metric(results: Iterable[Result], columns: Iterable[str]) -> str:
    """The first metric of a study that all runs have on the validation split, else their loss.

    Args:
        results: of one group.
        columns: figures of the study, such as "test/perplexity".
    """
    results = list(results)
    names = [column.replace("test/", "valid/") for column in columns]
    of_all = (n for n in names if n.startswith("valid/") and all(points(r, n) for r in results))
    return next(of_all, "valid/loss")


def panels(
    groups: Mapping[str, Mapping[int, Result]],
    columns: Sequence[str] = (),
    baseline: Mapping[int, Result] | None = None,
) -> list[Panel]:
    """A panel for each group that has a run.

    Axes of the same validation metric have the same limits, and so have those of the training loss
    of the same output normalizer: each normalizer brings a loss of its own.

    Args:
        groups: results by seed, by the label of the group.
        columns: figures of the study, the first one is preferred.
        baseline: results whose mean is drawn in every panel.
    """
    groups = {label: of for label, of in groups.items() if of}
    metrics = {label: validation_metric(of.values(), columns) for label, of in groups.items()}
    shown: dict[str, list[float]] = {}
    for label, of in groups.items():
        for result in of.values():
            for name, key in ((metrics[label], metrics[label]), (LOSS, _loss_of(result))):
                shown.setdefault(key, []).extend(value for _, value in points(result, name))
    limits = {key: _limits(values) for key, values in shown.items() if values}
    return [
        _panel(label, of, metrics[label], limits, mean_curve(baseline or {}, metrics[label]))
        for label, of in groups.items()
    ]


def mean_curve(results: Mapping[int, Result], name: str) -> Points:
    """The mean over seeds where all of them have a value."""
    curves = [dict(points(result, name)) for result in results.values()]
    common = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(u, statistics.fmean(curve[u] for curve in curves)) for u in common]


def color_of(seed: int) -> str:
    """The colour of a seed, the same in every panel."""
    return COLORS[seed % len(COLORS)]


def _loss_of(result: Result) -> str:
    return f"{LOSS} of {result['config'].get('output', {}).get('name')}"


def _limits(values: list[float]) -> Limits:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _panel(
    label: str, of: Mapping[int, Result], metric: str, limits: Mapping[str, Limits], mean: Points
) -> Panel:
    # Text as text, and ids from a fixed salt: the same curves are the same bytes.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "multimax", "font.size": 8,
                  "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}  # fmt: skip
    with plt.rc_context(style):
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(3.1, 2.4), sharex=True, height_ratios=(3, 2)
        )
        # The same for all panels, so that their axes stand in line.
        figure.subplots_adjust(left=0.17, right=0.98, bottom=0.16, top=0.97, hspace=0.15)
        if mean:
            above.plot(*zip(*mean, strict=True), color="0.55", linewidth=3, alpha=0.6)
        for seed, result in sorted(of.items()):
            color = color_of(seed)
            _line(above, points(result, metric), color, marker="o", markersize=2.5)
            _line(below, points(result, LOSS), color, linewidth=0.8)
        above.set(ylabel=metric.removeprefix("valid/").replace("_", " "), ylim=limits.get(metric))
        key = _loss_of(next(iter(of.values())))
        below.set(ylabel="training loss", xlabel="update", ylim=limits.get(key))
        for axes in (above, below):
            axes.grid(alpha=0.3, linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
        figure.align_ylabels()
        stream = io.StringIO()
        facts = {"Date": None, "Creator": None}
        figure.savefig(stream, format="svg", transparent=True, metadata=facts)
        plt.close(figure)
    picture = data_uri(_shortened(stream.getvalue()).encode(), "image/svg+xml")
    return Panel(label, picture, _in_words(of, metric))


def _shortened(picture: str) -> str:
    """An SVG with one digit after the decimal point and without indentation: half the bytes."""
    rounded = re.sub(r"(\d\.\d)\d+", r"\1", picture)
    return re.sub(r"\s*\n\s*", "\n", rounded)


def _line(axes: Axes, curve: Points, color: str, **style: Any) -> None:
    if curve:
        axes.plot(*zip(*curve, strict=True), color=color, **style)


def _in_words(of: Mapping[int, Result], metric: str) -> str:
    ends = [
        f"{curve[-1][1]:.4g} (seed {seed})"
        for seed, result in sorted(of.items())
        if (curve := points(result, metric))
    ]
    return f"Learning curves; {metric} ends at {', '.join(ends) or 'no value'}"


def data_uri(content: bytes, kind: str) -> str:
    """A file as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
