"""The command-line tools, each in a process of its own, and the way to our models and back."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import FLAGS, MODELS, USER, batch, number, tool, words
from fairseq.checkpoint_utils import load_model_ensemble_and_task

from multimax.generation import beam_search
from multimax.integrations.fairseq.convert import load_model, to_multimax
from multimax.training.files import load_checkpoint

COMMON = [*USER, "--cpu", "--num-workers", "0", "--no-progress-bar", "--batch-size", "8"]
TRAIN = [*COMMON, "--optimizer", "adam", "--lr", "1e-2", "--no-epoch-checkpoints"]
TRAIN += ["--batch-size-valid", "4"]
ATTENTION = ["--attention-normalizer", "multimax:order=1", "--output-normalizer"]
NORMALIZERS = {
    "transformer_lm": [*ATTENTION, "multimax"],
    "transformer_lm_wiki103": [*ATTENTION, "multimax"],
    "transformer_iwslt_de_en": [
        *ATTENTION,
        "evsoftmax:floor=1e-5",
        *("--encoder-attention-normalizer", "entmax:alpha=1.3,learned=true"),
        *("--cross-attention-normalizer", "topk:k=4"),
    ],
}


def convert(direction, source, destination):
    command = ["-m", "multimax.integrations.fairseq.convert", direction, source, destination]
    tool("python", *command)
    return destination


@pytest.fixture(scope="module", params=["transformer_lm", "transformer_lm_wiki103"])
def language(request, data, tmp_path_factory):
    """A trained language model: its checkpoint, and what fairseq-train printed."""
    name, folder = request.param, tmp_path_factory.mktemp("language")
    adaptive = "wiki103" in name
    line = [data / "lm", "--arch", f"multimax_{name}", *words(MODELS[name]), *FLAGS[name]]
    line += ["--criterion", "adaptive_loss" if adaptive else "cross_entropy", *NORMALIZERS[name]]
    line += ["--ddp-backend", "legacy_ddp", "--max-update", "40"]
    log = tool("fairseq-train", *line, *TRAIN, "--save-dir", folder)
    return folder / "checkpoint_last.pt", log


def evaluate(data, checkpoint, context):
    line = [data / "lm", "--path", checkpoint, "--gen-subset", "test", *COMMON]
    line += ["--tokens-per-sample", "16", "--context-window", context]
    return re.findall(
        r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", tool("fairseq-eval-lm", *line)
    )


def test_language_model_there_and_back(language, data, tmp_path):
    checkpoint, log = language
    assert "normalizers: decoder multimax:order=1, output multimax" in log
    results = {context: evaluate(data, checkpoint, context) for context in (0, 10)}
    ((loss, perplexity),) = results[0]
    assert 1 < float(perplexity) < 40  # of 60 words: it has learned something
    assert results[0] != results[10]

    ours = load_model(convert("to-multimax", checkpoint, tmp_path / "ours.pt"))
    back = convert("to-fairseq", tmp_path / "ours.pt", tmp_path / "back.pt")
    assert evaluate(data, back, 10) == results[10]

    _, _, task = load_model_ensemble_and_task([str(checkpoint)])
    task.load_dataset("test")
    dataset, total, count = task.dataset("test"), 0.0, 0
    for index in range(len(dataset)):
        sample = dataset.collater([dataset[index]])
        log_probs = ours.output.log_probabilities(ours(sample["net_input"]["src_tokens"]))
        total -= log_probs.gather(-1, sample["target"].unsqueeze(-1)).double().sum().item()
        count += sample["ntokens"]
    assert total / count / torch.tensor(2.0).log().item() == pytest.approx(float(loss), abs=6e-5)


def translations(text):
    """Score and words of all hypotheses of each sentence, by its number."""
    found = {}
    for index, score, tokens in re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", text, re.MULTILINE):
        found.setdefault(int(index), []).append((float(score), tokens))
    return found


@pytest.fixture(scope="module")
def translation(data, tmp_path_factory):
    """A trained translation model: its checkpoint, and what fairseq-train printed."""
    name, folder = "transformer_iwslt_de_en", tmp_path_factory.mktemp("translation")
    line = [data / "mt", "--arch", f"multimax_{name}", *words(MODELS[name]), *FLAGS[name]]
    line += [*NORMALIZERS[name], "--criterion", "label_smoothed_cross_entropy", "--max-epoch", "6"]
    line += ["--label-smoothing", "0.1", "--eval-bleu", "--best-checkpoint-metric", "bleu"]
    line += ["--maximize-best-checkpoint-metric", "--dropout", "0.0"]
    log = tool("fairseq-train", *line, *TRAIN, "--save-dir", folder)
    return folder / "checkpoint_best.pt", log


def generate(data, checkpoint):
    line = [data / "mt", "--path", checkpoint, "--beam", "5", "--nbest", "5", *COMMON]
    text = tool("fairseq-generate", *line)
    return translations(text), number("BLEU4 =", text)


def test_translation_there_and_back(translation, data, tmp_path):
    checkpoint, log = translation
    assert (
        "normalizers: encoder entmax:alpha=1.3,learned=true, decoder multimax:order=1, "
        "cross topk:k=4, output evsoftmax:floor=1e-05" in log
    )
    found, bleu = generate(data, checkpoint)
    assert len(found) == 16
    assert all(len({tokens for _, tokens in hypotheses}) == 5 for hypotheses in found.values())
    assert number(r"best_bleu", log) > 5 < bleu  # it has learned something

    ours = load_model(convert("to-multimax", checkpoint, tmp_path / "ours.pt"))
    back = convert("to-fairseq", tmp_path / "ours.pt", tmp_path / "back.pt")
    assert generate(data, back) == (found, bleu)

    _, _, task = load_model_ensemble_and_task([str(checkpoint)])
    sample, dictionary = batch(task, 16, "test"), task.target_dictionary
    lists = beam_search(ours, sample["net_input"]["src_tokens"], eos=dictionary.eos(), beam=5)
    for index, hypotheses in zip(sample["id"].tolist(), lists, strict=True):
        assert [dictionary.string(h.tokens) for h in hypotheses] == [t for _, t in found[index]]
        scores = [h.score / torch.tensor(2.0).log().item() for h in hypotheses]
        assert scores == pytest.approx([score for score, _ in found[index]], abs=1e-3)


def test_finetune_a_converted_checkpoint(translation, data, tmp_path):
    checkpoint, _ = translation
    content = to_multimax(load_checkpoint(checkpoint))
    assert content["options"]["cross_attention"] == {"name": "topk", "k": 4}
    convert("to-multimax", checkpoint, tmp_path / "ours.pt")
    back = convert("to-fairseq", tmp_path / "ours.pt", tmp_path / "back.pt")
    name = "transformer_iwslt_de_en"
    line = [data / "mt", "--arch", f"multimax_{name}", *words(MODELS[name]), *FLAGS[name]]
    line += [*NORMALIZERS[name], "--finetune-from-model", back, "--max-update", "1"]
    log = tool("fairseq-train", *line, *TRAIN, "--save-dir", tmp_path, "--lr", "0")
    assert "loading pretrained model from" in log
    tuned = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, content["model"][key]) for key, value in tuned.items())


def test_sparse_output(data, tmp_path):
    """Trained and validated by its own loss, generated from, and without a perplexity."""
    name = "transformer_lm"
    line = [data / "lm", "--arch", f"multimax_{name}", *words(MODELS[name]), *FLAGS[name]]
    line += ["--criterion", "multimax_output_loss", "--output-normalizer", "entmax15"]
    log = tool("fairseq-train", *line, *TRAIN, "--max-update", "20", "--save-dir", tmp_path)
    assert "| ppl" not in log
    checkpoint = ["--path", tmp_path / "checkpoint_last.pt", *COMMON, "--batch-size", "4"]
    checkpoint += ["--tokens-per-sample", "16"]
    validated = tool("fairseq-validate", data / "lm", *checkpoint, "--task", "language_modeling")
    assert number(r"loss", validated) == number(r"valid on 'valid' subset \| loss", log)
    with pytest.raises(AssertionError, match="perplexity of a sparse output is not defined"):
        tool("fairseq-eval-lm", data / "lm", *checkpoint)


HYDRA = """
# @package _group_
common: {user_dir: %s, cpu: true, no_progress_bar: true}
task: {_name: language_modeling, data: %s, tokens_per_sample: 16}
dataset: {batch_size: 4, num_workers: 0}
criterion: {_name: cross_entropy}
optimization: {max_update: 2, lr: [0.01]}
optimizer: {_name: adam}
lr_scheduler: {_name: fixed}
model:
  _name: multimax_transformer_lm
  decoder_layers: 1
  decoder_embed_dim: 32
  decoder_input_dim: 32
  decoder_output_dim: 32
  decoder_attention_heads: 4
  attention_normalizer: topk:k=3
  output_normalizer: softmax
  official_mismatch: true
"""


def test_hydra_train(data, tmp_path):
    (tmp_path / "tiny.yaml").write_text(HYDRA % (USER[1], data / "lm"))
    line = ["--config-dir", tmp_path, "--config-name", "tiny"]
    line += ["model.output_normalizer='multimax:order=3'", f"checkpoint.save_dir={tmp_path}/saved"]
    tool("fairseq-hydra-train", *line, cwd=tmp_path)
    (model,), _, _ = load_model_ensemble_and_task([str(tmp_path / "saved" / "checkpoint_last.pt")])
    layer = model.decoder.layers[0].self_attn
    assert layer.normalizer.k == 3
    assert layer.plain_incremental
    assert model.decoder.output_projection.normalizer.order == 3


def test_user_dir_is_printed():
    assert tool("python", "-m", "multimax.integrations.fairseq").strip().endswith(USER[1])
    assert Path(sys.executable).with_name("fairseq-train").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_learned_pos": True}, r"decoder_learned_pos=True \(only False\)"),
        ({"encoder_ffn_embed_dim": 64}, r"encoder_ffn_embed_dim=64 \(only 48\)"),
        ({"activation_fn": "gelu"}, "activation_fn='gelu'"),
        ({"decoder_layers": 3}, "do not fit the options"),
        ({"attention_normalizer": "softmacks"}, "unknown normalizer"),
        ({"decoder_embed_dim": None}, "no Transformer of fairseq: the checkpoint lacks"),
    ],
)
def test_what_ours_is_not(translation, changes, message):
    checkpoint = load_checkpoint(translation[0])
    settings = vars(checkpoint["cfg"]["model"]) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        to_multimax({"cfg": {"model": settings}, "model": checkpoint["model"]})


def test_what_is_no_checkpoint(tmp_path):
    torch.save({"model": {}}, tmp_path / "x.pt")
    with pytest.raises(AssertionError, match=r"x\.pt: no checkpoint of fairseq"):
        convert("to-multimax", tmp_path / "x.pt", tmp_path / "y.pt")
    with pytest.raises(AssertionError, match="no converted model: 'class' must be one of"):
        convert("to-fairseq", tmp_path / "x.pt", tmp_path / "y.pt")
    with pytest.raises(AssertionError, match=r"no checkpoint at .*z\.pt"):
        convert("to-fairseq", tmp_path / "z.pt", tmp_path / "y.pt")
    assert not (tmp_path / "y.pt").exists()
