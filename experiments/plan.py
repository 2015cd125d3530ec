"""What the runs of a study cost, before the first of them: size, FLOPs, memory, GPU-hours.

    python -m experiments.plan table2 --scale paper --processes 4
    python -m experiments.plan                              # all studies at small scale
    python -m experiments.plan table1 model.depth=24        # with another setting
    python -m experiments.plan experiment=deit_multimax scale=paper          # of one run

No data needs to be there: the data sets say how large they are. The real model makes an update on
the meta device (see `experiments.cost`). What a machine really needs is measured there with
`python train.py ... trainer.dry_run=true`.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.comparison import cells_of
from experiments.cost import Cost, cost_of
from experiments.results import load
from experiments.selection import SCALES, STUDIES, Run, config_of, has_scale, run_of, study_of
from multimax.files import write_atomically
from multimax.training.config import Config

UTILIZATION = 0.35
# Dense FLOP/s by trainer.precision: matrix products in fp32 are those of PyTorch's default, without
# TF32. Sources: NVIDIA A100 Tensor Core GPU data sheet; NVIDIA H100 data sheet, SXM.
PEAKS = {
    "A100": {"no": 19.5e12, "bf16": 312e12, "fp16": 312e12},
    "H100": {"no": 67e12, "bf16": 989e12, "fp16": 989e12},
}
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A cell of a study, or a configuration.

    Attributes:
        study: "" of a single configuration.
        cell: its name.
        cost: of a run.
        precision: of the run.
        finished: seeds that are recorded.
        missing: seeds that are not.
    """

    study: str
    cell: str
    cost: Cost
    precision: str
    finished: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()

    def hours(self, gpu: str, utilization: float) -> float:
        """GPU-hours of a run's training, at this share of the peak."""
        total = self.cost.flops * self.cost.updates
        return total / (PEAKS[gpu][self.precision] * utilization) / 3600


def plan_study(
    name: str, scale: str, runs: Iterable[Run], overrides: Sequence[str], processes: int
) -> list[Row]:
    """A row for each cell of a study; arguments as of `cells_of` and `cost_of`."""
    study = study_of(name)
    cells = cells_of(study, scale, runs, overrides)
    rows = []
    for cell, config in cells.configs.items():
        recorded = cells.selections[cell].runs
        wanted = range(study.cells[cell].seeds or study.seeds)
        rows.append(
            Row(
                name,
                cell,
                cost_of(config, processes),
                config.trainer.precision,
                tuple(seed for seed in wanted if seed in recorded),
                tuple(seed for seed in wanted if seed not in recorded),
            )
        )
    return rows


def plan_run(config: Config, processes: int) -> list[Row]:
    """The row of a single configuration."""
    cost = cost_of(config, processes)
    return [Row("", config.name, cost, config.trainer.precision, (), (config.seed,))]


def texts(row: Row, utilization: float) -> dict[str, str]:
    """What a reader sees of a row, by column."""
    cost = row.cost
    fused = "" if cost.fused is None else f"{cost.fused / GIB:.2f}"
    return {
        "cell": row.cell,
        "parameters": _short(cost.parameters),
        "FLOPs / update": _short(cost.flops),
        "state GiB": f"{cost.state / GIB:.2f}",
        "eager GiB": f"{cost.eager / GIB:.2f}",
        "fused GiB": fused,
        "units": _short(cost.units * cost.updates),
        "updates": f"{cost.updates:,}",
        **{f"{gpu} h": _hours(row.hours(gpu, utilization)) for gpu in PEAKS},
        "finished": str(len(row.finished)),
        "missing": str(len(row.missing)),
    }


def _short(number: float) -> str:
    """Three digits and a prefix of the SI, such as "22.0 M"."""
    prefixes = [" ", "k", "M", "G", "T", "P"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        del prefixes[0]
    digits = max(0, 3 - len(str(int(number))))
    return f"{number:.{digits}f} {prefixes[0]}".rstrip()


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def total(rows: Sequence[Row], utilization: float) -> str:
    """The runs of a study and their GPU-hours in a sentence."""
    finished = sum(len(row.finished) for row in rows)
    missing = sum(len(row.missing) for row in rows)
    hours = []
    for gpu in PEAKS:
        of_runs = [(row, row.hours(gpu, utilization)) for row in rows]
        everything = sum((len(row.finished) + len(row.missing)) * each for row, each in of_runs)
        rest = sum(len(row.missing) * each for row, each in of_runs)
        hours.append(f"{_hours(everything)} {gpu}-hours, {_hours(rest)} of them missing")
    return (
        f"{len(rows)} cells, {finished + missing} runs, {finished} finished and {missing} missing; "
        + "; ".join(hours)
    )


def remark(utilization: float, processes: int) -> str:
    """What the columns mean."""
    peaks = ", ".join(
        f"{gpu} {of['bf16'] / 1e12:g} TFLOP/s in fp16 and bf16 and {of['no'] / 1e12:g} in fp32"
        for gpu, of in PEAKS.items()
    )
    return (
        "FLOPs: two for each multiplication of matrix products and convolutions, forward and "
        "backward, with what gradient checkpointing does again. State: weights, gradients, "
        "optimizer and average of weights. Eager: what forward and backward of a batch of one of "
        f"{processes} process(es) hold beside it at the peak, where attention holds its queries x "
        "keys matrices; fused: an estimate for a kernel that holds none, where there is one. Both "
        "are in fp32: mixed precision holds less. Units: images, tokens or examples of a run. "
        "Hours: of one GPU for a run, training alone, at "
        f"{utilization:.0%} of the dense peak of NVIDIA's data sheets ({peaks})."
    )


def markdown(rows: Sequence[Row], utilization: float, processes: int) -> str:
    """A table for each study, its total, and what the columns mean."""
    parts = []
    for study, own in by_study(rows).items():
        lines = [texts(row, utilization) for row in own]
        columns = list(lines[0])
        cells = [columns, ["---"] * len(columns), *([line[c] for c in columns] for line in lines)]
        parts += [f"## {study}"] if study else []
        parts += ["\n".join("| " + " | ".join(line) + " |" for line in cells)]
        parts += [total(own, utilization)]
    return "\n\n".join([*parts, remark(utilization, processes)]) + "\n"


def comma_separated(rows: Sequence[Row], utilization: float) -> str:
    """A line for each row, in bytes and FLOPs; seeds have spaces between them."""
    stream = io.StringIO()
    lines = [
        {"study": row.study, "cell": row.cell, "precision": row.precision}
        | row.cost._asdict()
        | {f"{gpu}_hours": row.hours(gpu, utilization) for gpu in PEAKS}
        | {"finished": " ".join(map(str, row.finished))}
        | {"missing": " ".join(map(str, row.missing))}
        for row in rows
    ]
    writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def by_study(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each study, in their order."""
    return {
        name: [r for r in rows if r.study == name] for name in dict.fromkeys(r.study for r in rows)
    }


def show(console: Console, rows: Sequence[Row], utilization: float) -> None:
    """Print the table of a study, or of a configuration, and its total."""
    table = Table(title=rows[0].study or None, title_justify="left", box=SIMPLE_HEAD)
    for name in texts(rows[0], utilization):
        table.add_column(name, justify="left" if name == "cell" else "right")
    for row in rows:
        table.add_row(*texts(row, utilization).values())
    console.print(table)
    console.print(total(rows, utilization), highlight=False, soft_wrap=True)


def main() -> None:
    """Print the plan of what the command line names, and write it to files."""
    arguments = _arguments()
    settings = [name for name in arguments.names if "=" in name and not name.startswith("study=")]
    named = [name.removeprefix("study=") for name in arguments.names if name not in settings]
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows: list[Row] = []
    try:
        scale = _scale(settings, arguments.scale)
        settings = [setting for setting in settings if not setting.startswith("scale=")]
        if any(setting.startswith("experiment=") for setting in settings):
            if named:
                raise ValueError(f"experiment= is one run, study {named[0]} many: name one of them")
            rows = plan_run(config_of(*settings, f"scale={scale}"), arguments.processes)
            show(console, rows, arguments.utilization)
        else:
            runs = [run_of(result, str(file)) for file, result in load().items()]
            for name in named or STUDIES:
                if not has_scale(study_of(name), scale):
                    print(f"{name}: its task has no scale {scale}", file=sys.stderr)
                    continue
                own = plan_study(name, scale, runs, settings, arguments.processes)
                show(console, own, arguments.utilization)
                rows += own
        if not rows:
            raise SystemExit(1)
        console.print(remark(arguments.utilization, arguments.processes), highlight=False)
        _write(arguments, rows)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _scale(settings: Sequence[str], given: str) -> str:
    own = [setting.partition("=")[2] for setting in settings if setting.startswith("scale=")]
    scale = own[-1] if own else given
    if scale not in SCALES:
        raise ValueError(f"scale={scale} must be one of {', '.join(SCALES)}")
    return scale


def _write(arguments: argparse.Namespace, rows: Sequence[Row]) -> None:
    files = {
        arguments.csv: comma_separated(rows, arguments.utilization),
        arguments.markdown: markdown(rows, arguments.utilization, arguments.processes),
    }
    for path, text in files.items():
        if path is not None:
            write_atomically(path, lambda stream, text=text: stream.write(text.encode()))
            print(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = f"{', '.join(STUDIES)}, all if none is named; and settings of train.py"
    parser.add_argument("names", nargs="*", help=names)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--processes", type=_count, default=1, help="a GPU each; default 1")
    share = "share of the peak that the FLOPs reach, in (0, 1]; default 0.35"
    parser.add_argument("--utilization", type=_share, default=UTILIZATION, help=share)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also as CSV, in bytes and FLOPs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also as Markdown")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number >= 1")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be a number in (0, 1]")
    return share


if __name__ == "__main__":
    main()
