"""Studies: the runs of a table or a figure, each cell of which `configs/study/` names once."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, model_validator

from multimax.options import Count, Section, as_typed, validate
from multimax.registry import look_up

Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
Settings = list[Annotated[str, Field(pattern=r"^[\w./+~]+=.")]]


class Cell(Section):
    """Runs that differ in their seed only.

    Attributes:
        row: what its row of the table begins with, a text for each of `Study.row`.
        settings: of `train.py`, beside those of the whole study.
        seeds: how many, counted from 0; null is the number of the study.
        run_log: the first figure in the log of the paper's first author, one run at paper scale.
    """

    row: list[str]
    settings: Settings
    seeds: Count | None = None
    run_log: float | None = None


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
        digits: after the decimal point.
        unit: what the figures were counted on.
        baseline: the cell that the others are compared with.
        cells: by name.
        claims: what the differences say of it.
    """

    name: Name
    title: str
    base: Settings
    seeds: Count
    row: Annotated[list[str], Field(min_length=1)]
    columns: Annotated[dict[str, str], Field(min_length=1)]
    digits: Annotated[int, Field(ge=0, le=10)]
    unit: str
    baseline: str
    cells: Annotated[dict[Name, Cell], Field(min_length=1)]
    claims: Annotated[tuple[Claim, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _check_cells(self) -> "Study":
        for cell in (self.baseline, *(claim.cell for claim in self.claims)):
            look_up("cell", self.cells, cell)
        for claim in self.claims:
            look_up("cell", self.cells, claim.than or self.baseline)
            look_up("column", self.columns, claim.column)
        for name, cell in self.cells.items():
            if len(cell.row) != len(self.row):
                raise ValueError(
                    f"cell {name} has the row {as_typed(cell.row)}: it must have a text for each "
                    f"of {', '.join(self.row)}"
                )
        return self

    def settings(self, cell: str) -> list[str]:
        """What makes a cell on the command line of `train.py`, but for its seed."""
        return [*self.base, *self.cells[cell].settings]

    def jobs(
        self,
        cells: Sequence[str] | None = None,
        seeds: Sequence[str] | None = None,
        settings: Sequence[str] = (),
    ) -> list[list[str]]:
        """The command line of each run: seed by seed, so that a part of them is a fair one.

        Args:
            cells: their names; None is all of them.
            seeds: of every cell; None is what the study says.
            settings: of all runs, in the place of those of the study.

        Raises:
            ValueError: there is no such cell.
        """
        chosen = {name: look_up("cell", self.cells, name) for name in cells or self.cells}
        debug = ["debug" for setting in settings if re.match("debug=(?!null)", setting)]
        runs = [
            (seed, name)
            for name, cell in chosen.items()
            for seed in seeds or map(str, range(cell.seeds or self.seeds))
        ]
        for seed in seeds or ():
            if not seed.isdecimal():
                raise ValueError(f"seed={seed} must be a whole number, or several: seed=0,1,2")
        return [
            [
                *self.settings(name),
                f"group={self.name}",
                f"tags=[{','.join([self.name, name, *debug])}]",
                f"seed={seed}",
                *settings,
            ]
            for seed, name in sorted(runs, key=lambda run: int(run[0]))
        ]


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
