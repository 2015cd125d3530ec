"""What a bias does to values by the C kernel: masks, NaN and inf, half precision, dropout."""

import math

import pytest
import torch
from definition import MODULATED, assert_equal, assert_same_bits, attended, build, qkv, random
from kernels_here import needs_kernels

from multimax.attention import attention
from multimax.functional import MASK_FLOOR

pytestmark = needs_kernels

SHAPE = (2, 3, 9, 11)  # batch, heads, queries, keys


@pytest.fixture(params=["after", "before"])
def place(request):
    return request.param


@pytest.fixture
def multimax(_seed):
    return build("multimax-2-affine")


@pytest.mark.parametrize("fill", [-math.inf, -1e9, MASK_FLOOR])
@pytest.mark.parametrize("shape", [SHAPE, (3, 9, 11), (2, 1, 1, 11), (2, 3, 9, 1)], ids=str)
def test_a_fill_masks_as_a_mask_does(multimax, place, fill, shape):
    tensors, bias, allowed = qkv(), random(*shape), torch.rand(shape) < 0.6
    allowed[0, ..., 0] = False  # whole queries if all keys have the same bias
    expected = attended(tensors, multimax, allowed, bias=bias, bias_place=place)
    filled = bias.masked_fill(~allowed, fill)
    found = attended(tensors, multimax, bias=filled, bias_place=place)
    assert_same_bits(found, expected)
    assert (found[-1][~allowed] == 0).all()
    assert found[-1].any() or shape[-1] == 1  # SoftMax does not see what all keys have in common


def test_what_is_above_the_floor_is_a_bias(multimax):
    bias = torch.full(SHAPE, MASK_FLOOR + 1, dtype=torch.float64)
    assert_equal(attended(qkv(), multimax, bias=bias)[-1].sum(-1), torch.zeros(2, 3, 9).double())
    tensors = qkv()
    assert_equal(
        attended(tensors, multimax, bias=bias)[0], attended(tensors, multimax)[0], atol=1e-9
    )


def test_everything_masked(multimax, place):
    found = attended(qkv(), multimax, bias=torch.full(SHAPE, -math.inf), bias_place=place)
    assert len(found) == 5 + len(list(multimax.parameters())) > 5
    assert all((tensor == 0).all() for tensor in found)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", MODULATED)
def test_nan_and_inf_spoil_their_row_alone(name, place, value):
    tensors, bias, normalizer = qkv(), random(*SHAPE), build(name)
    bias[:, :, :, 4] = -math.inf
    options = dict(bias_place=place)
    expected = attended(tensors, normalizer, bias=bias, **options)
    bias[0, 1, 3, 2] = value
    out, of_query, of_key, of_value, *_, of_bias = attended(
        tensors, normalizer, bias=bias, **options
    )
    for found, before in ((out, expected[0]), (of_query, expected[1]), (of_bias, expected[-1])):
        spoilt = found[0, 1, 3]
        assert (spoilt.isnan() | (bias[0, 1, 3] == -math.inf if found is of_bias else False)).all()
        found[0, 1, 3] = before[0, 1, 3]
        assert torch.equal(found, before)
    for found in (of_key, of_value):
        assert (found[:, :, 4] == 0).all()  # which no query may attend to
        assert found[0, 1].isnan().any()
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[0, 1, 3, 2] = False  # where nothing matters
    hidden = attended(tensors, normalizer, mask, bias=bias, **options)
    bias[0, 1, 3, 2] = 0
    assert_same_bits(hidden, attended(tensors, normalizer, mask, bias=bias, **options))


SPECIAL = [0.5, -math.inf, math.inf, math.nan, -1e4, -8e3, 8e3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULATED)
def test_every_pair_of_special_score_and_bias_is_that_of_the_definition(name, place, dtype):
    """Also which probabilities are NaN, and which exactly 0."""
    normalizer = build(name).float()
    query, eye = torch.ones(1, 1, 1, 1, dtype=dtype), torch.eye(3, dtype=dtype)[None, None]
    for score in SPECIAL:
        for added in SPECIAL:
            key = torch.tensor([0.3, -0.2, score], dtype=dtype)[None, None, :, None]
            bias = torch.tensor([0.1, 0.7, added], dtype=dtype)
            tensors, options = (query, key, eye, normalizer), dict(bias=bias, bias_place=place)
            found, expected = (
                attention(*tensors, scale=1.0, backend=backend, **options)
                for backend in ("c", "eager")
            )
            message = f"score {score}, bias {added}: {found.tolist()}, not {expected.tolist()}"
            torch.testing.assert_close(found, expected, equal_nan=True, msg=message)
            assert torch.equal(found == 0, expected == 0), message


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("of_bias", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_precision(multimax, place, dtype, of_bias):
    """The same tolerances as without a bias; halves are computed in fp32."""
    tolerances = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3}
    tensors = [t.to(dtype) for t in qkv(queries=65, keys=70, dim=32, value_dim=32)]
    bias, exactly = random(3, 65, 70).to(of_bias), [tensor.double() for tensor in tensors]
    options = dict(bias_place=place, bias=bias.double(), backend="eager")
    upstream, *_ = attended(exactly, multimax, **options)
    options["upstream"] = upstream.to(dtype)
    expected = attended(exactly, multimax, **options)
    normalizer = multimax if dtype == torch.float64 else multimax.float()
    options |= dict(bias=bias, backend="c")
    *actual, d_bias = attended(tensors, normalizer, **options)
    assert all(tensor.dtype == dtype for tensor in actual[:4])
    assert d_bias.dtype == of_bias
    for result, exact in zip([*actual, d_bias], expected, strict=True):
        tolerance = max(tolerances.get(result.dtype, 5e-2), tolerances.get(dtype, 5e-2))
        assert (result - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dropout_in_lower_precision(multimax, place, dtype):
    """A finite bias, and what a fill hides, next to the definition in fp64 that drops the same."""
    tensors, rate = [t.to(dtype) for t in qkv(1, 2, 30, 33, 16, 16)], 0.3
    bias = random(2, 30, 33).masked_fill(torch.rand(2, 30, 33) < 0.2, -1e4).to(dtype)
    options = dict(bias=bias, bias_place=place, dropout=rate)
    eye = torch.eye(33, dtype=dtype).expand(1, 2, 33, 33)
    torch.manual_seed(7)
    kept = attended([*tensors[:2], eye], multimax.float(), **options)[0] > 0
    torch.manual_seed(7)
    upstream = torch.randn(1, 2, 30, 16, dtype=dtype)
    torch.manual_seed(7)
    found = attended(tensors, multimax, upstream=upstream, **options)
    exact = [t.double().requires_grad_() for t in tensors]
    wide, added = multimax.double(), bias.double().requires_grad_()
    eye = eye.double()
    p = attention(*exact[:2], eye, wide, bias=added, bias_place=place, backend="eager")
    out = (p * kept / (1 - rate)) @ exact[2]
    inputs = [*exact, *wide.parameters(), added]
    expected = [out, *torch.autograd.grad(out, inputs, upstream.double())]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for result, value in zip(found, expected, strict=True):
        assert (result - value).abs().max() < tolerance * value.abs().max()
    assert (found[-1][bias <= MASK_FLOOR] == 0).all()


@pytest.mark.parametrize("shape", [(3, 70, 33), (33,)], ids=str)
def test_dropout_keeps_what_it_keeps_without_a_bias(multimax, place, shape):
    tensors, bias, rate = [t.requires_grad_() for t in qkv(2, 3, 70, 33)], random(*shape), 0.3
    query, key, value = tensors
    eye = torch.eye(33, dtype=torch.float64).expand(2, 3, 33, 33)
    options = dict(bias=bias.requires_grad_(), bias_place=place)
    torch.manual_seed(7)
    kept = attention(query, key, eye, multimax, dropout=rate, backend="c") > 0
    torch.manual_seed(7)
    actual = attention(*tensors, multimax, dropout=rate, backend="c", **options)
    p = attention(query, key, eye, multimax, backend="eager", **options)
    expected = (p * kept / (1 - rate)) @ value
    assert_equal(actual, expected)
    wanted, upstream = [*tensors, *multimax.parameters(), bias], random(2, 3, 70, 5)
    found = (torch.autograd.grad(out, wanted, upstream) for out in (actual, expected))
    assert_equal(*found)
