"""What transformers does around attention: options, masks, classes."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from experiments.drop_in.transformers_models import build, first, inputs, move
from multimax import MultiMax, replace_softmax, restore_softmax, verify_replacement
from multimax.replacement import transformers_classes
from multimax.replacement.classes import HEADS, normalizes, size_of
from multimax.replacement.transformers_attention import REFUSED, attend
from multimax.replacement.transformers_route import asks_interface, obstacle

transformers = pytest.importorskip("transformers")

# Arguments of attention functions that change nothing, or that `attend` knows.
KNOWN = {"attention_mask", "dropout", "is_causal", "position_bias", "scaling", "softcap"}
KNOWN |= {"query", "key", "value", "output_attentions"}
KNOWN |= {"sliding_window", "position_ids", "deterministic"}  # what they say is in the mask
KNOWN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}  # of flash attention


def attention_class(name):
    module, _, cls = f"transformers.models.{name}".rpartition(".")
    return getattr(importlib.import_module(module), cls)


def scores_of(module, query, key, scale):
    return torch.einsum("bhqd,bhkd->bhqk", query * scale, key)


def test_capped_scores_are_modulated_after_the_cap():
    module = torch.nn.Module()
    module.normalizer, module.bias_place = MultiMax(), "after"
    query, key, value, bias = (torch.randn(1, 2, *s) for s in [(3, 4), (5, 4), (5, 4), (3, 5)])
    mask = torch.rand(1, 1, 3, 5) < 0.7
    mask[..., 0] = True
    out, _ = attend(module, query, key, value, mask, scaling=3.0, position_bias=bias, softcap=1.5)
    scores = 1.5 * (scores_of(module, query, key, 3.0) / 1.5).tanh()
    scores = module.normalizer.modulate(scores) + bias
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "additive", "finite", "none"])
def test_a_bias_of_positions_and_a_mask(kind):
    module = torch.nn.Module()
    module.normalizer, module.bias_place, module.is_causal = MultiMax(), "after", True
    query, key, value = (torch.randn(1, 2, 4, 3) for _ in range(3))
    bias = torch.randn(1, 2, 4, 4)
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    zeros, finite = torch.zeros(4, 4), torch.randn(4, 4)
    mask = {"bool": allowed, "none": None, "additive": zeros, "finite": finite}[kind]
    if kind in ("additive", "finite"):
        mask = mask.masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = mask if mask is None else mask[None, None]
    out, _ = attend(module, query, key, value, mask, scaling=1.0, position_bias=bias)
    scores = module.normalizer.modulate(scores_of(module, query, key, 1.0)) + bias
    scores = scores + finite if kind == "finite" else scores
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-6, rtol=1e-5)


def test_a_cache_that_is_not_full_hides_its_rest():
    module = torch.nn.Module()
    module.normalizer, module.is_causal = MultiMax(), True
    query, key, value = (torch.randn(1, 2, n, 4) for n in (3, 8, 8))
    out, _ = attend(module, query, key, value, None)
    expected, _ = attend(module, query, key[:, :, :3], value[:, :, :3], None)
    assert out.equal(expected)
    one, _ = attend(module, query[:, :, :1], key, value, None)  # decoding sees all of it
    full, _ = attend(module, query[:, :, :1], key, value, torch.ones(1, 1, 1, 8, dtype=torch.bool))
    torch.testing.assert_close(one, full)


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_change_what_is_normalized_are_refused(name):
    module = torch.nn.Module()
    module.normalizer = MultiMax()
    tensors = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=name):
        attend(module, *tensors, None, **{name: torch.zeros(2)})
    attend(module, *tensors, None, **{name: None}, sliding_window=4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt_oss.modeling_gpt_oss.GptOssAttention", "sink"),
        ("granite_swa.modeling_granite_swa.GraniteSWAAttention", "sink"),
        ("deepseek_v32.modeling_deepseek_v32.DeepseekV32Attention", "index"),
        ("llama.modeling_llama.LlamaAttention", None),
    ],
)
def test_classes_are_refused_for_what_they_pass(name, reason):
    cls = attention_class(name)
    found = obstacle(cls.__new__(cls))
    assert reason in found if reason else found is None


def test_no_class_passes_an_argument_that_nobody_has_looked_at():
    passed = {}
    call = re.compile(r"= attention_interface\((.*?)\n        (?:    )*\)", re.DOTALL)
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for arguments in call.findall(file.read_text()):
            for name in re.findall(r"^\s+(\w+)=", arguments, re.MULTILINE):
                passed.setdefault(name, set()).add(file.stem)
    assert len(passed["scaling"]) > 150
    unknown = passed.keys() - KNOWN - REFUSED.keys()
    assert not unknown, {name: sorted(passed[name]) for name in unknown}


@pytest.mark.parametrize("name", transformers_classes.CLASSES)
def test_listed_classes_exist_and_normalize(name):
    cls = attention_class(name.removeprefix("transformers.models."))
    assert normalizes(cls)
    # One that asks it is listed for its finite mask, which the interface does not tell.
    assert asks_interface(cls) == (name.endswith(transformers_classes.SHIFTED_MASK))


def test_routers_are_left():
    model = build("Mixtral")
    report = replace_softmax(model)
    assert {entry.note for entry in report.left} == {"it chooses experts"}
    assert len(report.left) == 2


def test_half_a_model_is_refused():
    model = build("Llama")
    with pytest.raises(ValueError, match="whole model"):
        replace_softmax(model.model.layers[0].self_attn)
    assert not any("normalizer" in name for name in model.state_dict())
    arguments = inputs("BART", build("BART"))
    whole = build("BART")
    replace_softmax(whole.get_encoder())
    with pytest.raises(RuntimeError, match="takes whole models"):
        whole(**arguments)


def test_skipped_layers_of_all_kinds_keep_softmax():
    model = build("Llama")
    arguments = inputs("Llama", model)
    expected = first(model(**arguments))
    replace_softmax(model, skip="model.layers.0.*")
    move(model, 1.0)
    with torch.no_grad():
        model.model.layers[1].self_attn.normalizer.ts.zero_()
    torch.testing.assert_close(first(model(**arguments)), expected, atol=2e-6, rtol=1e-5)


def test_attentions_of_a_model_that_does_not_pass_the_option():
    model = build("GPT-2")
    tokens = inputs("GPT-2", model)["input_ids"]
    model.set_attn_implementation("eager")
    expected = model(tokens, output_attentions=True).attentions
    replace_softmax(model)
    found = model(tokens, output_attentions=True).attentions
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_each_implementation_comes_back(implementation):
    model = build("CLIP")
    model.set_attn_implementation({"vision_config": implementation, "text_config": "eager"})
    before = [m.config._attn_implementation for m in (model.vision_model, model.text_model)]
    assert before == [implementation, "eager"]
    replace_softmax(model)
    assert model.vision_model.config._attn_implementation == "multimax"
    restore_softmax(model)
    after = [m.config._attn_implementation for m in (model.vision_model, model.text_model)]
    assert after == before


@pytest.mark.parametrize("name", ["Llama", "T5", "BERT", "GPT-2", "CLIP"])
def test_the_scale_and_the_heads_of_a_layer_are_found(name):
    model = build(name)
    arguments = inputs(name, model)
    expected = first(model(**arguments))
    assert {size_of(m, HEADS) for m in model.modules() if asks_interface(type(m))} == {4}
    replace_softmax(model, before_scale=True)
    torch.testing.assert_close(first(model(**arguments)), expected, atol=2e-6, rtol=1e-5)
    normalizers = [m for m in model.modules() if isinstance(m, MultiMax)]
    scale = 1.0 if name == "T5" else 8**-0.5
    assert all(abs(normalizer.score_scale - scale) < 1e-9 for normalizer in normalizers)


def test_flex_attention_is_replaced_too():
    model = build("Llama")
    arguments = inputs("Llama", model)
    expected = first(model(**arguments))
    model.set_attn_implementation("flex_attention")
    replace_softmax(model)
    torch.testing.assert_close(first(model(**arguments)), expected, atol=2e-6, rtol=1e-5)
    restore_softmax(model)
    assert model.config._attn_implementation == "flex_attention"


def test_a_verification_does_not_pass_nan_for_equal():
    model = build("BERT")
    replace_softmax(model)
    model.bert.encoder.layer[0].attention.self.normalizer.ts.data.fill_(torch.nan)
    assert verify_replacement(model, **inputs("BERT", model)).evaluation == torch.inf
