import math

import pytest
import torch
import torch.nn.functional as F

from multimax import MultiMax, SoftMax
from multimax.attention import attention
from multimax.functional import causal_mask


@pytest.fixture
def qkv(_seed):
    shapes = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.fixture
def mask(_seed):
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_is_scaled_dot_product_attention(qkv, mask, scale, causal, masked):
    # Two more keys than queries: the first query sees keys 0, 1, 2 and the last sees all.
    seen = torch.arange(7) <= torch.arange(5)[:, None] + 2
    attended = {(0, 0): None, (0, 1): seen, (1, 0): mask, (1, 1): mask & seen}[masked, causal]
    output = attention(*qkv, SoftMax(), mask if masked else None, causal, scale=scale)
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=attended, scale=scale)
    torch.testing.assert_close(output, expected)
    vector = torch.randn_like(output)
    gradients = [torch.autograd.grad((o * vector).sum(), qkv) for o in (output, expected)]
    for gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_causal_with_as_many_keys_as_queries(qkv):
    query, _, _ = qkv
    output = attention(query, query, query, SoftMax(), causal=True)
    expected = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("queries", [1, 3, 7, 9])
def test_causal_mask_ends_at_the_last_key(queries):
    mask = causal_mask(queries, 7)
    assert mask.shape == (queries, 7)
    assert mask.sum(-1).tolist() == [max(7 - queries + i + 1, 0) for i in range(queries)]
    assert (mask[-1]).all()


def test_one_query_at_a_time_equals_all_at_once(normalizer, qkv):
    """Incremental decoding: query i with the keys up to i."""
    query, key, value = (t[..., :5, :].float() for t in qkv)
    together = attention(query, key, value, normalizer, causal=True)
    for i in range(5):
        step = attention(
            query[..., i : i + 1, :],
            key[..., : i + 1, :],
            value[..., : i + 1, :],
            normalizer,
            causal=True,
        )
        torch.testing.assert_close(step, together[..., i : i + 1, :], atol=1e-5, rtol=1e-4)


def test_order_is_scale_modulate_mask(qkv, mask):
    module = MultiMax().double()
    torch.nn.init.constant_(module.ts, 0.3)
    query, key, value = qkv
    scores = query @ key.transpose(-2, -1) / math.sqrt(8)
    modulated = module.modulate(scores).masked_fill(~mask, -math.inf)
    expected = torch.softmax(modulated, -1) @ value
    torch.testing.assert_close(attention(*qkv, module, mask), expected)


def test_a_query_that_may_attend_to_nothing_gets_zeros(normalizer, qkv, mask):
    mask[0, 0, 3] = False
    output = attention(*qkv, normalizer.double(), mask)
    assert (output[0, :, 3] == 0).all()
    assert (output[1, :, 3] != 0).any()
    gradients = torch.autograd.grad(output.square().sum(), qkv)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][0, :, 3] == 0).all()


def test_gradients_that_keep_their_graph_are_the_same(normalizer, qkv, mask):
    """A kernel's backward is then another: `gradgradcheck` compares it with itself alone."""
    out = attention(*qkv, normalizer.double(), mask)
    inputs, vector = [*qkv, *normalizer.parameters()], torch.randn_like(out)
    plain = torch.autograd.grad((out * vector).sum(), inputs, retain_graph=True)
    kept = torch.autograd.grad((out * vector).sum(), inputs, create_graph=True)
    torch.testing.assert_close(kept, plain)


def test_more_queries_than_keys_leaves_the_first_with_nothing(qkv):
    query, key, value = qkv
    output = attention(query, key[..., :2, :], value[..., :2, :], SoftMax(), causal=True)
    assert (output[..., :3, :] == 0).all()
    torch.testing.assert_close(output[..., 3, :], value[..., 0, :])


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_dropout(qkv, backend):
    query, key, value = (t[:1, :1].detach() for t in qkv)
    expected = attention(query, key, value, SoftMax(), backend=backend)
    without = attention(query, key, value, SoftMax(), dropout=0.0, backend=backend)
    assert torch.equal(without, expected)
    many = query.expand(20_000, 1, -1, -1)
    samples = attention(many, key, value, SoftMax(), dropout=0.4, backend=backend)
    assert not torch.equal(samples[0], samples[1])
    error = samples.std(0) / math.sqrt(20_000)
    assert ((samples.mean(0) - expected[0]).abs() < 5 * error).all()


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_dropout_drops_probabilities_after_they_are_normalized(backend):
    """With a single key, a row of the output is value / (1 - dropout) or 0, not a mixture."""
    value = torch.tensor([[3.0, 6.0]])
    query, key = torch.ones(500, 1), torch.ones(1, 1)
    output = attention(query, key, value, SoftMax(), dropout=0.25, backend=backend)
    assert output.unique(dim=0).tolist() == [[0.0, 0.0], [4.0, 8.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_dtype(normalizer, qkv, dtype):
    assert attention(*(t.to(dtype) for t in qkv), normalizer).dtype == dtype


def test_an_additive_mask_is_an_error(qkv):
    with pytest.raises(ValueError, match="mask must be boolean"):
        attention(*qkv, SoftMax(), mask=torch.zeros(5, 7))
