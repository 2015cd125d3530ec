"""A table as Markdown, LaTeX and CSV, and between the markers of README.md."""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from multimax.files import write_atomically


@dataclass(frozen=True)
class Table:
    """What the files of a table are made of.

    Attributes:
        name: of the study and the scale, such as "table2_small".
        caption: what was trained, and on what the figures were counted.
        columns: their names; the first `words` of them describe a row.
        words: how many these are.
        rows: texts by column; empty where there is no run.
        remarks: what the columns mean, and a verdict on each claim.
        notes: on what was left out.
        runs: how many the table is of.
    """

    name: str
    caption: str
    columns: list[str]
    words: int
    rows: list[dict[str, str]]
    remarks: list[str]
    notes: list[str]
    runs: int


def significant(value: float, digits: int) -> str:
    """A number with this many significant digits, such as "0.00065", "1.20" or "230"."""
    return f"{value:#.{digits}g}".removesuffix(".")


def markdown(table: Table) -> str:
    """The table with its caption and remarks."""
    return "\n\n".join([table.caption, grid(table), *(f"- {r}" for r in table.remarks)]) + "\n"


def grid(table: Table) -> str:
    """The cells alone, as Markdown."""
    head = [table.columns, ["---"] * len(table.columns)]
    lines = [*head, *([row[column] for column in table.columns] for row in table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(table: Table) -> str:
    """The table for the package booktabs."""

    def line(cells: list[str]) -> str:
        text = " & ".join(cells).replace("%", r"\%").replace("±", r"$\pm$")
        return text.replace("*", r"$^*$") + r" \\"

    form = "l" * table.words + "r" * (len(table.columns) - table.words)
    parts = [
        *(f"% {text}" for text in (table.caption, *table.remarks)),
        rf"\begin{{tabular}}{{{form}}}",
        r"\toprule",
        line(table.columns),
        r"\midrule",
        *(line([row[column] for column in table.columns]) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(parts) + "\n"


def comma_separated(table: Table) -> str:
    """The cells alone, as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, table.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    return stream.getvalue()


FILES: dict[str, Callable[[Table], str]] = {
    ".md": markdown,
    ".tex": latex,
    ".csv": comma_separated,
}


def in_readme(text: str, table: Table) -> str:
    """The text with this table between `<!-- NAME -->` and `<!-- /NAME -->`, if it has them."""
    markers = re.compile(rf"(<!-- {table.name} -->\n).*?(<!-- /{table.name} -->)", re.DOTALL)
    remarks = "\n".join(f"- {remark}" for remark in table.remarks)
    body = f"\n{grid(table)}\n\n{remarks}\n\n"
    return markers.sub(lambda found: found[1] + body + found[2], text)


def replace_in_readme(readme: Path, table: Table) -> bool:
    """Write the table into README.md; False where it has no place for it."""
    old = readme.read_text()
    new = in_readme(old, table)
    if f"<!-- {table.name} -->" not in old:
        return False
    write_atomically(readme, lambda stream: stream.write(new.encode()))
    return True
