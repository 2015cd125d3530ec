"""Results of runs: copied into `results/runs/`, read back, and summarized over seeds.

python -m experiments.results outputs/small/deit_*     # copy finished results into results/runs
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from scipy import stats

from multimax.files import write_json

RUNS = Path("results/runs")
Result = dict[str, Any]


def collect(folders: list[Path], target: Path = RUNS) -> list[Path]:
    """Copy every finished result below `folders` to `target/<scale>/<experiment>/<run>.json`."""
    copied = []
    for folder in folders:
        for file in sorted(folder.rglob("result.json")):
            if any(part.startswith("previous-") for part in file.parts):
                continue
            result = json.loads(file.read_text())
            path = target / result["scale"] / result["experiment"] / f"{file.parent.name}.json"
            write_json(path, result)
            copied.append(path)
    return copied


def load(scale: str, experiments: list[str], source: Path = RUNS) -> dict[str, list[Result]]:
    """Results by experiment, ordered by seed.

    Raises:
        ValueError: the runs of one experiment have different configurations, or a seed twice.
    """
    loaded: dict[str, list[Result]] = defaultdict(list)
    for experiment in experiments:
        files = sorted((source / scale / experiment).glob("*.json"))
        results = [json.loads(file.read_text()) for file in files]
        if len({result["config_hash"] for result in results}) > 1:
            raise ValueError(
                f"{source / scale / experiment} holds runs of different configurations: "
                "keep those of one, since their mean would mean nothing"
            )
        loaded[experiment] = sorted(results, key=lambda result: result["seed"])
    return dict(loaded)


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), deviation


def paired_difference(
    values: dict[int, float], baseline: dict[int, float], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Mean difference to a baseline over common seeds, and half its confidence interval.

    Student's t over the paired differences; None with fewer than two common seeds.
    """
    common = sorted(set(values) & set(baseline))
    if len(common) < 2:
        return None
    differences = [values[seed] - baseline[seed] for seed in common]
    mean, deviation = mean_and_deviation(differences)
    quantile = float(stats.t.ppf((1 + confidence) / 2, len(common) - 1))
    return mean, quantile * deviation / math.sqrt(len(common))


def main() -> None:
    """Copy the results that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with finished runs")
    for path in collect(parser.parse_args().folders):
        print(path)


if __name__ == "__main__":
    main()
