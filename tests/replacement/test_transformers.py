"""Models of transformers with another normalizer: outputs, caches, generation."""

import copy
import pickle

import pytest
import torch

from experiments.drop_in.transformers_models import (
    GENERATING,
    INTERCEPTED,
    MODELS,
    REFUSED,
    build,
    first,
    inputs,
    move,
)
from multimax import MultiMax, load_pretrained, replace_softmax, restore_softmax, verify_replacement
from multimax.attention import attention

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_starts_as_itself_and_comes_back(name):
    model = build(name)
    arguments = inputs(name, model)
    with torch.no_grad():
        expected = first(model(**arguments))
    before = model.config.to_dict()
    report = replace_softmax(model)
    assert len(report.attention) == MODELS[name][-1]
    verification = verify_replacement(model, **arguments)
    assert verification.evaluation < 2e-6
    assert verification.training < 2e-6
    assert verification.called == verification.normalizers == MODELS[name][-1]
    assert all(gradient > 0 for gradient in verification.gradients.values())
    move(model, 1.0)
    with torch.no_grad():
        assert not torch.allclose(first(model(**arguments)), expected, atol=1e-6)
        restore_softmax(model)
        assert first(model(**arguments)).equal(expected)
    assert model.config.to_dict() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERCEPTED)
def test_classes_that_do_not_ask_the_interface(name, tmp_path):
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # their scores are all but equal otherwise
                parameter.normal_(std=0.3)
    arguments, place = inputs(name, model), INTERCEPTED[name][-1]
    if place == "before":
        with pytest.raises(ValueError, match="bias would be modulated"):
            replace_softmax(model)
    replace_softmax(model, bias_place=place)
    verification = verify_replacement(model, **arguments)
    assert verification.evaluation < 2e-6
    assert verification.called == verification.normalizers
    assert all(gradient > 0 for gradient in verification.gradients.values())
    move(model, 1.0)
    assert verify_replacement(model, **arguments).evaluation > 1e-3
    expected = first(model(**arguments))
    model.save_pretrained(tmp_path)
    assert first(load_pretrained(type(model), tmp_path).eval()(**arguments)).equal(expected)
    with pytest.raises(ValueError, match="load_pretrained"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_right_is_refused(name):
    model = build(name)
    with pytest.raises(ValueError, match=REFUSED[name][-1]):
        replace_softmax(model)
    assert not any("normalizer" in key for key in model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATING)
def test_generation_is_that_of_the_original(name):
    model = build(name)
    arguments = {k: v for k, v in inputs(name, model).items() if k != "decoder_input_ids"}
    ways = [{"num_beams": 1}, {"num_beams": 2}, {"do_sample": True}]
    if name in ("Llama", "Qwen3"):
        ways.append({"cache_implementation": "static"})

    def texts():
        torch.manual_seed(5)
        options = {"max_new_tokens": 6, "do_sample": False}
        return [model.generate(**arguments, **{**options, **way}) for way in ways]

    expected = texts()
    replace_softmax(model)
    for ours, theirs in zip(texts(), expected, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3", "T5"])
def test_a_cache_gives_what_the_whole_text_gives(name):
    model = build(name)
    replace_softmax(model)
    move(model)
    tokens = inputs(name, model)["input_ids"]
    given = {"input_ids": tokens} if name == "T5" else {}
    key = "decoder_input_ids" if name == "T5" else "input_ids"
    with torch.no_grad():
        whole = model(**given, **{key: tokens}).logits
        cache, parts = None, []
        for part in tokens.split([4, 1, 4], dim=1):
            out = model(**given, **{key: part}, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-5)


def test_relative_positions_are_added_after_the_modulation():
    model = build("T5").get_encoder()
    replace_softmax(model)
    move(model)
    layer = model.block[0].layer[0].SelfAttention
    seen = {}

    def look(module, args, kwargs):
        seen.update(kwargs, scores=args[0])

    layer.normalizer.register_forward_pre_hook(look, with_kwargs=True)
    tokens = torch.randint(4, 96, (1, 7))
    model(input_ids=tokens)
    assert seen["bias"].shape == (1, 4, 7, 7)
    assert seen["bias"].abs().max() > 0
    hidden = layer.q(model.block[0].layer[0].layer_norm(model.embed_tokens(tokens)))
    query = hidden.unflatten(-1, (4, 8)).transpose(1, 2)
    key = layer.k(model.block[0].layer[0].layer_norm(model.embed_tokens(tokens)))
    scores = query @ key.unflatten(-1, (4, 8)).permute(0, 2, 3, 1)
    torch.testing.assert_close(seen["scores"], scores * layer.scaling, atol=1e-5, rtol=1e-5)


def test_training_with_checkpoints_is_training_without():
    model = build("Llama").train()
    replace_softmax(model)
    move(model)
    arguments = inputs("Llama", model)
    arguments["labels"] = arguments["input_ids"]
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**arguments).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "Gemma 2", pytest.param("T5", marks=pytest.mark.slow)])
def test_one_graph(name):
    model = build(name)
    replace_softmax(model)
    move(model)
    arguments = inputs(name, model)
    with torch.no_grad():
        expected = first(model(**arguments, return_dict=False))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = first(compiled(**arguments, return_dict=False))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_half_precision_keeps_the_scalars_in_fp32(tmp_path):
    model = build("Qwen3").to(torch.bfloat16)
    arguments = inputs("Qwen3", model)
    expected = first(model(**arguments))
    replace_softmax(model)
    scalars = {p.dtype for n, p in model.named_parameters() if "normalizer" in n}
    assert scalars == {torch.float32}
    out = first(model(**arguments))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.05)
    move(model)
    model.save_pretrained(tmp_path)
    again = load_pretrained(type(model), tmp_path)
    for (name, ours), theirs in zip(
        again.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert ours.dtype == theirs.dtype, name
        assert ours.equal(theirs), name


def test_attention_probabilities_are_returned():
    model = build("BERT")
    arguments = inputs("BERT", model)
    model.set_attn_implementation("eager")
    expected = model(**arguments, output_attentions=True).attentions
    replace_softmax(model)
    found = model(**arguments, output_attentions=True).attentions
    for ours, theirs in zip(found, expected, strict=True):
        allowed = arguments["attention_mask"].bool()[:, None, :, None].expand_as(ours)
        torch.testing.assert_close(ours[allowed], theirs[allowed], atol=1e-6, rtol=1e-5)


def test_copies_are_models_of_their_own():
    model = build("Llama")
    replace_softmax(model)
    move(model)
    arguments = inputs("Llama", model)
    expected = first(model(**arguments))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert first(again(**arguments)).equal(expected)
        restore_softmax(again)
        assert not first(again(**arguments)).equal(expected)
        assert first(model(**arguments)).equal(expected)


def test_grouped_heads_and_masks_reach_attention():
    """The function that transformers calls, against `attention` itself."""
    from multimax.replacement.transformers_route import attend

    module = torch.nn.Module()
    module.normalizer, module.is_causal = MultiMax(), True
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    out, weights = attend(module, query, key, value, None, scaling=0.3)
    expected = attention(query, key, value, module.normalizer, causal=True, scale=0.3)
    assert out.transpose(1, 2).equal(expected)
    assert weights is None
    with pytest.raises(ValueError, match="learned sink"):
        attend(module, query, key, value, None, s_aux=torch.zeros(4))
