"""Attention with a bias by the C kernel, against its eager definition in float64."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from definition import (
    MODULATED,
    assert_equal,
    assert_same_bits,
    attended,
    build,
    for_threads,
    qkv,
    random,
)
from kernels_here import needs_kernels
from torch.autograd import gradcheck, gradgradcheck

from multimax.attention import attention
from multimax.functional import MASK_FLOOR

pytestmark = needs_kernels

SHAPE = (2, 3, 9, 11)  # batch, heads, queries, keys
FORMS = [*itertools.product((1, 2), (1, 3), (1, 9), (1, 11)), (11,), (9, 11), (9, 1), ()]


@pytest.fixture(params=["after", "before"])
def place(request):
    return request.param


@pytest.fixture
def multimax(_seed):
    return build("multimax-2-affine")


def assert_equals_the_definition(tensors, normalizer, mask=None, **options):
    expected = attended(tensors, normalizer, mask, "eager", **options)
    assert_equal(attended(tensors, normalizer, mask, **options), expected)


@pytest.mark.parametrize("name", MODULATED)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, -0.7])
def test_every_normalizer(name, place, causal, masked, scale):
    mask = torch.rand(2, 1, 9, 11) < 0.7 if masked else None
    options = dict(causal=causal, scale=scale, bias=random(*SHAPE), bias_place=place)
    assert_equals_the_definition(qkv(), build(name), mask, **options)


@pytest.mark.parametrize("shape", FORMS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_every_broadcast_form(multimax, shape, place, causal):
    """The gradient of a bias that is broadcast is a sum, of its own shape."""
    options = dict(bias=random(*shape), bias_place=place, causal=causal)
    assert_equals_the_definition(qkv(), multimax, **options)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 2), (20, 20)])
@pytest.mark.parametrize("sizes", [*itertools.product((0, 1), (0, 1), (0, 1)), (1, 1, 1)], ids=str)
def test_heads_and_shares_of_the_queries_add_up(multimax, place, batch, heads, key_heads, sizes):
    """Those with the same row of a bias: in turns, or after one another if all queries have it."""
    tensors = qkv(batch, heads, queries=150, keys=20, key_heads=key_heads)
    whole = zip(sizes, (batch, heads, 150), strict=True)
    bias = random(*(n if own else 1 for own, n in whole), 20)
    assert_equals_the_definition(tensors, multimax, causal=True, bias=bias, bias_place=place)


@pytest.mark.parametrize(("queries", "keys"), [(1, 65), (65, 1), (300, 33), (20, 9000)])
def test_numbers_of_queries_and_keys(multimax, place, queries, keys):
    tensors = qkv(1, 2, queries=queries, keys=keys)
    bias = random(2, queries, keys)
    assert_equals_the_definition(tensors, multimax, causal=True, bias=bias, bias_place=place)


VIEWS = {
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "permuted": lambda t: t.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1, :, :1].expand(2, -1, 9, -1),
    "stride 0": lambda t: t[..., :1].expand(-1, -1, -1, 11),
    "a part": lambda t: torch.cat([t, t], -1)[..., 5:16],
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_bias_that_is_not_contiguous(multimax, place, view):
    bias = VIEWS[view](random(*SHAPE))
    assert not bias.is_contiguous()
    assert_equals_the_definition(qkv(), multimax, bias=bias, bias_place=place)


@pytest.mark.parametrize(
    ("leading", "shape"),
    [
        ((), (9, 11)),
        ((3,), (3, 1, 11)),
        ((2, 2, 3), (3, 9, 11)),
        ((2, 2, 3), (2, 2, 3, 9, 11)),
        ((2, 2, 3), (2, 1, 3, 1, 11)),
        ((2, 2, 3), (2, 1, 9, 1)),
    ],
    ids=str,
)
def test_other_numbers_of_dimensions(multimax, place, leading, shape):
    tensors = [random(*leading, n, dim) for n, dim in ((9, 8), (11, 8), (11, 5))]
    mask = torch.rand(9, 11) < 0.6
    assert_equals_the_definition(tensors, multimax, mask, bias=random(*shape), bias_place=place)


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


def test_no_keys(multimax, place):
    for shape in ((3, 9, 0), (9, 1), (2, 1, 1, 0)):
        options = dict(bias=random(*shape), bias_place=place)
        assert_equals_the_definition(qkv(keys=0), multimax, **options)


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


@pytest.mark.parametrize("shape", [(1, 1, 70, 50), (3, 70, 50), (2, 1, 70, 50), (3, 1, 50), (1,)])
def test_the_same_bits_with_any_number_of_threads_and_every_time(multimax, place, shape):
    tensors, bias = [t.float() for t in qkv(2, 3, queries=70, keys=50)], random(*shape).float()

    def compute():
        torch.manual_seed(3)
        options = dict(dropout=0.2, bias=bias, bias_place=place)
        return attended(tensors, multimax.float(), causal=True, **options)

    first, *others = for_threads(compute)
    for again in others:
        assert_same_bits(again, first)


def test_a_bias_that_needs_no_gradient_changes_no_other(multimax, place):
    tensors, bias = qkv(), random(3, 9, 11)
    *expected, _ = attended(tensors, multimax, bias=bias, bias_place=place)
    inputs = [*(t.requires_grad_() for t in tensors), *multimax.parameters()]
    out = attention(*tensors, multimax, bias=bias, bias_place=place, backend="c")
    upstream = random(*out.shape, generator=torch.Generator().manual_seed(1))
    assert_same_bits([out, *torch.autograd.grad(out, inputs, upstream)], expected)
    bias.requires_grad_()
    of_bias = attended(tensors, multimax, bias=bias, bias_place=place)[-1]
    [t.requires_grad_(False) for t in inputs]
    out = attention(*tensors, multimax, bias=bias, bias_place=place, backend="c")
    assert torch.equal(torch.autograd.grad(out, bias, upstream)[0], of_bias)


def test_the_place_is_nothing_to_an_attention_without_a_bias(multimax, place):
    tensors = qkv()
    assert_same_bits(attended(tensors, multimax, bias_place=place), attended(tensors, multimax))


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


@pytest.mark.parametrize("shape", [(1, 2, 4, 5), (2, 1, 5), (4, 1), ()], ids=str)
@pytest.mark.parametrize("name", ["softmax-learned", "multimax-2-affine"])
def test_first_and_second_derivatives(name, place, shape):
    module, mask = build(name), torch.rand(4, 5) < 0.8
    tensors = [tensor.requires_grad_() for tensor in qkv(1, 2, 4, 5, 3, 2)]

    def function(query, key, value, bias):
        options = dict(bias=bias, bias_place=place, backend="c")
        return attention(query, key, value, module, mask, **options)

    inputs = (*tensors, random(*shape).requires_grad_())
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("learned", [False, True])
def test_compile_to_one_graph(multimax, place, learned):
    torch._dynamo.reset()
    tensors = [tensor.requires_grad_() for tensor in qkv()]
    bias = random(3, 1, 11).requires_grad_(learned)
    inputs = [*tensors, *multimax.parameters(), *[bias] * learned]

    def function(query, key, value, bias):
        return attention(query, key, value, multimax, bias=bias, bias_place=place, backend="c")

    def results(function):
        out = function(*tensors, bias)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(compiled), results(function))


def test_strides_beyond_32_bits(tmp_path, multimax, place):
    """A file of zeros that takes no space, of which two rows lie 2**31 numbers apart."""
    far, query = 2**31 + 64, qkv(1, 2, 1, 11)
    file = tmp_path / "zeros"
    file.touch()
    with file.open("r+b") as opened:
        opened.truncate(4 * (far + 16))
    memory = torch.from_file(str(file), shared=True, size=far + 16)
    bias = memory.as_strided((1, 2, 1, 11), (1, far, 1, 1))
    bias.copy_(torch.randn(bias.shape))
    query = [tensor.float() for tensor in query]
    options = dict(bias_place=place)
    with torch.no_grad():
        found, expected = (
            attention(*query, multimax.float(), bias=b, backend="c", **options)
            for b in (bias, bias.contiguous())
        )
    assert torch.equal(found, expected)


MEMORY = """
import resource
import sys
import torch
from multimax import MultiMax
from multimax.attention import attention

def run(tokens):
    query, key, value = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, tokens).expand(tokens, tokens)  # is read where it is
    learned = torch.randn(tokens, requires_grad=True)
    for bias in (bias, bias.bfloat16()[:1], bias.t(), learned, learned[:, None]):
        attention(query, key, value, MultiMax(), bias=bias, bias_place=sys.argv[1]).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small = run(64)
print(run(4000) - small)
"""


@pytest.mark.slow
def test_a_bias_that_is_broadcast_is_never_expanded_in_memory(place):
    command = [sys.executable, "-c", MEMORY, place]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kibibytes = int(done.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert kibibytes < 20 * 1024  # one fp32 matrix of 4000 x 4000 is 61 MiB
