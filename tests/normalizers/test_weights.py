"""Softpick, sigmoid attention and sinks: weights that need not sum to one, and no loss."""

import math

import pytest
import torch

from multimax import (
    NormalizerRecorder,
    SoftMax,
    Softpick,
    build_normalizer,
    entropy,
    linear_output_loss,
    output_loss,
    sigmoid,
    softpick,
)
from multimax.models.output import Output
from multimax.normalizers import build_for_output
from multimax.replacement.heads import find
from multimax.training.checks import _check_normalizer

X = torch.tensor([[1.0, -2.0, 3.0, 2.9], [0.5, 1e-9, -40.0, 7.0]], dtype=torch.float64)


def test_softpick():
    e = X.exp() - 1
    expected = e.relu() / (e.abs().sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(softpick(X), expected, rtol=1e-7, atol=0)
    assert (softpick(X)[X <= 0] == 0).all()
    assert (softpick(-X.abs()) == 0).all()
    assert (softpick(torch.zeros(2, 3)) == 0).all()


@pytest.mark.parametrize("offset", [-3e4, -200.0, 200.0, 6e4])
def test_softpick_far_from_zero(offset):
    """exp(x) alone would overflow, or exp(-max)."""
    x = (X.float() + offset).requires_grad_()
    p = softpick(x)
    (gradient,) = torch.autograd.grad(p[:, 0].sum(), x)
    assert gradient.isfinite().all()
    expected = torch.softmax(x.double(), -1) if offset > 0 else torch.zeros_like(X)
    torch.testing.assert_close(p.double(), expected, rtol=1e-4, atol=1e-7)


def test_softpick_keeps_the_digits_of_small_scores():
    x = torch.tensor([1e-3, 3e-4, -5e-4])
    torch.testing.assert_close(softpick(x).double(), softpick(x.double()), rtol=1e-6, atol=0)


def test_sigmoid():
    torch.testing.assert_close(sigmoid(X), 1 / (1 + 4 * torch.exp(-X)))
    mask = torch.tensor([True, False, True, True])
    torch.testing.assert_close(sigmoid(X, mask=mask)[:, mask], 1 / (1 + 3 * torch.exp(-X[:, mask])))
    torch.testing.assert_close(sigmoid(torch.zeros(99)).sum(), torch.tensor(0.99))


@pytest.mark.parametrize("fill", [-1e4, -1e9, -math.inf])
@pytest.mark.parametrize("function", [softpick, sigmoid])
def test_a_fill_is_the_mask(function, fill):
    mask = torch.tensor([True, True, True, False])
    assert function(X.masked_fill(~mask, fill)).equal(function(X, mask=mask))


NO_LOSS = [
    ({"name": "softpick"}, "use another normalizer in the output layer"),
    ({"name": "sigmoid"}, "use another normalizer in the output layer"),
    ({"name": "softmax", "sink": 0.0}, "use another normalizer or sink=None in the output layer"),
    ({"name": "multimax", "sink": 0.0, "learned_sink": False}, "or sink=None in the output"),
]


@pytest.mark.parametrize(("options", "remedy"), NO_LOSS)
def test_no_loss_belongs_to_weights(options, remedy):
    module = build_normalizer(**options)
    x, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    message = f"{type(module).__name__}.* has no loss, since its weights do not sum .*{remedy}"
    weight = torch.nn.Parameter(torch.randn(5, 5))
    for call in (
        lambda: output_loss(module, x, target),
        lambda: linear_output_loss(module, x, weight, target).backward(),
        lambda: build_for_output(options),
        lambda: Output(weight, options, 0),
        lambda: _check_normalizer("output", options, build_for_output),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"has no loss|output=True: (softpick|sigmoid) is not"):
        find(torch.nn.Sequential(torch.nn.Linear(2, 2)), options)


def test_a_recorder_measures_the_mass_and_the_entropy_of_the_shares():
    module = SoftMax(sink=1.0).double()
    with NormalizerRecorder(module) as recorder:
        p = module(X)
    summary = recorder.summary()[""]
    assert summary["mass"] == pytest.approx(p.sum(-1).mean().item())
    assert summary["entropy"] == pytest.approx(entropy(SoftMax()(X)).mean().item())
    with NormalizerRecorder(Softpick()) as recorder:
        recorder._modules[""](-X.abs())
    summary = recorder.summary()[""]
    assert (summary["mass"], summary["entropy_count"]) == (0, 0)
    assert math.isnan(summary["entropy"])
    plain = SoftMax()
    with NormalizerRecorder(plain) as recorder:
        plain(X)
    assert "mass" not in recorder.summary()[""]
