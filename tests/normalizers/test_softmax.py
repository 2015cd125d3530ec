"""SoftMax and its temperature."""

import math

import pytest
import torch

from multimax import SoftMax, softmax
from multimax.kernels.backend import use_backend

SCORES = torch.tensor([1.0, -2.0, 3.0, 2.9], dtype=torch.float64)


def test_is_torch_softmax(scores):
    assert torch.equal(softmax(scores), torch.softmax(scores, -1))
    with use_backend("eager"):
        assert torch.equal(SoftMax()(scores), torch.softmax(scores, -1))
    expected = torch.softmax(scores / 0.3, -1)
    assert torch.equal(softmax(scores, temperature=0.3), expected)


def test_a_low_temperature_is_one_hot():
    expected = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(softmax(SCORES, temperature=1e-3), expected, atol=1e-12, rtol=0)


def test_a_high_temperature_is_uniform():
    expected = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(softmax(SCORES, temperature=1e12), expected, atol=1e-12, rtol=0)


def test_a_temperature_for_each_row():
    temperature = torch.tensor([[0.5], [2.0]])
    result = softmax(SCORES.expand(2, 4), temperature=temperature)
    assert torch.equal(result[0], softmax(SCORES, temperature=0.5))
    assert torch.equal(result[1], softmax(SCORES, temperature=2.0))


def test_a_learned_temperature_starts_where_told_and_stays_positive(scores):
    module = SoftMax(temperature=2.0, learned=True)
    assert module.temperature.item() == pytest.approx(2.0)
    torch.testing.assert_close(module(scores), softmax(scores, temperature=2.0))
    assert list(module.state_dict()) == ["log_temperature"]
    torch.nn.init.constant_(module.log_temperature, -3.0)
    assert module.temperature.item() == pytest.approx(math.exp(-3))


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature must be .* got {temperature}"):
        softmax(SCORES, temperature=temperature)
