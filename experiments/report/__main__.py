"""All results of one scale as a single HTML page, which needs neither a network nor a script.

    python -m experiments.report                       # results/report.html, at small scale
    python -m experiments.report --scale paper --output report_paper.html

It is drawn from results/runs/ and from the figures in results/figures/: the same files give the
same page, to the byte.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from omegaconf import OmegaConf

from experiments.report import content, curves
from experiments.report.pictures import FOLDER, Picture, not_drawn, pictures
from experiments.results import RUNS, Result, has_diverged, load
from experiments.selection import SCALES, STUDIES, study_of
from multimax.files import write_atomically
from multimax.training.studies import Study

OUTPUT = Path("results/report.html")
MEANING = {
    "small": "Small models on embedded data, with one recipe for all rows of a table. These are "
    "not the models and data of the paper, and its numbers are not to be expected.",
    "paper": "The models, data and recipes of the paper.",
    "paper_wiki103": "The language model of fairseq's transformer_lm_wiki103 on WikiText-103.",
}


def page(
    results: Mapping[Path, Result], scale: str, studies: Iterable[Study], figures: Path
) -> str:
    """The page of the results of one scale.

    Args:
        results: all recorded ones by file; those of other scales are left out.
        scale: one of `configs/scale/`.
        studies: each has a section, if its task has the scale.
        figures: a folder of PNG files.

    Raises:
        ValueError: a result, a study or a figure cannot be read.
    """
    results = {file: result for file, result in results.items() if result["scale"] == scale}
    parts = content.parts_of(results, scale, studies)
    finished = [result for result in results.values() if not has_diverged(result)]
    drawn = pictures(figures)
    of_parts = {part.cells.name: of_study(part.cells.name, drawn) for part in parts}
    others = content.others_of(results, parts)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"strong": strong, "yaml": as_yaml}
    return environment.get_template("page.html.jinja").render(
        scale=scale,
        meaning=MEANING.get(scale, ""),
        parts=parts,
        of_parts=of_parts,
        pictures=[p for p in drawn if not any(p in own for own in of_parts.values())],
        not_drawn=not_drawn(drawn),
        others=others,
        other_panels=curves.panels({group.label: group.results for group in others}),
        runs=len(finished),
        seeds=sorted({result["seed"] for result in finished}),
        color_of=curves.color_of,
        hours=content.hours(finished),
        hours_of=content.hours,
        provenance=content.provenance(finished),
        verdicts=content.VERDICTS,
    )


def of_study(name: str, drawn: list[Picture]) -> list[Picture]:
    """The figures that belong to a study, such as "table2_small"."""
    return [p for p in drawn if p.name == name or p.name.startswith(f"{name}_")]


def strong(text: str) -> Markup:
    """A text as HTML, with what stands between two pairs of asterisks as <strong>."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text))))


def as_yaml(config: Mapping[str, Any]) -> str:
    """A configuration as the files of `configs/` have it."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    parser.add_argument("--scale", choices=SCALES, default="small")
    arguments = parser.parse_args()
    try:
        studies = [study_of(name) for name in STUDIES]
        text = page(load(RUNS), arguments.scale, studies, FOLDER).encode()
        write_atomically(arguments.output, lambda stream: stream.write(text))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{arguments.output} ({len(text) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
