"""The figures that were drawn, each with its caption and the command that makes it."""

import ast
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from experiments.figures.__main__ import FIGURES
from experiments.report.curves import data_uri
from experiments.selection import STUDIES

FOLDER = Path("results/figures")
MODULES = Path(__file__).parents[1] / "figures"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STUDY_NAMES = tuple(f"{name}_" for name in STUDIES)
COLORS = 256


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Attributes:
        name: of its file, without the suffix.
        source: the picture as a data URI.
        width: in pixels.
        height: in pixels.
        caption: what it shows.
        command: what makes it; empty if that is not known.
    """

    name: str
    source: str
    width: int
    height: int
    caption: str
    command: str


def pictures(folder: Path = FOLDER) -> list[Picture]:
    """All PNG files of a folder, in the order of their names; none if there is no folder.

    Raises:
        ValueError: a file cannot be read.
    """
    return [_picture(file) for file in sorted(folder.glob("*.png"))]


def not_drawn(found: list[Picture]) -> list[str]:
    """Names of figures that have no file."""
    made = {maker_of(picture.name) for picture in found}
    return [name for name in FIGURES if name not in made]


def maker_of(name: str) -> str | None:
    """The figure that a file belongs to: its own name, or one with something after it.

    "scores_deit" belongs to "scores" and "table2_small", as every name of a study, to "tables".
    """
    fitting = [figure for figure in FIGURES if name == figure or name.startswith(f"{figure}_")]
    if fitting:
        return max(fitting, key=len)
    return "tables" if name.startswith(STUDY_NAMES) else None


def _picture(file: Path) -> Picture:
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGBA")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}): delete it and draw it again") from error
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    stream = io.BytesIO()  # a palette is enough for a figure, and a third of the bytes
    flat.quantize(COLORS, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    caption, command = described(file.stem)
    return Picture(
        file.stem, data_uri(stream.getvalue(), "image/png"), *image.size, caption, command
    )


def described(name: str) -> tuple[str, str]:
    """The caption of a figure and the command that makes it; both empty if nothing here does."""
    if maker := maker_of(name):
        return caption_in(MODULES / f"{maker}.py"), f"python -m experiments.figures {maker}"
    benchmark = BENCHMARKS / f"{name.removeprefix('benchmark_')}.py"
    if name.startswith("benchmark_") and benchmark.is_file():
        return caption_in(benchmark), f"python -m benchmarks.{benchmark.stem}"
    return "", ""


def caption_in(module: Path) -> str:
    """What a module that draws says of its figure, without running it.

    The text of its `CAPTION`, else its docstring up to the commands.
    """
    tree = ast.parse(module.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CAPTION":
            return ast.literal_eval(node.value)
    text = ast.get_docstring(tree) or ""
    of_figure = itertools.takewhile(lambda part: "python -m" not in part, text.split("\n\n"))
    return " ".join(" ".join(of_figure).split())
