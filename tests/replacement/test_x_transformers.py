"""Models of x-transformers with another normalizer."""

import copy
import pickle

import pytest
import torch
from torch import nn

from experiments.drop_in.stirring import stirred
from experiments.drop_in.x_transformers_models import (
    ALIBI,
    BEFORE,
    DECODERS,
    FLASH,
    OTHERS,
    build,
    tokens,
    wrapped,
)
from multimax import MultiMax, replace_softmax, restore_softmax, verify_replacement

x_transformers = pytest.importorskip("x_transformers")

REFUSED = {
    "attn_sparse_topk": (2, "normalizes by sparse_topk_attn"),
    "attn_hard": (True, "one_hot_straight_through"),
    "attn_sigmoid": (True, "normalizes by sigmoid"),
    "attn_gumbel_softmax": (True, "gumbel_softmax"),
    "attn_custom_attn_fn": (nn.Softmax(-1), "normalizes by Softmax, not"),
    "attn_selective": (True, "other queries"),
    "attn_cog_signed": (True, "signs"),
    "attn_head_learned_sink": (True, "learned sink"),
    "attn_softclamp_logits": (True, 'bias_place="before"'),
    "attn_use_cope": (True, 'bias_place="before"'),
    "residual_attn": (True, "scores of a layer to those of the next"),
}


def move(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MultiMax):
                module.ts.copy_(torch.randn(module.ts.shape, generator=generator) / 2)


def sigma(scores, normalizer):
    """The modulation of the paper, in its second order, written again."""
    (b1, d1, b2, d2), (low1, high1, low2, high2) = normalizer.ranges, normalizer.ts
    below1, above1 = (b1 - scores).clamp(0), (scores - d1).clamp(0)
    below2, above2 = (b2 - scores).clamp(0), (scores - d2).clamp(0)
    first = low1 * below1 + high1 * above1
    return scores + first + low2 * below2**2 + high2 * above2**2


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_starts_as_itself_and_comes_back(name):
    model, (x,), inputs = build(name)
    mask = inputs["mask"]
    with torch.no_grad():
        expected = model(x, mask=mask)
    report = replace_softmax(model)
    assert [entry.name for entry in report.attention] == [
        f"attn_layers.layers.{i}.1" for i in (0, 2)
    ]
    verification = verify_replacement(model, x, mask=mask)
    assert max(verification.evaluation, verification.training) < 2e-6
    assert verification.called == verification.normalizers == 2
    assert all(gradient > 0 for gradient in verification.gradients.values())
    again = copy.deepcopy(model)
    move(model)
    with torch.no_grad():
        assert (model(x, mask=mask) - expected).abs().max() > 1e-3
        again.load_state_dict(model.state_dict())
        assert again(x, mask=mask).equal(model(x, mask=mask))
        if "flash" not in name:  # of that, the original cannot be pickled either
            assert pickle.loads(pickle.dumps(model))(x, mask=mask).equal(model(x, mask=mask))
    assert restore_softmax(model) == 2
    with torch.no_grad():
        assert model(x, mask=mask).equal(expected)
    assert not [m for m in model.modules() if hasattr(type(m), "replaced_class")]


@pytest.mark.parametrize("name", OTHERS)
def test_encoders_and_models_of_two_parts(name):
    model, args, kwargs = build(name)
    layers = 3 if name == "XTransformer" else 2
    assert len(replace_softmax(model).attention) == layers
    verification = verify_replacement(model, *args, **kwargs)
    assert max(verification.evaluation, verification.training) < 2e-6
    assert verification.called == layers


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("place", ["after", "before"])
def test_the_bias_is_added_where_it_is_asked_for(flash, place):
    torch.manual_seed(0)
    layer = x_transformers.Attention(
        dim=12, heads=4, kv_heads=2, dim_head=6, causal=True, flash=flash
    )
    layer = stirred(layer.double())
    replace_softmax(layer, bias_place=place)
    move(layer)
    x, bias = torch.randn(2, 7, 12).double(), torch.randn(4, 7, 7).double()
    query, key, value = (
        linear(x).unflatten(-1, (-1, 6)).transpose(1, 2)
        for linear in (layer.to_q, layer.to_k, layer.to_v)
    )
    key, value = key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1)  # x-transformers tiles them
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / 6**0.5
    if place == "before":
        scores = scores + bias
    modulated = sigma(scores, layer.normalizer)
    if place == "after":
        modulated = modulated + bias
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    weights = modulated.masked_fill(future, -torch.inf).softmax(-1)
    expected = layer.to_out((weights @ value).transpose(1, 2).flatten(-2))
    tolerance = 1e-11 if flash else 1e-6  # the other one normalizes in fp32
    out = layer(x, attn_bias=bias)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("options", [ALIBI, FLASH, {**ALIBI, "attn_kv_heads": 2}])
def test_generation_with_a_cache_is_that_without(options):
    model, (x, _) = wrapped(**options), tokens()
    wrapper = x_transformers.AutoregressiveWrapper(model).eval()
    sampling = {"temperature": 0.0}
    original = wrapper.generate(x[:, :3], 8, **sampling)
    replace_softmax(wrapper)
    assert wrapper.generate(x[:, :3], 8, **sampling).equal(original)
    move(wrapper)
    cached = wrapper.generate(x[:, :3], 8, **sampling)
    assert cached.equal(wrapper.generate(x[:, :3], 8, cache_kv=False, **sampling))
    with torch.no_grad():
        whole = model(torch.cat([x[:, :3], cached], 1))[:, 2:-1].argmax(-1)
    assert cached.equal(whole)


@pytest.mark.parametrize("name", ["multimax", "sparsemax", "entmax", "topk"])
@pytest.mark.parametrize("options", [{}, ALIBI, {**ALIBI, **FLASH}])
def test_queries_that_see_nothing_give_no_nan(name, options):
    model = wrapped(cross_attend=True, **options)
    x, mask = tokens(slice(3))  # padded on the left
    context, seen = torch.randn(2, 5, 32), torch.tensor([[True] * 5, [False] * 5])
    inputs = {"mask": mask, "context": context, "context_mask": seen}
    with torch.no_grad():
        expected = model(x, **inputs)
    replace_softmax(model, name, **({"k": 3} if name == "topk" else {}))
    out = model(x, **inputs)
    if name == "multimax":
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_what_a_model_tells_of_its_attention():
    model, (x, mask) = wrapped(**ALIBI), tokens()
    asked = {"mask": mask, "return_attn": True, "return_attn_z_loss": True}
    asked |= {"return_intermediates": True}
    with torch.no_grad():
        _, expected = model(x, **asked)
        replace_softmax(model)
        _, own = model(x, **asked)
        torch.testing.assert_close(own.attn_z_loss, expected.attn_z_loss)
        for ours, theirs in zip(own.attn_intermediates, expected.attn_intermediates, strict=True):
            torch.testing.assert_close(ours.post_softmax_attn, theirs.post_softmax_attn)
            torch.testing.assert_close(ours.pre_softmax_attn, theirs.pre_softmax_attn)


@pytest.mark.parametrize("option", REFUSED)
def test_another_normalization_is_refused_by_name(option):
    value, reason = REFUSED[option]
    model = wrapped(**{option: value})
    with pytest.raises(ValueError, match=reason):
        replace_softmax(model)
    assert not any(isinstance(module, MultiMax) for module in model.modules())


@pytest.mark.parametrize("name", BEFORE)
def test_scores_that_are_read_with_their_bias(name):
    model, args, kwargs = build(name)
    replace_softmax(model, bias_place="before")
    verification = verify_replacement(model, *args, **kwargs)
    assert verification.evaluation < 2e-6
    assert verification.called == 2


def test_what_weighs_layers_is_left_and_told():
    model, (x, mask) = wrapped(integrate_layers=True), tokens()
    report = replace_softmax(model)
    assert {entry.note for entry in report.left} == {"it weighs layers"}
    assert verify_replacement(model, x, mask=mask).evaluation < 2e-6
