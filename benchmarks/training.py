"""Wall time and peak memory of whole training runs, next to those of another commit.

python -m benchmarks.training --commit HEAD~1 --experiment lm_multimax deit_multimax
python -m benchmarks.training --commit v0.1 --experiment mt_multimax --updates 500 --rounds 7

Each round trains every experiment at small scale once with each commit: in the working tree, and
in a `git worktree` of the other commit, which is made for the purpose and removed at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import BLUE, Row, finish, print_table, ratios
from benchmarks.timing import quantiles

THIS = "working tree"
COLUMNS = {
    "provider": "package of",
    "step_ms": "training, ms",
    "step_range": "p20 - p80",
    "step_ratio": "ratio",
    "peak_mib": "peak, MiB",
    "peak_ratio": "ratio",
}


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A checkout of `commit` of the repository in the current folder, for the `with` block."""
    _git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def train(tree: Path, experiment: str, updates: int, threads: int) -> dict[str, Any]:
    """The result of some updates of `train.py` in `tree`, with the package that is there.

    Raises:
        RuntimeError: the run failed, or it was another commit's package.
    """
    with tempfile.TemporaryDirectory() as folder:
        bounds = [f"trainer.updates={updates}", "trainer.epochs=null", "schedule.warmup=0"]
        options = [f"experiment={experiment}", *bounds, "logger.wandb=disabled"]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "train.py", *options, f"output_dir={folder}"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        found = list(Path(folder).rglob("result.json"))
        if done.returncode or not found:
            raise RuntimeError(f"{' '.join(command)} in {tree}:\n{done.stdout}{done.stderr}")
        result = json.loads(found[0].read_text())
    wanted = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tree, text=True).strip()
    if result["commit"] != wanted:
        raise RuntimeError(f"{tree} ran the package of {result['commit']}")
    return result


def measure(trees: dict[str, Path], experiment: str, arguments: argparse.Namespace) -> list[Row]:
    """A row for each tree: seconds of training without start and evaluation, and peak memory."""
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    peaks: dict[str, list[float]] = {name: [] for name in trees}
    for turn in range(arguments.rounds):
        for name in list(trees)[:: 1 if turn % 2 else -1]:
            result = train(trees[name], experiment, arguments.updates, arguments.threads)
            seconds[name].append(result["training_seconds"])
            peaks[name].append(result["peak_memory_mib"]["host"])
    rows: list[Row] = []
    for name in trees:
        row = {"experiment": experiment, "updates": arguments.updates, "provider": name}
        row |= {"rounds": arguments.rounds, "peak_mib": float(np.median(peaks[name]))}
        rows.append(row | quantiles({"step": seconds[name]}))
    baseline = rows[0]
    return [
        row | ratios(row, baseline) | {"peak_ratio": row["peak_mib"] / baseline["peak_mib"]}
        for row in rows
    ]


def draw(rows: Sequence[Row]) -> Figure:
    """Time and memory as multiples of the other commit's, for each experiment."""
    own = [row for row in rows if row["provider"] == THIS]
    names = [row["experiment"] for row in own]
    figure = Figure(figsize=(10, 1.6 + 0.6 * len(own)), layout="constrained")
    panels = zip(figure.subplots(1, 2, sharey=True), ("step", "peak"), strict=True)
    for axes, key in panels:
        bars = axes.barh(names, [row[f"{key}_ratio"] for row in own], color=BLUE, height=0.6)
        axes.bar_label(bars, fmt="x %.2f", padding=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.margins(x=0.15)
        axes.set_xlabel(f"multiple of {rows[0]['provider']}")
    figure.axes[0].set_title("wall time of training")
    figure.axes[1].set_title("peak memory of the process")
    figure.axes[0].invert_yaxis()
    return figure


def main(command: Sequence[str] | None = None) -> None:
    """Train, print and write `training.csv` and its figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", required=True, help="to compare the working tree with")
    parser.add_argument("--experiment", nargs="+", required=True, help="of configs/experiment")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args(command)
    here = Path(_git("rev-parse", "--show-toplevel"))
    commit = _git("rev-parse", "--short", f"{arguments.commit}^{{commit}}")
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        worktree(commit, Path(folder) / "tree") as other,
    ):
        for experiment in arguments.experiment:
            measured = measure({commit: other, THIS: here}, experiment, arguments)
            print_table(f"{experiment}, {arguments.updates} updates", measured, COLUMNS)
            rows += measured
            finish("training", rows, arguments.threads, arguments.results, draw)


if __name__ == "__main__":
    main()
