"""The steps of `ModulatedSoftMax` around its modulation: soft cap and sink."""

import math

import pytest
import torch

from multimax import (
    MultiMax,
    SoftMax,
    build_normalizer,
    linear_output_loss,
    output_loss,
    use_backend,
)
from multimax.attention import attention
from multimax.functional import modulate

X = torch.tensor([[1.0, -2.0, 3.0, 2.9], [0.5, 0.1, -40.0, 7.0]], dtype=torch.float64)
TS = torch.tensor([0.2, -0.3, -0.1, 0.05], dtype=torch.float64)
RANGES = torch.tensor([0.3, 1.0, -0.2, 0.7], dtype=torch.float64)


def multimax(**options):
    module = MultiMax(**options).double()
    with torch.no_grad():
        module.ts.copy_(TS), module.ranges.copy_(RANGES)
    return module


def test_the_cap_is_on_the_modulated_scores():
    expected = (3 * torch.tanh(X / 0.5 / 3)).softmax(-1)
    torch.testing.assert_close(SoftMax(0.5, softcap=3.0)(X), expected)
    expected = (3 * torch.tanh(modulate(X, TS, RANGES) / 3)).softmax(-1)
    torch.testing.assert_close(multimax(softcap=3.0)(X), expected)


def test_a_sink_takes_its_share():
    for sink in (-1.0, 0.0, 2.5):
        whole = torch.cat([X, torch.full((2, 1), sink, dtype=X.dtype)], -1).softmax(-1)
        for learned in (True, False):
            module = SoftMax(sink=sink, learned_sink=learned).double()
            torch.testing.assert_close(module(X), whole[:, :-1])
            torch.testing.assert_close(module.log_probabilities(X), whole[:, :-1].log())
            assert [n for n, _ in module.named_parameters()] == (["sink"] if learned else [])
    one = X.exp() / (1 + X.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(SoftMax(sink=0, learned_sink=False)(X), one)


@pytest.mark.parametrize("make", [SoftMax, multimax])
def test_limits_are_the_plain_normalizer(make):
    plain = make()
    torch.testing.assert_close(make(softcap=1e9)(X), plain(X))
    torch.testing.assert_close(make(sink=-1e6)(X), plain(X))
    assert make(sink=1e6)(X).eq(0).all()
    assert plain.fusible
    assert not plain.has_steps
    for options in ({"softcap": 1e9}, {"sink": -1e6}):
        assert make(**options).fusible
        assert make(**options).has_steps


@pytest.mark.parametrize("fill", [-math.inf, -1e9, -1e4])
@pytest.mark.parametrize("make", [SoftMax, multimax])
def test_the_cap_lifts_no_mask(make, fill):
    module = make(softcap=2.0, sink=0.5).double()
    x = X.clone()
    x[0, 1] = fill
    x[1] = fill
    x.requires_grad_()
    p = module(x)
    p[0, 0].backward()
    kept = [0, 2, 3]
    torch.testing.assert_close(p[0, kept], module(X[0, kept]))
    assert p[0, 1] == 0
    assert (p[1] == 0).all()
    assert (x.grad[1] == 0).all()
    assert x.grad[0, 1] == 0
    assert module.sink.grad.isfinite()


def test_what_the_kernels_take():
    """Attention in C; neither the rows alone nor an output layer."""
    query, key, value = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    for options in ({"softcap": 1.0}, {"sink": 0.0}, {"length_scale": "modulated"}):
        for name in ("softmax", "multimax"):
            module = build_normalizer(name, **options).double()
            out = attention(query, key, value, module)
            torch.testing.assert_close(out, attention(query, key, value, module, backend="eager"))
            with use_backend("c"), pytest.raises(ValueError, match="'c' cannot compute"):
                module(torch.randn(2, 3))
            if module.sums_to_one:
                loss = linear_output_loss(module, query[0, 0], key[0, 0], torch.arange(5))
                expected = output_loss(module, query[0, 0] @ key[0, 0].mT, torch.arange(5))
                torch.testing.assert_close(loss, expected)
                with use_backend("c"), pytest.raises(ValueError, match="'c' cannot compute linear"):
                    linear_output_loss(module, query[0, 0], key[0, 0], torch.arange(5))


def test_the_cap_keeps_what_the_modulation_masks():
    """A modulated score of -inf would be one of -c, which the limit of a large cap is not."""
    scores = torch.tensor([1.0, 2.0, -8e3], dtype=torch.float64)
    for cap in (1e9, 2.0):
        module = multimax(affine=True, softcap=cap)
        with torch.no_grad():
            module.shift.fill_(-4e3)
        assert module(scores)[2] == 0


def test_what_is_shown():
    options = dict(length_scale="scores", heads=2, softcap=5.0, sink=1.0)
    shown = "temperature=1, length_scale='scores', heads=2, softcap=5, sink=learned"
    assert repr(SoftMax(**options)) == f"SoftMax({shown})"
    assert repr(SoftMax(sink=1.0, learned_sink=False)) == "SoftMax(temperature=1, sink=1.0)"


def test_the_separated_start():
    module = MultiMax(init="separated")
    torch.testing.assert_close(module.ts, torch.tensor([-0.1, -0.1, -0.01, -0.01]))
    assert module.ranges.tolist() == [0, 1, 0, 1]
    assert MultiMax(1, "separated").ranges.tolist() == [0, 1]
    x = torch.tensor([-2.0, 0.5, 3.0])
    expected = torch.tensor([-2 - 0.1 * 2 - 0.01 * 4, 0.5, 3 - 0.1 * 2 - 0.01 * 4])
    torch.testing.assert_close(module.modulate(x), expected)
