"""What all tasks share: sizes of batches, and the checks of what was evaluated."""

import math
from types import SimpleNamespace

import pytest
from torch import nn

from multimax.tasks.base import (
    LARGEST_LOSS,
    batch_size_per_process,
    check_counted,
    check_finite,
    check_not_diverged,
    describe_model,
)


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
