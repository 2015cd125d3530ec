"""The Fenchel-Young losses against their definition and the entmax package."""

import entmax as reference
import pytest
import torch
import torch.nn.functional as F

from multimax import (
    EntMax,
    entmax,
    entmax15_loss,
    fenchel_young_loss,
    output_loss,
    sparsemax_loss,
)

ALPHAS = [1.0, 1.001, 1.3, 1.5, 2.0, 2.7]
KINDS = ["hard", "one-hot", "mixup", "soft"]


def as_probabilities(target, smoothing=0.0):
    target = target if target.is_floating_point() else F.one_hot(target, 6).double()
    return (1 - smoothing) * target + smoothing / 6


def tsallis(p, alpha):
    """The entropy H as the papers write it."""
    if alpha == 1:
        return torch.special.entr(p).sum(-1)
    return (p - p**alpha).sum(-1) / (alpha * (alpha - 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_fenchel_young_is_its_definition(class_scores, alpha, kind, label_smoothing, targets):
    target = targets[kind]
    p, y = entmax(class_scores, alpha), as_probabilities(target, label_smoothing)
    expected = ((p - y) * class_scores).sum(-1) + tsallis(p, alpha) - tsallis(y, alpha)
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    losses = fenchel_young_loss(class_scores, target, alpha, **options)
    torch.testing.assert_close(losses, expected, atol=1e-11, rtol=0)  # 1/(alpha - 1) is 1000
    assert (losses >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_is_the_residual(class_scores, alpha, kind, label_smoothing, targets):
    class_scores.requires_grad_()
    target = targets[kind]
    loss = fenchel_young_loss(
        class_scores, target, alpha, label_smoothing=label_smoothing, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(loss, class_scores)
    expected = entmax(class_scores, alpha) - as_probabilities(target, label_smoothing)
    torch.testing.assert_close(gradient, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_loss_is_zero_exactly_at_the_target(class_scores, alpha):
    target = entmax(class_scores, alpha)
    at_target = fenchel_young_loss(class_scores, target, alpha, reduction="none")
    torch.testing.assert_close(at_target, torch.zeros(5).double(), atol=1e-12, rtol=0)
    elsewhere = 0.9 * target + 0.1 * target.roll(1, -1)
    assert (fenchel_young_loss(class_scores, elsewhere, alpha, reduction="none") > 1e-4).all()
    if alpha >= 1.5:  # a lead of 1 / (alpha - 1) is enough for exactly one-hot, and no loss
        certain = torch.tensor([[0.0, 2.0, 0.0]], requires_grad=True)
        loss = fenchel_young_loss(certain, torch.tensor([1]), alpha)
        loss.backward()
        assert loss == 0
        assert (certain.grad == 0).all()


@pytest.mark.parametrize("size", [6, 196, 50_000])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.7, 2.0, 2.5])
def test_equals_the_entmax_package(alpha, size):
    scores = torch.randn(3, size, dtype=torch.float64)
    target = torch.randint(size, (3,))
    ours = {1.5: entmax15_loss, 2.0: sparsemax_loss}.get(
        alpha, lambda *args, **options: fenchel_young_loss(*args, alpha, **options)
    )
    theirs = {1.5: reference.entmax15_loss, 2.0: reference.sparsemax_loss}.get(
        alpha, lambda x, y: reference.entmax_bisect_loss(x, y, alpha, 100)
    )
    results = []
    for function in (lambda x, y: ours(x, y, reduction="none"), theirs):
        x = scores.clone().requires_grad_()
        losses = function(x, target)
        losses.square().sum().backward()
        results.append((losses, x.grad))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_alpha_is_that_of_the_whole_loss(
    class_scores, kind, label_smoothing, targets
):
    """Central differences of the definition, which moves p along with alpha."""
    alpha = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    options = {"label_smoothing": label_smoothing, "reduction": "sum"}
    fenchel_young_loss(class_scores, targets[kind], alpha, **options).backward()
    step, y = 1e-6, as_probabilities(targets[kind], label_smoothing)

    def definition(a):
        p = entmax(class_scores, a)
        return (((p - y) * class_scores).sum(-1) + tsallis(p, a) - tsallis(y, a)).sum()

    expected = (definition(1.4 + step) - definition(1.4 - step)) / (2 * step)
    torch.testing.assert_close(alpha.grad, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_entmax_of_alpha_one_has_the_loss_of_softmax(class_scores, kind, targets):
    expected = F.cross_entropy(class_scores, targets[kind])
    torch.testing.assert_close(output_loss(EntMax(1.0), class_scores, targets[kind]), expected)
    y = as_probabilities(targets[kind])
    less = torch.special.entr(y).sum(-1).mean()
    torch.testing.assert_close(
        fenchel_young_loss(class_scores, targets[kind], 1.0), expected - less
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_fp32_keeps_its_sign_and_its_digits(alpha):
    scores = torch.randint(-32, 33, (500, 6)) / 8
    target = entmax(
        scores.double(), alpha
    ).float()  # p to rounding, where the loss is 0 to rounding
    assert (fenchel_young_loss(scores, target, alpha, reduction="none") >= 0).all()
    # A shift of 2^16 is exact for these scores, but a product with it would lose 16 bits.
    hard = torch.randint(6, (500,))
    losses = fenchel_young_loss(scores + 2**16, hard, alpha, reduction="none")
    expected = fenchel_young_loss(scores.double(), hard, alpha, reduction="none")
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)


def test_minus_infinity_scores_have_no_mass(class_scores):
    class_scores[:, 5] = -torch.inf
    target = torch.tensor([0, 1, 2, 3, 4])
    for alpha in (1.0, 1.5, 2.0):
        for y in (target, F.one_hot(target, 6).double()):
            loss = fenchel_young_loss(class_scores, y, alpha)
            torch.testing.assert_close(loss, fenchel_young_loss(class_scores[:, :5], target, alpha))
            assert fenchel_young_loss(class_scores, y, alpha, label_smoothing=0.1) == torch.inf


def test_only_the_probabilities_are_kept(class_scores, targets):
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fenchel_young_loss(class_scores.requires_grad_(), targets["hard"], 1.5)
    assert len({tensor.data_ptr() for tensor in kept if tensor.shape == class_scores.shape}) == 1


def test_bad_alpha(class_scores, targets):
    hard = targets["hard"]
    for alpha in (0.9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha must be a finite number >= 1, got {alpha}"):
            fenchel_young_loss(class_scores, hard, alpha)
    with pytest.raises(ValueError, match=r"alpha must have one element, got shape \(2,\)"):
        fenchel_young_loss(class_scores, hard, torch.tensor([1.4, 1.5]))
    with pytest.raises(ValueError, match=r"EntMax\(.*, heads=4\) has scalars of heads"):
        output_loss(EntMax(1.5, learned=True, heads=4), class_scores, hard)
    with pytest.raises(ValueError, match="class dimension"):
        fenchel_young_loss(torch.tensor(1.0), torch.tensor(0))


def test_second_derivatives_by_alpha_at_softmax_are_those_next_to_it(class_scores, targets):
    def second(alpha):
        alpha = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
        scores = class_scores.detach().requires_grad_()
        loss = fenchel_young_loss(scores, targets["mixup"], alpha)
        (first,) = torch.autograd.grad(loss, alpha, create_graph=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(first, (alpha, scores))])

    torch.testing.assert_close(second(1.0), second(1 + 1e-7), rtol=1e-5, atol=1e-6)
