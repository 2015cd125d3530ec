"""What the tables of the paper have in common: from results/runs to .md, .tex and .csv files."""

import argparse
import csv
import io
from dataclasses import dataclass
from pathlib import Path

from experiments.results import RUNS, Result, load, mean_and_deviation, paired_difference
from multimax.files import write_atomically

BASELINE = "softmax"
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
        name: of its files.
        title: what was trained.
        prefix: of its experiments, `<prefix>_softmax` and so on.
        variants: keys of `LABELS`, in the order of the rows.
        metrics: columns by name, each with the figure of the split that it shows. The first one
            also has its spread and its difference to SoftMax.
        unit: what the figures were counted on.
        digits: after the decimal point.
    """

    name: str
    title: str
    prefix: str
    variants: tuple[str, ...]
    metrics: dict[str, str]
    unit: str
    digits: int = 2

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        main, *others = self.metrics
        spread = ("sd", "seeds", "minus SoftMax", "95 % CI")
        return ("attention", "output", main, *spread, *others)

    def rows(self, scale: str, source: Path = RUNS) -> tuple[list[dict[str, str]], str]:
        """The cells, empty where there is no run, and a caption."""
        experiments = [f"{self.prefix}_{variant}" for variant in self.variants]
        loaded = load(scale, experiments, source)
        results = dict(zip(self.variants, (loaded[name] for name in experiments), strict=True))
        runs = [run for variant in results.values() for run in variant]
        split = "test" if any("test" in run["metrics"] for run in runs) else "valid"
        rows = [self._row(variant, results, split) for variant in self.variants]
        examples = {run["metrics"][split]["examples"] for run in runs}
        counted = ", ".join(f"{number:,}" for number in sorted(examples))
        return rows, (
            f"{self.title} at {scale} scale, figures of the {counted} {self.unit} of split "
            f"{split!r}"
        )

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

    def write(self, scale: str, target: Path, source: Path = RUNS) -> list[Path]:
        """Write the table as .md, .tex and .csv."""
        rows, caption = self.rows(scale, source)
        texts = {
            ".md": self._markdown(rows, caption).encode(),
            ".tex": self._latex(rows, caption).encode(),
            ".csv": self._csv(rows).encode(),
        }
        paths = []
        for suffix, content in texts.items():
            paths.append((target / f"{self.name}_{scale}").with_suffix(suffix))
            write_atomically(paths[-1], lambda stream, c=content: stream.write(c))
        return paths

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


def main(table: Table, description: str) -> None:
    """The command line of a table: write it for one scale."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--scale", choices=("small", "paper"), default="small")
    for path in table.write(parser.parse_args().scale, Path("results/tables")):
        print(path)
