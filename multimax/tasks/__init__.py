"""The paper's tasks and synthetic ones, each a `Task` that the trainer can run."""

from typing import Any

import torch
from torch import nn

from multimax.registry import look_up
from multimax.tasks.base import Task
from multimax.tasks.image_classification import ImageClassification
from multimax.tasks.language_modeling import LanguageModeling
from multimax.tasks.retrieval import MaxRetrieval, Retrieval
from multimax.tasks.sequences import AssociativeRecall, MultiTokenRecall, Reverse, Sort
from multimax.tasks.translation import Translation

TASKS: dict[str, type[Any]] = {
    "image_classification": ImageClassification,
    "language_modeling": LanguageModeling,
    "translation": Translation,
    "retrieval": Retrieval,
    "max_retrieval": MaxRetrieval,
    "associative_recall": AssociativeRecall,
    "mqmtar": MultiTokenRecall,
    "reverse": Reverse,
    "sort": Sort,
}


def data_fingerprint(config: Any) -> str:
    """The fingerprint of the data that `config.data` names, which no more is done with.

    Raises:
        ValueError, FileNotFoundError: as `build_task`, of the data.
    """
    return look_up("task", TASKS, config.task.name).open_data(config).fingerprint


def open_model(config: Any) -> tuple[Any, nn.Module]:
    """The data set that `config.data` names, as `Task.open_data` returns it, and a model for it.

    Args:
        config: as in `build_task`.

    Raises:
        ValueError, FileNotFoundError: as `build_task`.
    """
    task = look_up("task", TASKS, config.task.name)
    source = task.open_data(config)
    return source, task.build_model(config, source)


def build_task(
    config: Any,
    rank: int,
    world_size: int,
    device: torch.device,
    opened: tuple[Any, nn.Module] | None = None,
) -> Task:
    """The task that `config.task` names, with its data loaded and its model initialized.

    Args:
        config: what `multimax.training.config.read_config` returns.
        rank: of this process.
        world_size: number of processes.
        device: where batches go.
        opened: data set and model, as from `open_model`; None opens them, with new weights.

    Raises:
        ValueError: the task is unknown, or an option of its data or model is out of range.
        FileNotFoundError: its data is not where the configuration says.
    """
    task = look_up("task", TASKS, config.task.name)
    return task(config, *(opened or open_model(config)), rank, world_size, device)
