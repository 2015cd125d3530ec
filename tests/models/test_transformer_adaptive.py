import math

import pytest
import torch
from tiny_transformers import MAPPINGS, MULTIMAX, PAD, SOFTMAX, WORDS, close, draw, language_model

from multimax.losses import output_loss

CUTOFFS = [8, 16]
ADAPTIVE = dict(adaptive_cutoffs=CUTOFFS, adaptive_factor=2)


def adaptive(attention=SOFTMAX, output=SOFTMAX, **options):
    return language_model(attention, output, **ADAPTIVE, **options)


def spread(model, tokens):
    """Features large enough for sparse normalizers to give zeros in head and bands."""
    return 5 * model(tokens)


@pytest.mark.parametrize("name", MAPPINGS)
def test_probabilities_sum_to_one_over_the_whole_vocabulary(name):
    model = adaptive(output=MAPPINGS[name])
    features = spread(model, draw())
    probabilities = model.output.probabilities(features)
    assert probabilities.shape == (3, 6, WORDS)
    assert (probabilities >= 0).all()
    close(probabilities.sum(-1), torch.ones(3, 6, dtype=torch.float64))
    log_probabilities = model.output.log_probabilities(features)
    close(log_probabilities.exp(), probabilities)
    assert ((log_probabilities == -math.inf) == (probabilities == 0)).all()
    sparse = name not in ("softmax", "multimax")
    assert (probabilities == 0).any() == model.output.sparse == sparse


def test_probability_of_a_rare_word_is_that_of_its_band_times_its_own():
    """Written out from the weights for every word, with other normalizers than SoftMax."""
    model = adaptive(output=MULTIMAX)
    features, output = model(draw()), model.output
    bands = model.decoder.embed_tokens.embeddings
    head = torch.cat([features @ bands[0][0].weight.t(), output.head.class_proj(features)], dim=-1)
    head = output.normalizers[0](head)
    expected = [head[..., :8]]
    for band in (1, 2):
        words, projection = bands[band][0].weight, bands[band][1].weight
        inside = output.normalizers[band](features @ projection @ words.t())
        expected.append(head[..., 7 + band, None] * inside)
    close(output.probabilities(features), torch.cat(expected, dim=-1))
    assert len({tuple(normalizer.ts.tolist()) for normalizer in output.normalizers}) == 3


def test_embedding_is_the_projected_row_of_the_band():
    model = adaptive()
    embedding = model.decoder.embed_tokens
    for word, (band, row) in {0: (0, 0), 7: (0, 7), 8: (1, 0), 15: (1, 7), 29: (2, 13)}.items():
        table, projection = embedding.embeddings[band]
        expected = projection.weight @ table.weight[row]
        close(embedding(torch.tensor([[3, word, 9]]))[0, 1], expected)
    assert [part[0].weight.shape for part in embedding.embeddings] == [(8, 16), (8, 8), (14, 4)]
    assert (embedding(torch.tensor([[PAD]])) == 0).all()


@pytest.mark.parametrize("name", ["softmax", "multimax"])
def test_loss_is_the_negative_log_likelihood(name):
    model = adaptive(output=MAPPINGS[name])
    features, targets = model(draw(10)), draw(10, seed=3)
    targets[0, 2:] = PAD
    assert all(((targets >= start) & (targets < end)).any() for start, end in ((8, 16), (16, 30)))
    expected = -model.output.log_probabilities(features).gather(-1, targets.unsqueeze(-1))
    expected = expected.squeeze(-1).masked_fill(targets == PAD, 0.0)
    close(model.output.loss(features, targets, reduction="none"), expected)
    close(model.output.loss(features, targets, reduction="sum"), expected.sum())
    close(model.output.loss(features, targets), expected.sum() / 56)
    other = model.output.loss(features, targets, ignore_index=20, reduction="none")
    assert ((other == 0) == (targets == 20)).all()
    assert (targets == 20).any()


@pytest.mark.parametrize("name", MAPPINGS)
def test_loss_is_that_of_the_head_plus_that_of_the_band(name):
    model = adaptive(output=MAPPINGS[name])
    features, output = spread(model, draw()), model.output
    word, common = torch.full((3, 6), 19), torch.full((3, 6), 5)
    head, _, second = output.normalizers
    in_head = output_loss(head, output.head(features), torch.full((3, 6), 9), reduction="none")
    in_band = output_loss(second, output.tail[1](features), torch.full((3, 6), 3), reduction="none")
    close(output.loss(features, word, reduction="none"), in_head + in_band)
    alone = output_loss(head, output.head(features), common, reduction="none")
    close(output.loss(features, common, reduction="none"), alone)


@pytest.mark.parametrize("name", MAPPINGS)
def test_every_parameter_gets_a_gradient_without_words_in_a_band(name):
    """DDP waits for the gradient of each parameter, whatever words a batch has."""
    model = adaptive(MAPPINGS[name], MAPPINGS[name]).train()
    model.output.loss(model(torch.tensor([[2, 3, 4]])), torch.tensor([[3, 4, 5]])).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert gradients["decoder.embed_tokens.embeddings.0.0.weight"].abs().max() > 0
    assert (gradients["decoder.embed_tokens.embeddings.2.0.weight"] == 0).all()


def test_every_parameter_learns():
    model = adaptive(MULTIMAX, MULTIMAX).train()
    model.output.loss(model(draw(10)), draw(10, seed=3)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


def test_weights_and_projections_are_tied():
    model = adaptive()
    tables, output = model.decoder.embed_tokens.embeddings, model.output
    assert output.head.word_proj.weight is tables[0][0].weight
    for band in (1, 2):
        projection, _, words = output.tail[band - 1]
        assert projection.weight is tables[band][1].weight
        assert words.weight is tables[band][0].weight


def test_dropout_acts_in_the_loss_in_training_alone():
    model, plain = adaptive(adaptive_dropout=0.3), adaptive()
    features, targets = model(draw()), draw(seed=3)
    assert torch.equal(model.output.loss(features, targets), plain.output.loss(features, targets))
    assert torch.equal(model.train()(draw()), features)
    assert not torch.equal(
        model.output.loss(features, targets), plain.train().output.loss(features, targets)
    )
    # Of the features, for words of the head; of the projections too, for words of a band.
    torch.manual_seed(0)
    many, common = features[:1, :1].expand(1, 4000, -1), torch.full((1, 4000), 5)
    dropped = torch.nn.functional.dropout(many.reshape(4000, -1), 0.3)
    expected = output_loss(model.output.normalizers[0], model.output.head(dropped), common[0])
    assert model.output.loss(many, common).item() == pytest.approx(expected.item(), rel=0.02)
    assert [tail[1].p for tail in model.output.tail] == [0.3, 0.3]


def test_the_last_cutoff_may_be_the_vocabulary():
    model = language_model(adaptive_cutoffs=[*CUTOFFS, WORDS], adaptive_factor=2)
    assert torch.equal(model(draw()), adaptive()(draw()))


def test_errors():
    output, features = adaptive().output, torch.zeros(2, 3, 16, dtype=torch.float64)
    targets = torch.full((2, 3), 4)
    with pytest.raises(ValueError, match="no label smoothing"):
        output.loss(features, targets, label_smoothing=0.1)
    with pytest.raises(ValueError, match="reduction must be"):
        output.loss(features, targets, reduction="median")
    with pytest.raises(ValueError, match="targets must be int64 words of shape"):
        output.loss(features, targets.int())
    for wrong in (-1, WORDS):
        targets[1, 1] = wrong
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 30\), got {wrong}"):
            output.loss(features, targets)
    with pytest.raises(
        ValueError, match=r"words of shape \(2, 3\), got torch.int64 of shape \(2, 2\)"
    ):
        output.loss(features, targets[:, :2])


def test_residual_stream_is_not_autocast():
    model = adaptive().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(draw()).dtype == torch.float32
        assert model.output.loss(model(draw()), draw(seed=3)).dtype == torch.float32
    assert model.bfloat16()(draw()).dtype == torch.bfloat16
