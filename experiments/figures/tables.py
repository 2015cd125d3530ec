"""The difference of each cell of a study to its baseline, with its interval and every seed."""

import math
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, SymmetricalLogLocator
from matplotlib.transforms import blended_transform_factory

from experiments.comparison import Cells, Comparison, cells_of
from experiments.results import RUNS, load
from experiments.selection import STUDIES, has_scale, run_of, study_of
from multimax.files import write_atomically

FOLDER = Path("results/figures")
BETTER, WORSE, OPEN = "#0072b2", "#d55e00", "0.35"  # told apart by the colour-blind too
MUCH_LARGER = 300  # times a typical difference: on a linear axis that one would not be seen
CAPTION = (
    "What each row of the table gains or loses next to its baseline: mean difference over the "
    "common seeds (diamond), its 95 % interval by Student's t (bar), and each seed (dot). A star "
    "is for an interval that excludes 0 after Holm's correction for the number of rows. An arrow "
    "is for the interval of two seeds that goes on beyond the picture. Rows that have no seed in "
    "common with the baseline are left out. Where figures are compared by their ratio, that is "
    "drawn in the place of the difference, on a logarithmic axis, and 1 is no effect. Where some "
    "differences are hundreds of times the others, the axis is logarithmic beyond the range that "
    "it names. Within the grey band, if there is one, an effect is too small to matter."
)


def draw(folder: Path = FOLDER, source: Path = RUNS) -> list[Path]:
    """Write `<study>_<scale>.png` for every study that has something to compare."""
    runs = [run_of(result, str(file)) for file, result in load(source).items()]
    studies = [study_of(name) for name in STUDIES]
    return [
        file
        for scale in sorted({run.settings["scale"]["name"] for run in runs})
        for study in studies
        if has_scale(study, scale)
        if (file := save(cells_of(study, scale, runs), folder))
    ]


def save(cells: Cells, folder: Path) -> Path | None:
    """Write the figure of one study; None if no cell can be compared."""
    if not any(comparison.by_seed for comparison in cells.comparisons.values()):
        return None
    figure = forest(cells)
    path = folder / f"{cells.name}.png"
    write_atomically(path, lambda stream: figure.savefig(stream, dpi=120, format="png"))
    plt.close(figure)
    return path


def drawn_for(cells: Cells, folder: Path = FOLDER) -> list[Path]:
    """The figures that belong to a study: this one, drawn anew, and what its name begins."""
    own = save(cells, folder)
    return [*([own] if own else []), *sorted(folder.glob(f"{cells.name}_*.png"))]


def forest(cells: Cells) -> Figure:
    """A row for each cell that shares a seed with the baseline."""
    study = cells.study
    rows = {cell: found for cell, found in cells.comparisons.items() if found.by_seed}
    labels = [" | ".join(study.cells[cell].row) for cell in rows]
    size = max(7.0, 3.3 + 0.09 * max(map(len, labels))), 1.9 + 0.3 * len(rows)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    linear = None if study.ratios else linear_range(rows.values())
    axes.set_xlim(*limits(rows.values(), linear))
    if linear:
        _scale_beyond(axes, linear)
    axes.axvline(0, color="0.5", linewidth=1)
    if cells.smallest:
        axes.axvspan(-cells.smallest, cells.smallest, color="0.93", zorder=0)
    if study.ratios:
        _label_ratios(axes)
    for height, comparison in enumerate(rows.values()):
        _draw_row(axes, height, comparison, cells.lower_is_better)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=10)
    axes.set_xlabel(_label(cells, rows, linear))
    axes.annotate(
        " | ".join(study.row), (0, 1), (-10, 6), "axes fraction", "offset points", ha="right",
        fontweight="bold",
    )  # fmt: skip
    figure.suptitle(f"{study.title}, {cells.scale} scale", fontsize=10, x=0.01, ha="left")
    _draw_legend(figure)
    return figure


def _scale_beyond(axes: Axes, linear: float) -> None:
    """Make the axis logarithmic beyond what is linear; its limits stay."""
    axes.set_xscale("symlog", linthresh=linear, linscale=1.5)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
    axes.xaxis.set_minor_locator(FixedLocator([-linear / 2, linear / 2]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", length=4, pad=4)


def _label(cells: Cells, rows: Iterable[str], linear: float | None) -> str:
    """What is written below the axis, in lines."""
    study, good = cells.study, "lower" if cells.lower_is_better else "higher"
    columns = dict.fromkeys([cells.main_column, *map(cells.column_of, rows)])
    text = (
        f"{' or '.join(columns)}, {'ratio' if study.ratios else 'difference'} to "
        f"{' | '.join(study.cells[study.baseline].row)} ({good} is better"
        f"{f'; logarithmic beyond ±{linear:g}' if linear else ''})"
    )
    for together in (" | ", " ±", " is better"):  # no line ends here
        text = text.replace(together, together.replace(" ", "\N{NO-BREAK SPACE}"))
    return textwrap.fill(text, 56)


def _label_ratios(axes: Axes) -> None:
    """Ticks of an axis of logarithms: the ratios 1, 2 and 5 times a power of ten, or powers."""
    low, high = axes.get_xlim()
    mantissas = (1, 2, 5) if high - low < 2.5 else (1,)
    powers = range(math.floor(low), math.ceil(high))
    ratios = [mantissa * 10.0**power for power in powers for mantissa in mantissas]
    # Far from 1 as a power of ten, which is shorter.
    texts = [f"{r:g}" if 1e-3 <= r <= 1e3 else f"$10^{{{math.log10(r):.0f}}}$" for r in ratios]
    ticks = {math.log10(ratio): text for ratio, text in zip(ratios, texts, strict=True)}
    shown = {tick: text for tick, text in ticks.items() if low <= tick <= high}
    axes.set_xticks(list(shown), list(shown.values()))


def limits(rows: Iterable[Comparison], linear: float | None = None) -> tuple[float, float]:
    """Of the axis: all seeds, 0, and the intervals of three seeds or more.

    Student's t of two seeds has an interval of 12.7 standard errors to either side.

    Args:
        rows: what is drawn.
        linear: beyond it the axis is logarithmic.
    """
    shown = [0.0]
    for row in rows:
        shown += row.by_seed.values()
        if row.difference and row.difference.pairs > 2:
            mean, half = row.difference.mean, row.difference.half_width
            shown += [mean - half, mean + half]
    low, high = min(shown), max(shown)
    if linear:
        margin = 0.1 * linear
        return min(1.5 * low, low - margin), max(1.5 * high, high + margin)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def linear_range(rows: Iterable[Comparison]) -> float | None:
    """Up to where the axis is linear, a power of ten; None if it can be linear as a whole."""
    reach = [max(map(abs, row.by_seed.values())) for row in rows]
    typical = statistics.median_low(reach)
    if max(reach) < MUCH_LARGER * typical or not typical:
        return None
    return 10.0 ** math.ceil(math.log10(typical))


def _draw_row(axes: Axes, height: int, comparison: Comparison, lower_is_better: bool) -> None:
    found, color = comparison.difference, OPEN
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    if found:
        if comparison.star:
            color = BETTER if (found.mean < 0) == lower_is_better else WORSE
        axes.errorbar(
            found.mean, height, xerr=found.half_width, color=color, marker="D", markersize=6,
            markerfacecolor=color if comparison.star else "white", capsize=3, zorder=3,
        )  # fmt: skip
        low, high = axes.get_xlim()
        beyond = (found.mean - found.half_width < low, found.mean + found.half_width > high)
        for end, marker in enumerate("<>"):
            if beyond[end]:
                axes.plot(end, height, marker, color=color, transform=beside, clip_on=False)
    seeds = list(comparison.by_seed.values())
    below = [height + 0.24 if found else height] * len(seeds)
    axes.plot(seeds, below, "o", color=color, alpha=0.6, markersize=4, markeredgewidth=0)
    text = f"n = {len(seeds)}{' *' if comparison.star else ''}"
    axes.text(1.02, height, text, transform=beside, va="center", fontsize=9)


def _draw_legend(figure: Figure) -> None:
    kinds = {
        "better (*)": {"color": BETTER, "marker": "D", "linestyle": "-"},
        "worse (*)": {"color": WORSE, "marker": "D", "linestyle": "-"},
        "undecided": {"color": OPEN, "marker": "D", "linestyle": "-", "markerfacecolor": "white"},
        "one seed": {"color": OPEN, "marker": "o", "linestyle": "", "markersize": 4, "alpha": 0.6},
    }
    handles = [Line2D([], [], label=label, **style) for label, style in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
