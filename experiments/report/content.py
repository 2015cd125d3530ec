"""What the page says: studies with their tables and curves, and where the numbers are from."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.comparison import Cells, cells_of
from experiments.rendering import Table
from experiments.report.curves import Panel, panels
from experiments.results import Result, has_diverged
from experiments.selection import has_scale, run_of
from experiments.tables import table_of
from multimax.training.studies import Study

VERDICTS = ("confirmed", "refuted", "underpowered", "not run")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        label: of the row of a table, or of runs that belong to none.
        command: what makes one of them, but for its seed.
        config: the composed configuration.
        results: by seed.
    """

    label: str
    command: str
    config: Mapping[str, Any]
    results: dict[int, Result] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A study on the page.

    Attributes:
        cells: its cells with their runs.
        table: of the cells.
        groups: the cells with their results, in the order of the table.
    """

    cells: Cells
    table: Table
    groups: dict[str, Group]

    @property
    def title(self) -> str:
        """Such as "Table 2"."""
        spaced = re.sub(r"(?<=[a-z])(?=\d)", " ", self.cells.study.name)
        return spaced.replace("_", " ").capitalize()

    @property
    def command(self) -> str:
        """What runs whatever of the study is missing."""
        return f"python train.py -m study={self.cells.study.name}{scale_setting(self.cells.scale)}"

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        """(kind, sentence) on each claim."""
        return [(verdict_of(remark), remark) for remark in self.table.remarks[1:]]

    def verdict_counts(self) -> dict[str, int]:
        """How many claims have each verdict."""
        found = Counter(kind for kind, _ in self.verdicts)
        return {kind: found[kind] for kind in VERDICTS}

    @property
    def planned(self) -> int:
        """How many runs the study asks for."""
        study = self.cells.study
        return sum(cell.seeds or study.seeds for cell in study.cells.values())

    @property
    def missing(self) -> int:
        """How many of those have no result."""
        study = self.cells.study
        return sum(
            seed not in self.cells.selections[name].runs
            for name, cell in study.cells.items()
            for seed in range(cell.seeds or study.seeds)
        )

    @property
    def empty(self) -> list[str]:
        """Labels of the cells without any run."""
        return [group.label for group in self.groups.values() if not group.results]

    @property
    def results(self) -> list[Result]:
        """Of all its runs."""
        return [result for group in self.groups.values() for result in group.results.values()]

    @property
    def size(self) -> str:
        """Parameters, updates and examples of the runs, such as "305,242 parameters"."""
        split = self.cells.split
        counts = {
            "parameters": [r["parameters"] for r in self.results if "parameters" in r],
            "updates": [r["updates"] for r in self.results if "updates" in r],
            f"{self.cells.study.unit} of split {split!r}": [
                r["metrics"][split]["examples"] for r in self.results
            ],
        }
        return "; ".join(f"{_range(values)} {name}" for name, values in counts.items() if values)

    @cached_property
    def curves(self) -> list[Panel]:
        """The learning curves of each cell that has runs."""
        study = self.cells.study
        groups = {group.label: group.results for group in self.groups.values()}
        base = self.groups[study.baseline].results
        return panels(groups, list(study.columns.values()), base)


def parts_of(results: Mapping[Path, Result], scale: str, studies: Iterable[Study]) -> list[Part]:
    """The studies whose task has this scale, with the recorded results that belong to them.

    Raises:
        ValueError: a result or a study is wrong, or a run is recorded twice.
    """
    runs = [run_of(result, str(file)) for file, result in results.items()]
    by_place = {str(file): result for file, result in results.items()}
    return [
        part_of(cells_of(study, scale, runs), by_place)
        for study in studies
        if has_scale(study, scale)
    ]


def part_of(cells: Cells, by_place: Mapping[str, Result]) -> Part:
    """A study on the page, from its cells and from the results by the place of their runs."""
    groups = {
        name: Group(
            " | ".join(cell.row),
            shlex.join(["python", "train.py", *cells.study.settings(name)])
            + scale_setting(cells.scale),
            cells.configs[name].recorded(),
            {
                seed: by_place[run.place]
                for seed, run in sorted(cells.selections[name].runs.items())
                if not run.diverged
            },
        )
        for name, cell in cells.study.cells.items()
    }
    return Part(cells, table_of(cells), groups)


def others_of(results: Mapping[Path, Result], parts: Iterable[Part]) -> list[Group]:
    """The recorded runs that belong to no study, grouped by their configuration."""
    used = {
        run.place
        for part in parts
        for selection in part.cells.selections.values()
        for run in selection.runs.values()
    }
    groups: dict[str, Group] = {}
    for file, result in results.items():
        if str(file) not in used and not has_diverged(result):
            label = f"{result['experiment']}/{re.sub(r'-seed[0-9]+$', '', file.stem)}"
            config = {key: value for key, value in result["config"].items() if key != "seed"}
            group = groups.setdefault(label, Group(label, "", config))
            group.results[result["seed"]] = result
    return list(groups.values())


def scale_setting(scale: str) -> str:
    """What a command line needs for a scale that is not the default."""
    return "" if scale == "small" else f" scale={scale} data.root=PATH"


def verdict_of(remark: str) -> str:
    """The verdict in the sentence of a table on a claim."""
    found = re.search(r"\*\*(.+?)\*\*", remark)
    return found[1] if found else "not run"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def hours(results: Iterable[Result]) -> float:
    """Core hours of training: of each run its time by its processes and their threads."""
    seconds = (
        result["training_seconds"]
        * result.get("processes", 1)
        * result.get("hardware", {}).get("threads", 1)
        for result in results
    )
    return sum(seconds) / 3600


def provenance(results: Sequence[Result]) -> dict[str, str]:
    """Machine, versions, commits and dates of the runs, each with the number of runs."""
    facts = {
        "device": _counted(r.get("hardware", {}).get("device") for r in results),
        "platform": _counted(r.get("hardware", {}).get("platform") for r in results),
        "GPUs seen": _counted(r.get("hardware", {}).get("cuda_devices") for r in results),
        "processes": _counted(r.get("processes") for r in results),
        "threads of a process": _counted(r.get("hardware", {}).get("threads") for r in results),
    }
    packages = dict.fromkeys(name for r in results for name in r.get("versions", {}))
    facts |= {p: _counted(r.get("versions", {}).get(p) for r in results) for p in packages}
    changed = sum(bool(r.get("uncommitted_changes")) for r in results)
    facts["commit"] = _counted((r.get("commit") or "unknown")[:10] for r in results)
    facts["with uncommitted changes"] = f"{changed} of {len(results)} runs"
    if days := sorted({r["finished"][:10] for r in results if "finished" in r}):
        facts["finished"] = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return facts


def _counted(values: Iterable[object]) -> str:
    """Each value with the number of its runs, if they are not all the same."""
    counts = Counter("unknown" if value is None else str(value) for value in values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({n} runs)" for value, n in sorted(counts.items()))
