"""The C kernels of normalizers against their eager definition, and against torch and entmax."""

import itertools

import entmax as entmax_package
import pytest
import torch
from definition import (
    MODULATED,
    THRESHOLDS,
    assert_equal,
    assert_same_bits,
    build,
    for_threads,
    normalized,
    random,
)
from hypothesis import given
from hypothesis import strategies as st
from kernels_here import needs_kernels
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from multimax import EntMax15, SoftMax, SparseMax

pytestmark = needs_kernels
SHIFT_INVARIANT = ["softmax", "softmax-cold", "softmax-learned", *THRESHOLDS]


LEARNED = [name for name in MODULATED if list(build(name).parameters())]


@pytest.fixture(params=[*MODULATED, *THRESHOLDS])
def module(request, _seed):
    return build(request.param)


def assert_equals_the_definition(module, scores, mask=None, dim=-1, atol=1e-13, **options):
    expected = normalized(module, scores, mask, dim, "eager", **options)
    assert_equal(normalized(module, scores, mask, dim, **options), expected, 1e-11, atol)


# A 1 is a dimension of stride 0; where the last is one, whole rows are masked.
FORMS = [*itertools.product((1, 2), (1, 3), (1, 4), (1, 7)), (7,), (4, 7), (4, 1), (3, 4, 7), ()]


@pytest.mark.slow
@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_a_mask_of_every_broadcast_form(module, shape):
    scores, mask = random(2, 3, 4, 7, spread=2), torch.rand(shape) < 0.6
    assert_equals_the_definition(module, scores, mask)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape", [(7,), (5, 7), (3, 5, 7), (2, 1, 3, 4, 5), (2, 3, 1, 2, 3, 4)], ids=str
)
def test_scores_of_every_number_of_dimensions_and_any_dim(module, shape, masked):
    scores, mask = random(*shape, spread=2), (torch.rand(shape) < 0.7 if masked else None)
    for dim in range(-len(shape), len(shape)):
        assert_equals_the_definition(module, scores, mask, dim)


@pytest.mark.slow
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 2),
        lambda t: t[:, ::2, 1::3],
        lambda t: t[:, :1].expand(-1, 5, -1),
        lambda t: t.transpose(-1, -2)[..., 1:],
    ],
    ids=["transposed", "strided", "expanded", "shifted"],
)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scores_gradients_and_masks_that_are_not_contiguous(module, view, dim):
    scores, upstream = view(random(6, 8, 10)), view(random(6, 8, 10))
    mask = view(torch.rand(6, 8, 10) < 0.7)
    assert not scores.is_contiguous()
    assert_equals_the_definition(module, scores, mask, dim, upstream=upstream)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 196, 1024, 2049, 50_000, 267_744])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_every_size(module, size, masked):
    mask = torch.rand(size) < 0.5 if masked else None
    # For the scalars, squares of the scores are added up over the row.
    atol = 1e-13 + 1e-15 * size
    assert_equals_the_definition(module, random(3, size, spread=2), mask, atol=atol)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)]
)
def test_precision(module, dtype, rtol, masked):
    """Computed in fp32, good to 2e-5 of the largest; halves round once more, at the end."""
    scores = random(50, 196, spread=2).to(dtype)
    mask = torch.rand(50, 196) < 0.7 if masked else None
    options = dict(mask=mask, upstream=scores)  # with which the sums of the scalars do not cancel
    expected = normalized(module, scores.double(), backend="eager", **options)
    actual = normalized(module.float(), scores, **options)
    assert actual[0].dtype == actual[1].dtype == dtype
    for result, exact in zip(actual, expected, strict=True):
        atol = 2e-5 * exact.abs().max().item() + (6e-8 if dtype == torch.float16 else 0)
        torch.testing.assert_close(result.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_scalars_of_many_rows_in_fp32(name):
    """Their gradients are added up in float64 beyond 2,048 entries."""
    module, scores = build(name), random(4000, 196)
    expected = normalized(module, scores, backend="eager", upstream=scores)[2:]
    actual = normalized(module.float(), scores.float(), upstream=scores)[2:]
    assert len(actual) == len(expected) > 0
    for result, exact in zip(actual, expected, strict=True):
        assert (result - exact).abs().max() <= 2e-5 * exact.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives(module, dim, masked, check):
    mask = torch.tensor([[True, False, True, True]]) if masked else None
    names = [name for name, _ in module.named_parameters()]

    def function(scores, *values):
        state = dict(zip(names, values, strict=True))
        return functional_call(module, state, (scores, dim, mask))

    assert check(function, (random(3, 4).requires_grad_(), *module.parameters()))


numbers = st.floats(-50, 50, allow_subnormal=False)
lists = st.lists(numbers, min_size=1, max_size=40)


@pytest.mark.slow
@given(row=lists, keep=st.lists(st.booleans(), min_size=40, max_size=40))
def test_sums_to_one_where_it_may(module, row, keep):
    mask = torch.tensor(keep[: len(row)])
    p = module(torch.tensor(row, dtype=torch.float64), mask=mask)
    assert (p >= 0).all()
    assert (p[~mask] == 0).all()
    assert abs(p.sum().item() - mask.any().item()) < 1e-14 * len(row)


@pytest.mark.slow
@given(row=lists, seed=st.integers(0, 999))
def test_permutation_equivariance(module, row, seed):
    scores = torch.tensor(row, dtype=torch.float64)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))
    assert_equal(module(scores[order]), module(scores)[order], atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIFT_INVARIANT)
@given(row=lists, shift=numbers)
def test_a_shift_of_all_scores_changes_nothing(name, row, shift):
    scores, module = torch.tensor(row, dtype=torch.float64), build(name)
    # The shift itself rounds by 1e-14, which a temperature magnifies.
    assert_equal(module(scores + shift), module(scores), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3, 70, 196), (9, 20_000)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_bits_with_any_number_of_threads_and_every_time(module, shape, masked):
    """Also of the scalars: what the threads add up is put together in a fixed order."""
    scores, module = random(*shape).float(), module.float()
    mask = torch.rand(shape) < 0.7 if masked else None
    first, *others = for_threads(lambda: normalized(module, scores, mask))
    for again in others:
        assert_same_bits(again, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 196, 5000])
@pytest.mark.parametrize(
    ("module", "function"),
    [
        (SoftMax(), torch.softmax),
        (SparseMax(), entmax_package.sparsemax),
        (EntMax15(), entmax_package.entmax15),
    ],
    ids=["softmax", "sparsemax", "entmax15"],
)
def test_independent_implementations(module, function, dtype, size):
    scores, tolerance = random(20, size).to(dtype), 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(module(scores), function(scores, -1), rtol=tolerance, atol=tolerance)


def test_saves_no_more_than_it_says(module):
    """The result where it is enough; with scalars that are learned, the scores too."""
    saved, scores = [], random(50, 60).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(scores)
    large = {tensor.data_ptr() for tensor in saved if tensor.numel() == scores.numel()}
    assert len(large) == 1 + bool(list(module.parameters()))
