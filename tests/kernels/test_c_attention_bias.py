"""Attention with a bias by the C kernel, against its eager definition in float64."""

import itertools
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    "overlapping": lambda t: t.flatten()[:40].as_strided((3, 9, 11), (10, 1, 1)),
    "sizes of 1": lambda t: t.flatten()[:200].as_strided((1, 1, 9, 11), (7, 5, 13, 1)),
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


def test_no_keys(multimax, place):
    for shape in ((3, 9, 0), (9, 1), (2, 1, 1, 0)):
        options = dict(bias=random(*shape), bias_place=place)
        assert_equals_the_definition(qkv(keys=0), multimax, **options)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
import torch
from multimax import MultiMax
from multimax.attention import attention

def run(tokens):
    query, key, value = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, tokens).expand(tokens, tokens)  # is read where it is
    learned = torch.randn(tokens, requires_grad=True)
    for bias in (bias, bias.bfloat16()[:1], bias.t(), learned, learned[:, None]):
        for place in ("after", "before"):
            out = attention(query, key, value, MultiMax(), bias=bias, bias_place=place)
            out.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small = run(64)
print(run(4000) - small)
"""


@pytest.mark.slow
def test_a_bias_that_is_broadcast_is_never_expanded_in_memory():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kibibytes = int(done.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert kibibytes < 20 * 1024  # one fp32 matrix of 4000 x 4000 is 61 MiB
