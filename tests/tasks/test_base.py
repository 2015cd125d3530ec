"""What all tasks share: sizes of batches, and the checks of what was evaluated."""

import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from multimax.tasks.base import (
    LARGEST_LOSS,
    Task,
    batch_size_per_process,
    check_counted,
    check_finite,
    check_not_diverged,
    describe_model,
)
from multimax.tasks.image_classification import ImageClassification
from multimax.tasks.language_modeling import LanguageModeling
from multimax.tasks.translation import Translation


@pytest.mark.parametrize(
    ("world_size", "accumulation", "expected"), [(1, 1, 48), (2, 1, 24), (2, 3, 8), (5, 1, 9)]
)
def test_a_batch_is_shared_by_processes_and_accumulation(world_size, accumulation, expected):
    config = SimpleNamespace(trainer=SimpleNamespace(batch_size=48, accumulation=accumulation))
    assert batch_size_per_process(config, world_size) == expected


def test_a_model_is_its_class_and_its_parameters():
    assert describe_model(nn.Linear(1000, 3)) == "Linear, 3,003 parameters"


def test_every_example_is_counted_once():
    check_counted("valid", 7.0, 7, "images")
    for counted in (6.0, 8.0):
        with pytest.raises(RuntimeError, match=f"evaluated {counted:.0f} of 7 valid images"):
            check_counted("valid", counted, 7, "images")


def test_a_mean_without_a_perplexity():
    below = math.nextafter(LARGEST_LOSS, 0)
    check_not_diverged("valid", below, below)
    assert math.isfinite(math.exp(below))
    for means in ((LARGEST_LOSS,), (math.nan,), (1.0, LARGEST_LOSS), (1.0, math.nan)):
        with pytest.raises(FloatingPointError, match=r"the valid loss is .* training has diverged"):
            check_not_diverged("valid", *means)


def test_a_loss_that_is_not_finite():
    check_finite("test", 1e300)
    for loss in (math.inf, -math.inf, math.nan):
        with pytest.raises(FloatingPointError, match=f"the test loss is {loss}: training has"):
            check_finite("test", loss)


class Data:
    """Gives for loaders what it is asked for."""

    fingerprint = "0123456789abcdef"
    sizes: ClassVar = {"train": 96, "valid": 3, "test": 2}

    def train_loader(self, *arguments):
        return arguments

    def eval_loader(self, split, *arguments):
        return [(split, *arguments)] * self.sizes[split]


def opened():
    """A task that has loaders and nothing else."""
    task = type("Opened", (Task,), dict.fromkeys(Task.__abstractmethods__))()
    sizes = SimpleNamespace(batch_size=48, accumulation=2, eval_batch_size=7)
    config = SimpleNamespace(trainer=sizes, seed=5)
    task.open_loaders(Data(), config, 1, 3, torch.device("cpu"))
    return task


def test_loaders_are_those_of_the_configuration():
    task, share = opened(), (1, 3, torch.device("cpu"))
    assert task.device == torch.device("cpu")
    assert task.train_loader == (8, *share, 5)
    assert task.splits == {"valid": 3, "test": 2}
    assert task.eval_loaders == {
        "valid": [("valid", 7, *share)] * 3, "test": [("test", 7, *share)] * 2
    }  # fmt: skip


def test_a_task_has_the_fingerprint_of_its_data():
    assert opened().data_fingerprint == Data.fingerprint


def test_an_evaluation_can_be_ended_before_each_batch():
    task, calls = opened(), []
    assert len(list(task.evaluation_batches("valid"))) == 3
    task.before_batch = lambda: calls.append("before")
    for _ in task.evaluation_batches("valid"):
        calls.append("batch")
    assert calls == ["before", "batch"] * 3


@pytest.mark.parametrize(
    ("task", "monitor", "higher_is_better"),
    [
        (ImageClassification, "valid/top1", True),
        (LanguageModeling, "valid/loss", False),
        (Translation, "valid/bleu", True),
    ],
)
def test_what_the_best_checkpoint_is_best_in(task, monitor, higher_is_better):
    assert (task.monitor, task.higher_is_better) == (monitor, higher_is_better)
