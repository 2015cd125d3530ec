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
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.comparison import ALPHA, Cells, cells_of
from experiments.rendering import FILES, Table, replace_in_readme, significant
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
        spread = ["sd", "seeds", "n", self.effect, "95 % CI"]
        logged = self.cells.scale == "paper" and any(c.run_log for c in study.cells.values())
        columns = [*study.row, main, *spread, *others, *((RUN_LOG, "paper") if logged else ())]
        rows = []
        for name, cell in study.cells.items():
            row = dict.fromkeys(columns, "") | dict(zip(study.row, cell.row, strict=True))
            row |= self._figures(name)
            compared = self.cells.comparisons.get(name)
            if compared and (difference := compared.difference):
                row[self.effect], row["95 % CI"] = self._effect(difference)
                row[self.effect] += "*" * compared.star
            if logged and cell.run_log:
                row[RUN_LOG] = f"{cell.run_log:g}"
            rows.append(row)
        return columns, rows

    def _figures(self, cell: str) -> dict[str, str]:
        texts: dict[str, str] = {}
        for column in self.study.columns:
            found = list(self.cells.compared(cell, column).values())
            if found:
                mean, deviation = mean_and_deviation(found)
                texts[column] = self._number(mean)
                if column == self.cells.column_of(cell) and len(found) > 1:
                    texts["sd"] = self._number(deviation)
        runs = self.cells.selections[cell].runs.values()
        counted = [run for run in runs if self.study.diverged is not None or not run.diverged]
        if counted:
            name = f"{self.cells.split}/examples"
            examples = {int(run.figures[name]) for run in counted if not run.diverged}
            texts["seeds"] = str(len(counted))
            texts["n"] = ", ".join(f"{n:,}" for n in sorted(examples))
        return texts

    @property
    def effect(self) -> str:
        """What cells are compared by."""
        return "ratio" if self.study.ratios else "difference"

    def _number(self, value: float) -> str:
        """A compared figure, which may be a logarithm, as it is read."""
        if self.study.ratios:
            # Student's t of two seeds has intervals beyond what a double holds.
            ratio = math.inf if value > 300 else 10**value
            return significant(ratio, self.study.digits)
        return f"{value:.{self.study.digits}f}"

    def _effect(self, found: Difference) -> tuple[str, str]:
        """A difference or a ratio, and its interval."""
        mean, half = found.mean, found.half_width
        if self.study.ratios:
            interval = f"[{self._number(mean - half)}, {self._number(mean + half)}]"
            return self._number(mean), interval
        return f"{mean:+.{self.study.digits}f}", f"±{self._number(half)}"

    def remarks(self) -> list[str]:
        """What the columns mean, and what the differences say of each claim."""
        study = self.study
        cells, split, base = self.cells, self.cells.split, self.cells.label(study.baseline)
        nothing = 1 if study.ratios else 0
        meaning = (
            f"n: {study.unit} of split {split!r}; {self.effect}: to the row {base}, paired by "
            "seed, with its 95 % interval over the common seeds; *: the interval excludes "
            f"{nothing} after Holm's correction for the number of rows."
        )
        if study.ratios:
            meaning += (
                " Figures are geometric means over seeds, sd is their geometric standard deviation,"
                " a factor; a ratio is one of geometric means, tested on logarithms."
            )
        if "S" in study.columns:
            meaning += (
                " S and M: sparsity and multi-modality (Definitions 1 and 2), means over the "
                "attention layers and the rows of attention, with the row's mean score as threshold"
                f" and s = 0.1 / n for a row of n entries, of {study.inspected}."
            )
        if study.instead:
            meaning += (
                f" Rows without {cells.main_column} have sd, {self.effect} and interval of "
                f"{study.instead}."
            )
        if study.smallest is not None:
            meaning += (
                f" Claims have intervals at the level {100 * self.cells.level:.4g} % (Bonferroni, "
                f"for {len(study.claims)} claims); the smallest effect of interest is a "
                f"{self.effect} of {study.smallest:g}. Confirmed: the interval excludes {nothing} "
                "on the side of the claim, and the mean is at least that effect. Refuted: the "
                "whole interval is below it. Underpowered: anything else."
            )
        if diverged := self._diverged():
            counts = "are left out" if study.diverged is None else f"count as {study.diverged:g}"
            meaning += f" Runs that diverged {counts}: {diverged}."
        if len(devices := self._devices()) > 1:
            meaning += f" Runs on {'; '.join(devices)}."
        return [meaning, *self._verdicts()]

    def _verdicts(self) -> list[str]:
        claims = self.study.claims
        differences = [
            self.cells.difference(
                claim.cell, claim.than or self.study.baseline, claim.column, self.cells.level
            )
            for claim in claims
        ]
        corrected = holm([found.p_value if found else 1.0 for found in differences])
        return [
            self._verdict(claim, found, p)
            for claim, found, p in zip(claims, differences, corrected, strict=True)
        ]

    def _diverged(self) -> str:
        """The cells and seeds of runs that diverged."""
        seeds = {
            name: [str(seed) for seed, run in sorted(selection.runs.items()) if run.diverged]
            for name, selection in self.cells.selections.items()
        }
        return "; ".join(
            f"{self.cells.label(name)} (seed {', '.join(of)})" for name, of in seeds.items() if of
        )

    def _devices(self) -> list[str]:
        """Each device with the seeds that ran on it: a pair on two devices has no common noise."""
        seeds: dict[str, set[int]] = {}
        for selection in self.cells.selections.values():
            for seed, run in selection.runs.items():
                if run.device:
                    seeds.setdefault(run.device, set()).add(seed)
        return [
            f"{device} (seed {', '.join(map(str, sorted(of)))})"
            for device, of in sorted(seeds.items())
        ]

    def _verdict(self, claim: Claim, found: Difference | None, p_value: float) -> str:
        if found is None:
            return f"{claim.text}: not run (fewer than two pairs)."
        verdict = verdict_of(claim, found, p_value, self.cells.smallest)
        mean, interval = self._effect(found)
        # Whatever the other claims: as Holm's correction treats the smallest of the p-values.
        sees = self._number(found.smallest(1 - ALPHA / len(self.study.claims)))
        if self.study.ratios:
            mean, sees = f"ratio {mean}", f"a ratio of {sees}"
        else:
            interval = interval.replace("±", "± ")
        text = (
            f"{claim.text}: **{verdict}** at this scale ({claim.column} {mean} {interval}, "
            f"{found.pairs} pairs"
        )
        if verdict == "underpowered":
            text += f"; such a comparison, corrected for all claims, sees {sees} in 80 % of cases"
        return text + ")."


def verdict_of(claim: Claim, found: Difference, p_value: float, smallest: float | None) -> str:
    """What a comparison says of a claim: "confirmed", "refuted" or "underpowered".

    Args:
        claim: of a study.
        found: the difference that it is about, with an interval at the level of the study.
        p_value: of the difference, corrected for the number of claims.
        smallest: the smallest difference that matters; None is any, by which the p-value decides.
    """
    gain = -found.mean if claim.lower else found.mean
    if smallest is None:
        return "underpowered" if p_value >= ALPHA else "confirmed" if gain >= 0 else "refuted"
    if gain - found.half_width > 0 and gain >= smallest:
        return "confirmed"
    return "refuted" if gain + found.half_width < smallest else "underpowered"


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
    own = {s for cell in study.cells for s in study.settings(cell)[len(study.base) :]}
    return set(selection.left_out) <= {s.partition("=")[0].lstrip("+") for s in own}


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
