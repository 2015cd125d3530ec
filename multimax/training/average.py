"""The mean of the weights of several checkpoints of a run.

fairseq averages the last ones, timm the best ones on validation data:

    python train.py experiment=mt_multimax +trainer.keep=5
    python -m multimax.training.average RUN              # RUN/averaged.pt, of all that is kept
    python -m multimax.training.average RUN --last 3
    python -m multimax.training.average RUN --best 3     # of those that are kept
    python -m multimax.evaluate RUN/averaged.pt
    python -m multimax.training.average RUN/update-900.pt RUN/update-1000.pt --output RUN/two.pt

`trainer.keep` keeps the weights of the last evaluations as update-<update>.pt.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from multimax.files import load_checkpoint, save_checkpoint
from multimax.tasks import TASKS
from multimax.training.checkpoints import CHECKPOINT_FORMAT, WEIGHTS
from multimax.training.folder import KEPT, kept
from multimax.training.loggers import METRICS, entries_until
from multimax.training.trained import read_run


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """A checkpoint whose weights, and averaged weights where there are any, are means.

    Real numbers are averaged in fp64; all else, as the position, is that of the last checkpoint.

    Args:
        paths: checkpoints of one run, or of runs of one model on one data set, in their order.

    Returns:
        What `save_checkpoint` writes; it can be evaluated and started from, not resumed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none is named, or one is no checkpoint or of another model or data set.
    """
    if not paths:
        raise ValueError(f"there are no checkpoints {KEPT}: train with +trainer.keep=5")
    sums: dict[str, dict[str, Tensor]] = {}
    last: dict[str, Any] = {}
    for path in paths:
        state = load_checkpoint(path)
        if not set(WEIGHTS) <= set(state) or state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"{path} is no checkpoint of this version of the project")
        networks = {name: state[name] for name in ("model", "ema") if state[name] is not None}
        if last:
            _check_alike(last, sums, state, networks, path, paths[0])
        for name, weights in networks.items():
            total = sums.setdefault(name, {})
            for key, tensor in weights.items():
                if tensor.is_floating_point():
                    total[key] = total.get(key, 0) + tensor.double()
                else:
                    total[key] = tensor
        last = {key: state[key] for key in WEIGHTS}
    for name, total in sums.items():
        last[name] = {
            key: (total[key] / len(paths)).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for key, tensor in last[name].items()
        }
    return last


def _check_alike(
    last: dict[str, Any],
    sums: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    networks: dict[str, dict[str, Tensor]],
    path: Path,
    first: Path,
) -> None:
    shapes = {n: {k: t.shape for k, t in weights.items()} for n, weights in networks.items()}
    if shapes != {n: {k: t.shape for k, t in weights.items()} for n, weights in sums.items()}:
        raise ValueError(f"{path} is of another model than {first}")
    if (state["fingerprint"], state["inputs"]["data"]) != (
        last["fingerprint"],
        last["inputs"]["data"],
    ):
        raise ValueError(f"{path} is of other data than {first}")


def best(paths: Sequence[Path], number: int) -> list[Path]:
    """Those with the best values of the task's monitored metric, in their order.

    Args:
        paths: checkpoints that `trainer.keep` left in a run folder, the oldest first.
        number: how many; of equally good ones the oldest.

    Raises:
        FileNotFoundError: the run folder lacks config.yaml.
        ValueError: fewer of them were evaluated, or config.yaml is damaged.
    """
    task = TASKS[read_run(paths[-1])[1].task.name]
    updates = {path: int(path.stem.partition("-")[2]) for path in paths}
    entries = entries_until(paths[-1].with_name(METRICS), updates[paths[-1]], evaluated=True)
    known = [entry for entry in entries if entry.get(task.monitor) is not None]
    values = {entry["update"]: entry[task.monitor] for entry in known}
    found = [path for path in paths if updates[path] in values]
    if len(found) < number:
        raise ValueError(
            f"{METRICS} has {task.monitor} of {len(found)} checkpoints: --best {number}"
        )
    found.sort(key=lambda path: values[updates[path]], reverse=task.higher_is_better)
    return sorted(found[:number], key=updates.__getitem__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Average what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, help="a run folder, or checkpoints")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--last", type=int, help="only so many of a run folder, the newest")
    part.add_argument("--best", type=int, help="only so many of a run folder, by validation")
    parser.add_argument("--output", type=Path, help="averaged.pt in the folder if left out")
    parsed = parser.parse_args(arguments)
    try:
        paths: list[Path] = parsed.paths
        folder = paths[0] if paths[0].is_dir() else paths[0].parent
        if paths[0].is_dir():
            if len(paths) > 1:
                raise ValueError("give one run folder, or checkpoint files")
            paths = kept(folder)
        elif parsed.best is not None:
            raise ValueError(f"--best {parsed.best} needs a run folder: give {folder}")
        for option, number in (("--last", parsed.last), ("--best", parsed.best)):
            if number is not None and not 1 <= number <= len(paths):
                raise ValueError(f"{option} {number}: {folder} has {len(paths)} checkpoints")
        if parsed.last is not None:
            paths = paths[-parsed.last :]
        if parsed.best is not None:
            paths = best(paths, parsed.best)
        state = average(paths)
        output = parsed.output or folder / "averaged.pt"
        save_checkpoint(output, state)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{output}: the mean of {', '.join(path.name for path in paths)}")


if __name__ == "__main__":
    main()
