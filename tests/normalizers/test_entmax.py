"""alpha-entmax against the entmax package, its limits, and learned alphas."""

import math

import entmax as reference
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from multimax import EntMax, EntMax15, SparseMax, entmax, entmax15, softmax, sparsemax


def gradient_of(function, scores, *inputs):
    """The output and its vector-Jacobian products with a fixed random vector."""
    inputs = [t.detach().clone().requires_grad_() for t in (scores, *inputs)]
    output = function(*inputs)
    vector = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
    return output.detach(), *torch.autograd.grad((output * vector).sum(), inputs)


# The package solves by sorting (exact) or by 100 halvings; 1e-10 leaves room for the sums of
# 50,000 entries and for the gradient's division by a small support.
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 10, 196, 50_000])
@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("name", ["sparsemax", "entmax15", 1.1, 1.3, 1.75, 2.0, 2.5, 3.0, 4.0])
def test_equals_the_entmax_package(name, size, spread):
    scores = spread * torch.randn(3, size, dtype=torch.float64)
    if isinstance(name, str):
        ours = {"sparsemax": sparsemax, "entmax15": entmax15}[name]
        theirs = getattr(reference, name)
    else:

        def ours(x):
            return entmax(x, name)

        def theirs(x):
            return reference.entmax_bisect(x, name, n_iter=100)

    results, expected = gradient_of(ours, scores), gradient_of(theirs, scores)
    assert len(results) == 2
    torch.testing.assert_close(results, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("size", [2, 196])
@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])
def test_gradient_of_alpha_equals_the_entmax_package(alpha, size):
    scores = torch.randn(3, size, dtype=torch.float64)
    alphas = alpha + torch.tensor([[0.0], [0.01], [0.05]], dtype=torch.float64)

    def theirs(x, a):
        return reference.entmax_bisect(x, a, n_iter=100)

    results, expected = (gradient_of(f, scores, alphas) for f in (entmax, theirs))
    assert len(results) == 3
    torch.testing.assert_close(results, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.9, 2.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradients_of_an_alpha_for_each_row(scores, mask, alpha, masked, check):
    alphas = torch.tensor([alpha, alpha + 0.05], dtype=torch.float64)[:, None].requires_grad_()
    mask = mask[0, 0, 2:] if masked else None
    x = scores[0, 0, 2:].double().requires_grad_()
    assert check(lambda x, alpha: entmax(x, alpha, mask=mask), (x, alphas))


def test_alpha_one_is_softmax(scores):
    assert torch.equal(entmax(scores, 1.0), softmax(scores))
    near = entmax(scores.double(), 1 + 1e-5)
    torch.testing.assert_close(near, softmax(scores.double()), atol=1e-3, rtol=0)
    nearer = entmax(scores.double(), 1 + 1e-7)
    torch.testing.assert_close(nearer, softmax(scores.double()), atol=1e-5, rtol=0)


def test_modules_are_the_functions(scores):
    assert torch.equal(SparseMax()(scores), entmax(scores, 2.0))
    assert torch.equal(EntMax15()(scores), entmax(scores, 1.5))
    assert torch.equal(EntMax(1.3)(scores), entmax(scores, 1.3))
    assert torch.equal(sparsemax(scores), entmax(scores, 2.0))


def test_a_large_lead_is_exactly_one_hot():
    for alpha in (1.5, 2.0):
        scores = torch.tensor([0.0, 1 / (alpha - 1), -1.0])
        assert entmax(scores, alpha).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("alpha", [1.01, 1.5, 1.99])
def test_a_learned_alpha_starts_where_told_and_stays_in_its_interval(alpha):
    module = EntMax(alpha, learned=True)
    assert module.alpha.item() == pytest.approx(alpha, abs=1e-6)
    assert list(module.state_dict()) == ["alpha_logit"]
    for logit in (-8.0, 8.0):
        torch.nn.init.constant_(module.alpha_logit, logit)
        assert 1 < module.alpha.item() < 2


def test_an_alpha_for_each_head(scores, mask):
    module = EntMax(1.5, learned=True, heads=3)
    module.alpha_logit.data.copy_(torch.tensor([-2.0, 0.0, 2.0]))
    probabilities = module(scores, mask=mask)
    assert module.alpha.shape == (3,)
    for head, alpha in enumerate(module.alpha.tolist()):
        expected = entmax(scores[:, head], alpha, mask=mask[:, 0])
        torch.testing.assert_close(probabilities[:, head], expected, atol=1e-6, rtol=1e-5)
    probabilities.square().sum().backward()
    assert (module.alpha_logit.grad != 0).all()


@pytest.mark.parametrize("alpha", [0.5, -1, math.inf, math.nan])
def test_an_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=f"alpha must be a finite number >= 1, got {alpha}"):
        entmax(torch.ones(3), alpha)


@pytest.mark.parametrize("shape", [(7,), (2, 1, 1, 1, 1), (4, 7)])
def test_an_alpha_that_varies_along_the_row(scores, shape):
    with pytest.raises(ValueError, match=r"alpha of shape .* must broadcast to scores"):
        entmax(scores, torch.full(shape, 1.5))
    with pytest.raises(ValueError, match="along dim 1"):
        entmax(torch.ones(3, 4, 5), torch.full((4, 1), 1.5), dim=1)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0, 2.5])
def test_the_gradient_of_a_row_with_nan_is_nan_and_that_of_the_others_is_not(alpha):
    scores = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 0.5, 1.0]], requires_grad=True)
    vector = torch.tensor([1.0, 2.0, 4.0]).expand(2, 3)
    (gradient,) = torch.autograd.grad(entmax(scores, alpha), scores, vector)
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()
