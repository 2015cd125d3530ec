"""The paper's tasks, each a `Task` that the trainer can run."""

import torch
from omegaconf import DictConfig

from multimax.tasks.base import Task
from multimax.tasks.image_classification import ImageClassification
from multimax.tasks.language_modeling import LanguageModeling
from multimax.tasks.translation import Translation

TASKS: dict[str, type] = {
    "image_classification": ImageClassification,
    "language_modeling": LanguageModeling,
    "translation": Translation,
}


def build_task(config: DictConfig, rank: int, world_size: int, device: torch.device) -> Task:
    """The task that `config.task` names, with its data loaded and its model initialized.

    Raises:
        ValueError: the task is unknown, or an option of its data or model is out of range.
        FileNotFoundError: its data is not where the configuration says.
    """
    if config.task.name not in TASKS:
        raise ValueError(f"unknown task {config.task.name!r}; known: {', '.join(TASKS)}")
    return TASKS[config.task.name](config, rank, world_size, device)
