"""Checks of a composed configuration, before anything long starts, and the name of its run."""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

# What changes nothing in the numbers of a run, so that it does not change its folder.
NOT_IN_HASH = ("output_dir", "resume", "logger", "seed", "name", "tags")
NOT_IN_HASH_NESTED = {"trainer": ("log_every",), "data": ("root", "num_workers", "cache")}

Check = tuple[str, Callable[[Any], bool], str]
CHECKS: tuple[Check, ...] = (
    ("seed", lambda v: _whole(v) and v >= 0, "a whole number >= 0"),
    ("resume", lambda v: isinstance(v, str), "auto, never or the path of a checkpoint"),
    ("trainer.batch_size", lambda v: _whole(v) and v >= 1, "a whole number >= 1"),
    ("trainer.eval_batch_size", lambda v: _whole(v) and v >= 1, "a whole number >= 1"),
    ("trainer.accumulation", lambda v: _whole(v) and v >= 1, "a whole number >= 1"),
    ("trainer.epochs", lambda v: v is None or (_whole(v) and v >= 1), "a whole number >= 1"),
    ("trainer.updates", lambda v: v is None or (_whole(v) and v >= 1), "a whole number >= 1"),
    ("trainer.evaluate_every", lambda v: _whole(v) and v >= 1, "a whole number >= 1"),
    ("trainer.log_every", lambda v: _whole(v) and v >= 1, "a whole number >= 1"),
    ("trainer.precision", lambda v: v in ("no", "bf16", "fp16"), "no, bf16 or fp16"),
    ("trainer.clip_norm", lambda v: v is None or (_number(v) and v > 0),
     "a number > 0, or null for no clipping"),
    ("trainer.ema_decay", lambda v: v is None or (_number(v) and 0 < v < 1),
     "in (0, 1), or null for no EMA"),
    ("trainer.report", lambda v: v in ("last", "best"), "last or best"),
    ("trainer.compile", lambda v: isinstance(v, bool), "true or false"),
    ("optimizer.lr", lambda v: _number(v) and v > 0, "a number > 0"),
    ("optimizer.weight_decay", lambda v: _number(v) and v >= 0, "a number >= 0"),
    ("schedule.warmup", lambda v: _whole(v) and v >= 0, "a whole number >= 0"),
    ("schedule.min_lr", lambda v: v is None or (_number(v) and v >= 0), "a number >= 0"),
    ("schedule.period", lambda v: v is None or (_whole(v) and v >= 1), "a whole number >= 1"),
    ("schedule.period_growth", lambda v: v is None or (_number(v) and v >= 1), "a number >= 1"),
    ("schedule.shrink", lambda v: v is None or (_number(v) and v > 0), "a number > 0"),
    ("loss.label_smoothing", lambda v: _number(v) and 0 <= v < 1, "in [0, 1)"),
    ("logger.wandb", lambda v: v in ("auto", "online", "offline", "disabled"),
     "auto, online, offline or disabled"),
)  # fmt: skip


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def check_config(config: DictConfig, world_size: int) -> None:
    """Check what can be checked without data.

    Raises:
        ValueError: naming the field, its value and what to type instead.
    """
    for field, allowed, remedy in CHECKS:
        value = OmegaConf.select(config, field)
        if not allowed(value):
            raise ValueError(f"{field}={value!r} must be {remedy}")
    trainer = config.trainer
    if (trainer.epochs is None) == (trainer.updates is None):
        raise ValueError(
            f"trainer.epochs={trainer.epochs} and trainer.updates={trainer.updates}: give one of "
            "them and set the other to null"
        )
    per_process = world_size * trainer.accumulation
    if trainer.batch_size % per_process:
        nearest = max(1, round(trainer.batch_size / per_process)) * per_process
        raise ValueError(
            f"trainer.batch_size={trainer.batch_size} is the batch of one update and must be a "
            f"multiple of processes x trainer.accumulation = {world_size} x "
            f"{trainer.accumulation}: use trainer.batch_size={nearest}"
        )
    length = trainer.epochs or trainer.updates
    # The warm-up of the other schedules is in updates, which only the data makes epochs of.
    known = config.schedule.name == "cosine" or trainer.updates is not None
    if known and config.schedule.warmup >= length:
        raise ValueError(
            f"schedule.warmup={config.schedule.warmup} leaves nothing of the {length} "
            f"{'epochs' if trainer.epochs else 'updates'}: use fewer than {length}"
        )


def run_folder(config: DictConfig) -> Path:
    """`output_dir/scale/experiment/<normalizers>-<hash>-seed<seed>`: one folder a configuration."""
    return (
        Path(config.output_dir)
        / config.scale.name
        / config.name
        / f"{config.attention.name}-{config.output.name}-{config_hash(config)}-seed{config.seed}"
    )


def config_hash(config: DictConfig) -> str:
    """Eight hexadecimal digits of all settings that can change the numbers, but for the seed."""
    content: Any = OmegaConf.to_container(config, resolve=True)
    content = {key: value for key, value in content.items() if key not in NOT_IN_HASH}
    for section, keys in NOT_IN_HASH_NESTED.items():
        content[section] = {k: v for k, v in content[section].items() if k not in keys}
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def explain_bad_overrides(overrides: Sequence[str], config_name: str = "config") -> str | None:
    """What is wrong with the command line and what the valid choices are; None if it composes.

    Call it inside `hydra.initialize`. Of a sweep (`a=1,2`), each choice of a group is checked, and
    the first value of a setting.
    """
    try:
        choices = [_choices(parsed) for parsed in _parse(overrides)]
    except HydraException as error:
        return str(error)
    firsts = [first for first, *_ in choices]
    others = [
        [*firsts[:i], other, *firsts[i + 1 :]]
        for i, (_, *rest) in enumerate(choices)
        for other in rest
    ]
    problems = (_explain(candidate, config_name) for candidate in (firsts, *others))
    return next((problem for problem in problems if problem), None)


def _explain(overrides: list[str], config_name: str) -> str | None:
    try:
        compose(config_name, overrides=overrides)
        return None
    except HydraException as error:
        message = str(error)
    unknown = re.search(r"Could not override '([^']+)'", message)
    if not unknown:
        return message.split("Config search path")[0].strip()
    key = unknown.group(1)
    groups = [str(p.input_line) for p in _parse(overrides) if _chooses_group(p)]
    known = sorted(set(_keys(compose(config_name, overrides=groups))))
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    section = key.rsplit(".", 1)[0] + "." if "." in key else ""
    siblings = [k for k in known if k.startswith(section) and "." not in k[len(section) :]]
    lines = [f"there is no setting {key!r}"]
    if close:
        lines.append(f"did you mean: {', '.join(close)}")
    lines.append(f"settings there: {', '.join(siblings) or ', '.join(known)}")
    return "\n".join(lines)


def _parse(overrides: Sequence[str]) -> list[Override]:
    loader = GlobalHydra.instance().config_loader()  # globs are looked up there
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def _choices(override: Override) -> list[str]:
    """The override itself; of a sweep those of its values that are checked."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    values = override.sweep_string_iterator()
    values = values if _chooses_group(override) else islice(values, 1)
    return [f"{override.get_key_element()}={value}" for value in values]


def _chooses_group(override: Override) -> bool:
    """Whether it chooses a file of a group: these decide which settings exist."""
    groups = ("experiment", "task", "scale", "attention", "output", "data", "model", "debug")
    return override.type == OverrideType.CHANGE and override.key_or_group in groups


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        node = config._get_node(key)
        yield f"{prefix}{key}"
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _keys(node, f"{prefix}{key}.")
