"""The runs of each cell of a study, and how the cells compare with its baseline."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.selection import Run, Selection, config_of, select
from experiments.statistics import CONFIDENCE, Difference, holm, paired_difference
from multimax.training.config import Config, hashed_settings
from multimax.training.studies import Study

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """A cell next to the baseline, by the column that `Cells.column_of` says.

    Attributes:
        by_seed: the difference of each seed that both have; of the logarithms to base 10 where the
            study compares by ratios.
        difference: their mean and its interval; None with fewer than two seeds.
        star: whether the interval excludes 0 after Holm's correction for the number of cells, also
            of those that have no difference yet.
    """

    by_seed: dict[int, float]
    difference: Difference | None = None
    star: bool = False


@dataclass(frozen=True)
class Cells:
    """The cells of a study at one scale.

    Attributes:
        study: their names, settings and columns.
        scale: of the runs.
        configs: the composed configuration of each cell.
        selections: the recorded runs of each cell.
    """

    study: Study
    scale: str
    configs: dict[str, Config]
    selections: dict[str, Selection]

    @property
    def name(self) -> str:
        """Of the study and the scale, such as "table2_small", which files are called by."""
        return f"{self.study.name}_{self.scale}"

    @cached_property
    def split(self) -> str:
        """What the figures were counted on: "test", or "valid" where there is no test split."""
        of_test = (
            name.startswith("test/")
            for selection in self.selections.values()
            for run in selection.runs.values()
            for name in run.figures
        )
        return "test" if any(of_test) else "valid"

    @property
    def main_column(self) -> str:
        """The column by which the cells are compared."""
        return next(iter(self.study.columns))

    def column_of(self, cell: str) -> str:
        """The column by which a cell is compared: the main one, if its runs have the figure."""
        main, instead = self.main_column, self.study.instead
        if instead and self.values(cell, instead) and not self.values(cell, main):
            return instead
        return main

    @property
    def lower_is_better(self) -> bool:
        """Whether the claims of the study are that its main column is lower."""
        return any(c.lower for c in self.study.claims if c.column == self.main_column)

    def label(self, cell: str) -> str:
        """What the row of a cell begins with, such as "SoftMax, MultiMax, order 2"."""
        return ", ".join(self.study.cells[cell].row)

    def count(self) -> int:
        """Of all runs."""
        return sum(len(selection.runs) for selection in self.selections.values())

    def values(self, cell: str, column: str) -> dict[int, float]:
        """A figure by seed, of the runs that have it: a sparse output has no perplexity.

        That of a run that diverged is what the study says, or none.
        """
        name = self.study.columns[column].replace("test/", f"{self.split}/")
        runs = sorted(self.selections[cell].runs.items())
        found = {
            seed: self.study.diverged if run.diverged else run.figures.get(name)
            for seed, run in runs
        }
        return {seed: value for seed, value in found.items() if value is not None}

    def compared(self, cell: str, column: str) -> dict[int, float]:
        """`values`, or their logarithms to base 10 where the study compares by ratios.

        Raises:
            ValueError: a figure has no logarithm.
        """
        found = self.values(cell, column)
        if not self.study.ratios:
            return found
        for seed, value in found.items():
            if not value > 0:
                raise ValueError(
                    f"{column} of cell {cell}, seed {seed}, is {value:g}: study "
                    f"{self.study.name} has ratios=true, which is for positive figures"
                )
        return {seed: math.log10(value) for seed, value in found.items()}

    @property
    def smallest(self) -> float | None:
        """The smallest difference of `compared` figures that matters."""
        smallest = self.study.smallest
        return math.log10(smallest) if smallest and self.study.ratios else smallest

    @property
    def level(self) -> float:
        """Of the intervals of claims: with a smallest difference, Bonferroni's for their number."""
        claims = self.study.claims
        return CONFIDENCE if self.smallest is None else 1 - (1 - CONFIDENCE) / max(1, len(claims))

    def difference(
        self, cell: str, than: str, column: str, confidence: float = CONFIDENCE
    ) -> Difference | None:
        """Of the `compared` figures to another cell, by the seeds that both have."""
        return paired_difference(
            self.compared(cell, column), self.compared(than, column), confidence
        )

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Every cell but the baseline next to it."""
        base = self.study.baseline
        columns = {cell: self.column_of(cell) for cell in self.study.cells if cell != base}
        found = {cell: self.difference(cell, base, column) for cell, column in columns.items()}
        corrected = holm([f.p_value if f else 1.0 for f in found.values()])
        comparisons = {}
        for (cell, column), p in zip(columns.items(), corrected, strict=True):
            values, of_base = self.compared(cell, column), self.compared(base, column)
            by_seed = {s: value - of_base[s] for s, value in values.items() if s in of_base}
            comparisons[cell] = Comparison(by_seed, found[cell], p < ALPHA)
        return comparisons


def cells_of(study: Study, scale: str, runs: Iterable[Run], overrides: Sequence[str] = ()) -> Cells:
    """The cells of a study with their runs, which some cells may not have.

    Args:
        study: its cells and columns.
        scale: one of `configs/scale/`, of which the task has a recipe.
        runs: recorded ones, of whatever study.
        overrides: settings of the runs that are not those of the study.

    Raises:
        ValueError: the settings do not compose, or a run is recorded twice.
    """
    runs = list(runs)
    configs = {
        name: config_of(*study.settings(name), f"scale={scale}", *overrides) for name in study.cells
    }
    selections = {name: select(hashed_settings(config), runs) for name, config in configs.items()}
    return Cells(study, scale, configs, selections)
