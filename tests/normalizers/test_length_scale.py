"""The factor s log(n) on scores or modulated scores, and that of adaptive-scalable entmax."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

from multimax import (
    ASEntMax,
    MultiMax,
    SoftMax,
    build_normalizer,
    entmax15,
    linear_output_loss,
    output_loss,
    registered_normalizers,
)
from multimax.attention import attention
from multimax.functional import modulate

SCALED = [name for name in registered_normalizers() if name != "asentmax"]
REFERENCE = 5


def scaled(name, place="scores", **options):
    options = {"k": 3} | options if name == "topk" else options
    module = build_normalizer(name, length_scale=place, reference_length=REFERENCE, **options)
    return module.double().eval()


def plain(name):
    return build_normalizer(name, **({"k": 3} if name == "topk" else {})).double().eval()


def rows(length):
    return 2 * torch.randn(3, length, dtype=torch.float64)


@pytest.mark.parametrize("place", ["scores", "modulated"])
@pytest.mark.parametrize("name", SCALED)
def test_it_multiplies_the_scores_by_s_log_n(name, place):
    torch.manual_seed(0)
    module = scaled(name, place)
    assert module.log_length_factor.exp().item() == pytest.approx(1 / math.log(REFERENCE))
    torch.manual_seed(0)
    reference = plain(name)
    x = rows(REFERENCE)
    torch.testing.assert_close(module(x), reference(x), rtol=1e-6, atol=1e-7)  # fp32 of the start
    assert module.has_steps
    assert module.fusible == reference.fusible
    assert not reference.has_steps
    with torch.no_grad():
        module.log_length_factor.fill_(math.log(0.3))
    for length in (2, 9):
        x, factor = rows(length), 0.3 * math.log(length)
        if place == "scores":
            expected = reference(factor * x)
        else:
            expected = reference.normalize_modulated(factor * reference.modulate(x))
        torch.testing.assert_close(module(x), expected)
        log_p = module.log_probabilities(x)
        torch.testing.assert_close(log_p.exp(), expected)


@pytest.mark.parametrize(
    ("name", "place"),
    [*((name, "scores") for name in SCALED), ("softmax", "modulated"), ("multimax", "modulated")],
)
def test_only_allowed_entries_count(name, place):
    """Those that are neither masked nor of at most the floor; a causal row counts what it sees."""
    torch.manual_seed(0)
    module, x = scaled(name, place), rows(6)
    mask = torch.tensor([True, True, False, True, True, False])
    expected = module(x[:, mask])
    torch.testing.assert_close(module(x, mask=mask)[:, mask], expected)
    for fill in (-1e4, -1e9, -math.inf, torch.finfo(x.dtype).min):
        filled = x.masked_fill(~mask, fill).requires_grad_()
        p = module(filled)
        torch.testing.assert_close(p[:, mask], expected)
        assert (p[:, ~mask] == 0).all()
        gradients = torch.autograd.grad(p.square().sum(), [filled, module.log_length_factor])
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[0][:, ~mask] == 0).all()
    query = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    value = torch.eye(4, dtype=torch.float64)[None, None]
    p = attention(query, query, value, module, causal=True, scale=1.0)[0, 0]
    for row in range(4):
        seen = (query @ query.mT)[0, 0, row, : row + 1]
        torch.testing.assert_close(p[row, : row + 1], module(seen))


@pytest.mark.parametrize("name", ["softmax", "multimax", "entmax15", "sigmoid"])
def test_a_row_of_one_entry_counts_as_two(name):
    module, x = scaled(name), torch.tensor([[1.5]], dtype=torch.float64)
    factor = math.log(2) / math.log(REFERENCE)
    torch.manual_seed(0)
    expected = torch.ones(1, 1).double() if name != "sigmoid" else (factor * x).sigmoid()
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "softmax", "length_scale": "scores"},
        {"name": "softmax", "length_scale": "modulated", "sink": 0.3, "softcap": 2.0},
        {"name": "multimax", "length_scale": "modulated", "softcap": 4.0, "sink": -0.5},
        {"name": "entmax", "alpha": 1.3, "learned": True, "length_scale": "scores"},
        {"name": "softpick", "length_scale": "scores"},
        {"name": "asentmax"},
    ],
)
def test_every_head_has_its_own_scalars_with_exact_gradients(options):
    module = build_normalizer(**options, heads=2).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    own = [p for n, p in module.named_parameters() if n not in ("ts", "ranges")]
    assert own
    assert all(p.shape == (2,) for p in own)
    x, mask = rows(5).expand(2, 3, 5).clone(), torch.rand(2, 3, 5) < 0.7
    x[1] += torch.randn(3, 5)
    for head in range(2):
        single = build_normalizer(**options).double()
        state = {n: p[head : head + 1] for n, p in module.named_parameters() if p.numel() == 2}
        single.load_state_dict(module.state_dict() | state)
        torch.testing.assert_close(module(x, mask=mask)[head], single(x[head], mask=mask[head]))
    names, values = zip(*module.named_parameters(), strict=True)

    def function(x, *values):
        return functional_call(module, dict(zip(names, values, strict=True)), (x, -1, mask))

    values = [v.detach().clone().requires_grad_() for v in values]
    assert gradcheck(function, (x.requires_grad_(), *values))


@pytest.mark.parametrize("name", ["softmax", "multimax", "topk", "sparsemax", "entmax"])
def test_the_loss_counts_the_allowed_classes(name):
    torch.manual_seed(0)
    module, features = scaled(name), torch.randn(4, 7, dtype=torch.float64)
    weight, target = torch.randn(6, 7, dtype=torch.float64), torch.tensor([0, 1, 3, 4])
    allowed = torch.tensor([True, True, False, True, True, True])
    target_left = torch.tensor([0, 1, 2, 3])
    expected = output_loss(module, (features @ weight.T)[:, allowed], target_left)
    loss = output_loss(module, features @ weight.T, target, class_mask=allowed)
    torch.testing.assert_close(loss, expected)
    linear = linear_output_loss(module, features, weight, target, class_mask=allowed)
    torch.testing.assert_close(linear, expected)
    got = torch.autograd.grad(linear, module.log_length_factor)
    torch.testing.assert_close(got, torch.autograd.grad(expected, module.log_length_factor))


@pytest.mark.parametrize("place", ["after", "before"])
def test_a_bias_after_the_modulation_is_not_scaled(place):
    x, bias = rows(4), rows(4)
    ts, ranges = torch.tensor([-0.3, -0.2]).double(), torch.tensor([0.0, 1.0]).double()
    module = scaled("multimax", "modulated", order=1)
    with torch.no_grad():
        module.ts.copy_(ts), module.ranges.copy_(ranges)
    factor = module.log_length_factor.exp() * math.log(4)
    if place == "after":
        logits = factor * modulate(x, ts, ranges) + bias
    else:
        logits = factor * modulate(x + bias, ts, ranges)
    torch.testing.assert_close(module.biased(x, bias, None, place), logits.softmax(-1))


def test_the_derivative_is_at_the_scores_that_the_modulator_sees():
    module = scaled("multimax", "scores")
    mask = torch.tensor([True, True, True, False])
    x = rows(4)
    factor = module.log_length_factor.detach().exp() * math.log(3)
    torch.manual_seed(0)
    same = MultiMax().double()
    same.load_state_dict({"ts": module.ts, "ranges": module.ranges})
    slope = module.derivative(x, mask=mask)[:, mask]
    torch.testing.assert_close(slope, same.derivative(factor * x)[:, mask])


def test_adaptive_scalable_entmax():
    module = ASEntMax(reference_length=6).double()
    x = rows(6)
    torch.testing.assert_close(module(x), entmax15(x), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        module.log_delta.fill_(math.log(0.7))
        module.log_beta.fill_(math.log(0.4))
        module.gamma.fill_(1.6)
    x = rows(11)
    expected = entmax15((0.7 + 0.4 * math.log(11) ** 1.6) * x)
    torch.testing.assert_close(module(x), expected)


def test_scalable_softmax_keeps_its_largest_probability_in_longer_rows():
    """What it is for: the figure of the paper, one score of 3 among scores of -2."""

    def largest(module, length):
        x = torch.full((length,), -2.0)
        x[-1] = 3.0
        return module(x)[-1].item()

    module = SoftMax(length_scale="scores", reference_length=10)
    with torch.no_grad():
        module.log_length_factor.fill_(math.log(0.43))
    assert largest(SoftMax(), 100_000) < 0.01
    assert largest(module, 100_000) > 0.99
