"""Incremental decoding: token by token equals all at once."""

import pytest
import torch
from tiny_transformers import (
    MAPPINGS,
    MULTIMAX,
    PAD,
    SOURCE_WORDS,
    close,
    draw,
    language_model,
    translation_model,
)

SPARSE = {"name": "sparsemax"}


def padded(rows=3, length=7):
    """Tokens with padding on the left of the first row and on the right of the second."""
    tokens = draw(rows, length)
    tokens[0, :3] = PAD
    tokens[1, 5:] = PAD
    return tokens


def padded_source():
    source = draw(3, 6, SOURCE_WORDS)
    source[1, 4:] = PAD
    source[2, :2] = PAD
    return source


def decode(model, tokens, cache, lengths):
    assert sum(lengths) == tokens.size(1)
    return torch.cat([model.step(part, cache) for part in tokens.split(lengths, 1)], 1)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[1] * 7, [4, 1, 2], [7]])
@pytest.mark.parametrize("name", MAPPINGS)
def test_step_by_step_equals_parallel(name, lengths):
    tokens, real = padded(), padded() != PAD
    mapping = MAPPINGS[name]
    for options in ({}, dict(pre_norm=False), dict(adaptive_cutoffs=[8, 16], adaptive_factor=2)):
        model = language_model(mapping, mapping, **options)
        features = decode(model, tokens, model.new_cache(), lengths)
        close(features[real], model(tokens)[real])
        probabilities = [model.output.probabilities(x)[real] for x in (features, model(tokens))]
        close(*probabilities)
    for pre_norm in (False, True):
        model = translation_model(mapping, mapping, pre_norm=pre_norm)
        cache = model.new_cache(model.encode(padded_source()))
        close(decode(model, tokens, cache, lengths)[real], model(padded_source(), tokens)[real])


@pytest.mark.parametrize("name", MAPPINGS)
def test_step_by_step_equals_parallel_in_single_precision(name):
    tokens, source = padded(), padded_source()
    model = translation_model(MAPPINGS[name], MAPPINGS[name]).float()
    cache = model.new_cache(model.encode(source))
    features, together = decode(model, tokens, cache, [1] * 7), model(source, tokens)
    assert (features - together)[tokens != PAD].abs().max() < 5e-6


@pytest.mark.parametrize("name", MAPPINGS)
def test_reordered_rows_are_the_hypotheses_they_were(name):
    """Two hypotheses a sentence, of which the first sentence later keeps one twice."""
    model = translation_model(MAPPINGS[name])
    source, tokens = padded_source(), draw(3, 2)
    cache = model.new_cache(model.encode(source))
    model.step(tokens, cache)
    cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
    third = draw(6, 1, seed=5)
    model.step(third, cache)
    begun = torch.cat([tokens.repeat_interleave(2, 0), third], 1)

    rows = torch.tensor([1, 1, 5, 4])  # the second sentence is done
    cache.reorder(rows, torch.tensor([0, 2]))
    last = draw(4, 1, seed=6)
    features = model.step(last, cache)
    whole = torch.cat([begun[rows], last], 1)
    close(features, model(source[[0, 0, 2, 2]], whole)[:, -1:])


def test_reordered_rows_of_a_language_model():
    model, tokens = language_model(MULTIMAX), padded()
    cache = model.new_cache()
    model.step(tokens[:, :4], cache)
    rows = torch.tensor([2, 0])
    cache.reorder(rows)
    features = decode(model, tokens[rows, 4:], cache, [1, 2])
    close(features, model(tokens[rows])[:, 4:])


def test_the_source_is_projected_once():
    model = translation_model()
    calls = []
    for layer in model.decoder.layers:
        layer.encoder_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    cache = model.new_cache(model.encode(padded_source()))
    decode(model, draw(3, 4), cache, [1] * 4)
    assert len(calls) == 2


def test_caches_are_independent():
    model = language_model()
    first, second = model.new_cache(), model.new_cache()
    model.step(draw(), first)
    close(model.step(draw(seed=4), second), model(draw(seed=4)))


def test_a_position_table_made_in_inference_serves_training():
    models = [language_model().train() for _ in range(2)]
    with torch.inference_mode():
        models[0](draw(length=40))
    outputs = [model(draw()) for model in models]
    close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    used, fresh = ([p.grad for p in model.parameters()] for model in models)
    assert all(gradient is not None for gradient in fresh)
    torch.testing.assert_close(used, fresh)


class TestOfficialMismatch:
    """SoftMax in cross-attention and, in `step` alone, in the decoder's self-attention."""

    def softmax_in(self, **places):
        mappings = dict.fromkeys(("encoder_attention", "decoder_attention", "cross_attention"))
        return translation_model(SPARSE, **(mappings | {p: {"name": "softmax"} for p in places}))

    def test_language_model(self):
        tokens = draw()
        official = language_model(SPARSE, official_mismatch=True)
        assert torch.equal(official(tokens), language_model(SPARSE)(tokens))
        features = decode(official, tokens, official.new_cache(), [2, 1, 3])
        close(features, language_model()(tokens))
        assert (features - official(tokens)).abs().max() > 1e-3

    def test_translation_model(self):
        source, tokens = padded_source(), draw()
        official = translation_model(SPARSE, official_mismatch=True)
        teacher_forced = self.softmax_in(cross_attention=True)
        assert torch.equal(official(source, tokens), teacher_forced(source, tokens))
        cache = official.new_cache(official.encode(source))
        features = decode(official, tokens, cache, [1] * 6)
        generating = self.softmax_in(cross_attention=True, decoder_attention=True)
        close(features, generating(source, tokens))
        assert (features - official(source, tokens)).abs().max() > 1e-3

    def test_scalars_of_self_attention_alone(self):
        official = translation_model(MULTIMAX, MULTIMAX, official_mismatch=True)
        names = {n for n, _ in official.named_parameters() if n.endswith("normalizer.ts")}
        layers = {
            f"{s}.layers.{i}.self_attn.normalizer.ts"
            for s in ("encoder", "decoder")
            for i in (0, 1)
        }
        assert names == layers | {"decoder.output_projection.normalizer.ts"}

    def test_off_by_default(self):
        source, tokens = padded_source(), draw()
        model = translation_model(SPARSE)
        assert (
            model(source, tokens) - self.softmax_in(cross_attention=1)(source, tokens)
        ).abs().max() > 1e-3

    def test_excludes_a_cross_attention_of_its_own(self):
        with pytest.raises(ValueError, match="leave cross_attention=None"):
            translation_model(SPARSE, cross_attention=SPARSE, official_mismatch=True)
