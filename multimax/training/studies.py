"""Studies: the runs of a table or a figure, each cell of which `configs/study/` names once."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, model_validator

from multimax.options import Count, Positive, Section, Whole, as_typed, validate
from multimax.registry import look_up

Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
Setting = Annotated[str, Field(pattern=r"^[\w./+~]+=.")]
Settings = list[Setting]


class Cell(Section):
    """Runs that differ in their seed only.

    Attributes:
        row: what its row of the table begins with, a text for each of `Study.row`.
        settings: of `train.py`, beside those of the whole study.
        seeds: how many, counted from 0; null is the number of the study.
        run_log: the first figure in the log of the paper's first author, one run at paper scale.
        tuning: settings that were tried on validation data, see `Tuning`.
        then: more of them, which were made from the best of `tuning`.
        chosen: which of them the cell has, counted from 0; null is not decided yet.
    """

    row: list[str]
    settings: Settings
    seeds: Count | None = None
    run_log: float | None = None
    tuning: Annotated[tuple[Settings, ...], Field(strict=False)] = ()
    then: Annotated[tuple[Settings, ...], Field(strict=False)] = ()
    chosen: Whole | None = None

    @property
    def tried(self) -> tuple[Settings, ...]:
        """All settings that were tried, as `chosen` counts them."""
        return self.tuning + self.then


class Claim(Section):
    """Something that the study is to confirm or refute.

    Attributes:
        text: the claim.
        cell: whose figure is claimed to be higher.
        than: the cell that it is compared with; null is the baseline.
        column: which figure.
        lower: whether the figure is claimed to be lower, not higher.
    """

    text: str
    cell: str
    than: str | None = None
    column: str
    lower: bool = False


class Tuning(Section):
    """How the settings of each cell are chosen: all of its `tuning` are run, with the same seeds.

    Attributes:
        seeds: of those runs; none is one of the study.
        figure: of which the mean over the seeds decides, such as "valid/mse".
        lower: whether a lower figure is better.
        settings: of these runs only.
    """

    seeds: Annotated[list[Whole], Field(min_length=1)]
    figure: Annotated[str, Field(pattern=r"^valid/")]
    lower: bool
    settings: Annotated[tuple[Setting, ...], Field(strict=False)] = ()


class Study(Section):
    """The runs of a table or a figure.

    Attributes:
        name: of the study, which groups its runs in Weights & Biases.
        title: what was trained.
        base: settings of `train.py` that all cells share.
        seeds: how many a cell has that does not say so itself.
        row: names of the columns that describe a cell.
        columns: further columns by name, each with the figure of a result that it shows, such as
            "test/top1". The first one also has its spread and its difference to the baseline.
        instead: the column by which cells are compared whose runs lack the figure of the first, as
            sparse outputs lack a perplexity; null is none.
        inspected: what of the split S and M were measured on.
        digits: after the decimal point; with `ratios`, significant ones.
        unit: what the figures were counted on.
        baseline: the cell that the others are compared with.
        cells: by name.
        claims: what the differences say of it.
        ratios: whether figures are compared by their ratio, not by their difference.
        smallest: the smallest difference that matters, or the smallest ratio; a claim is confirmed
            or refuted by it. Null is any.
        diverged: what every figure of a run counts as that diverged; null leaves such runs out.
        tuning: how the settings of the cells are chosen; null if there is nothing to choose.
    """

    name: Name
    title: str
    base: Settings
    seeds: Count
    row: Annotated[list[str], Field(min_length=1)]
    columns: Annotated[dict[str, str], Field(min_length=1)]
    digits: Annotated[int, Field(ge=0, le=10)]
    unit: str
    instead: str | None = None
    inspected: str = "the whole split"
    baseline: str
    cells: Annotated[dict[Name, Cell], Field(min_length=1)]
    claims: Annotated[tuple[Claim, ...], Field(strict=False)] = ()
    ratios: bool = False
    smallest: Positive | None = None
    diverged: float | None = None
    tuning: Tuning | None = None

    @model_validator(mode="after")
    def _check_cells(self) -> "Study":
        if self.ratios and self.smallest is not None and self.smallest <= 1:
            raise ValueError(f"smallest={self.smallest:g} must be a ratio above 1, as ratios=true")
        for cell in (self.baseline, *(claim.cell for claim in self.claims)):
            look_up("cell", self.cells, cell)
        if self.instead is not None:
            look_up("column", self.columns, self.instead)
        for claim in self.claims:
            look_up("cell", self.cells, claim.than or self.baseline)
            look_up("column", self.columns, claim.column)
        for name, cell in self.cells.items():
            if len(cell.row) != len(self.row):
                raise ValueError(
                    f"cell {name} has the row {as_typed(cell.row)}: it must have a text for each "
                    f"of {', '.join(self.row)}"
                )
            self._check_tuning(name, cell)
        return self

    def _check_tuning(self, name: str, cell: Cell) -> None:
        if bool(cell.tuning) != (self.tuning is not None):
            raise ValueError(f"cell {name}: study.tuning and the tuning of cells need each other")
        budgets = {len(other.tried) for other in self.cells.values()}
        if len(budgets) > 1:
            raise ValueError(f"cells have {sorted(budgets)} settings to try: let them have as many")
        if cell.chosen is not None and cell.chosen >= len(cell.tried):
            raise ValueError(
                f"cell {name}: chosen={cell.chosen} must be less than {len(cell.tried)}, the "
                "number of its settings to try"
            )
        shared = set(self.tuning.seeds) & set(range(cell.seeds or self.seeds)) if self.tuning else 0
        if shared:
            raise ValueError(f"study.tuning.seeds: {min(shared)} is a seed of the study too")

    def settings(self, cell: str) -> list[str]:
        """What makes a cell on the command line of `train.py`, but for its seed.

        Of a cell whose choice is not made, these are the first settings to try.
        """
        return self.tried(cell, self.cells[cell].chosen or 0)

    def tried(self, cell: str, index: int) -> list[str]:
        """What `settings` is if these settings of a cell are chosen."""
        found = self.cells[cell]
        return [*self.base, *found.settings, *(found.tried[index] if found.tried else ())]

    def jobs(
        self,
        cells: Sequence[str] | None = None,
        seeds: Sequence[str] | None = None,
        settings: Sequence[str] = (),
        tuning: bool = False,
    ) -> list[list[str]]:
        """The command line of each run: seed by seed, so that a part of them is a fair one.

        Args:
            cells: their names; None is all of them.
            seeds: of every cell; None is what the study says.
            settings: of all runs, in the place of those of the study.
            tuning: the runs by which the settings of cells are chosen, in the place of the study's.

        Raises:
            ValueError: there is no such cell, or its settings are not chosen.
        """
        for seed in seeds or ():
            if not seed.isdecimal():
                raise ValueError(f"seed={seed} must be a whole number, or several: seed=0,1,2")
        debug = ["debug" for setting in settings if re.match("debug=(?!null)", setting)]
        runs = [
            (int(seed), name, of_cell)
            for name in cells or self.cells
            for of_cell in (self._to_try(name) if tuning else [self._chosen(name)])
            for seed in seeds or self._seeds(name, tuning)
        ]
        return [
            [
                *of_cell,
                f"group={self.name}",
                f"tags=[{','.join([self.name, name, *['tuning'] * tuning, *debug])}]",
                f"seed={seed}",
                *settings,
            ]
            for seed, name, of_cell in sorted(runs, key=lambda run: run[0])
        ]

    def _seeds(self, cell: str, tuning: bool) -> Sequence[int]:
        if tuning and self.tuning:
            return self.tuning.seeds
        return range(self.cells[cell].seeds or self.seeds)

    def _to_try(self, cell: str) -> list[list[str]]:
        """The settings of the runs by which those of a cell are chosen."""
        found = look_up("cell", self.cells, cell)
        if self.tuning is None:
            raise ValueError(f"study {self.name} has nothing to choose: leave tuning=false")
        return [
            [*self.tried(cell, index), *self.tuning.settings] for index in range(len(found.tried))
        ]

    def _chosen(self, cell: str) -> list[str]:
        found = look_up("cell", self.cells, cell)
        if found.tuning and found.chosen is None:
            raise ValueError(
                f"the settings of cell {cell} are not chosen: run -m study={self.name} "
                f"tuning=true, then python -m experiments.tuning {self.name} says which"
            )
        return self.settings(cell)


def read_study(content: Any) -> Study:
    """The study that `configs/study/` holds under `study`.

    Raises:
        ValueError: something in it is missing, unknown, or of a wrong type.
    """
    if isinstance(content, DictConfig):
        content = OmegaConf.to_container(content, resolve=True)
    if not isinstance(content, Mapping):
        raise ValueError(f"study={as_typed(content)} must name a file of configs/study")
    return validate(Study, content, "study.")
