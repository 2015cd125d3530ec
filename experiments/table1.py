"""Table 1: image classification with a DeiT, every normalizer.

python -m experiments.table1                # results/runs -> results/tables/table1_small.*
python -m experiments.table1 --scale paper

The runs it needs, for each scale:
    python train.py -m seed=0,1,2 experiment=deit_softmax,deit_temperature,deit_topk,\
deit_sparsemax,deit_entmax15,deit_evsoftmax,deit_multimax
    python -m experiments.results outputs/small
"""

import argparse
import csv
from pathlib import Path
from typing import Any

from experiments.results import RUNS, Result, load, mean_and_deviation, paired_difference
from multimax.training.files import write_atomically

BASELINE = "deit_softmax"
ROWS = {
    BASELINE: "SoftMax",
    "deit_temperature": "SoftMax, learned temperature",
    "deit_topk": "top-k",
    "deit_sparsemax": "sparsemax",
    "deit_entmax15": "1.5-entmax",
    "deit_evsoftmax": "evidential SoftMax",
    "deit_multimax": "MultiMax",
}
COLUMNS: tuple[str, ...] = (
    "attention",
    "output",
    "top-1 %",
    "sd",
    "seeds",
    "minus SoftMax",
    "95 % CI",
)


def rows(scale: str, source: Path = RUNS) -> tuple[list[dict[str, str]], str]:
    """The cells of the table, empty where there is no run, and a caption."""
    results = load(scale, list(ROWS), source)
    split = _split([result for runs in results.values() for result in runs])
    top1 = {
        experiment: {run["seed"]: run["metrics"][split]["top1"] for run in runs}
        for experiment, runs in results.items()
    }
    table = [_row(name, results[name], top1[name], top1[BASELINE]) for name in ROWS]
    examples = {run["metrics"][split]["examples"] for runs in results.values() for run in runs}
    counted = ", ".join(f"{number:,}" for number in sorted(examples))
    return (
        table,
        f"DeiT at {scale} scale, top-1 accuracy on the {counted} images of split {split!r}",
    )


def _split(runs: list[Result]) -> str:
    return "test" if any("test" in run["metrics"] for run in runs) else "valid"


def _row(
    experiment: str, runs: list[Result], top1: dict[int, float], baseline: dict[int, float]
) -> dict[str, str]:
    cells = dict.fromkeys(COLUMNS, "")
    cells["attention"] = ROWS[experiment]
    if not runs:
        return cells
    config: dict[str, Any] = runs[0]["config"]
    cells["output"] = config["output"]["name"]
    mean, deviation = mean_and_deviation(list(top1.values()))
    cells["top-1 %"], cells["seeds"] = f"{mean:.2f}", str(len(runs))
    if len(runs) > 1:
        cells["sd"] = f"{deviation:.2f}"
    difference = paired_difference(top1, baseline)
    if difference and experiment != BASELINE:
        cells["minus SoftMax"] = f"{difference[0]:+.2f}"
        cells["95 % CI"] = f"±{difference[1]:.2f}"
    return cells


def markdown(table: list[dict[str, str]], caption: str) -> str:
    """The table as Markdown."""
    lines = [
        caption,
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join(["---"] * len(COLUMNS)) + " |",
    ]
    lines += ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in table]
    return "\n".join(lines) + "\n"


def latex(table: list[dict[str, str]], caption: str) -> str:
    """The table as a LaTeX tabular for booktabs."""

    def line(cells: list[str]) -> str:
        return (
            " & ".join(cell.replace("%", r"\%").replace("±", r"$\pm$") for cell in cells) + r" \\"
        )

    body = [line([row[column] for column in COLUMNS]) for row in table]
    head = [f"% {caption}", r"\begin{tabular}{llrrrrr}", r"\toprule", line(list(COLUMNS))]
    return "\n".join([*head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def write(scale: str, target: Path, source: Path = RUNS) -> list[Path]:
    """Write the table as .md, .tex and .csv."""
    table, caption = rows(scale, source)
    stem = target / f"table1_{scale}"
    texts = {".md": markdown(table, caption), ".tex": latex(table, caption)}
    for suffix, text in texts.items():
        content = text.encode()
        write_atomically(stem.with_suffix(suffix), lambda stream, c=content: stream.write(c))
    with stem.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    return [stem.with_suffix(suffix) for suffix in (".md", ".tex", ".csv")]


def main() -> None:
    """Write the table of one scale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", choices=("small", "paper"), default="small")
    for path in write(parser.parse_args().scale, Path("results/tables")):
        print(path)


if __name__ == "__main__":
    main()
