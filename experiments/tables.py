"""The tables, from results/runs to .md, .tex and .csv files.

    python -m experiments.tables                       # all of them at small scale
    python -m experiments.tables table2 --scale paper
    python -m experiments.tables table1 optimizer.lr=2e-3    # of runs with another setting
    python -m experiments.tables --readme              # and those of README.md
    python -m experiments.tables table2 --wandb        # and to Weights & Biases, with its figures
    python -m experiments.tables table2 --from-wandb ENTITY/PROJECT

A table is a study of configs/study/: a row has the runs with its very configuration, whatever their
names and folders. For each table:

    python train.py -m study=table1
    python -m experiments.results outputs/small
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.comparison import ALPHA, Cells, cells_of
from experiments.rendering import FILES, Table, replace_in_readme
from experiments.results import load
from experiments.selection import SCALES, STUDIES, Run, Selection, has_scale, run_of, study_of
from experiments.statistics import Difference, holm, mean_and_deviation
from multimax.files import write_atomically
from multimax.registry import look_up
from multimax.training.studies import Claim, Study

TABLES = STUDIES
RUN_LOG = "author's run log (one run), not the paper"


class _Builder:
    """The rows and remarks of a study from the runs of its cells."""

    def __init__(self, cells: Cells) -> None:
        self.study, self.cells = cells.study, cells

    def rows(self) -> tuple[list[str], list[dict[str, str]]]:
        """Column names, and the texts of each row."""
        study = self.study
        main, *others = study.columns
        spread = ["sd", "seeds", "n", "difference", "95 % CI"]
        logged = self.cells.scale == "paper" and any(c.run_log for c in study.cells.values())
        columns = [*study.row, main, *spread, *others, *((RUN_LOG, "paper") if logged else ())]
        rows = []
        for name, cell in study.cells.items():
            row = dict.fromkeys(columns, "") | dict(zip(study.row, cell.row, strict=True))
            row |= self._figures(name)
            compared = self.cells.comparisons.get(name)
            if compared and (difference := compared.difference):
                row["difference"] = self._signed(difference.mean) + "*" * compared.star
                row["95 % CI"] = f"±{difference.half_width:.{study.digits}f}"
            if logged and cell.run_log:
                row[RUN_LOG] = f"{cell.run_log:g}"
            rows.append(row)
        return columns, rows

    def _figures(self, cell: str) -> dict[str, str]:
        texts: dict[str, str] = {}
        for index, column in enumerate(self.study.columns):
            found = list(self.cells.values(cell, column).values())
            if found:
                mean, deviation = mean_and_deviation(found)
                texts[column] = f"{mean:.{self.study.digits}f}"
                if not index and len(found) > 1:
                    texts["sd"] = f"{deviation:.{self.study.digits}f}"
        runs = self.cells.selections[cell].runs.values()
        if runs:
            examples = {int(run.figures[f"{self.cells.split}/examples"]) for run in runs}
            texts |= {"seeds": str(len(runs)), "n": ", ".join(f"{n:,}" for n in sorted(examples))}
        return texts

    def _signed(self, value: float) -> str:
        return f"{value:+.{self.study.digits}f}"

    def remarks(self) -> list[str]:
        """What the columns mean, and what the differences say of each claim."""
        study = self.study
        split, base = self.cells.split, self.cells.label(study.baseline)
        meaning = (
            f"n: {study.unit} of split {split!r}; difference: to the row {base}, paired by "
            "seed, with its 95 % interval over the common seeds; *: the interval excludes 0 after "
            "Holm's correction for the number of rows."
        )
        if "S" in study.columns:
            meaning += (
                " S and M: sparsity and multi-modality (Definitions 1 and 2), means over the "
                "attention layers and the rows of attention, with the row's mean score as threshold"
                " and s = 0.1 / n for a row of n entries."
            )
        differences = [
            self.cells.difference(claim.cell, claim.than or study.baseline, claim.column)
            for claim in study.claims
        ]
        corrected = iter(holm([found.p_value for found in differences if found]))
        verdicts = [
            self._verdict(claim, found, next(corrected) if found else 1.0)
            for claim, found in zip(study.claims, differences, strict=True)
        ]
        return [meaning, *verdicts]

    def _verdict(self, claim: Claim, found: Difference | None, p_value: float) -> str:
        if found is None:
            return f"{claim.text}: not run."
        as_claimed = (found.mean < 0) == claim.lower
        verdict = ("confirmed" if as_claimed else "refuted") if p_value < ALPHA else "underpowered"
        digits = self.study.digits
        text = (
            f"{claim.text}: **{verdict}** at this scale ({claim.column} "
            f"{self._signed(found.mean)} ± {found.half_width:.{digits}f}, {found.pairs} pairs"
        )
        if verdict == "underpowered":
            text += f"; such a comparison sees {found.smallest:.{digits}f} in 80 % of cases"
        return text + ")."


def build(study: Study, scale: str, runs: Iterable[Run], overrides: Sequence[str] = ()) -> Table:
    """The table of a study, empty in the cells that have no run; arguments as of `cells_of`."""
    return table_of(cells_of(study, scale, runs, overrides))


def table_of(cells: Cells) -> Table:
    """The table of the cells of a study."""
    notes = [
        f"{name}: runs with other settings are left out ({', '.join(selection.left_out)})"
        for name, selection in cells.selections.items()
        if selection.left_out and not _are_cells(selection, cells.study)
    ]
    builder = _Builder(cells)
    columns, rows = builder.rows()
    caption = f"{cells.study.title}, at {cells.scale} scale"
    words = len(cells.study.row)
    return Table(cells.name, caption, columns, words, rows, builder.remarks(), notes, cells.count())


def _are_cells(selection: Selection, study: Study) -> bool:
    """Whether what was left out differs only in what makes the cells of the study."""
    own = {s.partition("=")[0] for cell in study.cells.values() for s in cell.settings}
    return set(selection.left_out) <= own


def main() -> None:
    """Write the tables that the command line names."""
    arguments = _arguments()
    overrides = [name for name in arguments.names if "=" in name]
    named = [name for name in arguments.names if "=" not in name]
    without_runs = []
    try:
        runs = _runs(arguments.from_wandb)
        for name in named or TABLES:
            look_up("table", dict.fromkeys(TABLES), name)
            study = study_of(name)
            if not has_scale(study, arguments.scale):
                without_runs.append(f"{name}: its task has no scale {arguments.scale}")
                continue
            cells = cells_of(study, arguments.scale, runs, overrides)
            table = table_of(cells)
            print(*table.notes, sep="\n", end="\n" if table.notes else "")
            if not table.runs:
                without_runs.append(
                    f"{name}: there is no run at {arguments.scale} scale with these settings, so "
                    f"that no table is written; python train.py -m study={name} runs it"
                )
                continue
            write(table, arguments.readme)
            if arguments.wandb:
                from experiments.figures.tables import drawn_for
                from experiments.wandb_tables import log_table

                print(log_table(table, study, drawn_for(cells)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(*without_runs, sep="\n", end="\n" if without_runs else "", file=sys.stderr)
    if without_runs and (named or len(without_runs) == len(TABLES)):
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"{', '.join(TABLES)}; all if none is named")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--readme", action="store_true", help="also between README.md's markers")
    parser.add_argument("--wandb", action="store_true", help="also as a wandb.Table with figures")
    parser.add_argument("--from-wandb", metavar="ENTITY/PROJECT", help="runs of Weights & Biases")
    return parser.parse_args()


def _runs(project: str | None) -> list[Run]:
    if project:
        from experiments.wandb_tables import runs_of

        return runs_of(project)
    return [run_of(result, str(file)) for file, result in load().items()]


def write(table: Table, readme: bool = False) -> None:
    """Write the files of a table, and what README.md shows of it."""
    for suffix, form in FILES.items():
        text = form(table)
        path = Path("results/tables") / f"{table.name}{suffix}"
        write_atomically(path, lambda stream, text=text: stream.write(text.encode()))
        print(path)
    if readme and replace_in_readme(Path("README.md"), table):
        print("README.md")


if __name__ == "__main__":
    main()
