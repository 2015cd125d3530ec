"""Top-k and evidential SoftMax: which entries stay, and with which floor."""

import math

import pytest
import torch

from multimax import EvSoftMax, TopK, evsoftmax, softmax, topk


def softmax_over(scores, keep):
    return torch.softmax(scores.masked_fill(~keep, -math.inf), -1)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_keeps_the_k_largest(scores, k):
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k).indices, True)
    probabilities = topk(scores, k)
    torch.testing.assert_close(probabilities, softmax_over(scores, keep))
    assert ((probabilities > 0).sum(-1) == k).all()


def test_topk_limits(scores):
    one_hot = torch.nn.functional.one_hot(scores.argmax(-1), 7).float()
    assert torch.equal(topk(scores, 1), one_hot)
    for k in (7, 8, 1000):
        torch.testing.assert_close(topk(scores, k), softmax(scores))


def test_topk_keeps_all_that_tie_with_the_kth():
    expected = torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25])
    torch.testing.assert_close(topk(torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0]), 2), expected)


def test_topk_counts_allowed_entries_only():
    scores = torch.tensor([5.0, 1.0, 0.0, 4.0])
    mask = torch.tensor([False, True, True, True])
    expected = torch.tensor([0.0, *torch.softmax(torch.tensor([1.0, 4.0]), 0).tolist()])[
        [0, 1, 0, 2]
    ]
    torch.testing.assert_close(topk(scores, 2, mask=mask), expected)
    torch.testing.assert_close(topk(scores, 9, mask=mask), softmax(scores, mask=mask))


@pytest.mark.parametrize("k", [0, -1, 2.0])
def test_topk_needs_a_positive_integer(k):
    with pytest.raises(ValueError, match=f"k must be an integer >= 1, got {k}"):
        topk(torch.ones(3), k)


def test_evsoftmax_keeps_what_is_at_least_the_mean(scores):
    probabilities = evsoftmax(scores)
    keep = scores >= scores.mean(-1, keepdim=True)
    torch.testing.assert_close(probabilities, softmax_over(scores, keep))
    assert torch.equal(probabilities > 0, keep)
    assert evsoftmax(torch.tensor([1.0, 2.0, 3.0]))[1] > 0  # equal to the mean


def test_evsoftmax_takes_the_mean_of_allowed_entries():
    scores = torch.tensor([0.0, 1.0, 100.0])
    mask = torch.tensor([True, True, False])
    assert evsoftmax(scores, mask=mask).tolist() == [0.0, 1.0, 0.0]


def test_evsoftmax_with_a_floor_towards_one_is_softmax(scores):
    torch.testing.assert_close(
        evsoftmax(scores.double(), floor=1 - 1e-13), softmax(scores.double()), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("floor", [1e-6, 0.3])
def test_evsoftmax_floor_is_a_share_of_the_weight(scores, floor):
    keep = scores >= scores.mean(-1, keepdim=True)
    weights = scores.exp() * torch.where(keep, 1.0, floor)
    torch.testing.assert_close(
        evsoftmax(scores, floor=floor), weights / weights.sum(-1, keepdim=True)
    )


@pytest.mark.parametrize("floor", [-0.1, 1.0, math.nan])
def test_evsoftmax_floor_out_of_range(floor):
    with pytest.raises(ValueError, match=f"floor must be in .* got {floor}"):
        evsoftmax(torch.ones(3), floor=floor)


def test_evsoftmax_has_its_floor_in_training_only(scores):
    module = EvSoftMax(floor=0.1)
    assert torch.equal(module.train()(scores), evsoftmax(scores, floor=0.1))
    assert torch.equal(module.eval()(scores), evsoftmax(scores))


def test_topk_has_no_floor_in_training(scores):
    assert torch.equal(TopK(k=2, floor=0.1).train()(scores), topk(scores, 2))


@pytest.mark.parametrize(
    "module", [TopK(k=2, floor=0.1), EvSoftMax(floor=0.1)], ids=["topk", "evsoftmax"]
)
def test_logits_have_the_floor(module, scores):
    keep = module.eval()(scores) > 0
    weights = scores.exp() * torch.where(keep, 1.0, 0.1)
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(torch.softmax(module.logits(scores), -1), expected)


@pytest.mark.parametrize("module", [TopK(k=2), EvSoftMax()], ids=["topk", "evsoftmax"])
def test_logits_have_the_digits_of_their_dtype(module, scores):
    scores = scores.double()
    keep = module.eval()(scores) > 0
    expected = torch.where(keep, scores, scores + math.log(1e-6))
    torch.testing.assert_close(module.logits(scores), expected, atol=1e-14, rtol=1e-15)


@pytest.mark.parametrize("module", [TopK(k=2), EvSoftMax()], ids=["topk", "evsoftmax"])
def test_logits_refuse_a_mask_that_would_be_misread(module, scores):
    with pytest.raises(ValueError, match="mask must be boolean"):
        module.logits(scores, mask=torch.zeros(7))
