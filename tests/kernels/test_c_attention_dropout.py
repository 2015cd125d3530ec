"""Dropout inside of the attention kernel, which draws its mask anew in the backward pass."""

import math

import pytest
import torch
from definition import (
    MODULATED,
    assert_equal,
    assert_same_bits,
    attended,
    build,
    qkv,
    random,
)
from kernels_here import needs_kernels
from torch.autograd import grad

from multimax import SoftMax
from multimax.attention import attention

pytestmark = needs_kernels


def factors(query, key, rate, normalizer, seed=7):
    """What dropout multiplies every probability with: the output for the identity as values."""
    keys = key.size(-2)
    value = torch.eye(keys, dtype=key.dtype).expand(*key.shape[:2], keys, keys)
    torch.manual_seed(seed)
    with torch.no_grad():
        dropped = attention(query, key, value, normalizer, dropout=rate, backend="c")
        return dropped / attention(query, key, value, normalizer, backend="eager")


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_entries_are_dropped_independently_at_the_rate(rate):
    query, key, _ = qkv(2, 2, 150, 200)
    found = factors(query, key, rate, SoftMax())
    kept = found > 0
    assert_equal(found[kept], torch.full_like(found[kept], 1 / (1 - rate)))
    noise = (kept.double() - (1 - rate)) / math.sqrt(rate * (1 - rate))
    assert abs(noise.mean().item()) < 5 / math.sqrt(noise.numel())
    for dim, size in enumerate(noise.shape):  # each batch, head, query and key, and the next one
        others = [d for d in range(4) if d != dim]
        assert noise.mean(others).abs().max() < 5 / math.sqrt(noise.numel() / size)
        pairs = noise.narrow(dim, 0, size - 1) * noise.narrow(dim, 1, size - 1)
        assert abs(pairs.mean().item()) < 5 / math.sqrt(pairs.numel())


def test_another_seed_is_another_mask():
    query, key, _ = qkv(2, 2, 150, 200)
    first, second = (factors(query, key, 0.5, SoftMax(), seed) > 0 for seed in (1, 2))
    agreement = (first == second).double().mean().item()
    assert abs(agreement - 0.5) < 5 / math.sqrt(first.numel())


def test_the_seed_of_torch_governs():
    tensors, normalizer = qkv(queries=70), build("multimax-2")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(attended(tensors, normalizer, dropout=0.3))
    found.append(attended(tensors, normalizer, dropout=0.3))
    assert_same_bits(found[0], found[1])
    for other in found[2:]:
        assert not torch.equal(other[0], found[0][0])
    assert not torch.equal(found[2][0], found[3][0])


def test_no_dropout_draws_no_number():
    tensors, normalizer = qkv(), build("multimax-2")
    before = torch.get_rng_state()
    attended(tensors, normalizer)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODULATED)
def test_the_backward_pass_has_the_mask_of_the_forward_pass(name, causal, masked):
    tensors, normalizer = [t.requires_grad_() for t in qkv(2, 2, 70, 33)], build(name)
    query, key, value = tensors
    kept = factors(query, key, 0.3, normalizer) > 0
    mask = torch.rand(70, 33) < 0.8 if masked else torch.ones(70, 33, dtype=torch.bool)
    torch.manual_seed(7)
    given = mask if masked else None
    actual = attention(*tensors, normalizer, given, causal, 0.3, backend="c")
    combined = mask & mask.new_ones(70, 33).tril(33 - 70) if causal else mask
    p = normalizer(query @ key.mT / math.sqrt(8), mask=combined)
    expected = (p * kept / 0.7) @ value
    assert_equal(actual, expected)
    wanted, upstream = [*tensors, *normalizer.parameters()], random(2, 2, 70, 5)
    assert_equal(grad(actual, wanted, upstream), grad(expected, wanted, upstream))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
@pytest.mark.parametrize("backend", ["c", "eager"])
def test_a_rate_out_of_range(rate, backend):
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {rate}"):
        attention(*qkv(), SoftMax(), dropout=rate, backend=backend)
