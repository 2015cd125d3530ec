"""Language models through the command-line tools, and the way to ours and back."""

import math
import re

import pytest
from conftest import COMMON, FLAGS, MODELS, TRAIN, USER, forked, number, tool, words
from fairseq.checkpoint_utils import load_model_ensemble_and_task

from multimax.integrations.fairseq.convert import load_model

NORMALIZERS = ["--attention-normalizer", "multimax:order=1", "--output-normalizer", "multimax"]


def evaluate(run, data, checkpoint, context):
    line = [data / "lm", "--path", checkpoint, "--gen-subset", "test", *COMMON]
    line += ["--tokens-per-sample", "16", "--context-window", context]
    printed = run("fairseq-eval-lm", *line)
    ((loss, perplexity),) = re.findall(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", printed)
    return float(loss), float(perplexity)


@pytest.mark.parametrize(
    ("name", "criterion", "run"),
    [
        ("transformer_lm", "cross_entropy", tool),
        ("transformer_lm_wiki103", "adaptive_loss", forked),
    ],
)
def test_there_and_back(data, tmp_path, name, criterion, run):
    line = [data / "lm", "--arch", f"multimax_{name}", *words(MODELS[name]), *FLAGS[name]]
    line += ["--criterion", criterion, "--ddp-backend", "legacy_ddp", *NORMALIZERS]
    log = run("fairseq-train", *line, *TRAIN, "--max-update", "40", "--save-dir", tmp_path)
    assert "normalizers: decoder multimax:order=1, output multimax" in log
    checkpoint = tmp_path / "checkpoint_last.pt"
    loss, perplexity = evaluate(run, data, checkpoint, 0)
    assert 1 < perplexity < 40  # of 60 words: it has learned something
    with_context = evaluate(forked, data, checkpoint, 10)
    assert with_context != (loss, perplexity)

    forked("convert", "to-multimax", checkpoint, tmp_path / "ours.pt")
    forked("convert", "to-fairseq", tmp_path / "ours.pt", tmp_path / "back.pt")
    assert evaluate(forked, data, tmp_path / "back.pt", 10) == with_context

    ours = load_model(tmp_path / "ours.pt")
    _, _, task = load_model_ensemble_and_task([str(checkpoint)])
    task.load_dataset("test")
    dataset, total, count = task.dataset("test"), 0.0, 0
    for index in range(len(dataset)):
        sample = dataset.collater([dataset[index]])
        log_probs = ours.output.log_probabilities(ours(sample["net_input"]["src_tokens"]))
        total -= log_probs.gather(-1, sample["target"].unsqueeze(-1)).double().sum().item()
        count += sample["ntokens"]
    assert total / count / math.log(2) == pytest.approx(loss, abs=6e-5)


def test_sparse_output(data, tmp_path):
    """Trained and validated by its own loss, and without a perplexity."""
    name = "transformer_lm"
    line = [data / "lm", "--arch", f"multimax_{name}", *words(MODELS[name]), *FLAGS[name]]
    line += ["--criterion", "multimax_output_loss", "--output-normalizer", "entmax15"]
    log = forked("fairseq-train", *line, *TRAIN, "--max-update", "20", "--save-dir", tmp_path)
    assert "| ppl" not in log
    checkpoint = ["--path", tmp_path / "checkpoint_last.pt", *COMMON, "--batch-size", "4"]
    checkpoint += ["--tokens-per-sample", "16"]
    validated = forked("fairseq-validate", data / "lm", *checkpoint, "--task", "language_modeling")
    assert number(r"loss", validated) == number(r"valid on 'valid' subset \| loss", log)
    with pytest.raises(AssertionError, match="perplexity of a sparse output is not defined"):
        forked("fairseq-eval-lm", data / "lm", *checkpoint)


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
    assert layer.official_mismatch
    assert model.decoder.output_projection.normalizer.order == 3
