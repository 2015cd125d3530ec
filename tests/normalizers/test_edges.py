"""Rows with NaN or inf, scores without entries or without dimensions, views, and bad masks."""

import itertools
import math

import numpy as np
import pytest
import torch

import multimax
from multimax import MultiMax, SoftMax, SparseMax, TopK, use_backend

NAN, INF = math.nan, math.inf

SPOILT = [
    [1.0, INF, 2.0, -1.0],
    [-INF, INF, 2.0, -1.0],
    [INF, INF, INF, INF],
    [1.0, NAN, 2.0, 3.0],
    [NAN, -INF, 1.0, 2.0],
    [INF, -INF, -INF, -INF],
    [NAN, -INF, -INF, -INF],
    [-INF, 1.0, INF, NAN],
]
MASKS = {
    "none": None,
    "shared": [True, True, False, True],
    "own": [[False, True, True, True], [True, True, True, True]],
    "empty": [[False, False, False, False], [True, True, True, True]],
}
FUNCTIONS = {
    "softmax": multimax.softmax,
    "softmax-tensor": lambda x, **o: multimax.softmax(x, temperature=torch.tensor(0.7), **o),
    "multimax": lambda x, **o: multimax.multimax(x, torch.full((4,), 0.3), torch.zeros(4), **o),
    "topk": lambda x, **o: multimax.topk(x, 2, **o),
    "sparsemax": multimax.sparsemax,
    "entmax15": multimax.entmax15,
    "entmax-1": lambda x, **o: multimax.entmax(x, 1.0, **o),
    "entmax-1.3": lambda x, **o: multimax.entmax(x, 1.3, **o),
    "entmax-tensor": lambda x, **o: multimax.entmax(x, torch.tensor(1.3), **o),
    "evsoftmax": multimax.evsoftmax,
    "softpick": multimax.softpick,
    "sigmoid": multimax.sigmoid,
}
WEIGHTS = (multimax.softpick, multimax.sigmoid)


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def spoilt_row(row, mask, dtype=torch.float64):
    """The row above an ordinary one, its mask, what receives mass, and what of that is NaN."""
    scores = torch.tensor([row, [0.0, 1.0, 2.0, 3.0]], dtype=dtype)
    mask = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
    visible = (scores != -INF) & (torch.tensor(True) if mask is None else mask)
    nan = visible & (visible & ~scores.isfinite()).any(-1, keepdim=True)
    return scores, mask, visible, nan


def gradients(normalizer, scores, mask, create_graph=False):
    """Probabilities, the gradient of the scores, and those of the scalars."""
    scores = scores.clone().requires_grad_()
    upstream = torch.tensor([[1.0, 2.0, -3.0, 0.5], [0.3, 0.2, -1.0, 0.7]]).to(scores.dtype)
    p = normalizer(scores, mask=mask)
    loss = (p * upstream).sum()
    wanted = [scores, *normalizer.parameters()]
    return p.detach(), *torch.autograd.grad(loss, wanted, create_graph=create_graph)


@pytest.mark.slow
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_nan_and_inf_spoil_their_row_and_nothing_that_is_masked(normalizer, mask, create_graph):
    normalizer = normalizer.double()
    for row in SPOILT:
        scores, given, visible, nan = spoilt_row(row, mask)
        p, gradient, *scalars = gradients(normalizer, scores, given, create_graph)
        for tensor in (p, gradient):
            assert torch.equal(tensor.isnan(), nan)
            assert (tensor[~visible] == 0).all()
        without = gradients(normalizer, scores.nan_to_num(0.0, 0.0), given)
        torch.testing.assert_close(p[1], without[0][1])
        torch.testing.assert_close(gradient[1], without[1][1])
        if not nan.any():  # also not by 0 times what is masked
            assert all(scalar.isfinite().all() for scalar in scalars)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_and_inf_in_every_dtype_and_dim(normalizer, dtype):
    for row, dim in itertools.product(SPOILT, (0, 1)):
        scores, mask, visible, nan = spoilt_row(row, "shared", dtype)
        if dim == 0:
            scores, mask, visible, nan = scores.t(), mask[:, None], visible.t(), nan.t()
        p = normalizer(scores, dim, mask)
        assert torch.equal(p.isnan(), nan)
        assert (p[~visible] == 0).all()


@pytest.mark.parametrize("mask", MASKS)
def test_nan_and_inf_in_functions(function, mask):
    for row in SPOILT:
        scores, given, visible, nan = spoilt_row(row, mask)
        scores.requires_grad_()
        p = function(scores, mask=given)
        (gradient,) = torch.autograd.grad(p[..., :2].sum(), scores)
        for tensor in (p, gradient):
            assert torch.equal(tensor.isnan(), nan)
            assert (tensor[~visible] == 0).all()


@pytest.mark.parametrize("scale", [-1.3, 0.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_inf_is_not_taken_for_masked_under_a_scale_that_is_not_positive(scale, order):
    module = MultiMax(order, affine=True).double()
    torch.nn.init.constant_(module.scale, scale)
    for row, mask in itertools.product(SPOILT, MASKS):
        scores, given, visible, nan = spoilt_row(row, mask)
        for tensor in gradients(module, scores, given)[:2]:
            assert torch.equal(tensor.isnan(), nan)
            assert (tensor[~visible] == 0).all()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_a_masked_score_reaches_no_gradient(normalizer, scores, mask, garbage):
    hidden = ~mask.expand_as(scores)
    results = []
    for value in (0.0, garbage):
        x = scores.masked_fill(hidden, value).requires_grad_()
        p = normalizer(x, mask=mask)
        loss = (p * torch.arange(7)).sum()
        results.append([p, *torch.autograd.grad(loss, [x, *normalizer.parameters()])])
    assert all(map(torch.equal, *results))


def test_k_and_more_entries_of_inf():
    """The threshold of top-k is inf itself, below which nothing is left to be NaN."""
    scores = torch.tensor([[INF, INF, 1.0], [3.0, 2.0, 1.0]])
    p = TopK(2)(scores)
    assert p[0].isnan().all()
    assert (p[1] > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 0), -1), ((0, 3), -1), ((2, 0, 3), 1), ((0,), 0), ((2, 0, 3), 2)]
)
def test_no_entries(normalizer, shape, dim, masked):
    scores = torch.ones(shape, requires_grad=True)
    mask = torch.ones(shape, dtype=torch.bool) if masked else None
    p = normalizer(scores, dim, mask)
    p.sum().backward()
    assert p.shape == scores.grad.shape == shape
    assert normalizer.log_probabilities(scores, dim, mask).shape == shape


def test_no_entries_in_functions(function):
    assert function(torch.ones(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("dim", [-1, 0])
def test_a_scalar_is_a_row_of_one(normalizer, dim):
    scores = torch.tensor(3.0, requires_grad=True)
    p = normalizer(scores, dim)
    assert p.shape == ()
    if normalizer.sums_to_one:
        assert p == 1
        assert torch.autograd.grad(p, scores)[0] == 0
    for score, expected in ((-INF, 0.0), (NAN, NAN), (INF, NAN)):
        torch.testing.assert_close(
            normalizer(torch.tensor(score), dim), torch.tensor(expected), equal_nan=True
        )
    assert normalizer(torch.tensor(3.0), dim, torch.tensor(False)) == 0
    with pytest.raises(IndexError):
        normalizer(torch.tensor(3.0), 1)


def test_a_scalar_in_functions(function):
    p = function(torch.tensor(3.0))
    assert 0.9 < p < 1 if function in WEIGHTS else p == 1


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_k_of_numpy(scores, kind):
    assert torch.equal(TopK(kind(2))(scores), TopK(2)(scores))
    assert torch.equal(multimax.topk(scores, kind(2)), multimax.topk(scores, 2))
    assert type(TopK(kind(2)).k) is int
    with pytest.raises(ValueError, match="k must be an integer >= 1, got"):
        TopK(kind(0))


@pytest.mark.parametrize("k", [2.0, np.float32(2), "2", None])
def test_k_that_is_no_integer(k):
    with pytest.raises(ValueError, match="k must be an integer >= 1, got"):
        TopK(k)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_an_error(normalizer, layout):
    scores = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    for call in (normalizer, normalizer.log_probabilities, *FUNCTIONS.values()):
        with pytest.raises(ValueError, match=r"nested .* pad them, torch.nested.to_padded_tensor"):
            call(scores)


@pytest.mark.parametrize("form", ["neg", "conj"])
def test_views_with_the_negative_bit(normalizer, form):
    if form == "neg":
        scores = torch._neg_view(torch.randn(3, 5))
    else:
        scores = torch.randn(3, 5, dtype=torch.complex64).conj().imag
    assert scores.is_neg()
    plain = scores.resolve_neg().clone().requires_grad_()
    expected = normalizer(plain)
    assert torch.equal(normalizer(scores), expected)
    for upstream in (scores, scores.resolve_neg().clone()):
        (gradient,) = torch.autograd.grad(expected, plain, upstream, retain_graph=True)
        torch.testing.assert_close(
            gradient, torch.autograd.grad(expected, plain, scores + 0, retain_graph=True)[0]
        )


@pytest.mark.parametrize(
    ("shape", "of_mask"),
    [((2, 3), (4, 2, 3)), ((2, 3), (5, 3)), ((1, 3), (2, 3)), ((), (3,)), ((2, 3), (2, 1, 3))],
)
def test_a_mask_that_does_not_fit_is_one_error(normalizer, shape, of_mask):
    scores, mask = torch.ones(shape), torch.ones(of_mask, dtype=torch.bool)
    for call in (normalizer, normalizer.log_probabilities):
        with pytest.raises(ValueError, match=r"mask of shape .* must broadcast to the scores, of"):
            call(scores, mask=mask)


@pytest.mark.parametrize("of_mask", [(4, 2, 3), (5, 3), (2, 2)])
def test_a_mask_that_does_not_fit_in_functions(function, of_mask):
    with pytest.raises(ValueError, match=r"mask of shape .* must broadcast to the scores, of"):
        function(torch.ones(2, 3), mask=torch.ones(of_mask, dtype=torch.bool))


@pytest.mark.parametrize("form", ["plain", "transposed", "sliced", "channels-last", "half"])
def test_the_result_can_be_viewed_as_that_of_torch(normalizer, form):
    scores = torch.randn(2, 3, 4, 5)
    scores = {
        "plain": scores,
        "transposed": scores.transpose(1, 3),
        "sliced": scores[:, :, ::2],
        "channels-last": scores.to(memory_format=torch.channels_last),
        "half": scores.half().transpose(1, 3),
    }[form]
    for dim, mask in itertools.product(range(4), (None, torch.ones(scores.shape) > 0)):
        assert torch.softmax(scores, dim).view(-1).shape == (scores.numel(),)
        assert normalizer(scores, dim, mask).view(-1).shape == (scores.numel(),)


@pytest.mark.parametrize("create_graph", [False, True])
def test_sparsemax_keeps_the_sign_of_zero_gradients(create_graph):
    """Off the support, that of 0 times what comes in; the C kernels leave it to the compiler."""
    scores, upstream = torch.full((40,), -9.0), torch.linspace(-1, 1, 40)
    scores[0], upstream[0] = 9.0, 0.0
    scores.requires_grad_()
    with use_backend("eager"):
        p = SparseMax()(scores)
    (gradient,) = torch.autograd.grad(p, scores, upstream, create_graph=create_graph)
    assert (gradient == 0).all()
    assert torch.equal(gradient.signbit()[1:], (upstream < 0)[1:])


def test_the_default_device_is_not_that_of_the_scores(normalizer, scores):
    expected = normalizer(scores)
    with torch.device("meta"):
        assert torch.equal(normalizer(scores), expected)


def test_a_temperature_of_its_own_dtype():
    scores = torch.randn(3, 5, dtype=torch.float64)
    p = multimax.softmax(scores, temperature=torch.tensor(0.7))
    torch.testing.assert_close(p, SoftMax(0.7)(scores), rtol=1e-6, atol=1e-7)
