"""What all benchmarks share around the measurement: command line, CSV, table, style of figures."""

import argparse
import csv
import io
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.memory import measure_memory
from benchmarks.timing import INFERENCE, Workload, quantiles, time_phases
from multimax.files import write_atomically
from multimax.training.result import environment

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

Row = dict[str, Any]
Workloads = Callable[..., dict[str, Workload]]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLACK, BLUE, ORANGE, GREEN, PINK = "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"
YELLOW, SKY, GREY = "#E69F00", "#56B4E9", "#7F7F7F"
# Of lines: a colour and a marker for each function, dashed where it is eager.
STYLES = {
    "SoftMax": (BLUE, "s"),
    "MultiMax": (ORANGE, "D"),
    "MultiMax, official": (GREEN, "^"),
    "MultiMax, official, TorchScript": (SKY, "v"),
    "MultiMax, official, compiled": (SKY, "v"),
    "MultiMax + log n, cap, sink": (YELLOW, "X"),
    "FlexAttention, SoftMax": (GREY, "p"),
    "FlexAttention, MultiMax of constants": (PINK, "P"),
    "sparsemax": (PINK, "P"),
    "1.5-entmax": (YELLOW, "X"),
    "F.linear_cross_entropy, chunked": (GREY, "*"),
}


def arguments_of(doc: str | None, providers: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; the first provider is the baseline."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--providers", nargs="+", choices=providers, default=list(providers))
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=rounds, help="at most")
    parser.add_argument("--seconds", type=float, default=60, help="of rounds for one shape")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to write to")
    return parser


def measure(
    workloads: Workloads,
    options: dict[str, Any],
    warmup: dict[str, Any] | None,
    arguments: argparse.Namespace,
    warmup_rounds: int = 2,
) -> list[Row]:
    """One row for each provider: memory first, then the time of all that found enough of it.

    Args:
        workloads: the function of this name of a benchmark, `(providers, **options)`.
        options: the shape.
        warmup: see `measure_memory`.
        arguments: of `arguments_of`.
        warmup_rounds: not counted.
    """
    module = f"benchmarks.{Path(workloads.__code__.co_filename).stem}"
    memory = {
        name: measure_memory(module, name, options, warmup, arguments.threads)
        for name in arguments.providers
    }
    torch.set_num_threads(arguments.threads)
    fitting = [name for name, found in memory.items() if found]
    seconds = time_phases(
        workloads(fitting, **options), arguments.rounds, arguments.seconds, warmup_rounds
    )
    rows: list[Row] = []
    for name, found in memory.items():
        times = seconds.get(name, {})
        counted = len(times.get("step", []))
        row = {"provider": name, "rounds": counted, **quantiles(times), **(found or {})}
        rows.append({**options, **row})
    return [row | ratios(row, rows[0]) for row in rows]


def ratios(row: Row, baseline: Row) -> Row:
    """Medians as multiples of those of the baseline, of each phase that both have."""
    phases = ("forward", "backward", "step", INFERENCE)
    return {
        f"{phase}_ratio": row[f"{phase}_ms"] / baseline[f"{phase}_ms"]
        for phase in phases
        if f"{phase}_ms" in row and f"{phase}_ms" in baseline
    }


def context(threads: int, dtype: str = "float32") -> Row:
    """What a reader needs to repeat and to compare a measurement, the same for all its rows."""
    facts = environment()
    hardware, dirty = facts["hardware"], "-dirty" if facts["uncommitted_changes"] else ""
    return {
        "dtype": dtype,
        "threads": threads,
        "device": hardware["device"],
        "cpu_count": hardware["cpu_count"],
        "platform": hardware["platform"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": facts["versions"]["python"],
        **{name: metadata.version(name) for name in ("torch", "timm", "entmax")},
        "compiler": compiler_version(),
        "commit": f"{facts['commit']}{dirty}",
    }


def compiler_version() -> str:
    """The first line that the C compiler says of itself; empty without one."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def write_csv(path: Path, rows: Sequence[Row], shared: Row) -> None:
    """Rows with `shared` added to each; a column that a row lacks stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in shared))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns, *shared])
    writer.writeheader()
    writer.writerows(row | shared for row in rows)
    write_atomically(path, lambda stream: stream.write(text.getvalue().encode()))


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Rows as a table; `columns` has the heading of each column, in order.

    Of times, the column `<phase>_ms` is the median and `<phase>_range` the quantiles around it.
    """
    table = Table(title=title, title_justify="left")
    for key, heading in columns.items():
        table.add_column(heading, justify="left" if key == "provider" else "right")
    for row in rows:
        table.add_row(*(_cell(row, key) for key in columns))
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)


def _cell(row: Row, key: str) -> str:
    if key == "step_ms" and not row.get("rounds", 1):
        return "failed" if row.get("failed") else "out of memory"
    if key.endswith("_range"):
        low, high = (row.get(key.replace("_range", f"_{part}_ms")) for part in ("p20", "p80"))
        return "" if low is None or high is None else f"{low:,.4g} - {high:,.4g}"
    value = row.get(key)
    return value if isinstance(value, str) else "" if value is None else f"{value:,.4g}"


def draw_lines(
    axes: Axes, rows: Sequence[Row], key: str, value_of: Callable[[Row], float | None]
) -> None:
    """A line for each provider: `value_of` rows over their `key`, both logarithmic."""
    for name in dict.fromkeys(row["provider"] for row in rows):
        color, marker = STYLES.get(name.removesuffix(", eager"), (BLACK, "o"))
        points = [(row[key], value_of(row)) for row in rows if row["provider"] == name]
        points = [(x, y) for x, y in points if y]
        style = "--" if name.endswith("eager") else "-"
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, style, color=color, marker=marker, markersize=5, label=name)
    axes.set(xscale="log", yscale="log")
    ticks = sorted({row[key] for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    low, high = axes.get_ylim()
    labelled = (1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=labelled))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3, linewidth=0.5)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the picture as PNG, with its panels freed of their upper and right lines."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    write_atomically(path, lambda stream: figure.savefig(stream, format="png", dpi=120))


def finish(
    name: str,
    rows: Sequence[Row],
    threads: int,
    results: Path,
    draw: Any,
    dtype: str = "float32",
) -> None:
    """Write `benchmarks/<name>.csv` and `figures/benchmark_<name>.png` below `results`.

    Called after each shape, so that one which takes too long costs none of those before it.

    Args:
        name: of the benchmark, with what tells this variant from others.
        rows: all that has been measured.
        threads: of torch; other numbers than 1 become part of the names.
        results: the folder.
        draw: `(rows) -> Figure`.
        dtype: of what was measured.
    """
    name = name if threads == 1 else f"{name}_{threads}threads"
    table, picture = results / "benchmarks" / f"{name}.csv", results / "figures"
    write_csv(table, rows, context(threads, dtype))
    picture = picture / f"benchmark_{name}.png"
    save_figure(draw(rows), picture)
    print(table, picture, sep="\n")
