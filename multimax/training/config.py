"""The configuration of a run, from what Hydra composed, and its folder.

`read_config` turns what Hydra composed into a `Config`, before anything long starts. The sections
`data`, `model`, `attention` and `output` are the arguments of what they name (`section_of`); a task
declares those that are its own.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, create_model

from multimax.files import digest
from multimax.normalizers import NORMALIZERS
from multimax.options import Section, Whole, as_typed, section_of, validate
from multimax.registry import look_up
from multimax.tasks import TASKS
from multimax.tasks.base import Task
from multimax.training.checks import check_settings
from multimax.training.sections import (
    NAME,
    FolderName,
    LoggerSection,
    OptimizerSection,
    ScaleSection,
    ScheduleSection,
    TaskSection,
    TrainerSection,
)

# What changes nothing in the numbers of a run, so that it does not change its folder.
NOT_IN_HASH = ("output_dir", "resume", "logger", "seed", "name", "group", "tags")
NOT_IN_HASH_NESTED: dict[str, tuple[str, ...]] = {
    "trainer": ("log_every", "keep", "dry_run", "shard"),
    "data": ("root", "num_workers", "cache"),
}
# Newer settings, with what was there before them: that is not in the hash, as in older folders.
_OF_NORMALIZER: dict[str, Any] = {"reference_length": 64, "learned_sink": True}
NEWER: dict[str, dict[str, Any]] = {
    "attention": {"shared": False, "before_scale": False} | _OF_NORMALIZER,
    "output": _OF_NORMALIZER,
    "model": {"positions": "sinusoidal"},
    "trainer": {"channels_last": False},
}
NOT_SET = ("score_scale",)  # of a normalizer: attention sets it, see `build_for_attention`


class Config(Section):
    """The whole configuration; `config_class` makes the one of a task, data set and so on."""

    name: FolderName = Field(
        description="of the experiment and its folder: letters, digits, and . + - _ after the first"
    )
    seed: Whole = Field(description="of weights, order and augmentation")
    group: str | None = Field(
        None, description="of runs in Weights & Biases; null is the name of the experiment"
    )
    tags: list[str] = Field(description="for Weights & Biases")
    output_dir: str = Field(description="folder of all runs")
    resume: str = Field(
        description="auto: go on where this run stopped; never: afresh; or the path of a checkpoint"
    )
    weights: str | None = Field(
        None,
        description="what training starts from: null draws new weights; or the path of a last.pt "
        "or best.pt, of a converted checkpoint or of one of the official code",
    )
    logger: LoggerSection
    task: TaskSection
    scale: ScaleSection
    trainer: TrainerSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    attention: Any = None
    output: Any = None
    data: Any = None
    model: Any = None
    loss: Any = None

    def recorded(self) -> dict[str, Any]:
        """What was given, as plain values: what `result.json` and `config.yaml` hold."""
        return self.model_dump(exclude_unset=True)


def read_config(content: Any) -> Config:
    """The typed configuration.

    Args:
        content: what Hydra composed, or the same as plain mappings; a `Config` stays as it is.

    Raises:
        ValueError: a setting is missing, unknown, of a wrong type, out of range, or does not go
            with another; the message names it, its value, and what to type instead.
    """
    if isinstance(content, Config):
        return content
    plain = _resolved(content)
    task: type[Task] = _look_up(plain, "task", "task", TASKS)
    tables = {
        "attention": ("normalizer", NORMALIZERS),
        "output": ("normalizer", NORMALIZERS),
        "data": (task.data_kind, task.data_sets),
        "model": (f"model of {plain['task']['name']}", task.models),
    }
    for section, (kind, table) in tables.items():
        _look_up(plain, section, kind, table)
    names = [plain[section]["name"] for section in tables]
    config = validate(config_class(task, *names), plain)
    check_settings(config)
    return config


@cache
def config_class(
    task: type[Task], attention: str, output: str, data: str, model: str
) -> type[Config]:
    """The class of the configurations of a task with these normalizers, data set and model."""
    name: Any = str, NAME
    attention_class = NORMALIZERS[attention]
    sections: dict[str, Any] = {
        "attention": section_of(attention_class, NOT_SET, name=name, **_of_layers(attention)),
        "output": section_of(NORMALIZERS[output], NOT_SET, name=name),
        "data": section_of(task.data_sets[data], name=name),
        "model": section_of(task.models[model], task.model_arguments, name=name),
        **task.sections,
    }
    fields: dict[str, Any] = {key: (section, ...) for key, section in sections.items()}
    return create_model("Config", __base__=Config, **fields)


def _of_layers(normalizer: str) -> dict[str, Any]:
    """Settings of the attention layers, beside those of their normalizer."""
    settings = {"shared": "true: all attention layers have one set of learned scalars"}
    if normalizer == "multimax":
        settings["before_scale"] = (
            "true: modulate the dot products, before they are scaled by 1 / sqrt(head_dim)"
        )
    return {name: (bool, Field(False, description=text)) for name, text in settings.items()}


def _resolved(content: Any) -> dict[str, Any]:
    if isinstance(content, Mapping) and not isinstance(content, DictConfig):
        return dict(content)
    try:
        plain: Any = OmegaConf.to_container(content, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {error.msg or error}") from error
    return plain


def _look_up(plain: Mapping[str, Any], section: str, kind: str, table: Mapping[str, Any]) -> Any:
    """What the name in a section stands for; ValueError if there is none, or none for the task."""
    name = _chosen(plain, section)
    if section in ("data", "model"):
        _check_task(plain["task"]["name"], section, name)
    try:
        return look_up(kind, table, name)
    except ValueError as error:
        raise ValueError(f"{section}.name={as_typed(name)}: {error}") from None


def _chosen(plain: Mapping[str, Any], section: str) -> str:
    content = plain.get(section)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{section}={as_typed(content)} must be a section with a name: choose one of the files "
            f"in configs/{section}"
        )
    name = content.get("name")
    if not isinstance(name, str):
        raise ValueError(f"{section}.name={as_typed(name)} must be text (which one)")
    return name


def _check_task(task: str, section: str, name: str) -> None:
    """Raise ValueError for a data set or a model that belongs to another task."""
    attribute = {"data": "data_sets", "model": "models"}[section]
    if name in getattr(TASKS[task], attribute):
        return
    owner = next((other for other in TASKS if name in getattr(TASKS[other], attribute)), None)
    if owner:
        raise ValueError(
            f"{section}.name={name} goes with task={owner}, not with task={task}, which takes "
            f"{', '.join(getattr(TASKS[task], attribute))}: choose {section}=, or recipe=, of one "
            "task"
        )


def check_processes(config: Config, world_size: int) -> None:
    """Raise ValueError for a batch size that the processes cannot share."""
    trainer = config.trainer
    if trainer.shard and world_size == 1:
        raise ValueError("trainer.shard=true needs several processes: start train.py by torchrun")
    if trainer.shard and trainer.precision == "fp16":
        raise ValueError("trainer.precision=fp16 cannot go with trainer.shard=true: use bf16 or no")
    per_process = world_size * trainer.accumulation
    if trainer.batch_size % per_process:
        nearest = max(1, round(trainer.batch_size / per_process)) * per_process
        raise ValueError(
            f"trainer.batch_size={trainer.batch_size} is the batch of one update and must be a "
            f"multiple of processes x trainer.accumulation = {world_size} x "
            f"{trainer.accumulation}: use trainer.batch_size={nearest}"
        )


def run_folder(config: Config) -> Path:
    """`output_dir/scale/experiment/<normalizers>-<hash>-seed<seed>`: one folder a configuration."""
    return (
        Path(config.output_dir)
        / config.scale.name
        / config.name
        / f"{config.attention.name}-{config.output.name}-{config_hash(config)}-seed{config.seed}"
    )


def config_hash(config: Config) -> str:
    """Eight hexadecimal digits of all settings that can change the numbers, but for the seed."""
    return digest(json.dumps(hashed_settings(config), sort_keys=True))[:8]


def hashed_settings(config: Config) -> dict[str, Any]:
    """All settings that can change the numbers, but for the seed, as plain values.

    Defaults are filled in and nulls left out, so that two spellings of one configuration are equal.
    """
    content = config.model_dump(exclude_none=True, exclude=set(NOT_IN_HASH))
    for section, keys in NOT_IN_HASH_NESTED.items():
        content[section] = {k: v for k, v in content[section].items() if k not in keys}
    for section, before in NEWER.items():
        items = content[section].items()
        content[section] = {k: v for k, v in items if k not in before or v != before[k]}
    return content
