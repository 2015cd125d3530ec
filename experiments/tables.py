"""The tables, from results/runs to .md, .tex and .csv files.

    python -m experiments.tables                       # all of them at small scale
    python -m experiments.tables table2 --scale paper
    python -m experiments.tables table1 optimizer.lr=2e-3    # of runs with another setting

A row has the runs with its very configuration, whatever their names and folders. For each table:

    python train.py -m seed=0,1,2 'experiment=glob(deit_*)'   # lm_*, mt_*
    python -m experiments.results outputs/small
"""

import argparse
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.results import RUNS, Result, load, mean_and_deviation, paired_difference
from experiments.selection import CONFIGS, recorded_settings, select, settings_of
from multimax.files import write_atomically
from multimax.registry import look_up

BASELINE = "softmax"
SCALES = sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml"))
LABELS = {
    "softmax": "SoftMax",
    "temperature": "SoftMax, learned temperature",
    "topk": "top-k",
    "sparsemax": "sparsemax",
    "entmax15": "1.5-entmax",
    "evsoftmax": "evidential SoftMax",
    "multimax": "MultiMax",
}


@dataclass(frozen=True)
class Table:
    """A table with a row for each experiment of a task.

    Attributes:
        title: what was trained.
        prefix: of its experiments, `<prefix>_softmax` and so on.
        variants: keys of `LABELS`, in the order of the rows.
        metrics: columns by name, each with the figure of the split that it shows. The first one
            also has its spread and its difference to SoftMax.
        unit: what the figures were counted on.
        digits: after the decimal point.
    """

    title: str
    prefix: str
    variants: tuple[str, ...]
    metrics: dict[str, str]
    unit: str
    digits: int = 2

    def has_scale(self, scale: str) -> bool:
        """Whether its task has a recipe at a scale."""
        experiment = f"experiment={self.prefix}_{self.variants[0]}"
        task = settings_of(experiment)["task"]["name"]
        return (CONFIGS / "recipe" / task / f"{scale}.yaml").exists()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        main, *others = self.metrics
        spread = ("sd", "seeds", "minus SoftMax", "95 % CI")
        return ("attention", "output", main, *spread, *others)

    def rows(
        self, scale: str, source: Path = RUNS, overrides: tuple[str, ...] = ()
    ) -> tuple[list[dict[str, str]], str, list[str]]:
        """The cells, empty where there is no run; a caption; and what was left out.

        Args:
            scale: one of `SCALES`, of which the task has a recipe.
            source: folder of the recorded results.
            overrides: settings of the runs that are not those of the experiments.
        """
        recorded = [(recorded_settings(result), result) for result in load(source)]
        results, notes = {}, []
        for variant in self.variants:
            experiment = f"{self.prefix}_{variant}"
            settings = settings_of(f"experiment={experiment}", f"scale={scale}", *overrides)
            selection = select(settings, recorded)
            results[variant] = [selection.runs[seed] for seed in sorted(selection.runs)]
            if selection.left_out:
                others = ", ".join(selection.left_out)
                notes.append(f"{experiment}: runs with other settings are left out ({others})")
        runs = [run for variant in results.values() for run in variant]
        split = "test" if any("test" in run["metrics"] for run in runs) else "valid"
        rows = [self._row(variant, results, split) for variant in self.variants]
        examples = {run["metrics"][split]["examples"] for run in runs}
        counted = ", ".join(f"{number:,}" for number in sorted(examples))
        caption = (
            f"{self.title} at {scale} scale, metrics of the {counted} {self.unit} of split "
            f"{split!r}"
        )
        return rows, caption, notes

    def _row(self, variant: str, results: dict[str, list[Result]], split: str) -> dict[str, str]:
        cells = dict.fromkeys(self.columns, "")
        cells["attention"] = LABELS[variant]
        runs = results[variant]
        if not runs:
            return cells
        cells["output"], cells["seeds"] = runs[0]["config"]["output"]["name"], str(len(runs))
        for column, figure in self.metrics.items():
            values = _by_seed(runs, split, figure).values()
            if values:
                cells[column] = f"{mean_and_deviation(list(values))[0]:.{self.digits}f}"
        main = next(iter(self.metrics.values()))
        values = _by_seed(runs, split, main)
        if len(values) > 1:
            cells["sd"] = f"{mean_and_deviation(list(values.values()))[1]:.{self.digits}f}"
        difference = paired_difference(values, _by_seed(results[BASELINE], split, main))
        if difference and variant != BASELINE:
            cells["minus SoftMax"] = f"{difference[0]:+.{self.digits}f}"
            cells["95 % CI"] = f"±{difference[1]:.{self.digits}f}"
        return cells

    def files(self, rows: list[dict[str, str]], caption: str) -> dict[str, str]:
        """The table as Markdown, LaTeX and CSV, by suffix."""
        return {
            ".md": self._markdown(rows, caption),
            ".tex": self._latex(rows, caption),
            ".csv": self._csv(rows),
        }

    def _markdown(self, rows: list[dict[str, str]], caption: str) -> str:
        head = [list(self.columns), ["---"] * len(self.columns)]
        lines = [*head, *([row[column] for column in self.columns] for row in rows)]
        return "\n".join([caption, "", *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"

    def _latex(self, rows: list[dict[str, str]], caption: str) -> str:
        def line(cells: list[str]) -> str:
            text = " & ".join(cells).replace("%", r"\%").replace("±", r"$\pm$")
            return text + r" \\"

        body = [line([row[column] for column in self.columns]) for row in rows]
        form = "ll" + "r" * (len(self.columns) - 2)
        head = [f"% {caption}", rf"\begin{{tabular}}{{{form}}}", r"\toprule"]
        parts = [*head, line(list(self.columns)), r"\midrule", *body]
        return "\n".join([*parts, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def _csv(self, rows: list[dict[str, str]]) -> str:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue()


def _by_seed(runs: list[Result], split: str, figure: str) -> dict[int, float]:
    """The figure of each run that has it; a sparse output has no perplexity."""
    found = {run["seed"]: run["metrics"][split].get(figure) for run in runs}
    return {seed: value for seed, value in found.items() if value is not None}


DENSE = tuple(variant for variant in LABELS if variant != "temperature")
TABLES = {
    "table1": Table("DeiT", "deit", tuple(LABELS), {"top-1 %": "top1"}, "images"),
    "table2": Table(
        "Language model",
        "lm",
        DENSE,
        {"perplexity": "perplexity", "bits per byte": "bits_per_byte"},
        "tokens",
        digits=3,
    ),
    "table3": Table("Translation", "mt", DENSE, {"BLEU": "bleu", "chrF": "chrf"}, "sentences"),
}


def main() -> None:
    """Write the tables that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"{', '.join(TABLES)}; all if none is named")
    parser.add_argument("--scale", choices=SCALES, default="small")
    arguments = parser.parse_args()
    overrides = tuple(name for name in arguments.names if "=" in name)
    named = [name for name in arguments.names if "=" not in name]
    without_runs = []
    try:
        for name in named or TABLES:
            table = look_up("table", TABLES, name)
            if not table.has_scale(arguments.scale):
                without_runs.append(f"{name}: its task has no scale {arguments.scale}")
                continue
            rows, caption, notes = table.rows(arguments.scale, overrides=overrides)
            print(*notes, sep="\n", end="\n" if notes else "")
            if not any(row["seeds"] for row in rows):
                without_runs.append(
                    f"{name}: {RUNS} has no run at {arguments.scale} scale with these settings, so "
                    "that no table is written; `python -m experiments.tables --help` has the "
                    "commands"
                )
                continue
            for suffix, text in table.files(rows, caption).items():
                path = Path("results/tables") / f"{name}_{arguments.scale}{suffix}"
                write_atomically(path, lambda stream, text=text: stream.write(text.encode()))
                print(path)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(*without_runs, sep="\n", end="\n" if without_runs else "", file=sys.stderr)
    if without_runs and (named or len(without_runs) == len(TABLES)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
