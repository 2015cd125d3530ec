"""Models of transformers with another normalizer in files, and training that writes them."""

import pytest
import torch

from experiments.drop_in.transformers_models import build, first, inputs, move
from multimax import MultiMax, load_pretrained, replace_softmax, restore_softmax, verify_replacement

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BERT", {}),
        ("Llama", {"output": True}),
        ("T5", {"output": True, "skip": "encoder.*"}),
        ("CLIP", {"name": "entmax", "learned": True}),
    ],
)
def test_saved_models_keep_their_scalars(name, options, tmp_path):
    model = build(name)
    replace_softmax(model, **options)
    move(model)
    model.save_pretrained(tmp_path)
    again = load_pretrained(type(model), tmp_path).eval()
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    arguments = inputs(name, model)
    assert first(again(**arguments)).equal(first(model(**arguments)))


def test_layers_that_are_skipped_stay_so(tmp_path):
    model = build("T5")
    arguments = inputs("T5", model)
    report = replace_softmax(model, skip="decoder.*")
    assert (len(report.attention), len(report.left)) == (2, 4)
    assert verify_replacement(model, **arguments).evaluation < 2e-6
    move(model)
    model.save_pretrained(tmp_path)
    auto = load_pretrained(transformers.AutoModelForSeq2SeqLM, tmp_path).eval()
    assert first(auto(**arguments)).equal(first(model(**arguments)))


LOADS = {
    "BERT": [lambda folder: transformers.AutoModel.from_pretrained(folder)],
    "CLIP": [
        lambda folder: transformers.CLIPModel.from_pretrained(folder),
        lambda folder: transformers.CLIPVisionModel.from_pretrained(folder),
        lambda folder: transformers.CLIPTextModel.from_pretrained(folder),
    ],
    "T5": [lambda folder: transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)],
}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in LOADS), ("BERT", {"attention": False, "output": True})],
)
def test_nothing_else_loads_a_saved_model_silently(name, options, tmp_path):
    model = build(name)
    replace_softmax(model, **options)
    model.save_pretrained(tmp_path)
    for load in LOADS[name]:
        with pytest.raises(ValueError, match=r'"multimax.load_pretrained"` is not supported'):
            load(tmp_path)


def test_an_ordinary_folder_is_refused(tmp_path):
    build("BERT").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not saved with another normalizer"):
        load_pretrained(transformers.BertForMaskedLM, tmp_path)


@pytest.mark.parametrize("name", ["Qwen3", "BART"])
def test_shared_scalars_are_one_in_files_too(name, tmp_path):
    model = build(name)
    replace_softmax(model, shared=True)
    move(model)
    arguments = inputs(name, model)
    expected = first(model(**arguments))
    model.save_pretrained(tmp_path)
    again = load_pretrained(type(model), tmp_path).eval()
    assert first(again(**arguments)).equal(expected)
    scalars = {m.ts for m in again.modules() if isinstance(m, MultiMax)}
    assert len(scalars) == 1
    restore_softmax(model)
    model.save_pretrained(tmp_path / "plain")
    type(model).from_pretrained(tmp_path / "plain")


def test_a_part_of_a_saved_model(tmp_path):
    model = build("BERT")
    replace_softmax(model, skip="bert.encoder.layer.1.*", output=True)
    move(model)
    model.save_pretrained(tmp_path)
    part = load_pretrained(transformers.AutoModel, tmp_path).eval()
    arguments = inputs("BERT", model)
    expected = model.bert(**arguments).last_hidden_state
    torch.testing.assert_close(part(**arguments).last_hidden_state, expected)
    part.save_pretrained(tmp_path / "part")
    whole = load_pretrained(transformers.BertForMaskedLM, tmp_path / "part")
    assert whole.bert.encoder.layer[0].attention.self.normalizer.ts.equal(
        model.bert.encoder.layer[0].attention.self.normalizer.ts
    )


def test_missing_scalars_are_named(tmp_path):
    model = build("BERT")
    replace_softmax(model)
    state = {k: v for k, v in model.state_dict().items() if "layer.1.attention.self.norm" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.self\.normalizer\.ts"):
        load_pretrained(type(model), tmp_path)


def test_a_state_dict_says_what_is_missing(tmp_path):
    model = build("BERT")
    replace_softmax(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*normalizer\.ts"):
        build("BERT").load_state_dict(state)
    again = build("BERT", seed=1)
    replace_softmax(again)
    again.load_state_dict(state)
    arguments = inputs("BERT", model)
    assert first(again(**arguments)).equal(first(model(**arguments)))


def test_an_explicit_implementation_leaves_the_scalars_unexpected(tmp_path):
    model = build("BERT")
    replace_softmax(model)
    model.save_pretrained(tmp_path)
    _, report = transformers.BertForMaskedLM.from_pretrained(
        tmp_path, attn_implementation="sdpa", output_loading_info=True
    )
    scalars = {name for name in model.state_dict() if "normalizer" in name}
    assert set(report["unexpected_keys"]) == scalars


def test_autocast():
    model = build("Llama")
    arguments = inputs("Llama", model)
    replaced = build("Llama")
    replace_softmax(replaced)
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = first(model(**arguments)), first(replaced(**arguments))
        replaced(**arguments, labels=arguments["input_ids"]).loss.backward()
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.05)
    gradient = replaced.model.layers[0].self_attn.normalizer.ts.grad
    assert gradient.abs().max() > 0


@pytest.mark.slow
def test_a_trainer_trains_the_scalars(tmp_path):
    pytest.importorskip("accelerate")
    model = build("GPT-2").train()
    replace_softmax(model)
    before = {n: p.clone() for n, p in model.named_parameters() if "normalizer" in n}
    tokens = torch.randint(4, 96, (8, 9))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    scalars = dict(model.named_parameters())
    assert len(before) == 4
    assert all(not scalars[name].equal(value) for name, value in before.items() if ".ts" in name)
    trainer.save_model(str(tmp_path / "trained"))
    again = load_pretrained(transformers.AutoModelForCausalLM, tmp_path / "trained").eval()
    assert first(again(tokens)).equal(first(model.eval()(tokens)))
