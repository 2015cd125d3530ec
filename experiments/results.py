"""Results of runs: copied into `results/runs/` with their learning curves, and read back.

python -m experiments.results outputs/small/deit_*     # copy finished results into results/runs
python -m experiments.results outputs/small outputs/sweeps     # and record runs that diverged
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multimax.files import write_json

RUNS = Path("results/runs")
CURVE_POINTS = 60  # of training; those of evaluations are all kept
Result = dict[str, Any]
# Before schema 2 a task had one model, which the configuration did not name.
ONLY_MODELS = {
    "image_classification": "vision_transformer",
    "language_modeling": "transformer_lm",
    "translation": "transformer",
}


def collect(folders: list[Path], target: Path = RUNS) -> list[Path]:
    """Copy every finished result below `folders` to `target/<scale>/<experiment>/<run>.json`.

    A copy holds the learning curve too, as "curve".

    What was set aside, what `debug=two_updates` made, and what settings were chosen by is left out.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a result is damaged.
    """
    copied = []
    for file, result in read_finished(folders):
        if "tuning" in result["config"]["tags"]:
            continue
        result["config"] = without_place(result["config"])
        curve = file.parent / "metrics.jsonl"
        if curve.exists():
            lines = [json.loads(line) for line in curve.read_text().splitlines()]
            result["curve"] = thinned(lines)
        path = target / result["scale"] / result["experiment"] / f"{file.parent.name}.json"
        write_json(path, result)
        copied.append(path)
    return copied


def without_place(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration that does not tell where the run was."""
    return config | {"output_dir": "outputs"}


def read_finished(folders: list[Path]) -> Iterator[tuple[Path, Result]]:
    """Every finished result below `folders`; errors are those of `collect`."""
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"there is no {folder}: give folders of finished runs")
        for file in sorted(folder.rglob("result.json")):
            if any(part.startswith("previous-") for part in file.relative_to(folder).parts):
                continue
            result = _read(file)
            if not is_debug(result):
                yield file, result


def load(source: Path = RUNS) -> dict[Path, Result]:
    """All recorded results by file, wherever they lie below `source`, in the present schema."""
    return {file: upgrade(_read(file)) for file in sorted(source.rglob("*.json"))}


def has_diverged(result: Result) -> bool:
    """Whether this is the record of a run that diverged, see `experiments.diverged`."""
    return "diverged" in result


def is_debug(result: Result) -> bool:
    """Whether a run was only to see whether its configuration runs at all."""
    return "debug" in (result["experiment"], *result["config"]["tags"])


def _read(file: Path) -> Result:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it") from error


def upgrade(result: Result) -> Result:
    """A result of schema 1 as one of schema 2: the numbers and the settings are the same."""
    if result["schema"] == 1:
        config = result["config"]
        model = {"name": ONLY_MODELS[result["task"]], **config["model"]}
        best = {"metric": result["best"]["figure"], **result["best"]}
        del best["figure"]
        return result | {"schema": 2, "config": config | {"model": model}, "best": best}
    return result


def thinned(lines: list[dict[str, Any]], points: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """The lines of a learning curve: those of evaluations, and as many others as wanted."""
    evaluated = {i for i, line in enumerate(lines) if any(k.startswith("valid/") for k in line)}
    step = max(1, len(lines) // points)
    return [line for i, line in enumerate(lines) if i in evaluated or i % step == 0]


def main() -> None:
    """Copy the results that the command line names."""
    from experiments.diverged import collect_diverged  # which reads what is here

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with finished runs")
    try:
        folders = parser.parse_args().folders
        copied = [*collect(folders), *collect_diverged(folders)]
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(*copied or ["no finished run there, but for runs of debug=two_updates"], sep="\n")


if __name__ == "__main__":
    main()
