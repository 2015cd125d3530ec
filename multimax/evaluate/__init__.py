"""The figures of a trained model again, from its weights.

    python -m multimax.evaluate outputs/small/deit_multimax/RUN
    python -m multimax.evaluate RUN/best.pt --split test --set decoding.beam=10
    python -m multimax.evaluate CHECKPOINT --experiment deit_multimax --set scale=paper \\
        --data-root /path/to/imagenet

Of a finished run, and of one that was published (a folder or hf-hub:USER/NAME), they are those of
its result.json, bit for bit on a CPU like the one that it was trained on. With --experiment, the
checkpoint can lie anywhere: one of the official code of MultiMax for vision, or one that
multimax.integrations.fairseq.convert made of one of fairseq.
"""

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from rich.console import Console
from torch import nn

from multimax.evaluate.foreign import compose_experiment, load_foreign
from multimax.files import write_json
from multimax.hub import load_model
from multimax.tasks import build_task
from multimax.tasks.base import Task
from multimax.training.config import check_processes, config_hash
from multimax.training.evaluation import build_accelerator, evaluate, evaluate_splits
from multimax.training.result import environment, now, print_metrics, print_rows
from multimax.training.trained import TrainedModel, read_result


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate what the command line names."""
    parsed = _parser().parse_args(arguments)
    console = Console()
    try:
        if parsed.json is not None and parsed.json.is_dir():
            raise ValueError(f"--json {parsed.json} is a folder: give the name of a file")
        trained = open_trained(parsed.checkpoint, parsed.experiment, parsed.set, parsed.data_root)
        report = evaluate_trained(trained, parsed.split, console)
        if parsed.json is not None and PartialState().is_main_process:
            write_json(parsed.json, report)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error


def open_trained(
    checkpoint: Path,
    experiment: str | None = None,
    settings: Sequence[str] = (),
    data_root: str | None = None,
) -> TrainedModel:
    """The trained model of a run folder, or of a checkpoint.

    Args:
        checkpoint: a run folder, a checkpoint in one, a published model (see `load_model`), or,
            with `experiment`, a checkpoint that lies anywhere (see `load_foreign`).
        experiment: that the checkpoint is of; None is that of its run folder.
        settings: replace others of the configuration, as on the command line of `train.py`.
        data_root: replaces `data.root`.

    Raises:
        FileNotFoundError: the checkpoint, or something that it needs, is missing.
        ValueError: the checkpoint does not fit its configuration, or a setting is wrong.
    """
    if experiment is None:
        if checkpoint.is_file() and not (checkpoint.parent / "config.yaml").is_file():
            raise FileNotFoundError(
                f"there is no {checkpoint.parent / 'config.yaml'}, which tells what model "
                f"{checkpoint.name} is of: give a checkpoint in its run folder, or say what it is "
                "with --experiment, as in --experiment deit_multimax --set scale=paper"
            )
        return load_model(checkpoint, data_root, settings, open_data=True)
    if checkpoint.is_dir():
        raise ValueError(
            f"{checkpoint} is a folder, which has a configuration of its own: leave --experiment "
            "out, or give a checkpoint file"
        )
    return load_foreign(checkpoint, compose_experiment(experiment, settings, data_root))


def evaluate_trained(
    trained: TrainedModel, split: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """The figures of a trained model, computed as at the end of a run, and what they are of.

    Args:
        trained: of `load_run` or `open_trained`, with its data set.
        split: of the data; None is all splits but the training split.
        console: where a table goes; None prints nothing.

    Returns:
        `metrics`, as in `result.json`; `same_as_result`, whether they are those of the run's
        `result.json`, or None if there is none for these weights, settings and data; what they are
        of, and versions and hardware.

    Raises:
        FileNotFoundError, ValueError: the data is missing or damaged, or has no such split.
        FloatingPointError: the model gives no finite loss.
    """
    accelerator = build_accelerator(trained.config)
    try:
        task = _open_task(trained, accelerator, split)
        console = console if accelerator.is_main_process else None
        if console is not None:
            print_rows(console, {"weights": str(trained.path), **task.describe()})
        averaged = _averaged(trained, task)
        # As in training, which changes what is computed: with mixed precision and when compiled.
        if trained.config.trainer.compile:
            task.model.compile()
        accelerator.prepare_model(task.model, evaluation_mode=True)
        metrics = evaluate_splits(task, partial(evaluate, task, averaged, accelerator))
    finally:
        AcceleratorState._reset_state()
    report = _report(trained, task, metrics)
    differences = compare_to_result(report)
    report["same_as_result"] = None if differences is None else not differences
    if console is not None:
        _print(console, report, differences)
    return report


def _open_task(trained: TrainedModel, accelerator: Accelerator, split: str | None) -> Task:
    """The task of a trained model with its data, of which only one split is to be evaluated."""
    config, processes = trained.config, accelerator.num_processes
    check_processes(config, processes)
    opened = trained.source, trained.model.to(accelerator.device)
    task = build_task(config, accelerator.process_index, processes, accelerator.device, opened)
    if split is not None:
        if split not in task.splits:
            known = ", ".join(task.splits)
            raise ValueError(f"{config.data.name} has no split {split!r}; it has: {known}")
        task.splits = {split: task.splits[split]}
    return task


def _averaged(trained: TrainedModel, task: Task) -> nn.Module | None:
    """The model with its averaged weights, if there are any."""
    if trained.averaged is None:
        return None
    averaged = copy.deepcopy(task.model)
    try:
        averaged.load_state_dict(trained.averaged)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the averaged weights of {trained.path} are damaged: {error}") from error
    return averaged


def _report(trained: TrainedModel, task: Task, metrics: dict[str, Any]) -> dict[str, Any]:
    config = trained.config
    return {
        "checkpoint": str(trained.path),
        "experiment": config.name,
        "task": config.task.name,
        "scale": config.scale.name,
        "seed": config.seed,
        "config_hash": config_hash(config),
        "data": task.data_fingerprint,
        "trained_on": trained.data,
        "metrics": metrics,
        "notes": task.notes,
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        **environment(),
        "finished": now(),
    }


def compare_to_result(report: dict[str, Any]) -> list[str] | None:
    """What differs between these figures and those of `result.json` beside the checkpoint.

    Returns:
        A text for each figure that is another one; None if there is no `result.json`, or it is of
        other weights, settings or data.

    Raises:
        ValueError: `result.json` is damaged.
    """
    checkpoint = Path(report["checkpoint"])
    if not (checkpoint.parent / "result.json").is_file():
        return None
    result = read_result(checkpoint.parent)
    same = (
        checkpoint.name == f"{result.get('reported_weights')}.pt"
        and report["config_hash"] == result["config_hash"]
        and report["data"] == result["inputs"]["data"]
    )
    if not same:
        return None
    return [
        f"{split}/{name}: {figures.get(name)!r}, there {there!r}"
        for split, figures in report["metrics"].items()
        for name, there in result["metrics"].get(split, {}).items()  # it may lack newer figures
        if figures.get(name) != there
    ]


def _print(console: Console, report: dict[str, Any], differences: list[str] | None) -> None:
    print_metrics(console, f"{report['experiment']} ({report['scale']} scale)", report["metrics"])
    lines = []
    if report["trained_on"] not in (None, report["data"]):
        lines.append("this is other data than that of the training")
    if differences is not None:
        same = "these are the figures of its result.json"
        lines += ["not the figures of its result.json:", *differences] if differences else [same]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m multimax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a run folder, a checkpoint, a published model"
    )
    parser.add_argument("--split", choices=["valid", "test"], help="only this one")
    parser.add_argument(
        "--experiment", metavar="NAME", help="what a checkpoint outside a run folder is of"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="settings of the configuration, as train.py takes them",
    )  # fmt: skip
    parser.add_argument("--data-root", help="where the data is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser
