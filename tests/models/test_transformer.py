import math

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import (
    MAPPINGS,
    MULTIMAX,
    PAD,
    SOFTMAX,
    SOURCE_WORDS,
    WORDS,
    close,
    draw,
    language_model,
    translation_model,
)
from torch import nn

from multimax.losses import output_loss
from multimax.models.positions import SinusoidalPositions


def to_torch_layer(ours, theirs):
    """Copy a layer's weights to torch's own layer of the same kind."""
    state = {}
    pairs = [("self_attn", "self_attn", "norm1", "self_attn_layer_norm")]
    if ours.encoder_attn is not None:
        pairs.append(("encoder_attn", "multihead_attn", "norm2", "encoder_attn_layer_norm"))
    pairs.append((None, None, f"norm{len(pairs) + 1}", "final_layer_norm"))
    for attention, target, norm, own_norm in pairs:
        for kind in ("weight", "bias"):
            state[f"{norm}.{kind}"] = getattr(getattr(ours, own_norm), kind)
            if attention is not None:
                part = getattr(ours, attention)
                projections = [getattr(getattr(part, f"{p}_proj"), kind) for p in "qkv"]
                state[f"{target}.in_proj_{kind}"] = torch.cat(projections)
                state[f"{target}.out_proj.{kind}"] = getattr(part.out_proj, kind)
    for kind in ("weight", "bias"):
        state[f"linear1.{kind}"] = getattr(ours.fc1, kind)
        state[f"linear2.{kind}"] = getattr(ours.fc2, kind)
    theirs.load_state_dict(state)
    return theirs.eval()


def embedded(stack, tokens):
    """The input of the first layer, written out token by token."""
    rows = []
    for row in tokens.tolist():
        position = PAD
        for token in row:
            x = math.sqrt(16) * stack.embed_tokens.weight[token]
            if token != PAD:
                position += 1
                rates = [math.exp(-math.log(10000) * i / 7) for i in range(8)]
                angles = [position * rate for rate in rates]
                wave = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                x = x + torch.tensor(wave, dtype=torch.float64)
            rows.append(x)
    return torch.stack(rows).view(*tokens.shape, 16)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_softmax_is_the_transformer_of_torch(pre_norm):
    model = translation_model(pre_norm=pre_norm)
    source, target = draw(words=SOURCE_WORDS), draw(length=5)
    source[0, 4:] = PAD
    source[1, :2] = PAD
    sizes = dict(d_model=16, nhead=4, dim_feedforward=24, dropout=0.0, batch_first=True)
    sizes |= dict(norm_first=pre_norm, dtype=torch.float64)
    padding = source == PAD
    x = embedded(model.encoder, source)
    for layer in model.encoder.layers:
        layer = to_torch_layer(layer, nn.TransformerEncoderLayer(**sizes))
        x = layer(x, src_key_padding_mask=padding)
    x = model.encoder.layer_norm(x) if pre_norm else x
    y = embedded(model.decoder, target)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for layer in model.decoder.layers:
        layer = to_torch_layer(layer, nn.TransformerDecoderLayer(**sizes))
        y = layer(y, x, tgt_mask=future, memory_key_padding_mask=padding)
    y = model.decoder.layer_norm(y) if pre_norm else y
    features = model(source, target)
    torch.testing.assert_close(features, y, rtol=0, atol=1e-6)  # positions are fp32
    close(model.output.scores(features), features @ model.decoder.embed_tokens.weight.t())


def test_positions_skip_padding_and_never_end():
    positions = SinusoidalPositions(8, PAD)
    tokens = torch.tensor([[1, 1, 5, 6], [5, 6, 1, 7]])
    embeddings = positions(tokens != PAD, 4)
    assert (embeddings[tokens == PAD] == 0).all()
    assert torch.equal(embeddings[0, 2:], embeddings[1, :2])
    expected = [
        f(2 * math.exp(-math.log(10000) * i / 3)) for f in (math.sin, math.cos) for i in range(4)
    ]
    torch.testing.assert_close(embeddings[1, 0], torch.tensor(expected))
    token_mask = torch.ones(1, 3000, dtype=torch.bool)
    assert torch.equal(positions(token_mask, 3000)[:, :2], embeddings[1:, :2])
    assert torch.equal(positions(token_mask, 1), positions(token_mask, 3000)[:, -1:])


@pytest.mark.parametrize("name", MAPPINGS)
def test_the_future_does_not_influence_the_past(name):
    for model, source in (
        (language_model(MAPPINGS[name], MAPPINGS[name]), ()),
        (translation_model(MAPPINGS[name], MAPPINGS[name]), (draw(words=SOURCE_WORDS),)),
    ):
        tokens = draw()
        features = model(*source, tokens)
        tokens[:, 3] = (tokens[:, 3] - 2 + 5) % (WORDS - 2) + 2
        changed = model(*source, tokens)
        close(changed[:, :3], features[:, :3])
        assert ((changed - features)[:, 3:].abs().amax(-1) > 1e-9).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPPINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_influences_nothing(name, side):
    def pad(tokens, count):
        return F.pad(tokens, (count, 0) if side == "left" else (0, count), value=PAD)

    def real(features, count):
        return features[:, count:] if side == "left" else features[:, :-count]

    model = translation_model(MAPPINGS[name])
    source, target = draw(words=SOURCE_WORDS), draw(length=5)
    features = model(source, target)
    close(model(pad(source, 3), target), features)
    close(real(model(source, pad(target, 2)), 2), features)
    # Sentences of different lengths in one batch are what they are alone.
    mixed = torch.cat([pad(source[:1, :4], 2), source[1:]])
    close(model(mixed, target)[:1], model(source[:1, :4], target[:1]))
    close(model(mixed, target)[1:], features[1:])


def test_loss_ignores_padding_and_only_padding():
    model = language_model()
    features, targets = model(draw()), draw(seed=3)
    log_probabilities = model.output.log_probabilities(features)
    expected = -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    close(model.output.loss(features, targets, reduction="none"), expected)
    targets[0, 2:] = PAD
    expected[0, 2:] = 0
    close(model.output.loss(features, targets, reduction="none"), expected)
    close(model.output.loss(features, targets), expected.sum() / 14)
    ignored = model.output.loss(
        features, targets, ignore_index=int(targets[2, 1]), reduction="none"
    )
    assert ignored[0, 2:].min() > 0
    assert ignored[2, 1] == 0


@pytest.mark.parametrize("name", MAPPINGS)
def test_output_layer_is_the_normalizer_of_the_scores(name):
    model = language_model(output=MAPPINGS[name])
    features, targets = 5 * model(draw()), draw(seed=3)
    scores = model.output.scores(features)
    probabilities = model.output.probabilities(features)
    assert torch.equal(probabilities, model.output.normalizer(scores))
    close(probabilities.sum(-1), torch.ones(3, 6, dtype=torch.float64))
    log_probabilities = model.output.log_probabilities(features)
    close(log_probabilities.exp(), probabilities)
    assert ((log_probabilities == -math.inf) == (probabilities == 0)).all()
    sparse = name not in ("softmax", "multimax")
    assert (probabilities == 0).any() == model.output.sparse == sparse
    expected = output_loss(model.output.normalizer, scores, targets, label_smoothing=0.1)
    close(model.output.loss(features, targets, label_smoothing=0.1), expected)


def test_log_probabilities_of_softmax_do_not_underflow():
    model = language_model().float()
    features = 1e4 * model(draw())
    assert (model.output.probabilities(features) == 0).any()
    assert model.output.log_probabilities(features).isfinite().all()


@pytest.mark.parametrize("name", MAPPINGS)
def test_half_precision_is_normalized_in_single(name):
    model = language_model(MAPPINGS[name], MAPPINGS[name]).bfloat16()
    features = model(draw())
    assert features.dtype == torch.bfloat16
    assert model.output.log_probabilities(features).dtype == torch.float32
    assert model.output.loss(features, draw(seed=3)).dtype == torch.float32


@pytest.mark.parametrize("adaptive_cutoffs", [None, [8, 16]])
def test_identity_multimax_is_softmax_exactly(adaptive_cutoffs):
    identity = {"name": "multimax", "init": "identity"}
    options = dict(adaptive_cutoffs=adaptive_cutoffs, adaptive_factor=2)
    tokens = draw()
    plain, zero = language_model(**options), language_model(identity, identity, **options)
    assert torch.equal(plain(tokens), zero(tokens))
    features = plain(tokens)
    assert torch.equal(plain.output.probabilities(features), zero.output.probabilities(features))
    assert torch.equal(plain.output.loss(features, tokens), zero.output.loss(features, tokens))
    source = draw(words=SOURCE_WORDS)
    plain, zero = translation_model(), translation_model(identity, identity)
    assert torch.equal(plain(source, tokens), zero(source, tokens))


def adaptive_model(attention=SOFTMAX, output=SOFTMAX):
    return language_model(attention, output, adaptive_cutoffs=[8, 16], adaptive_factor=2)


@pytest.mark.parametrize("build", [language_model, adaptive_model, translation_model])
def test_models_that_differ_in_the_normalizer_alone_are_pairs(build):
    expected = dict(build().named_parameters())
    following = torch.rand(1)
    for mapping in MAPPINGS.values():
        others = dict(build(mapping, mapping).named_parameters())
        assert torch.rand(1) == following  # so are their dropout and what else they draw
        assert all(torch.equal(others[name], value) for name, value in expected.items())
        assert all("normalizer" in name for name in set(others) - set(expected))


def test_each_attention_has_its_own_normalizer():
    model = translation_model(MULTIMAX, MULTIMAX)
    names = {name for name, _ in model.named_parameters() if name.endswith(".ts")}
    layers = [f"encoder.layers.{i}.self_attn" for i in (0, 1)]
    layers += [
        f"decoder.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "encoder_attn")
    ]
    assert names == {f"{layer}.normalizer.ts" for layer in [*layers, "decoder.output_projection"]}
    parameters = dict(model.named_parameters())
    assert all(parameters[name].numel() == 4 for name in names)
    assert len({tuple(parameters[name].tolist()) for name in names}) == 7


@pytest.mark.slow
@pytest.mark.parametrize("place", ["encoder_attention", "decoder_attention", "cross_attention"])
def test_attention_switches(place):
    model = translation_model(**{place: {"name": "sparsemax"}})
    kinds = {
        "encoder_attention": {
            type(la.self_attn.normalizer).__name__ for la in model.encoder.layers
        },
        "decoder_attention": {
            type(la.self_attn.normalizer).__name__ for la in model.decoder.layers
        },
        "cross_attention": {
            type(la.encoder_attn.normalizer).__name__ for la in model.decoder.layers
        },
    }
    assert kinds.pop(place) == {"SparseMax"}
    assert list(kinds.values()) == [{"SoftMax"}, {"SoftMax"}]
    source, target = draw(words=SOURCE_WORDS), draw()
    difference = (model(source, target) - translation_model()(source, target)).abs()
    assert difference.max() > 1e-4
