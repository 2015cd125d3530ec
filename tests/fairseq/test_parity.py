"""Our Transformer against fairseq's own: the same state dict, logits, losses and translations.

With `-s`, pytest shows how far they differ.
"""

from argparse import Namespace
from types import SimpleNamespace

import fairseq.utils
import pytest
import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel, transformer_iwslt_de_en
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    base_lm_architecture,
    transformer_lm_baevski_wiki103,
)
from fairseq.sequence_generator import SequenceGenerator

from multimax.decoding import beam_search
from multimax.models.transformer import LanguageModel, TranslationModel

SOFTMAX = {"name": "softmax"}
WORDS, SOURCE_WORDS, PAD, EOS = 50, 43, 1, 2
SIZES = dict(embed_dim=32, ffn_dim=48, num_heads=4, attention=SOFTMAX, output=SOFTMAX)


def dictionary(size):
    words = Dictionary()
    for index in range(size - len(words)):
        words.add_symbol(f"w{index}")
    assert len(words) == size
    assert (words.pad(), words.eos()) == (PAD, EOS)
    return words


def sizes(side):
    return {
        f"{side}_embed_dim": 32,
        f"{side}_ffn_embed_dim": 48,
        f"{side}_attention_heads": 4,
        f"{side}_layers": 3,
    }


def randomize(model):
    """Vectors away from where they start, so that a forgotten bias or norm shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(autouse=True)
def _keep_double_precision(monkeypatch):
    """fairseq normalizes in fp32 whatever it is given; leave fp64 as it is."""

    def softmax(x, dim, onnx_trace=False):
        return F.softmax(x, dim)

    def log_softmax(x, dim, onnx_trace=False):
        return F.log_softmax(x, dim)

    monkeypatch.setattr(fairseq.utils, "softmax", softmax)
    monkeypatch.setattr(fairseq.utils, "log_softmax", log_softmax)


def fairseq_lm(architecture, **options):
    torch.manual_seed(0)
    args = Namespace(**sizes("decoder"), tokens_per_sample=64, **options)
    architecture(args)
    words = dictionary(WORDS)
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words)
    return randomize(TransformerLanguageModel.build_model(args, task))


def fairseq_translation(**options):
    torch.manual_seed(0)
    args = Namespace(
        **sizes("encoder"),
        **sizes("decoder"),
        max_source_positions=1024,
        max_target_positions=1024,
        **options,
    )
    transformer_iwslt_de_en(args)
    source, target = dictionary(SOURCE_WORDS), dictionary(WORDS)
    task = SimpleNamespace(source_dictionary=source, target_dictionary=target)
    return randomize(TransformerModel.build_model(args, task))


def load(ours, theirs):
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)  # and back
    return ours.eval()


def tokens(rows, length, words, left=False):
    """Random words with eos at the end and padding of 0, 1, 2 ... at one side."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(4, words, (rows, length), generator=generator)
    for row in range(rows):
        if left:
            drawn[row, :row] = PAD
            drawn[row, -1] = EOS
        else:
            drawn[row, length - row :] = PAD
            drawn[row, length - row - 1] = EOS
    return drawn


LANGUAGE_MODELS = {
    "tied": (dict(share_decoder_input_output_embed=True), {}),
    "untied": ({}, dict(tie_embeddings=False)),
    "no-final-norm": (
        dict(share_decoder_input_output_embed=True, no_decoder_final_norm=True),
        dict(final_norm=False),
    ),
}


@pytest.mark.parametrize("case", LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transformer_lm(case, dtype):
    theirs_options, ours_options = LANGUAGE_MODELS[case]
    theirs = fairseq_lm(base_lm_architecture, **theirs_options).to(dtype)
    ours = load(LanguageModel(WORDS, PAD, depth=3, **SIZES, **ours_options).to(dtype), theirs)
    words = tokens(4, 17, WORDS)
    expected, _ = theirs(words)
    error = (ours.output.scores(ours(words)) - expected)[words != PAD].abs().max().item()
    print(f"\nlogits of size {expected.abs().max():.3g} differ by {error:.2g}")
    assert error < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cutoffs", ["12,30", "10", "12,30,50"])
def test_transformer_lm_wiki103(dtype, cutoffs):
    theirs = fairseq_lm(
        transformer_lm_baevski_wiki103,
        adaptive_input_cutoff=cutoffs,
        adaptive_softmax_cutoff=cutoffs,
        adaptive_softmax_factor=2,
        adaptive_input_factor=2,
    ).to(dtype)
    ours = LanguageModel(
        WORDS,
        PAD,
        depth=3,
        final_norm=False,
        adaptive_cutoffs=[int(end) for end in cutoffs.split(",")],
        adaptive_factor=2,
        **SIZES,
    )
    load(ours.to(dtype), theirs)
    words = tokens(4, 17, WORDS)
    output = theirs(words)
    features = ours(words)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert (features - output[0])[words != PAD].abs().max() < tolerance
    expected = theirs.get_normalized_probs(output, log_probs=True)
    error = (ours.output.log_probabilities(features) - expected)[words != PAD].abs().max().item()
    print(f"\nlog-probabilities of size {expected.abs().max():.3g} differ by {error:.2g}")
    assert error < tolerance

    # The training loss; fairseq ignores the padding index inside the bands too, so that the second
    # word of each band would not count: leave it out of the targets.
    targets = torch.randint(4, WORDS, words.shape)
    for end in ours.output.bands:
        targets[targets == end + PAD] = 5
    targets[words == PAD] = PAD
    logits, parts = theirs.decoder.adaptive_softmax(output[0], targets)
    total = sum(
        F.cross_entropy(scores, part, ignore_index=PAD, reduction="sum")
        for scores, part in zip(logits, parts, strict=True)
        if part is not None
    )
    loss = ours.output.loss(features, targets, reduction="sum")
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)


def translation_pair(dtype, pre_norm=False, tied=True):
    theirs = fairseq_translation(
        encoder_normalize_before=pre_norm,
        decoder_normalize_before=pre_norm,
        share_decoder_input_output_embed=tied,
    )
    ours = TranslationModel(
        SOURCE_WORDS,
        WORDS,
        PAD,
        encoder_depth=3,
        decoder_depth=3,
        pre_norm=pre_norm,
        tie_embeddings=tied,
        **SIZES,
    )
    return load(ours.to(dtype), theirs.to(dtype)), theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_transformer_iwslt_de_en(pre_norm, tied, dtype):
    ours, theirs = translation_pair(dtype, pre_norm, tied)
    source, target = tokens(4, 9, SOURCE_WORDS, left=True), tokens(4, 12, WORDS)
    expected, _ = theirs(source, (source != PAD).sum(1), target)
    error = (ours.output.scores(ours(source, target)) - expected)[target != PAD].abs().max().item()
    print(f"\nlogits of size {expected.abs().max():.3g} differ by {error:.2g}")
    assert error < (1e-5 if dtype == torch.float32 else 1e-13)


def end_at_various_lengths(model):
    """Make eos about as likely as the other words: its score gets a bias."""
    decoder = model.decoder
    norm = decoder.layer_norm or decoder.layers[-1].final_layer_norm
    strength = 8 if decoder.layer_norm is None else 4
    with torch.no_grad():
        decoder.embed_tokens.weight.mul_(2)
        decoder.embed_tokens.weight[EOS] = strength * norm.bias / norm.bias.square().sum()


@pytest.mark.parametrize("length_penalty", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_beam_search(pre_norm, beam, length_penalty):
    ours, theirs = translation_pair(torch.float64, pre_norm)
    end_at_various_lengths(ours)
    end_at_various_lengths(theirs)
    source = tokens(6, 9, SOURCE_WORDS, left=True)
    generator = SequenceGenerator(
        [theirs], dictionary(WORDS), beam_size=beam, max_len_b=20, len_penalty=length_penalty
    )
    sample = {"net_input": {"src_tokens": source, "src_lengths": (source != PAD).sum(1)}}
    expected = generator.generate([theirs], sample)
    found = beam_search(
        ours, source, eos=EOS, beam=beam, max_len_b=20, length_penalty=length_penalty
    )
    lengths = set()
    for mine, reference in zip(found, expected, strict=True):
        assert [h.tokens for h in mine] == [h["tokens"].tolist() for h in reference]
        for hypothesis, other in zip(mine, reference, strict=True):
            assert hypothesis.score == pytest.approx(other["score"].item(), rel=1e-6)
            lengths.add(len(hypothesis.tokens))
    print(f"\nlengths {sorted(lengths)}")
    assert len(lengths) > 1 or beam == 1  # else the test shows little


def test_beam_search_in_single_precision_with_lengths_that_grow_with_the_source():
    """One sentence at a time: in fairseq the longest of a batch sets the length for all."""
    ours, theirs = translation_pair(torch.float32)
    generator = SequenceGenerator(
        [theirs], dictionary(WORDS), beam_size=5, max_len_a=1.2, max_len_b=3
    )
    source = tokens(6, 9, SOURCE_WORDS, left=True)
    found = beam_search(ours, source, eos=EOS, beam=5, max_len_a=1.2, max_len_b=3)
    for row, mine in zip(source, found, strict=True):
        alone = row[row != PAD].unsqueeze(0)
        sample = {"net_input": {"src_tokens": alone, "src_lengths": torch.tensor([alone.numel()])}}
        (reference,) = generator.generate([theirs], sample)
        assert [h.tokens for h in mine] == [h["tokens"].tolist() for h in reference]
        for hypothesis, other in zip(mine, reference, strict=True):
            assert hypothesis.score == pytest.approx(other["score"].item(), abs=1e-5)


def test_initialization_has_the_same_spread():
    """Every tensor's standard deviation and mean, at a size where chance is small."""

    def spreads(model):
        return {name: (p.std().item(), p.mean().item()) for name, p in model.named_parameters()}

    def build(**wide):
        args = Namespace(
            **{f"encoder_{k}": v for k, v in wide.items()},
            **{f"decoder_{k}": v for k, v in wide.items()},
            encoder_layers=1,
            decoder_layers=1,
            share_decoder_input_output_embed=True,
            max_source_positions=64,
            max_target_positions=64,
        )
        transformer_iwslt_de_en(args)
        source, target = dictionary(500), dictionary(600)
        task = SimpleNamespace(source_dictionary=source, target_dictionary=target)
        return TransformerModel.build_model(args, task)

    torch.manual_seed(0)
    expected = spreads(build(embed_dim=256, ffn_embed_dim=512, attention_heads=4))
    ours = TranslationModel(
        500,
        600,
        PAD,
        embed_dim=256,
        ffn_dim=512,
        encoder_depth=1,
        decoder_depth=1,
        num_heads=4,
        attention=SOFTMAX,
        output=SOFTMAX,
    )
    found = spreads(ours)
    assert set(found) == set(expected)
    for name, (std, mean) in found.items():
        assert std == pytest.approx(expected[name][0], rel=0.15, abs=1e-9), name
        assert abs(mean - expected[name][1]) < 0.3 * std + 1e-9, name
