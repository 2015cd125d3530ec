"""entmax near alpha = 1, against 50 decimal digits: fp32 keeps its digits down to 1 + 1e-12."""

from decimal import Decimal, getcontext

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from multimax import EntMax, entmax, softmax
from multimax.losses import fenchel_young_loss, output_loss
from multimax.normalizers.entmax_solver import NEAR_ONE, curvature

getcontext().prec = 50
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14}
EXCESSES = [0.06, 1e-2, 1e-3, 1e-4, 1e-7, 1e-8, 1e-12]
CASES = [(excess, torch.float32) for excess in EXCESSES]
CASES += [(excess, torch.float64) for excess in (1e-3, 1e-7)]


def draw(seed, spread=1.0, size=12):
    return (spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))).float()


def exact(scores, excess):
    """The probabilities, by bisection of their definition."""
    x = [Decimal(score) - Decimal(scores.max().item()) for score in scores.tolist()]

    def probabilities(offset):
        bases = [1 + excess * (value - offset) for value in x]
        return [(base.ln() / excess).exp() if base > 0 else Decimal(0) for base in bases]

    low, high = Decimal(0), Decimal(len(x)).ln() + 1
    for _ in range(150):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(probabilities(middle)) >= 1 else (low, middle)
    return probabilities(low)


def exact_slope(function, excess):
    """d function / d excess."""
    step = Decimal("1e-20")
    return float((function(excess + step) - function(excess - step)) / (2 * step))


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize(("excess", "dtype"), CASES)
def test_probabilities_and_the_gradient_of_alpha(excess, spread, dtype):
    scores, weights = draw(0, spread).to(dtype), draw(1).to(dtype)
    alpha = torch.tensor(1 + excess, dtype=torch.float64, requires_grad=True)
    excess = Decimal((alpha - 1).item())  # alpha has rounded
    wanted = torch.tensor([float(p) for p in exact(scores, excess)], dtype=dtype)
    slope = exact_slope(
        lambda a: sum(p * Decimal(w) for p, w in zip(exact(scores, a), weights.tolist(), strict=1)),
        excess,
    )
    for p in (entmax(scores, alpha.item()), entmax(scores, alpha)):
        torch.testing.assert_close(p, wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype] / 20)
    (got,) = torch.autograd.grad((entmax(scores, alpha) * weights).sum(), alpha)
    assert got.item() == pytest.approx(slope, rel=10 * ROUNDING[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(("excess", "dtype"), CASES)
def test_the_loss_and_its_gradient_of_alpha(excess, dtype):
    scores = draw(0).to(dtype)
    alpha = torch.tensor(1 + excess, dtype=torch.float64, requires_grad=True)
    excess = Decimal((alpha - 1).item())
    target = 3

    def loss(a):
        p = exact(scores, a)
        powers = [value * (a * value.ln()).exp() if value else value for value in p]
        entropy = (sum(p) - sum(powers)) / (a * (1 + a))
        expected = sum(v * Decimal(s) for v, s in zip(p, scores.tolist(), strict=True))
        return expected - Decimal(scores[target].item()) + entropy

    got = fenchel_young_loss(scores[None], torch.tensor([target]), alpha)
    (slope,) = torch.autograd.grad(got, alpha)
    rounding = 5 * ROUNDING[dtype]
    assert got.item() == pytest.approx(float(loss(excess)), rel=rounding)
    assert slope.item() == pytest.approx(exact_slope(loss, excess), rel=10 * rounding)
    fixed = fenchel_young_loss(scores[None], torch.tensor([target]), 1 + float(excess))
    assert fixed.item() == pytest.approx(got.item(), rel=rounding)


@pytest.mark.parametrize("logit", [-10.0, -18.0, -40.0, -100.0, -1000.0])
def test_a_learned_alpha_that_has_come_to_one(logit):
    module, scores, weights = EntMax(1.5, learned=True), draw(0), draw(1)
    torch.nn.init.constant_(module.alpha_logit, logit)
    share = torch.tensor(logit).sigmoid().item()
    p = module(scores)
    torch.testing.assert_close(p, softmax(scores), rtol=3 * share + 2e-6, atol=share + 1e-7)
    (got,) = torch.autograd.grad((p * weights).sum(), module.alpha_logit)
    # At alpha = 1, dp / d alpha = -p (l^2 - E[l^2]) / 2, l = log p.
    double, squares = softmax(scores.double()), softmax(scores.double()).log().square()
    by_alpha = -double * (squares - (double * squares).sum()) / 2
    wanted = share * (by_alpha * weights).sum().item()
    assert got.item() == pytest.approx(wanted, rel=1e-3, abs=1e-44)
    loss = output_loss(module, scores[None], torch.tensor([2]))
    torch.testing.assert_close(loss, -softmax(scores)[2].log(), rtol=1e-3, atol=0)
    (of_loss,) = torch.autograd.grad(loss, module.alpha_logit)
    # d loss / d alpha is that of the entropy alone.
    slope = (double.log().square() * double).sum().item() / 2
    entropy = -(double * double.log()).sum().item()
    assert of_loss.item() == pytest.approx(-share * (slope + entropy), rel=1e-3, abs=1e-44)


def test_a_tensor_alpha_of_one_is_softmax():
    scores = draw(0)
    torch.testing.assert_close(entmax(scores, torch.tensor(1.0)), softmax(scores))
    alphas = torch.tensor([[1.0], [1 + 1e-6], [1.5], [2.5]], requires_grad=True)
    rows = scores.expand(4, -1)
    p = entmax(rows, alphas)
    for row, alpha in zip(p, alphas.flatten().tolist(), strict=True):
        torch.testing.assert_close(row, entmax(scores, alpha), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((p * draw(1)).sum(), alphas)
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match=r"alpha must be >= 1, got 0.9"):
        entmax(scores, torch.tensor(0.9))
    with pytest.raises(ValueError, match=r"alpha must be >= 1, got 0.9"):
        fenchel_young_loss(rows, torch.tensor([0, 1, 2, 3]), torch.tensor(0.9))


@pytest.mark.slow
@pytest.mark.parametrize("excess", [0.0, 1e-9, 1e-3, 0.05])
def test_derivatives_of_both_orders(excess):
    scores = draw(0, size=5).double().requires_grad_()
    # Not the first derivative by alpha at 1 itself, where the numeric one would leave the domain.
    alpha = torch.tensor(1 + excess + 1e-3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(entmax, (scores, alpha))
    assert gradgradcheck(entmax, (scores, alpha))

    def loss(scores, alpha):
        return fenchel_young_loss(scores[None], torch.tensor([1]), alpha)

    assert gradcheck(loss, (scores, alpha))
    assert gradgradcheck(loss, (scores, alpha))


def test_both_forms_meet():
    scores = draw(0, 3.0, 1000).double()
    below, above = entmax(scores, 1 + NEAR_ONE - 1e-12), entmax(scores, 1 + NEAR_ONE)
    torch.testing.assert_close(below, above, rtol=1e-9, atol=1e-12)


def test_masked_entries_and_rows_of_odd_scores():
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[1.0, -inf, 2.0], [-inf, -inf, -inf], [1.0, nan, 2.0], [1.0, 0.0, inf]])
    for alpha in (1.001, torch.tensor(1.001), torch.tensor(1.0)):
        p = entmax(scores, alpha)
        assert p[0, 1] == 0
        torch.testing.assert_close(p[0, ::2], entmax(scores[0, ::2], alpha))
        assert torch.equal(p[1], torch.zeros(3))
        assert p[2:].isnan().all()


def test_long_rows_and_equal_scores():
    p = entmax(torch.zeros(300_000), 1.05)
    torch.testing.assert_close(p, torch.full_like(p, 1 / 300_000))
    far = torch.tensor([0.0, -1000.0, -1.0])
    torch.testing.assert_close(entmax(far, 1.001), entmax(far.double(), 1.001).float())


def test_curvature_has_its_digits_everywhere():
    y = -torch.tensor([0.0, 1e-30, 1e-9, 1e-3, 0.3, 0.49999, 0.50001, 2.0, 10.0]).double()
    wanted = [
        -0.5 if not v else float((1 - (-v).exp() - v) / v**2) for v in map(Decimal, y.tolist())
    ]
    wanted[1] = -0.5  # of which 50 digits are too few
    torch.testing.assert_close(
        curvature(y), torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0
    )
