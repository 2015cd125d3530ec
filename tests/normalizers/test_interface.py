"""What every normalizer answers where it is told little, and in which dtype."""

import pytest
import torch

from multimax import (
    EntMax,
    EvSoftMax,
    MultiMax,
    SoftMax,
    TopK,
    build_normalizer,
    entmax,
    entmax15,
    evsoftmax,
    multimax,
    registered_normalizers,
    sigmoid,
    softmax,
    softpick,
    sparsemax,
    topk,
)

SCALARS = torch.tensor([0.3, -0.2, 0.01, 0.02])
FUNCTIONS = {
    "softmax": softmax,
    "topk": lambda scores, *dim: topk(scores, 2, *dim),
    "sparsemax": sparsemax,
    "entmax": lambda scores, *dim: entmax(scores, 1.3, *dim),
    "entmax15": entmax15,
    "evsoftmax": evsoftmax,
    "multimax": lambda scores, *dim: multimax(scores, SCALARS, SCALARS, *dim),
    "softpick": softpick,
    "sigmoid": sigmoid,
}


@pytest.mark.parametrize(
    "method", ["forward", "log_probabilities", "logits", "normalize_modulated"]
)
def test_methods_work_along_the_last_dimension(normalizer, scores, method):
    if method == "normalize_modulated" and not normalizer.modulates_first:
        return
    method = getattr(normalizer, method)
    assert torch.equal(method(scores), method(scores, -1))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_work_along_the_last_dimension(scores, name):
    function = FUNCTIONS[name]
    assert torch.equal(function(scores), function(scores, -1))
    if name not in ("softpick", "sigmoid"):
        torch.testing.assert_close(function(scores).sum(-1), torch.ones(2, 3, 4))


@pytest.mark.parametrize("name", registered_normalizers())
def test_only_what_is_fusible_has_coefficients(name):
    module = build_normalizer(name)
    if module.fusible:
        assert module.coefficients(torch.float64, torch.device("cpu")).dtype == torch.float64
    else:
        with pytest.raises(NotImplementedError, match="not of the form that the kernels compute"):
            module.coefficients(torch.float64, torch.device("cpu"))


def test_defaults():
    assert not list(SoftMax().parameters())
    assert SoftMax().temperature == 1
    assert (TopK().k, TopK().floor, EvSoftMax().floor) == (100, 1e-6, 1e-6)
    assert (EntMax().alpha, EntMax().heads) == (1.5, None)
    module = MultiMax()
    assert (module.order, module.init, module.affine) == (2, "paper", False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_keep_the_dtype(scores, name, dtype):
    function, half = FUNCTIONS[name], scores.to(dtype)
    assert function(half).dtype == dtype
    assert torch.equal(function(half), function(half.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_scores_not_of_the_scalars(normalizer, scores, dtype):
    normalizer, scores = normalizer.double(), scores.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert normalizer(scores).dtype == dtype
    assert normalizer.log_probabilities(scores).dtype == wide
    for x in (scores, scores[0, 0, 0, 0]):
        assert normalizer.modulate(x).dtype in (dtype, wide)
        if isinstance(normalizer, MultiMax):
            assert normalizer.derivative(x).dtype == wide


def test_gradients_that_keep_their_graph_are_the_same(normalizer, scores, mask):
    """A kernel's backward is then another: `gradgradcheck` compares it with itself alone."""
    normalizer, scores = normalizer.double(), scores.double().requires_grad_()
    inputs = [scores, *normalizer.parameters()]
    loss = (normalizer(scores, mask=mask) * torch.arange(7)).sum()
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs, create_graph=True), plain)
