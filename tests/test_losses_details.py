"""What the losses promise beside their value: defaults, targets without gradients, devices."""

import pytest
import torch

from multimax import EntMax, MultiMax, SoftMax, output_loss, use_backend
from multimax.losses import entmax15_loss, fenchel_young_loss, linear_output_loss, sparsemax_loss

WEIGHT = torch.eye(6, dtype=torch.float64)
LOSSES = {
    "softmax": lambda scores, target, **o: output_loss(SoftMax(), scores, target, **o),
    "multimax": lambda scores, target, **o: output_loss(MultiMax(), scores, target, **o),
    "entmax": lambda scores, target, **o: output_loss(EntMax(1.3), scores, target, **o),
    "fenchel-young": fenchel_young_loss,
    "entmax15": entmax15_loss,
    "sparsemax": sparsemax_loss,
    "linear": lambda x, target, **o: linear_output_loss(SoftMax(), x, WEIGHT, target, **o),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    torch.manual_seed(0)
    return LOSSES[request.param]


def test_defaults_are_those_of_torch(loss, class_scores, targets):
    target = targets["hard"].clone()
    target[1] = -100
    torch.manual_seed(0)
    given = loss(class_scores, target, label_smoothing=0.0, ignore_index=-100, reduction="mean")
    torch.manual_seed(0)
    assert torch.equal(loss(class_scores, target), given)


def test_a_target_gets_no_gradient(loss, class_scores, targets):
    soft, scores = targets["soft"].requires_grad_(), class_scores.requires_grad_()
    loss(scores, soft).backward()
    assert soft.grad is None
    assert (scores.grad != 0).any()


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_one_class(backend):
    scores, target = torch.randn(3, 1, dtype=torch.float64), torch.tensor([0, -100, 0])
    with use_backend(backend):
        for normalizer in (SoftMax(), EntMax(1.3)):
            losses = output_loss(normalizer, scores, target, reduction="none")
            assert losses.tolist() == [0, 0, 0]


def test_scores_without_classes():
    for normalizer in (SoftMax(), EntMax()):
        with pytest.raises(ValueError, match="scores must have a class dimension"):
            output_loss(normalizer, torch.tensor(1.0), torch.tensor(0))


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("normalizer", [SoftMax(), MultiMax()], ids=["softmax", "multimax"])
def test_on_a_device_that_has_no_values(normalizer, targets, kind):
    """As on one where looking at them would wait."""
    scores = torch.empty(5, 6, device="meta", dtype=torch.float64, requires_grad=True)
    loss = output_loss(normalizer.to("meta"), scores, targets[kind].to("meta"))
    loss.backward()
    assert loss.shape == ()
    assert scores.grad.shape == (5, 6)
