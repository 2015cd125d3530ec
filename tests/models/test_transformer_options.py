import math

import pytest
import torch
from tiny_transformers import (
    MULTIMAX,
    PAD,
    SOFTMAX,
    SOURCE_WORDS,
    TINY,
    WORDS,
    draw,
    language_model,
    translation_model,
)

from multimax.models.transformer import LanguageModel


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_acts_in_training_alone(rate):
    tokens, source = draw(), draw(words=SOURCE_WORDS)
    for build, inputs in ((language_model, (tokens,)), (translation_model, (source, tokens))):
        model, plain = build(**{rate: 0.3}), build()
        assert torch.equal(model(*inputs), plain(*inputs))
        assert torch.equal(plain.train()(*inputs), plain.eval()(*inputs))
        model.train()
        assert not torch.equal(model(*inputs), model(*inputs))


def test_embeddings_are_dropped_out():
    tokens = draw(20, 40)
    stack = language_model(dropout=0.3).train().decoder
    embeddings = stack.embed(tokens, tokens != PAD)
    assert (embeddings == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert_dropped(embeddings, stack.eval().embed(tokens, tokens != PAD))


def assert_dropped(found, whole):
    """Of a rate of 0.3: what is left is as much larger, so that the mean is the same."""
    kept = found.abs() > 1e-12
    assert 0.5 < kept.double().mean() < 0.9
    torch.testing.assert_close(found[kept], whole[kept] / 0.7)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_what_dropout_leaves_of_a_layer_keeps_its_mean(pre_norm):
    model = language_model(dropout=0.3, activation_dropout=0.3, pre_norm=pre_norm)
    layer, seen = model.train().decoder.layers[0], {}
    parts = ("self_attn_layer_norm", "self_attn.out_proj", "fc1", "fc2", "final_layer_norm")
    for name in parts:
        layer.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    layer.register_forward_hook(lambda _, inputs, output: seen.update(layer=(inputs[0], output)))
    model(draw(20, 40))
    after_attention = "final_layer_norm" if pre_norm else "self_attn_layer_norm"
    residual = seen[after_attention][0] - seen["layer"][0]
    assert_dropped(residual, seen["self_attn.out_proj"][1])
    hidden = seen["fc1"][1].relu()
    assert_dropped(seen["fc2"][0][hidden > 0], hidden[hidden > 0])
    if pre_norm:
        assert_dropped(seen["layer"][1] - seen["final_layer_norm"][0], seen["fc2"][1])
    else:
        assert_dropped(
            seen["final_layer_norm"][0] - seen["self_attn_layer_norm"][1], seen["fc2"][1]
        )


def test_every_parameter_learns():
    model = translation_model(MULTIMAX, MULTIMAX, tie_embeddings=False, pre_norm=True).train()
    targets = draw(seed=3)
    model.output.loss(model(draw(words=SOURCE_WORDS), draw()), targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # SoftMax does not see a constant that all scores share.
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name
    assert (model.decoder.embed_tokens.weight.grad[PAD] == 0).all()


def test_initialization():
    torch.manual_seed(0)
    options = dict(embed_dim=128, ffn_dim=256, depth=1, num_heads=4)
    model = LanguageModel(500, PAD, **options, attention=SOFTMAX, output=SOFTMAX)
    table = model.decoder.embed_tokens.weight
    assert (table[PAD] == 0).all()
    assert table.std().item() == pytest.approx(128**-0.5, rel=0.02)
    layer = model.decoder.layers[0]
    xavier = math.sqrt(2 / (128 + 128))
    for name, gain in (("q", 0.5**0.5), ("k", 0.5**0.5), ("v", 0.5**0.5), ("out", 1.0)):
        projection = getattr(layer.self_attn, f"{name}_proj")
        assert projection.weight.std().item() == pytest.approx(gain * xavier, rel=0.02)
    assert (layer.self_attn.out_proj.bias == 0).all()
    options = dict(options, attention=SOFTMAX, output=SOFTMAX, tie_embeddings=False)
    projection = LanguageModel(500, PAD, **options).decoder.output_projection.weight
    assert projection.std().item() == pytest.approx(128**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention={"name": "softmix"}), "unknown normalizer 'softmix'; known: softmax"),
        (dict(output={"name": "topk", "q": 3}), "no option q"),
        (dict(num_heads=3), "num_heads=3 does not divide embed_dim=16: use embed_dim=18"),
        (dict(embed_dim=2, num_heads=1), r"embed_dim=2 must be a whole number in \[4, "),
        (dict(depth=0), r"depth=0 must be a whole number in \[1, 1000\]"),
        (dict(ffn_dim=2.5), r"ffn_dim=2.5 must be a whole number in \[1, "),
        (dict(dropout=1.0), r"dropout=1.0 must be a number in \[0, 1\)"),
        (dict(attention_dropout=-0.1), "attention_dropout=-0.1 must be a number in"),
        (
            dict(adaptive_cutoffs=[8, 16], adaptive_dropout=2),
            "adaptive_dropout=2 must be a number in",
        ),
        (dict(adaptive_cutoffs=[16, 8]), "adaptive_cutoffs must rise"),
        (dict(adaptive_cutoffs=[8, 40]), "adaptive_cutoffs must rise"),
        (dict(adaptive_cutoffs=[]), "adaptive_cutoffs must rise"),
        (dict(adaptive_cutoffs=[1, 8]), "padding_index=1 must be in the first band, below 1"),
        (dict(adaptive_cutoffs=[8, 16], adaptive_factor=5), "adaptive_factor=5 leaves no width"),
        (dict(adaptive_cutoffs=[8, 16], tie_embeddings=False), "ties its embeddings"),
        (dict(adaptive_dropout=0.1), "adaptive_dropout=0.1 needs adaptive_cutoffs"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        language_model(**options)


def test_a_padding_index_outside_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match=r"padding_index=5 must be less than 5"):
        LanguageModel(5, 5, depth=1, attention=SOFTMAX, output=SOFTMAX, **TINY)


@pytest.mark.parametrize("token", [-1, WORDS])
def test_a_token_outside_the_vocabulary_is_an_error(token):
    message = f"token {token} is outside the vocabulary of {WORDS}"
    with pytest.raises(ValueError, match=message):
        language_model()(torch.tensor([[2, token]]))
    with pytest.raises(ValueError, match=f"token {SOURCE_WORDS} is outside the vocabulary of"):
        translation_model()(torch.tensor([[2, SOURCE_WORDS]]), draw())


def test_tokens_of_a_wrong_shape_or_dtype_are_errors():
    for wrong in (draw()[0], draw().int(), draw().double()):
        with pytest.raises(ValueError, match="tokens must be int64 of shape"):
            language_model()(wrong)
