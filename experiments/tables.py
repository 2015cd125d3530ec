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

from experiments.rendering import FILES, Table, replace_in_readme
from experiments.results import load
from experiments.selection import (
    CONFIGS,
    STUDIES,
    Run,
    Selection,
    run_of,
    select,
    settings_of,
    study_of,
)
from experiments.statistics import Difference, holm, mean_and_deviation, paired_difference
from multimax.files import write_atomically
from multimax.registry import look_up
from multimax.training.studies import Claim, Study

SCALES = sorted(path.stem for path in (CONFIGS / "scale").glob("*.yaml"))
TABLES = STUDIES
ALPHA = 0.05
RUN_LOG = "author's run log (one run), not the paper"


class _Builder:
    """The rows and remarks of a study from the runs of its cells."""

    def __init__(self, study: Study, scale: str, selections: dict[str, Selection]) -> None:
        self.study, self.scale, self.selections = study, scale, selections
        figures = {
            name for of in selections.values() for r in of.runs.values() for name in r.figures
        }
        self.split = "test" if any(name.startswith("test/") for name in figures) else "valid"

    def values(self, cell: str, column: str) -> dict[int, float]:
        """A figure by seed, of the runs that have it: a sparse output has no perplexity."""
        name = self.study.columns[column].replace("test/", f"{self.split}/")
        runs = self.selections[cell].runs
        return {s: runs[s].figures[name] for s in sorted(runs) if name in runs[s].figures}

    def difference(self, cell: str, than: str, column: str) -> Difference | None:
        """To another cell, by the seeds that both have."""
        return paired_difference(self.values(cell, column), self.values(than, column))

    def rows(self) -> tuple[list[str], list[dict[str, str]]]:
        """Column names, and the texts of each row."""
        study = self.study
        main, *others = study.columns
        spread = ["sd", "seeds", "n", "difference", "95 % CI"]
        logged = self.scale == "paper" and any(cell.run_log for cell in study.cells.values())
        columns = [*study.row, main, *spread, *others, *((RUN_LOG, "paper") if logged else ())]
        compared = {
            cell: difference
            for cell in study.cells
            if cell != study.baseline
            and (difference := self.difference(cell, study.baseline, main))
        }
        corrected = holm([difference.p_value for difference in compared.values()])
        stars = {cell: p < ALPHA for cell, p in zip(compared, corrected, strict=True)}
        rows = []
        for name, cell in study.cells.items():
            row = dict.fromkeys(columns, "") | dict(zip(study.row, cell.row, strict=True))
            row |= self._figures(name)
            if difference := compared.get(name):
                row["difference"] = self._signed(difference.mean) + "*" * stars[name]
                row["95 % CI"] = f"±{difference.half_width:.{study.digits}f}"
            if logged and cell.run_log:
                row[RUN_LOG] = f"{cell.run_log:g}"
            rows.append(row)
        return columns, rows

    def _figures(self, cell: str) -> dict[str, str]:
        texts: dict[str, str] = {}
        for index, column in enumerate(self.study.columns):
            found = list(self.values(cell, column).values())
            if found:
                mean, deviation = mean_and_deviation(found)
                texts[column] = f"{mean:.{self.study.digits}f}"
                if not index and len(found) > 1:
                    texts["sd"] = f"{deviation:.{self.study.digits}f}"
        runs = self.selections[cell].runs.values()
        if runs:
            examples = {int(run.figures[f"{self.split}/examples"]) for run in runs}
            texts |= {"seeds": str(len(runs)), "n": ", ".join(f"{n:,}" for n in sorted(examples))}
        return texts

    def _signed(self, value: float) -> str:
        return f"{value:+.{self.study.digits}f}"

    def remarks(self) -> list[str]:
        """What the columns mean, and what the differences say of each claim."""
        study = self.study
        base = ", ".join(study.cells[study.baseline].row)
        meaning = (
            f"n: {study.unit} of split {self.split!r}; difference: to the row {base}, paired by "
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
            self.difference(claim.cell, claim.than or study.baseline, claim.column)
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
    """The table of a study, empty in the cells that have no run.

    Args:
        study: its cells and columns.
        scale: one of `SCALES`, of which the task has a recipe.
        runs: recorded ones, of whatever study.
        overrides: settings of the runs that are not those of the study.
    """
    runs = list(runs)
    selections = {
        name: select(settings_of(*study.settings(name), f"scale={scale}", *overrides), runs)
        for name in study.cells
    }
    notes = [
        f"{name}: runs with other settings are left out ({', '.join(selection.left_out)})"
        for name, selection in selections.items()
        if selection.left_out and not _are_cells(selection, study)
    ]
    builder = _Builder(study, scale, selections)
    columns, rows = builder.rows()
    caption = f"{study.title}, at {scale} scale"
    total = sum(len(selection.runs) for selection in selections.values())
    return Table(
        f"{study.name}_{scale}",
        caption,
        columns,
        len(study.row),
        rows,
        builder.remarks(),
        notes,
        total,
    )


def _are_cells(selection: Selection, study: Study) -> bool:
    """Whether what was left out differs only in what makes the cells of the study."""
    own = {s.partition("=")[0] for cell in study.cells.values() for s in cell.settings}
    return set(selection.left_out) <= own


def has_scale(study: Study, scale: str) -> bool:
    """Whether the task of a study has a recipe at a scale."""
    task = settings_of(*study.settings(study.baseline))["task"]["name"]
    return (CONFIGS / "recipe" / task / f"{scale}.yaml").exists()


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
            table = build(study, arguments.scale, runs, overrides)
            print(*table.notes, sep="\n", end="\n" if table.notes else "")
            if not table.runs:
                without_runs.append(
                    f"{name}: there is no run at {arguments.scale} scale with these settings, so "
                    f"that no table is written; python train.py -m study={name} runs it"
                )
                continue
            write(table, arguments.readme)
            if arguments.wandb:
                from experiments.wandb_tables import log_table

                print(log_table(table, study))
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
