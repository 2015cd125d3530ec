"""Attention with factors of rows, a cap and a logsumexp by the Triton kernels, in float64."""

import math

import pytest
import torch
from definition import assert_equal, assert_same_bits, attended, qkv, random
from modulators import moved_apart

from multimax import MultiMax, SoftMax
from multimax.attention import attention

pytest.importorskip("triton")

import triton
import triton.language as tl

from multimax.kernels.c_attention import attention_definition
from multimax.kernels.triton_attention import triton_attention
from multimax.kernels.triton_logits import tanh
from multimax.normalizers.steps import left_by_sink

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.slow]

HEADS, QUERIES, KEYS = 2, 17, 9  # two tiles of queries
SCALARS = dict(heads=HEADS, sink=0.3, reference_length=5)
NORMALIZERS = {
    "softmax": lambda: SoftMax(length_scale="scores", **SCALARS),
    "softmax-capped": lambda: SoftMax(0.7, learned=True, softcap=2.5, sink=0.1),
    "softmax-both": lambda: SoftMax(length_scale="scores", softcap=2.5, reference_length=2),
    "multimax-1": lambda: MultiMax(1, affine=True, length_scale="modulated", **SCALARS),
    "multimax-2": lambda: MultiMax(affine=True, length_scale="scores", softcap=3.0, **SCALARS),
    "multimax-2-last": lambda: MultiMax(length_scale="modulated", softcap=2.0, heads=HEADS),
}


def build(name):
    return moved_apart(NORMALIZERS[name]())


def inputs(device, batch=1, **sizes):
    sizes = dict(heads=HEADS, queries=QUERIES, keys=KEYS, dim=8, value_dim=8, key_heads=1) | sizes
    query, *others = (tensor.to(device) for tensor in qkv(batch, **sizes))
    return [2 * query, *others]


def fused(
    tensors, module, mask=None, causal=False, bias=None, place="after", scale=None, seen=None
):
    """Attention by the kernels; `seen` is in the place of the number of keys that are allowed."""
    options = dict(mask=mask, causal=causal, bias=bias, scale=scale)
    if seen is None:
        return attention(*tensors, module, **options, bias_place=place, backend="triton")
    lengths = torch.full((1, HEADS, tensors[0].size(2), 1), seen).to(tensors[0])
    steps = {"factor_first": module.length_scale == "scores", "softcap": module.softcap}
    steps["factor"] = module.length_factor(lengths.log())
    coefficients = module.coefficients(tensors[0].dtype, tensors[0].device)
    found = triton_attention(
        *tensors, coefficients, **options, **steps, with_logsumexp=module.sink is not None
    )
    return left_by_sink(module, *found) if module.sink is not None else found


def with_gradients(tensors, module, bias=None, **options):
    """As `attended`, for `fused`."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    of_bias = [] if bias is None else [bias.detach().requires_grad_()]
    out = fused(leaves, module, bias=of_bias[0] if of_bias else None, **options)
    upstream = random(*out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    wanted = [*leaves, *module.parameters(), *of_bias]
    return out.detach(), *torch.autograd.grad(out, wanted, upstream)


@triton.jit
def tanh_of(x, y, size: tl.constexpr):
    places = tl.arange(0, size)
    tl.store(y + places, tanh(tl.load(x + places)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh(dtype, device):
    """Three roundings off at most, also near 0, and where 1 - 2 / (exp(2 x) + 1) takes over."""
    sizes = [torch.logspace(-30, 2, 256), torch.linspace(0.2, 1, 255), torch.tensor([math.inf])]
    x = torch.cat([torch.cat(sizes), -torch.cat(sizes)]).to(device, dtype)
    found = torch.empty_like(x)
    tanh_of[(1,)](x, found, x.numel())
    expected = x.double().tanh()
    assert ((found.double() - expected) / expected).abs().max() <= 3 * torch.finfo(dtype).eps
    x = torch.tensor([0.0, math.nan], device=device, dtype=dtype)
    tanh_of[(1,)](x, found, 2)
    assert found[0] == 0
    assert found[1].isnan()


@pytest.mark.parametrize(
    ("name", "shape", "place", "causal"),
    [
        ("softmax", None, "after", True),
        ("softmax-capped", (HEADS, QUERIES, KEYS), "before", False),
        ("multimax-1", (1, 1, KEYS), "after", False),
        ("multimax-2", (HEADS, QUERIES, KEYS), "before", True),
        ("multimax-2-last", (1, QUERIES, 1), "after", True),
    ],
)
def test_normalizers_with_steps(name, shape, place, causal, device):
    """Output and gradients, of what the factors are made of too, with a row that sees nothing."""
    module, mask = build(name).to(device), torch.rand(QUERIES, KEYS, device=device) < 0.7
    mask[3] = False
    bias = None
    if shape is not None:
        bias = random(1, *shape).to(device)
        bias[..., 0] = -math.inf  # whole queries if all keys have the same bias
    options = dict(mask=mask, causal=causal, bias=bias)
    tensors = inputs(device)
    found = with_gradients(tensors, module, place=place, **options)
    assert_equal(found, attended(tensors, module, backend="eager", bias_place=place, **options))
    for tensor in found[:2]:
        assert (tensor[:, :, 3] == 0).all()


@pytest.mark.parametrize(
    ("shape", "order", "first", "softcap", "learned"),
    [
        ((1, 1, 1, 1), 0, True, None, False),
        ((1, HEADS, QUERIES, 1), 2, False, 3.0, False),
        ((2, HEADS, QUERIES, 1), 1, True, 3.0, True),
        (None, 2, False, None, True),
    ],
)
def test_shapes_of_factors_and_the_logsumexp(shape, order, first, softcap, learned, device):
    tensors = inputs(device, batch=2)
    c = 0.3 * random(2 + 4 * order).to(device)
    c[0] += 1
    factor = None if shape is None else 0.6 + torch.rand(shape, dtype=c.dtype, device=device)
    leaves = [t if t is None else t.requires_grad_() for t in (*tensors, c, None, factor)]
    c.requires_grad_(learned)
    steps = (first, softcap, True)
    found = triton_attention(*leaves[:4], None, True, 0.0, 0.4, None, False, factor, *steps)
    expected = attention_definition(leaves[:5], None, (True, 0.0, 0.4, False), factor, *steps)
    assert_equal(found, expected)
    upstream, wanted = [], [t for t in leaves if t is not None and t.requires_grad]
    for tensor in found:  # the first rows see nothing
        upstream.append(torch.randn_like(tensor))
        assert (tensor[:, :, : QUERIES - KEYS] == (0.0 if tensor.dim() == 4 else -math.inf)).all()
    wrong = [tensor.clone() for tensor in upstream]
    wrong[1][:, :, : QUERIES - KEYS] = math.nan  # as of a difference of two of -inf
    gradients = torch.autograd.grad(found, wanted, wrong)
    assert_equal(gradients, torch.autograd.grad(expected, wanted, upstream))


def test_dropout(device):
    """It is of the output alone: the logsumexp is that of all keys."""
    query, key, value = (t.requires_grad_() for t in inputs(device, keys=8))
    factor = 0.6 + torch.rand(1, HEADS, QUERIES, 1, dtype=torch.float64, device=device)
    leaves = [query, key, value, torch.tensor([0.9, 0.0]).to(query), factor.requires_grad_()]
    identity = torch.eye(8, dtype=torch.float64, device=device).expand_as(key)

    def dropped(content, dropout=0.25):
        torch.manual_seed(3)
        options = (None, False, dropout, None, None, False, factor, True, 2.0, True)
        return triton_attention(query, key, content, leaves[3], *options)

    (whole, logsumexp), kept = dropped(identity, 0.0), dropped(identity)[0] != 0
    found, expected = dropped(value), ((whole * kept * 4 / 3) @ value, logsumexp)
    assert 0.6 < kept.double().mean() < 0.9
    upstream = [torch.randn_like(tensor) for tensor in found]
    wanted = [query, key, value, factor]
    gradients = [torch.autograd.grad(pair, wanted, upstream) for pair in (found, expected)]
    assert_equal([*found, *gradients[0]], [*expected, *gradients[1]])


@pytest.mark.parametrize(
    ("name", "low", "seen"),
    [
        ("softmax", -15e3, 3),
        ("softmax", -8e3, 4),
        ("softmax-capped", -15e3, None),
        ("softmax-both", -8e3, 4),
        ("multimax-1", -8e3, 3),
        ("multimax-2", -15e3, 3),
        ("multimax-2", -8e3, 4),
    ],
)
def test_what_factors_and_caps_could_lift_is_masked(name, low, seen, device):
    """Scores of at most the floor that come in or are modulated; rows of NaN and inf are NaN."""
    module = build(name).to(device)
    if getattr(module, "affine", False):
        torch.nn.init.constant_(module.scale, 1.3)
    if module.length_scale:  # factors below or above 1
        torch.nn.init.constant_(module.log_length_factor, -1.2 if low == -15e3 else 0.7)
    tensors = [tensor.to(device) for tensor in qkv(1, HEADS, 6, 4, dim=1, value_dim=1)]
    tensors[0].fill_(1.0)
    tensors[1][..., 3, :] = low
    tensors[0][0, 1, 2], tensors[0][0, 1, 4] = math.nan, -math.inf  # inf times a key of -8e3
    found = with_gradients(tensors, module, scale=1.0, seen=seen)
    expected = attended(tensors, module, backend="eager", scale=1.0)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12, equal_nan=True)
    assert found[0].isnan().sum() == 2
    for actual, wanted in zip(found[1:4], expected[1:4], strict=True):
        assert_equal(actual[0, 0], wanted[0, 0])


def test_second_derivatives_are_those_of_the_definition(device):
    module = build("multimax-2").to(device)
    tensors = [t.requires_grad_() for t in inputs(device, queries=5, keys=4)]
    leaves, results = [*tensors, *module.parameters()], []
    eager = attention(*tensors, module, causal=True, backend="eager")
    for output in (fused(tensors, module, causal=True), eager):
        first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert_equal(*results)


def test_compile_to_one_graph(device):
    module = build("multimax-2").to(device)
    tensors = [t.requires_grad_() for t in inputs(device, queries=5, keys=4)]
    leaves, results = [*tensors, *module.parameters()], []
    for function in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        output = function(tensors, module)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert_equal(*results)


def test_lower_precision(device):
    """Gradients of scalars and factors are sums in fp32 of products that fp16 does not round."""
    tensors = [t.half().requires_grad_() for t in inputs(device, queries=40, keys=33, heads=1)]
    c = torch.tensor([1.0, 0.1, -0.2, 0.1, 0.5, 0.6], device=device, requires_grad=True)
    factor = (0.6 + torch.rand(1, 1, 40, 1, device=device)).requires_grad_()
    options, steps = (None, False, 0.0, 0.3, None, False), (True, 3.0, True)
    leaves = [*tensors, c, factor]
    found = triton_attention(*tensors, c, *options, factor, *steps)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = attention_definition(
        [*exact[:4], None], None, (False, 0.0, 0.3, False), exact[4], *steps
    )
    upstream = [torch.randn_like(tensor) for tensor in found]
    gradients = torch.autograd.grad(found, leaves, upstream)
    wanted = torch.autograd.grad(expected, exact, [t.double() for t in upstream])
    for actual, exact_one in zip((*found, *gradients), (*expected, *wanted), strict=True):
        error = torch.dist(actual.double(), exact_one) / exact_one.norm()
        assert error < (1e-3 if actual.dtype == torch.half else 1e-6)


def test_a_logsumexp_leaves_the_output_alone(device):
    tensors = inputs(device, queries=5, keys=4)
    c = torch.tensor([0.8, 0.0], dtype=torch.float64, device=device)
    output, logsumexp = triton_attention(*tensors, c, with_logsumexp=True)
    assert_same_bits([output], [triton_attention(*tensors, c)])
    scores = tensors[0] @ tensors[1].transpose(2, 3) / math.sqrt(8)
    assert_equal(logsumexp, (0.8 * scores).logsumexp(-1))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("factor must be floating-point of four", {"factor": torch.ones(1, 2, 5)}),
        (r"broadcast to \(1, 2, 5, 1\)", {"factor": torch.ones(1, 2, 1, 4)}),
        ("in torch.int64", {"factor": torch.ones(1, 2, 5, 1, dtype=torch.int64)}),
        ("on meta", {"factor": torch.ones(1, 2, 5, 1, device="meta")}),
        ("softcap must be a positive number", {"softcap": 0.0}),
    ],
)
def test_errors_say_what_is_wrong(message, arguments, device):
    tensors = inputs(device, queries=5, keys=4)
    with pytest.raises(ValueError, match=message):
        triton_attention(*tensors, torch.ones(2).to(tensors[0]), **arguments)
