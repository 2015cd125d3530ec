"""Names and shapes are those of fairseq 0.12, and the sizes those that its recipes report."""

import copy

import pytest
import torch
from tiny_transformers import MULTIMAX, SOFTMAX, language_model, translation_model

from multimax.models.transformer import LanguageModel, TranslationModel

ATTENTION = """
    k_proj.weight 16,16  k_proj.bias 16  v_proj.weight 16,16  v_proj.bias 16
    q_proj.weight 16,16  q_proj.bias 16  out_proj.weight 16,16  out_proj.bias 16
"""
NORM = "weight 16  bias 16"
MLP = "fc1.weight 24,16  fc1.bias 24  fc2.weight 16,24  fc2.bias 16"


def shapes(text, prefix=""):
    words = text.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return {prefix + name: tuple(map(int, shape.split(","))) for name, shape in pairs}


def layer(prefix, cross=False):
    found = shapes(MLP, prefix) | shapes(NORM, prefix + "final_layer_norm.")
    for part in ("self_attn", "encoder_attn") if cross else ("self_attn",):
        found |= shapes(ATTENTION, f"{prefix}{part}.")
        found |= shapes(NORM, f"{prefix}{part}_layer_norm.")
    return found


TRANSFORMER_LM = {
    **shapes("decoder.version 1  decoder.embed_tokens.weight 30,16"),
    **layer("decoder.layers.0."),
    **layer("decoder.layers.1."),
    **shapes(NORM, "decoder.layer_norm."),
    **shapes("decoder.output_projection.weight 30,16"),
}
TRANSFORMER_LM_WIKI103 = {
    **shapes(
        """
        decoder.version 1
        decoder.embed_tokens._float_tensor 1
        decoder.embed_tokens.embeddings.0.0.weight 8,16
        decoder.embed_tokens.embeddings.0.1.weight 16,16
        decoder.embed_tokens.embeddings.1.0.weight 8,8
        decoder.embed_tokens.embeddings.1.1.weight 16,8
        decoder.embed_tokens.embeddings.2.0.weight 14,4
        decoder.embed_tokens.embeddings.2.1.weight 16,4
        decoder.adaptive_softmax.version 1
        decoder.adaptive_softmax.head._float_tensor 1
        decoder.adaptive_softmax.head.word_proj.weight 8,16
        decoder.adaptive_softmax.head.class_proj.weight 2,16
        decoder.adaptive_softmax.tail.0.0.weight 16,8
        decoder.adaptive_softmax.tail.0.2.weight 8,8
        decoder.adaptive_softmax.tail.1.0.weight 16,4
        decoder.adaptive_softmax.tail.1.2.weight 14,4
        """
    ),
    **layer("decoder.layers.0."),
    **layer("decoder.layers.1."),
}
TRANSFORMER_IWSLT_DE_EN = {
    **shapes("encoder.version 1  encoder.embed_tokens.weight 20,16"),
    **layer("encoder.layers.0."),
    **layer("encoder.layers.1."),
    **shapes("decoder.version 1  decoder.embed_tokens.weight 30,16"),
    **layer("decoder.layers.0.", cross=True),
    **layer("decoder.layers.1.", cross=True),
    **shapes("decoder.output_projection.weight 30,16"),
}
FINAL_NORMS = shapes(NORM, "encoder.layer_norm.") | shapes(NORM, "decoder.layer_norm.")
WITHOUT_FINAL_NORM = {n: shape for n, shape in TRANSFORMER_LM.items() if ".layer_norm" not in n}
ADAPTIVE = dict(adaptive_cutoffs=[8, 16], adaptive_factor=2, final_norm=False)
CASES = {
    "transformer_lm": (language_model, {}, TRANSFORMER_LM),
    "no-final-norm": (language_model, dict(final_norm=False), WITHOUT_FINAL_NORM),
    "post-norm": (language_model, dict(pre_norm=False), WITHOUT_FINAL_NORM),
    "transformer_lm_wiki103": (language_model, ADAPTIVE, TRANSFORMER_LM_WIKI103),
    "transformer_iwslt_de_en": (translation_model, {}, TRANSFORMER_IWSLT_DE_EN),
    "pre-norm": (translation_model, dict(pre_norm=True), TRANSFORMER_IWSLT_DE_EN | FINAL_NORMS),
    "untied": (translation_model, dict(tie_embeddings=False), TRANSFORMER_IWSLT_DE_EN),
}


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes(case):
    build, options, expected = CASES[case]
    state = build(**options).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_fairseq_loads_strictly(case):
    """Every number of it arrives, and position tables of its earlier versions are let go."""
    build, options, _ = CASES[case]
    model = build(**options)
    own = model.state_dict()
    state = {name: tensor.clone() for name, tensor in own.items()}
    for name, tensor in own.items():
        first = next(other for other in own if own[other].data_ptr() == tensor.data_ptr())
        tied = first != name
        state[name] = state[first] if tied else (tensor + torch.rand(tensor.shape)).to(tensor.dtype)
    tables = {"decoder.embed_positions._float_tensor": torch.zeros(1)}
    if build is translation_model:
        tables["encoder.embed_positions.weights"] = torch.zeros(7, 16)
    build(**options).load_state_dict(state, strict=True)
    model.load_state_dict(state | tables, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_version_says_what_fairseq_wants():
    state = language_model(**ADAPTIVE).state_dict()
    assert state["decoder.version"].tolist() == [3]
    assert state["decoder.adaptive_softmax.version"].tolist() == [1]
    assert state["decoder.adaptive_softmax.version"].dtype == torch.int64


def test_names_of_the_scalars():
    def names(model):
        return {name for name, _ in model.named_parameters() if "normalizer" in name}

    layers = {
        f"decoder.layers.{i}.self_attn.normalizer.{p}" for i in (0, 1) for p in ("ts", "ranges")
    }
    full = {f"decoder.output_projection.normalizer.{p}" for p in ("ts", "ranges")}
    bands = {
        f"decoder.adaptive_softmax.normalizers.{i}.{p}" for i in (0, 1, 2) for p in ("ts", "ranges")
    }
    assert names(language_model(MULTIMAX, MULTIMAX)) == layers | full
    assert names(language_model(MULTIMAX, MULTIMAX, **ADAPTIVE)) == layers | bands


def test_tied_embeddings_are_one_tensor():
    for model in (language_model(), translation_model()):
        assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
        assert model.output is model.decoder.output_projection
    untied = translation_model(tie_embeddings=False).decoder
    assert not torch.equal(untied.output_projection.weight, untied.embed_tokens.weight)
    model = copy.deepcopy(translation_model())
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight


def test_untied_weights_do_not_load_into_a_tied_model():
    state = translation_model(tie_embeddings=False).state_dict()
    with pytest.raises(ValueError, match="build it with tie_embeddings=False"):
        translation_model().load_state_dict(state)


def test_published_sizes():
    """fairseq reports 39,469,056 for IWSLT14 and 247 M for WikiText-103 with adaptive softmax."""

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    options = dict(attention=SOFTMAX, output=SOFTMAX)
    with torch.device("meta"):
        iwslt = TranslationModel(
            8848,
            6632,
            1,
            embed_dim=512,
            ffn_dim=1024,
            encoder_depth=6,
            decoder_depth=6,
            num_heads=4,
            **options,
        )
        small = LanguageModel(
            267_744, 1, embed_dim=512, ffn_dim=2048, depth=6, num_heads=8, **options
        )
        large = LanguageModel(
            267_744,
            1,
            embed_dim=1024,
            ffn_dim=4096,
            depth=16,
            num_heads=8,
            final_norm=False,
            adaptive_cutoffs=[20_000, 60_000],
            **options,
        )
    assert count(iwslt) == 39_469_056
    assert count(small) == 267_744 * 512 + 18_914_304 + 1024
    assert round(count(large) / 1e6) == 247
