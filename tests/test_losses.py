import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from multimax import EntMax, LogitNormalizer, MultiMax, Normalizer, SoftMax, output_loss
from multimax.losses import row_losses


@pytest.fixture
def normalizer(distribution):
    """Only what sums to one has a loss."""
    return distribution


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "soft", "mixup"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradients(normalizer, class_scores, kind, label_smoothing, check, targets):
    module = copy.deepcopy(normalizer).double()
    names = [name for name, _ in module.named_parameters()]

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, scores):
            options = {"label_smoothing": label_smoothing, "reduction": "none"}
            return output_loss(self.module, scores, targets[kind], **options)

    def function(scores, *values):
        state = {f"module.{name}": value for name, value in zip(names, values, strict=True)}
        return functional_call(Loss(), state, (scores,))

    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert check(function, (class_scores.requires_grad_(), *values))


OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": index}
    for reduction in ("none", "sum", "mean")
    for smoothing in (0.0, 0.1)
    for index in (-100, 2, 255)
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_softmax_has_the_semantics_of_cross_entropy(options):
    scores = torch.randn(4, 3, 6, requires_grad=True)
    target = torch.randint(6, (4, 3))
    target[0, 0], target[1, 2] = options["ignore_index"], 1
    loss = output_loss(SoftMax(), scores, target, **options)
    expected = F.cross_entropy(scores.movedim(-1, 1), target, **options)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x.square().sum(), scores)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)
    if options["ignore_index"] == -100:
        soft = torch.softmax(torch.randn(4, 3, 6), -1)
        loss = output_loss(SoftMax(), scores, soft, **options)
        expected = F.cross_entropy(scores.movedim(-1, 1), soft.movedim(-1, 1), **options)
        torch.testing.assert_close(loss, expected)


def test_a_logit_normalizer_has_cross_entropy_of_its_logits(class_scores, targets):
    module = MultiMax()
    loss = output_loss(module, class_scores, targets["hard"])
    torch.testing.assert_close(
        loss, F.cross_entropy(module.modulate(class_scores), targets["hard"])
    )
    log_likelihood = module(class_scores).log().gather(-1, targets["hard"][:, None])
    torch.testing.assert_close(loss, -log_likelihood.mean())


def test_ignored_rows_count_for_nothing(normalizer, class_scores, targets):
    target = targets["hard"]
    target[[1, 3]] = -100
    kept = target >= 0
    class_scores.requires_grad_()
    for reduction in ("mean", "sum"):
        loss = output_loss(normalizer, class_scores, target, reduction=reduction)
        expected = output_loss(normalizer, class_scores[kept], target[kept], reduction=reduction)
        torch.testing.assert_close(loss, expected)
    losses = output_loss(normalizer, class_scores, target, reduction="none")
    assert (losses[~kept] == 0).all()
    assert (torch.autograd.grad(losses.sum(), class_scores)[0][~kept] == 0).all()
    assert output_loss(normalizer, class_scores, torch.full((5,), -100)).isnan()
    assert output_loss(normalizer, class_scores, torch.full((5,), -100), reduction="sum") == 0


def test_a_single_row_and_many_dimensions(normalizer, class_scores, targets):
    target = targets["hard"]
    losses = output_loss(normalizer, class_scores, target, reduction="none")
    torch.testing.assert_close(output_loss(normalizer, class_scores[0], target[0]), losses[0])
    stacked = output_loss(
        normalizer, class_scores.expand(2, 3, -1, -1), target.expand(2, 3, -1), reduction="none"
    )
    torch.testing.assert_close(stacked, losses.expand(2, 3, -1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_half_precision_is_computed_in_fp32(
    normalizer, class_scores, dtype, autocast, kind, targets
):
    half = (100 * class_scores).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = [output_loss(normalizer, x, targets[kind]) for x in (half, full)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, full.grad.to(dtype))


class Unknown(Normalizer):
    def forward(self, scores, dim=-1, mask=None):
        return scores


def test_other_families(class_scores, targets):
    with pytest.raises(ValueError, match="Unknown has no loss"):
        output_loss(Unknown(), class_scores, targets["hard"])

    class Registered(Unknown):
        pass

    row_losses.register(Registered, lambda module, scores, target, smoothing: scores.sum(-1))
    losses = output_loss(Registered(), class_scores, targets["hard"], reduction="none")
    assert torch.equal(losses, class_scores.sum(-1))

    class Halved(LogitNormalizer, Unknown):
        def logits(self, scores, dim=-1, mask=None):
            return scores / 2

    loss = output_loss(Halved(), class_scores, targets["hard"])
    torch.testing.assert_close(loss, F.cross_entropy(class_scores / 2, targets["hard"]))


HARD, SOFT = torch.zeros(5, dtype=torch.int64), torch.full((5, 6), 1 / 6)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (HARD, {"reduction": "avg"}, "reduction must be .* got 'avg'"),
        (HARD, {"label_smoothing": 1.0}, "label_smoothing must be .* got 1.0"),
        (HARD, {"label_smoothing": -0.1}, "label_smoothing must be .* got -0.1"),
        (HARD.int(), {}, "target must be int64 .* got torch.int32: use .long"),
        (HARD[1:], {}, r"target must have the shape .* \(5,\), got \(4,\)"),
        (HARD[:, None], {}, r"target must have the shape .* got \(5, 1\)"),
        (HARD + 6, {}, r"target must be in \[0, 6\) .* got 6"),
        (HARD - 1, {}, r"target must be in \[0, 6\) or ignore_index=-100, got -1"),
        (SOFT[:, 1:], {}, r"a floating-point target .* got \(5, 5\)"),
        (HARD.float(), {}, r"a floating-point target .* got \(5,\).*\.long"),
        (SOFT, {"ignore_index": 0}, "ignore_index=0 needs class indices"),
    ],
)
def test_bad_input(class_scores, target, options, message):
    for normalizer in (SoftMax(), EntMax()):
        with pytest.raises(ValueError, match=message):
            output_loss(normalizer, class_scores, target, **options)
