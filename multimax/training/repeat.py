"""A run repeated from its `result.json`, and whether it gave the same numbers."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from multimax.options import as_typed
from multimax.training.config import NOT_IN_HASH_NESTED, Config, read_config, run_folder
from multimax.training.result import SCHEMA, environment
from multimax.training.run import SHOWN, run

FREE = ("output_dir", "logger.wandb", *(f"data.{name}" for name in NOT_IN_HASH_NESTED["data"]))
COMPARED = ("metrics", "normalizers", "learned_scalars")


def repeat(arguments: Sequence[str], console: Console | None = None) -> bool:
    """Train, evaluate and compare a run that a JSON file records.

    It goes to `<output_dir>/repeated`, where it can be interrupted and gone on with like any other;
    a finished repetition is kept aside, and another one made.

    Args:
        arguments: of the command line: `repeat=FILE`, a result.json or a file of results/runs, and
            what the numbers do not depend on, such as `output_dir=` and `data.root=`.
        console: where the main process reports to; None is the terminal.

    Returns:
        Whether all metrics, measures of the normalizers and learned scalars are the same.

    Raises:
        ValueError: the file is none of a run that can be repeated, or an argument would change it.
        FileNotFoundError: there is no such file.
        Exception: as `multimax.training.run.run`.
    """
    console = console or Console(quiet=os.environ.get("RANK", "0") != "0")
    given: dict[str, str] = dict(_setting(argument) for argument in arguments)
    file = Path(given.pop("repeat"))
    recorded = _read(file)
    config = _config(recorded, given)
    _say(console, f"repeating {file}: {recorded['experiment']}, seed {recorded['seed']}")
    with _threads(recorded.get("hardware", {}).get("threads")):
        for line in other_conditions(recorded, environment()):
            _say(console, f"  {line}")
        result = json.loads(json.dumps(run(config, console)))  # as a file has it
    if result["inputs"] != recorded["inputs"]:
        raise ValueError(
            f"{file} is of other data, or of other first weights: inputs {recorded['inputs']} there"
            f", {result['inputs']} here; give data.root= of the same files"
        )
    changed = differences(recorded, result)
    for line in changed:
        _say(console, line)
    _say(console, f"{len(changed)} numbers differ" if changed else "repeated: the same numbers")
    return not changed


@contextmanager
def _threads(recorded: int | None) -> Iterator[None]:
    """As many threads as there, which sums depend on."""
    here = torch.get_num_threads()
    torch.set_num_threads(recorded or here)
    try:
        yield
    finally:
        torch.set_num_threads(here)


def _setting(argument: str) -> tuple[str, str]:
    name, _, value = argument.partition("=")
    if name != "repeat" and name not in FREE:
        raise ValueError(
            f"{argument}: repeat= takes all settings from its file, but for {', '.join(FREE)}"
        )
    return name, value


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"repeat={file} must be a result.json: there is no such file")
    try:
        recorded = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"repeat={file} is damaged: {error}") from error
    needed = ("schema", "config", "seed", "processes", *SHOWN)
    missing = [key for key in needed if not isinstance(recorded, dict) or key not in recorded]
    if missing:
        raise ValueError(f"repeat={file} is no result.json: it lacks {', '.join(missing)}")
    if recorded["schema"] != SCHEMA:
        raise ValueError(
            f"repeat={file} has schema {recorded['schema']}, this version writes {SCHEMA}: use the "
            f"commit that it records, {recorded.get('commit')}"
        )
    if recorded["origin"]:
        raise ValueError(
            f"repeat={file} went on from another run ({recorded['origin']}): repeat that one first"
        )
    return recorded


def _config(recorded: dict[str, Any], given: dict[str, str]) -> Config:
    content = json.loads(json.dumps(recorded["config"])) | {"resume": "auto"}
    for name, value in given.items():
        section, _, key = name.rpartition(".")
        (content[section] if section else content)[key] = _plain(value)
    config = read_config(content | {"output_dir": f"{content['output_dir']}/repeated"})
    if (run_folder(config) / "result.json").exists():
        return config.model_copy(update={"resume": "never"})
    return config


def _plain(value: str) -> Any:
    return {"null": None, "true": True, "false": False}.get(
        value, int(value) if value.isdecimal() else value
    )


def other_conditions(recorded: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What a result was made with that is not here, and can change its last digits."""
    lines = []
    for section in ("versions", "hardware"):
        for name, value in recorded.get(section, {}).items():
            now = here[section].get(name)
            if value != now and name != "cpu_count":
                lines.append(f"{section}.{name} was {value}, is {now}")
    if recorded.get("commit") != here["commit"] or recorded.get("uncommitted_changes"):
        changes = " with uncommitted changes" if recorded.get("uncommitted_changes") else ""
        lines.append(f"commit was {recorded.get('commit')}{changes}, is {here['commit']}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    there = recorded.get("processes", processes)
    if there != processes:
        lines.append(f"processes were {there}, are {processes}: start as many")
    return lines


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each recorded number that is not the same, with both of its values."""
    lines = []
    for section in COMPARED:
        before, after = (dict(_leaves(result[section])) for result in (recorded, now))
        lines += [
            f"{section}.{name}: {as_typed(before.get(name))} recorded, "
            f"{as_typed(after.get(name))} now"
            for name in before
            if not _same(before[name], after.get(name))
        ]
    return lines


def _leaves(content: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(content, list):
        content = {str(index): value for index, value in enumerate(content)}
    if not isinstance(content, dict):
        return [(prefix.removesuffix("."), content)]
    return [leaf for key, value in content.items() for leaf in _leaves(value, f"{prefix}{key}.")]


def _same(before: Any, after: Any) -> bool:
    both_nan = all(isinstance(value, float) and math.isnan(value) for value in (before, after))
    return before == after or both_nan


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
