"""The paper's tasks, each a `Task` that the trainer can run."""

from typing import Any

import torch

from multimax.registry import build, look_up
from multimax.tasks.base import Task
from multimax.tasks.image_classification import ImageClassification
from multimax.tasks.language_modeling import LanguageModeling
from multimax.tasks.translation import Translation

TASKS: dict[str, type[Any]] = {
    "image_classification": ImageClassification,
    "language_modeling": LanguageModeling,
    "translation": Translation,
}


def data_fingerprint(config: Any) -> str:
    """The fingerprint of the data that `config.data` names, which no more is done with.

    Raises:
        ValueError, FileNotFoundError: as `build_task`, of the data.
    """
    task = look_up("task", TASKS, config.task.name)
    options = config.data.given()
    return build(task.data_kind, task.data_sets, options.pop("name"), options).fingerprint


def build_task(config: Any, rank: int, world_size: int, device: torch.device) -> Task:
    """The task that `config.task` names, with its data loaded and its model initialized.

    Args:
        config: what `multimax.training.config.read_config` returns.
        rank: of this process.
        world_size: number of processes.
        device: where batches go.

    Raises:
        ValueError: the task is unknown, or an option of its data or model is out of range.
        FileNotFoundError: its data is not where the configuration says.
    """
    return look_up("task", TASKS, config.task.name)(config, rank, world_size, device)
