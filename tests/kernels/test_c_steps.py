"""Length scale, cap and sink in the attention kernel, against the eager definition in float64."""

import itertools
import math

import pytest
import torch
from definition import assert_equal, assert_same_bits, attended, for_threads, qkv, random
from kernels_here import needs_kernels
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from multimax import MultiMax, SoftMax, use_backend
from multimax.attention import attention
from multimax.functional import MASK_FLOOR
from multimax.kernels.c_attention import attention_definition, c_attention
from multimax.normalizers.steps import allowed_keys

pytestmark = needs_kernels

MODULATIONS = {
    "softmax": lambda **steps: SoftMax(0.7, learned=True, **steps),
    "multimax-1": lambda **steps: MultiMax(1, **steps),
    "multimax-2": lambda **steps: MultiMax(2, affine=True, **steps),
}
STEPS = {
    "scores": {"length_scale": "scores"},
    "modulated": {"length_scale": "modulated", "heads": 4},
    "cap": {"softcap": 1.5},
    "sink": {"sink": 0.3},
    "fixed sink": {"sink": 0.0, "learned_sink": False},
    "scores, all": {"length_scale": "scores", "softcap": 1.5, "sink": 0.3, "heads": 4},
    "modulated, all": {"length_scale": "modulated", "softcap": 1.5, "sink": 0.3},
}
SHAPE = (2, 4, 9, 11)  # batch, heads, queries, keys


def build(modulation="multimax-2", steps="scores, all"):
    """A normalizer in float64 with its scalars moved apart."""
    module = MODULATIONS[modulation](**STEPS[steps]).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def inputs(**options):
    return qkv(**({"heads": 4, "key_heads": 2, "keys": 11} | options))


def assert_equals_the_definition(tensors, normalizer, mask=None, rtol=1e-12, atol=1e-13, **options):
    expected = attended(tensors, normalizer, mask, "eager", **options)
    assert_equal(attended(tensors, normalizer, mask, **options), expected, rtol, atol)


BIASES = {
    "no bias": {},
    "after": {"bias": (4, 9, 11), "bias_place": "after"},
    "before": {"bias": (2, 1, 1, 11), "bias_place": "before"},
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_every_form(modulation, steps, bias):
    """With masks of several forms, of which some leave nothing, and grouped heads."""
    module, options = build(modulation, steps), dict(BIASES[bias])
    if options:
        options["bias"] = random(*options["bias"])
        options["bias"][..., 3] = -math.inf  # masks, and does not count
    for form, causal, scale in (
        (None, False, None),
        (None, True, -0.7),
        ((11,), True, 2.0),
        ((2, 1, 1, 11), False, None),
        (SHAPE, True, None),
        ((9, 1), False, None),
    ):
        mask = None if form is None else torch.rand(form) < 0.7
        assert_equals_the_definition(inputs(), module, mask, causal=causal, scale=scale, **options)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (70, 33), (33, 70), (20, 9000), (5, 0)])
def test_numbers_of_queries_and_keys(queries, keys):
    """Rows of several segments and tiles, shares of the queries, and rows that see no key."""
    tensors, module = inputs(batch=1, queries=queries, keys=keys), build()
    assert_equals_the_definition(tensors, module, causal=True)
    bias = random(4, 1, keys)
    assert_equals_the_definition(tensors, module, causal=True, bias=bias, atol=1e-12)


@pytest.mark.parametrize("leading", [(), (4,), (2, 2, 4)])
def test_other_numbers_of_dimensions(leading):
    tensors = [random(*leading, n, dim) for n, dim in ((9, 8), (11, 8), (11, 5))]
    module = build(steps="scores, all" if leading else "modulated, all")
    for mask in (None, torch.rand(9, 11) < 0.6, torch.rand(*leading, 1, 11) < 0.6):
        assert_equals_the_definition(tensors, module, mask, causal=True, bias=random(1, 11))


@pytest.mark.parametrize("steps", ["sink", "scores, all", "modulated, all"])
@pytest.mark.parametrize("place", ["after", "before"])
def test_everything_masked(steps, place):
    """A row that sees nothing is 0, and leads no gradient anywhere."""
    module = build(steps=steps)
    for options in ({"mask": torch.tensor(False)}, {"bias": torch.full(SHAPE, -math.inf)}):
        found = attended(inputs(), module, bias_place=place, **options)
        assert len(found) > 4
        assert all((tensor == 0).all() for tensor in found)


SPECIAL = [0.5, -math.inf, math.inf, math.nan, MASK_FLOOR, MASK_FLOOR + 1, -6e3, 8e3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", ["scores", "modulated", "cap", "scores, all", "modulated, all"])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_special_scores(modulation, steps, dtype):
    """As in the definition with the same factor: what is masked, what is NaN, and its gradients."""
    module = build(modulation, steps).to(dtype)
    eye = torch.eye(3, dtype=dtype).expand(1, 4, 3, 3)
    query = torch.ones(1, 4, 1, 1, dtype=dtype)
    rows = [((0.3, -0.2, x), 2.0, y) for x, y in itertools.product(SPECIAL, (None, *SPECIAL[:4]))]
    rows += [((x, x, x), factor, None) for x in SPECIAL for factor in (0.5, 2.0)]
    for scores, factor, added in rows:
        module.length_factor = lambda log_length, factor=factor: torch.full_like(log_length, factor)
        bias = None if added is None else torch.tensor([0.1, 0.7, added]).to(dtype)
        key = torch.tensor(scores, dtype=dtype).requires_grad_()
        tensors = (query, key[:, None].expand(1, 4, 3, 1), eye, module)
        for place in ("after", "before"):
            found, expected = (
                attention(*tensors, scale=1.0, bias=bias, bias_place=place, backend=backend)
                for backend in ("c", "eager")
            )
            message = f"{scores} x {factor}, bias {added} {place}: {found}, not {expected}"
            torch.testing.assert_close(found, expected, equal_nan=True, msg=message)
            if not expected.isnan().any():
                assert torch.equal(found == 0, expected == 0), message
                upstream = torch.arange(12, dtype=dtype).reshape(1, 4, 1, 3)
                grads = [torch.autograd.grad(out, key, upstream)[0] for out in (found, expected)]
                torch.testing.assert_close(*grads, msg=f"{message}: gradients {grads}")


def test_a_masked_key_may_be_anything():
    for steps in ("scores, all", "modulated, all"):
        tensors, module = inputs(), build(steps=steps)
        mask = torch.ones(11, dtype=torch.bool)
        mask[4:7] = False
        expected = attended(tensors, module, mask)
        tensors[1][:, :, 4:7] = 1e200
        assert_same_bits(attended(tensors, module, mask), expected)
        tensors[1][:, :, 4] = math.nan
        hidden = torch.zeros(11, dtype=torch.float64).masked_fill(~mask, -math.inf)
        for options in ({"mask": mask}, {"bias": hidden}):
            out, _, _, _, *scalars = attended(tensors, module, **options)[: len(expected)]
            assert_same_bits([out, *scalars], [expected[0], *expected[4:]])


@pytest.mark.parametrize("cap", [0.5, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_accurate_also_near_zero(dtype, cap):
    """Scores from 1e-12 to 40: log of p is the capped score less that of a key of 0."""
    x = torch.logspace(-12, math.log10(40), 400, dtype=torch.float64).to(dtype)
    x = torch.cat([x, -x])
    query = torch.ones(1, 1, 1, 1, dtype=dtype)
    coefficients = torch.tensor([1.0, 0.0], dtype=dtype)
    # A row with one key: log sum exp is its capped score.
    key = x[:, None, None, None]
    query = query.expand(len(x), 1, 1, 1)
    tensors = (query, key, key, coefficients, None, False, 0.0, 1.0)
    _, found = c_attention(*tensors, softcap=cap, with_logsumexp=True)
    exact = cap * torch.tanh(x.double() / cap)
    error = (found.flatten().double() - exact).abs() / exact.abs()
    assert error.max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_factor_and_logsumexp_with_their_gradients(first, causal):
    """Factors of every broadcast form; the gradient of log sum exp adds to that of the result."""
    coefficients = build().coefficients(torch.float64, torch.device("cpu")).detach()
    mask, bias = torch.rand(9, 11) < 0.7, random(1, 4, 9, 11)
    mask[3] = False
    for shape in ((1, 1, 1, 1), (1, 4, 1, 1), (2, 1, 9, 1), (2, 4, 9, 1)):
        leaves = [*inputs(), coefficients, bias, torch.rand(shape).double() + 0.5]
        leaves = [tensor.clone().requires_grad_() for tensor in leaves]
        first_five, factor = leaves[:5], leaves[5]
        options = {"factor": factor, "factor_first": first, "softcap": 2.0, "with_logsumexp": True}
        plain = (mask, causal, 0.0, 0.3)
        found = c_attention(*first_five[:4], *plain, first_five[4], False, **options)
        expected = attention_definition(first_five, mask, (*plain[1:], False), **options)
        assert found[1].shape == SHAPE[:3]
        assert torch.equal(found[1].isneginf(), expected[1].isneginf())
        assert found[1][:, :, 3].isneginf().all()
        upstream = random(*found[0].shape), random(*SHAPE[:3])
        results = []
        for out, total in (found, expected):
            loss = (out * upstream[0]).sum() + (total.clamp_min(-1e9) * upstream[1]).sum()
            results.append([out, total, *torch.autograd.grad(loss, leaves)])
        assert results[0][-1].shape == shape
        assert_equal(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", ["scores, all", "modulated, all"])
@pytest.mark.parametrize("place", ["after", "before"])
def test_first_and_second_derivatives(steps, place):
    module, mask = build("multimax-2", steps), torch.rand(4, 5) < 0.8
    if module.heads:
        module = MultiMax(1, **(STEPS[steps] | {"heads": 2})).double()
    names, scalars = zip(*module.named_parameters(), strict=True)
    tensors = [*qkv(1, 2, 4, 5, 3, 2), random(2, 1, 5), *(s.detach().clone() for s in scalars)]

    def function(query, key, value, bias, *scalars):
        options = dict(bias=bias, bias_place=place, backend="c")
        own = {f"normalizer.{name}": scalar for name, scalar in zip(names, scalars, strict=True)}
        return functional_call(holder, own, (query, key, value, mask), options)

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.normalizer = module

        def forward(self, query, key, value, mask, **options):
            return attention(query, key, value, self.normalizer, mask, **options)

    holder = Holder()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("steps", ["scores, all", "modulated, all"])
def test_dropout_comes_after_the_sink(steps):
    """Kept probabilities are those of the definition over 1 - rate, in both passes."""
    module, rate = build(steps=steps), 0.4
    query, key, _ = inputs(queries=30, keys=20)
    value = torch.eye(20, dtype=torch.float64).expand(2, 2, 20, 20)
    key = key.requires_grad_()
    with torch.no_grad():
        expected = attention(query, key, value, module, causal=True, backend="eager")
    torch.manual_seed(7)
    p = attention(query, key, value, module, causal=True, dropout=rate, backend="c")
    kept = p.detach() > 0
    assert_equal(p.detach(), expected * kept / (1 - rate))
    assert 0.5 < (kept.sum() / (expected > 0).sum()) < 0.7
    whole = attention(query, key, value, module, causal=True, backend="eager") * kept / (1 - rate)
    upstream = random(*p.shape)
    wanted = [key, *module.parameters()]
    pair = (torch.autograd.grad(out, wanted, upstream) for out in (p, whole))
    assert_equal(*pair)


@pytest.mark.parametrize("steps", STEPS)
def test_half_precision(steps):
    """Is computed in fp32, with the dtypes of the inputs for results and gradients."""
    module = build("multimax-1", steps)
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        tensors = [tensor.to(dtype) for tensor in inputs()]
        expected = attended([t.double() for t in tensors], module, None, "eager", causal=True)
        found = attended(tensors, module.float(), causal=True)
        module.double()
        assert all(tensor.dtype == dtype for tensor in found[:4])
        for one, exact in zip(found[:4], expected, strict=False):
            assert (one - exact).abs().max() < tolerance * exact.abs().max()


def test_the_same_bits_with_any_number_of_threads_and_every_time():
    module = build("multimax-2", "modulated, all").float()
    tensors = [tensor.float() for tensor in inputs(queries=333, keys=70)]

    def compute():
        torch.manual_seed(3)
        return attended(tensors, module, causal=True, dropout=0.2, bias=random(70).float())

    torch.manual_seed(0)
    first, *others = for_threads(compute)
    for again in others:
        assert_same_bits(again, first)


@pytest.mark.slow
def test_compile_to_one_graph():
    torch._dynamo.reset()
    module, tensors = build(), [tensor.requires_grad_() for tensor in inputs()]
    mask = torch.rand(2, 1, 1, 11) < 0.8
    wanted = [*tensors, *module.parameters()]

    def function(query, key, value):
        return attention(query, key, value, module, mask, causal=True, backend="c")

    def results(function):
        out = function(*tensors)
        return [out, *torch.autograd.grad(out.square().sum(), wanted)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled), results(function))


def test_lengths_without_a_matrix():
    """Counts equal those of the complete mask, and stay small where that is broadcast."""
    query = torch.zeros(2, 4, 9, 8)
    mask, bias = torch.rand(2, 1, 1, 11) < 0.6, torch.zeros(4, 1, 11)
    bias[torch.rand(4, 1, 11) < 0.3] = -1e4
    triangle = torch.ones(9, 11, dtype=torch.bool).tril(2)
    for given in ((None, None), (mask, None), (None, bias), (mask.expand(2, 4, 9, 11), bias)):
        whole = torch.ones(2, 4, 9, 11, dtype=torch.bool)
        whole = whole if given[0] is None else whole & given[0]
        whole = whole if given[1] is None else whole & (bias > MASK_FLOOR)
        for causal in (False, True):
            expected = (whole & triangle if causal else whole).sum(-1, keepdim=True)
            length = allowed_keys(query, 11, given[0], causal, given[1])
            assert torch.equal(length.expand(2, 4, 9, 1), expected)
            assert length.numel() <= 2 * 4 * (9 if causal else 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": torch.ones(1, 4, 8, 1)}, r"factor must .* broadcast to \(2, 4, 9, 1\), got"),
        ({"factor": torch.ones(9, 1)}, "of shape \\(9, 1\\)"),
        ({"factor": torch.ones(1, 1, 1, 1).bool()}, "got torch.bool"),
        ({"softcap": 0.0}, "softcap must be a positive number or None, got 0.0"),
    ],
)
def test_what_the_kernel_would_misread(options, message):
    coefficients = torch.tensor([1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        c_attention(*inputs(), coefficients, None, False, 0.0, 1.0, **options)


def test_rows_of_explicit_scores_stay_eager():
    for steps in STEPS:
        module, scores = build(steps=steps), random(4, 2, 5)
        with use_backend("c"), pytest.raises(ValueError, match="'c' cannot compute"):
            module(scores)
