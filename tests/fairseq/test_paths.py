"""Every normalizer acts alike in training, teacher forcing and incremental decoding."""

import copy

import pytest
import torch
from conftest import MODELS, NORMALIZERS, batch, incremental, normalizers, perturb
from fairseq.modules import AdaptiveSoftmax, MultiheadAttention
from omegaconf import OmegaConf

from multimax import build_normalizer
from multimax.attention import attention
from multimax.functional import modulate
from multimax.integrations.fairseq.attention import normalize_attention
from multimax.integrations.fairseq.convert import build_model, to_fairseq, to_multimax
from multimax.integrations.fairseq.output import decoder_output, normalize_output
from multimax.integrations.fairseq.specification import format_normalizer, parse_normalizer

MISMATCH = ["--official-mismatch"]
TRANSLATION = "multimax_transformer_iwslt_de_en"


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_incremental_equals_parallel(build, name, normalizer):
    side = build(f"multimax_{name}", *normalizers(normalizer, normalizer))
    model, sample = perturb(side.model), batch(side.task)
    keep = sample["target"].ne(side.task.target_dictionary.pad())
    paths = model(**sample["net_input"])[0], incremental(model, sample)
    together, steps = (model.get_normalized_probs((x,), log_probs=False)[keep] for x in paths)
    torch.testing.assert_close(steps, together, rtol=0, atol=1e-6)
    assert together.std() > 1e-3  # and nothing above is trivial


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_ours(normalizer, causal):
    """Padding, causality, dropout off; the weights that are returned are the probabilities."""
    module = MultiheadAttention(32, 4, self_attention=True)
    normalize_attention(module, parse_normalizer(normalizer))
    perturb(module).eval()
    x = 3 * torch.randn(6, 2, 32)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    future = torch.full((6, 6), -torch.inf).triu(1) if causal else None
    output, weights = module(
        x, x, x, key_padding_mask=padding, attn_mask=future, need_head_weights=True
    )
    q, k, v = (
        p(x).view(6, 2, 4, 8).permute(1, 2, 0, 3)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    reference = copy.deepcopy(module.normalizer)
    mask = ~padding[:, None, None, :]
    heads = attention(q, k, v, reference, mask=mask, causal=causal)
    expected = module.out_proj(heads.permute(2, 0, 1, 3).reshape(6, 2, 32))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert weights.shape == (4, 2, 6, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 6))
    assert (weights[:, 1, :, 4:] == 0).all()
    assert module(x, x, x, need_weights=False)[1] is None
    assert module(x, x, x, key_padding_mask=padding)[1].shape == (2, 6, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    module = MultiheadAttention(32, 4, self_attention=True)
    normalize_attention(module, {"name": "multimax"})
    module.normalizer.ts.data = torch.tensor([0.1, 0.1, 0.1, 0.1])
    x = 60 * torch.randn(6, 2, 32)
    expected, _ = module(x, x, x, need_weights=True)
    output, weights = module.to(dtype)(*[x.to(dtype)] * 3, need_weights=True)
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert weights.dtype == torch.float32
    scores = (module.q_proj(x.to(dtype)) * module.scaling).abs().max()
    assert scores**2 > 256  # its square would not be a number of fp16
    assert expected.isfinite().all()


def test_a_row_without_keys_is_zero():
    module = MultiheadAttention(32, 4, self_attention=True)
    normalize_attention(module, {"name": "multimax"})
    x = torch.randn(6, 2, 32, requires_grad=True)
    padding = torch.tensor([[True] * 6, [False] * 6])
    output, weights = module(x, x, x, key_padding_mask=padding)
    assert (weights[0] == 0).all()
    output.sum().backward()
    assert x.grad.isfinite().all()


PLACES = {
    "encoder": "encoder.layers.1.self_attn",
    "decoder": "decoder.layers.0.self_attn",
    "cross": "decoder.layers.1.encoder_attn",
}


@pytest.mark.parametrize("place", PLACES)
def test_each_place_is_switchable(build, place):
    softmax = normalizers("softmax", "softmax")
    side = build(TRANSLATION, *softmax, f"--{place}-attention-normalizer", "topk:k=2")
    given = {k: m.normalizer for k, m in side.model.named_modules() if hasattr(m, "normalizer")}
    assert PLACES[place] in given
    assert len(given) == 2
    assert {normalizer.k for normalizer in given.values()} == {2}
    plain, sample = build(TRANSLATION, *softmax), batch(side.task)
    for path in (lambda model: model(**sample["net_input"])[0], lambda m: incremental(m, sample)):
        assert (path(side.model) - path(plain.model)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["multimax_transformer_lm", TRANSLATION])
def test_official_mismatch(build, name):
    """Teacher-forced self-attention is modulated; steps and cross-attention are plain SoftMax."""
    chosen = normalizers("multimax", "softmax")
    side, plain = build(name, *chosen, *MISMATCH), build(name, *normalizers("softmax", "softmax"))
    sample = batch(side.task)
    perturb(side.model, 2.0)
    if hasattr(side.model, "encoder"):  # its self-attention is always modulated, as there
        assert not hasattr(side.model.decoder.layers[0].encoder_attn, "normalizer")
        assert hasattr(side.model.encoder.layers[0].self_attn, "normalizer")
        plain.model.encoder = side.model.encoder
    assert torch.equal(incremental(side.model, sample), incremental(plain.model, sample))
    outputs = [side.model(**sample["net_input"])[0] for side in (side, plain)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_adaptive_probabilities_sum_to_one(normalizer):
    decoder = torch.nn.Module()
    decoder.adaptive_softmax = AdaptiveSoftmax(50, 16, [20, 40], dropout=0.0).eval()
    normalize_output(decoder, parse_normalizer(normalizer))
    output, x = perturb(decoder).adaptive_softmax.eval(), 3 * torch.randn(2, 5, 16)
    log_probs = output.get_log_prob(x, None)
    assert log_probs.shape == (2, 5, 50)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 5))
    assert log_probs.isfinite().all()
    target = torch.randint(50, (2, 5))
    chosen = output.get_log_prob(x, target).gather(-1, target.unsqueeze(-1))
    torch.testing.assert_close(chosen, log_probs.gather(-1, target.unsqueeze(-1)))


def test_each_band_has_scalars_of_its_own():
    decoder = torch.nn.Module()
    decoder.adaptive_softmax = AdaptiveSoftmax(50, 16, [20, 40], dropout=0.0).eval()
    normalize_output(decoder, {"name": "multimax"})
    output, x = decoder.adaptive_softmax, torch.randn(2, 5, 16)
    before = output.get_log_prob(x, None).exp()
    output.normalizers[2].ts.data += 0.5
    after = output.get_log_prob(x, None).exp()
    assert torch.equal(after[..., :40], before[..., :40])
    assert (after[..., 40:] - before[..., 40:]).abs().max() > 1e-4
    torch.testing.assert_close(after.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", ["transformer_lm", "transformer_lm_wiki103"])
def test_output_probabilities_are_those_of_the_normalizer(build, name, normalizer):
    side = build(f"multimax_{name}", *normalizers("softmax", normalizer))
    model, sample = perturb(side.model), batch(side.task)
    features = model(**sample["net_input"], features_only=True)[0]
    log_probs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
    output = decoder_output(model.decoder)
    if name == "transformer_lm":
        expected = output.normalizer(torch.nn.functional.linear(features, output.weight))
    else:
        first, *others = output.normalizers
        head = first(output.head(features.flatten(0, 1)))
        bands = [
            head[:, 20 + i, None] * normalizer(tail(features.flatten(0, 1)))
            for i, (normalizer, tail) in enumerate(zip(others, output.tail, strict=True))
        ]
        expected = torch.cat([head[:, :20], *bands], dim=1).view_as(log_probs)
    torch.testing.assert_close(log_probs.exp(), expected, rtol=1e-4, atol=1e-6)


def test_before_scale_modulates_the_dot_products():
    module = MultiheadAttention(32, 4, self_attention=True)
    normalize_attention(module, parse_normalizer("multimax:before_scale=true"))
    perturb(module).eval()
    x = 3 * torch.randn(6, 2, 32)
    _, weights = module(x, x, x, need_head_weights=True)
    q, k = (p(x).view(6, 2, 4, 8).permute(2, 1, 0, 3) for p in (module.q_proj, module.k_proj))
    modulated = modulate(q @ k.mT, module.normalizer.ts, module.normalizer.ranges)
    torch.testing.assert_close(weights, torch.softmax(modulated / 8**0.5, -1), rtol=1e-4, atol=1e-6)
    assert (weights - torch.softmax(q @ k.mT / 8**0.5, -1)).abs().max() > 0.01


def test_conversion_keeps_before_scale_and_refuses_shared(build):
    side = build("multimax_transformer_lm", *normalizers("multimax:before_scale=true", "softmax"))
    model, tokens = perturb(side.model), batch(side.task)["net_input"]["src_tokens"]
    settings = OmegaConf.to_container(side.model_config)
    content = to_multimax({"cfg": {"model": settings}, "model": model.state_dict()})
    torch.testing.assert_close(build_model(content)(tokens), model(tokens, features_only=True)[0])
    again = to_multimax(to_fairseq(content))["options"]
    assert again["attention"] == {"name": "multimax", "before_scale": True}
    for name, value in content["model"].items():
        if "normalizer" in name:
            value.zero_()
    content["options"]["attention"]["shared"] = True
    with pytest.raises(ValueError, match=r"shared=true of attention: .* leave shared out"):
        to_fairseq(content)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("multimax", {"name": "multimax"}),
        ("topk:k=7,floor=1e-5", {"name": "topk", "k": 7, "floor": 1e-5}),
        ("entmax:alpha=1.3,learned=True", {"name": "entmax", "alpha": 1.3, "learned": True}),
        (" multimax : init = identity , affine = true", None),
    ],
)
def test_specification(text, options):
    options = options or {"name": "multimax", "init": "identity", "affine": True}
    assert parse_normalizer(text) == options
    assert parse_normalizer(format_normalizer(options)) == options
    build_normalizer(**options)


@pytest.mark.parametrize("text", ["topk:", "topk:k", "topk:k=", "topk:=7", "topk:k=7,"])
def test_malformed_specification(text):
    with pytest.raises(ValueError, match="topk:k=100"):
        parse_normalizer(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (normalizers("softmacks"), "unknown normalizer 'softmacks'"),
        (normalizers("topk:kay=3"), "has no option kay"),
        (normalizers("topk:k=0"), "k must be"),
        (normalizers("multimax:shared=true"), "shared=true of encoder: .*; leave shared out"),
        (normalizers("softmax", "multimax:before_scale=true"), "before_scale of output: .* leave"),
        (normalizers("topk:before_scale=true"), "before_scale is for multimax, not for topk"),
        ([*MISMATCH, "--cross-attention-normalizer", "topk"], "leave --cross-attention-norm"),
    ],
)
def test_bad_arguments(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(TRANSLATION, *arguments)
