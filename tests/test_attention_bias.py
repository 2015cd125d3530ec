"""Attention with an additive bias: the definition in plain torch, and its gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from multimax import MultiMax, NormalizerRecorder, SoftMax, build_normalizer, registered_normalizers
from multimax.attention import attention
from multimax.functional import modulate

SHAPE = (2, 3, 5, 7)  # batch, heads, queries, keys
BIASES = {"full": SHAPE, "heads": (3, 5, 7), "keys": (7,), "batch": (2, 1, 1, 7)}
LEARNED = dict(dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def inputs(dtype=torch.float64, **options):
    torch.manual_seed(0)
    shapes = ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6))
    return [torch.randn(*shape, dtype=dtype, **options) for shape in shapes]


def multimax(**options):
    module = MultiMax(**options).double()
    with torch.no_grad():
        module.ts.copy_(torch.randn(module.ts.shape, **LEARNED) / 4)
        module.ranges.copy_(torch.randn(module.ranges.shape, **LEARNED))
    return module


@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("place", ["after", "before"])
def test_softmax_with_a_bias_is_that_of_torch(shape, place):
    query, key, value = inputs()
    bias = torch.randn(shape, dtype=torch.float64)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(SHAPE))
    out = attention(query, key, value, SoftMax(), bias=bias, bias_place=place)
    torch.testing.assert_close(out, expected, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("place", ["after", "before"])
@pytest.mark.parametrize("options", [{}, {"order": 1}, {"order": 3}, {"affine": True}])
def test_the_place_of_the_bias(place, options):
    query, key, value = inputs()
    module, bias = multimax(**options), torch.randn(SHAPE, dtype=torch.float64)
    scores = query @ key.mT / 2
    inside, outside = (bias, 0.0) if place == "before" else (0.0, bias)
    # `affine` starts as the identity.
    modulated = modulate(scores + inside, module.ts, module.ranges) + outside
    expected = modulated.softmax(-1) @ value
    out = attention(query, key, value, module, bias=bias, bias_place=place)
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=1e-13)


def test_a_temperature_divides_the_scores_and_not_a_bias_after_it():
    query, key, value = inputs()
    bias, scores = torch.randn(SHAPE, dtype=torch.float64), query @ key.mT / 2
    for place, logits in {"after": scores / 3 + bias, "before": (scores + bias) / 3}.items():
        out = attention(query, key, value, SoftMax(3.0), bias=bias, bias_place=place)
        torch.testing.assert_close(out, logits.softmax(-1) @ value, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("name", registered_normalizers())
@pytest.mark.parametrize("fill", [-torch.inf, -1e9, -1e4])
@pytest.mark.parametrize("place", ["after", "before"])
def test_a_fill_in_the_bias_masks_as_a_mask_does(name, fill, place):
    query, key, value = inputs()
    torch.manual_seed(1)
    allowed = torch.rand(SHAPE) < 0.6
    allowed[0, 0, 0] = False
    bias = torch.randn(SHAPE, dtype=torch.float64)
    normalizer = build_normalizer(name).double().eval()
    options = {"bias_place": place}
    expected = attention(query, key, value, normalizer, mask=allowed, bias=bias, **options)
    filled = bias.masked_fill(~allowed, fill)
    assert attention(query, key, value, normalizer, bias=filled, **options).equal(expected)
    assert not expected[0, 0, 0].any()


@pytest.mark.parametrize("place", ["after", "before"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_reach_everything(place, causal):
    query, key, value = inputs(requires_grad=True)
    module = multimax()
    bias = torch.randn(3, 5, 7, dtype=torch.float64)
    bias[:, :, 2] = -torch.inf
    bias.requires_grad_()

    def function(query, key, value, bias, ts, ranges):
        scalars = {"ts": ts, "ranges": ranges}
        call = torch.func.functional_call
        return attention(
            query, key, value, _Called(lambda *a, **k: call(module, scalars, a, k)),
            bias=bias, bias_place=place, causal=causal,
        )  # fmt: skip

    arguments = (query, key, value, bias, module.ts, module.ranges)
    finite = bias.detach().clone().nan_to_num(neginf=-1.0).requires_grad_()
    assert torch.autograd.gradcheck(function, (*arguments[:3], finite, *arguments[4:]))
    function(*arguments).sum().backward()
    assert bias.grad[:, :, 2].eq(0).all()
    assert bias.grad.isfinite().all()


class _Called(MultiMax):
    """A normalizer whose scalars are arguments of a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, scores, dim=-1, mask=None, bias=None):
        return self.function(scores, dim=dim, mask=mask, bias=bias)


@pytest.mark.parametrize("name", registered_normalizers())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(name, dtype):
    query, key, value = inputs(dtype)
    bias = torch.randn(SHAPE)
    normalizer = build_normalizer(name).eval()
    out = attention(query, key, value, normalizer, bias=bias)
    wide = attention(query.float(), key.float(), value.float(), normalizer, bias=bias)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wide, atol=0.05, rtol=0.05)


def test_a_recorder_counts_the_bias_as_scores():
    query, key, value = inputs()
    bias, module = torch.randn(SHAPE, dtype=torch.float64), MultiMax(init="identity").double()
    with NormalizerRecorder(module) as biased:
        attention(query, key, value, module, bias=bias)
    with NormalizerRecorder(module) as plain:
        module(query @ key.mT / 2 + bias)
    plain, biased = plain.summary()[""], biased.summary()[""]
    assert biased == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize(
    ("bias", "place", "message"),
    [
        (torch.ones(5, 7, dtype=torch.bool), "after", "boolean mask as `mask`"),
        (torch.ones(7, 5), "after", r"bias of shape \(7, 5\) must broadcast"),
        (torch.ones(1, 2, 3, 5, 7), "after", "must broadcast"),
        (torch.ones(5, 7), "inside", "'after' or 'before', got 'inside'"),
        (torch.ones(5, 7, device="meta"), "after", "bias is on meta"),
    ],
)
def test_a_bad_bias_is_refused(bias, place, message):
    with pytest.raises(ValueError, match=message):
        attention(*inputs(), MultiMax(), bias=bias, bias_place=place)
