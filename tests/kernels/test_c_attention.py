"""Attention on the CPU, a tile at a time, against its eager definition in float64."""

import itertools
import math

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

from multimax.attention import attention

pytestmark = needs_kernels


@pytest.fixture(params=MODULATED)
def normalizer(request, _seed):
    return build(request.param)


@pytest.fixture
def multimax(_seed):
    return build("multimax-2-affine")


def assert_equals_the_definition(tensors, normalizer, mask=None, **options):
    expected = attended(tensors, normalizer, mask, "eager", **options)
    assert_equal(attended(tensors, normalizer, mask, **options), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_every_normalizer(normalizer, causal, masked, scale):
    mask = torch.rand(2, 1, 9, 11) < 0.7 if masked else None
    assert_equals_the_definition(qkv(), normalizer, mask, causal=causal, scale=scale)


@pytest.mark.parametrize("queries", [1, 7, 33, 65, 300])
@pytest.mark.parametrize("keys", [1, 7, 33, 65, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_every_number_of_queries_and_keys(multimax, queries, keys, causal):
    tensors = qkv(batch=1, heads=2, queries=queries, keys=keys)
    mask = torch.rand(queries, keys) < 0.8
    assert_equals_the_definition(tensors, multimax, causal=causal)
    assert_equals_the_definition(tensors, multimax, mask, causal=causal)


@pytest.mark.parametrize("dim", [1, 3, 32, 64, 80, 128, 300])
@pytest.mark.parametrize("value_dim", [1, 16, 80])
def test_every_head_dimension(multimax, dim, value_dim):
    tensors = qkv(queries=70, keys=33, dim=dim, value_dim=value_dim)
    assert_equals_the_definition(tensors, multimax, causal=True)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 1), (4, 2), (6, 3), (20, 20)])
def test_grouped_heads_and_shares_of_the_queries(multimax, batch, heads, key_heads):
    """Few heads are split into shares of their queries: their sums must be put together."""
    tensors = qkv(batch, heads, queries=150, keys=20, key_heads=key_heads)
    mask = torch.rand(batch, heads, 150, 20) < 0.8
    assert_equals_the_definition(tensors, multimax, mask, causal=True)


def test_long_rows(multimax):
    """More keys than fit into a tile of many queries, and than a product takes at once."""
    assert_equals_the_definition(qkv(1, 1, queries=20, keys=9000), multimax, causal=True)


FORMS = [*itertools.product((1, 2), (1, 3), (1, 9), (1, 11)), (11,), (9, 11), (9, 1), ()]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", FORMS, ids=str)
def test_a_mask_of_every_broadcast_form(multimax, shape, causal):
    """A 1 is a dimension of stride 0; where the last is one, whole queries are masked."""
    assert_equals_the_definition(qkv(), multimax, torch.rand(shape) < 0.6, causal=causal)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t[:1, :, :1].expand(2, -1, 9, -1),
        lambda t: t[..., :1].expand(-1, -1, -1, 11),
    ],
    ids=["transposed", "strided", "expanded", "stride 0"],
)
def test_masks_that_are_not_contiguous(multimax, view):
    mask = view(torch.rand(2, 3, 9, 11) < 0.6)
    assert not mask.is_contiguous()
    assert_equals_the_definition(qkv(), multimax, mask)


def test_everything_masked(multimax):
    found = attended(qkv(), multimax, torch.tensor(False))
    assert len(found) == 4 + len(list(multimax.parameters())) > 4
    assert all((tensor == 0).all() for tensor in found)


@pytest.mark.parametrize("form", ["joint", "strided", "expanded"])
def test_tensors_that_are_not_contiguous(multimax, form):
    tensors = list(random(2, 9, 3, 3, 8).permute(3, 0, 2, 1, 4))  # of a joint linear layer
    if form == "strided":
        tensors = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    elif form == "expanded":
        tensors = [t[:1].expand(2, -1, -1, -1) for t in tensors]
    assert not any(tensor.is_contiguous() for tensor in tensors)
    for upstream in (random(2, 9, 3, 8).transpose(1, 2), random(1).expand(2, 3, 9, 8)):
        assert_equals_the_definition(tensors, multimax, causal=True, upstream=upstream)


@pytest.mark.parametrize(
    "shapes",
    [
        [(9, 8), (11, 8), (11, 5)],
        [(3, 9, 8), (3, 11, 8), (3, 11, 5)],
        [(6, 9, 8), (2, 11, 8), (2, 11, 5)],
        [(2, 2, 3, 9, 8), (2, 2, 3, 11, 8), (2, 2, 3, 11, 5)],
        [(2, 2, 4, 9, 8), (2, 2, 2, 11, 8), (2, 2, 2, 11, 5)],
        [(1, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 5)],
        [(2, 3, 9, 8), (1, 3, 11, 8), (1, 3, 11, 5)],
        [(2, 3, 9, 8), (2, 3, 11, 8), (1, 3, 11, 5)],
        [(2, 3, 9, 8), (2, 3, 11, 8), (2, 1, 11, 5)],
        [(2, 3, 9, 8), (2, 1, 11, 8), (2, 3, 11, 5)],
        [(9, 8), (2, 3, 11, 8), (2, 3, 11, 5)],
        [(2, 3, 9, 8), (3, 11, 8), (11, 5)],
        [(2, 1, 3, 9, 8), (1, 4, 3, 11, 8), (4, 3, 11, 5)],
    ],
    ids=str,
)
def test_dimensions_that_are_broadcast(multimax, shapes):
    tensors = [random(*shape) for shape in shapes]
    for mask in (None, torch.rand(9, 11) < 0.6):
        assert_equals_the_definition(tensors, multimax, mask, causal=True)


def test_no_keys(multimax):
    assert_equals_the_definition(qkv(keys=0), multimax)


@pytest.mark.parametrize("index", range(4))
def test_each_gradient_alone(multimax, index):
    expected = attended(tensors := qkv(), multimax)[1:]
    inputs = list(multimax.requires_grad_(index == 3).parameters())
    if index < 3:
        inputs, expected = [tensors[index].requires_grad_()], expected[index : index + 1]
    out = attention(*tensors, multimax, backend="c")
    upstream = random(*out.shape, generator=torch.Generator().manual_seed(1))
    assert_same_bits(torch.autograd.grad(out, inputs, upstream), expected[-len(inputs) :])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # In fp32 one draw in a hundred exceeds 1e-5, on other processors other ones.
    [(torch.float32, 2e-5), (torch.bfloat16, 5e-2), (torch.float16, 2e-3)],
)
def test_precision(normalizer, dtype, tolerance, causal):
    """Halves are computed in fp32: what is left is the rounding of output and gradients.

    The loss is half the square of the output, so that the sums of the scalars do not cancel.
    """
    tensors = [t.to(dtype) for t in qkv(queries=65, keys=70, dim=32, value_dim=32)]
    mask = torch.rand(70) < 0.8
    exactly = [tensor.double() for tensor in tensors]
    upstream, *_ = attended(exactly, normalizer, mask, "eager", causal=causal)
    options = dict(causal=causal, upstream=upstream.to(dtype))
    expected = attended(exactly, normalizer, mask, "eager", **options)
    actual = attended(tensors, normalizer.float(), mask, **options)
    assert all(tensor.dtype == dtype for tensor in actual[:4])
    for result, exact in zip(actual, expected, strict=True):
        assert (result - exact).abs().max() < tolerance * exact.abs().max()


def test_nan_stays_in_its_query(multimax):
    tensors, mask = qkv(), torch.rand(9, 11) < 0.7
    mask[:, 4], mask[3, 5] = False, True
    expected = attended(tensors, multimax, mask)
    tensors[0][0, 1, 3, 2] = math.nan
    out, of_query, of_key, of_value, *_ = attended(tensors, multimax, mask)
    assert out[0, 1, 3].isnan().all()
    assert of_query[0, 1, 3].isnan().all()
    assert of_key[0, 1, mask[3]].isnan().any(-1).all()
    assert (of_value[:, :, 4] == 0).all()  # which no query may attend to
    for found, before in zip((out, of_query), expected[:2], strict=True):
        found[0, 1, 3] = before[0, 1, 3]
        assert torch.equal(found, before)


def test_a_masked_key_may_be_anything(multimax):
    tensors, mask = qkv(), torch.ones(11, dtype=torch.bool)
    mask[4:7] = False
    expected = attended(tensors, multimax, mask)
    tensors[1][:, :, 4:7] = 1e200  # the squares of the scores are infinite
    assert_same_bits(attended(tensors, multimax, mask), expected)
    tensors[1][:, :, 4] = math.nan
    assert torch.equal(attended(tensors, multimax, mask)[0], expected[0])


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_same_bits_with_any_number_of_threads_and_every_time(multimax, heads, dropout):
    tensors = [tensor.float() for tensor in qkv(2, heads, queries=333, keys=70)]

    def compute():
        torch.manual_seed(3)
        return attended(tensors, multimax.float(), causal=True, dropout=dropout)

    first, *others = for_threads(compute)
    for again in others:
        assert_same_bits(again, first)
