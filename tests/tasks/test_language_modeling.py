import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_language_model import ROOT, TEXT, build
from torch import nn

from multimax.losses import output_loss
from multimax.models.output import Output
from multimax.tasks import language_modeling
from multimax.training.run import run

EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("lm_*.yaml"))
OUTPUTS = ["softmax", "multimax", "temperature", "sparsemax", "entmax15", "evsoftmax", "topk"]
SPARSE = OUTPUTS[3:]


def evaluate(config, split, world_size=1):
    """The metrics of a split, from all ranks one after the other."""
    sums = []

    def collect(totals):
        sums.append(totals.clone())
        return (
            sum(sums) if len(sums) == world_size else torch.tensor([1.0, 1.0, task.splits[split]])
        )

    with torch.inference_mode():
        for rank in range(world_size):
            task = build(config, rank, world_size)
            metrics = task.evaluate(task.model.eval(), split, collect)
    return metrics, task


def naive_probabilities(task, split):
    """(tokens, words): each token from a forward pass of its own, over just what it may see."""
    data = task.data
    stream = [data.vocabulary.eos_index, *data.streams[split].tolist()]
    step, rows = data.block_size - data.context_window, []
    for position in range(len(stream) - 1):
        first = max(0, position // step * step - data.context_window)
        features = task.model(torch.tensor([stream[first : position + 1]]))[0, -1]
        rows.append(task.model.output.probabilities(features))
    return torch.stack(rows), torch.tensor(stream[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "window"), [(1, 0), (1, 8), (1, 15), (3, 8), (40, 5)])
def test_evaluation_is_the_naive_one(composed, world_size, window):
    window = f"data.context_window={window}"
    config = composed("lm_multimax", window, f"trainer.batch_size={world_size}")
    metrics, task = evaluate(config, "valid", world_size)
    with torch.inference_mode():
        p, targets = naive_probabilities(task, "valid")
    loss = -p.gather(1, targets[:, None]).log().double().mean().item()
    assert len(targets) == task.splits["valid"]
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.slow
def test_context_window_changes_the_figures(composed):
    losses = {
        evaluate(composed("lm_softmax", f"data.context_window={window}"), "test")[0]["loss"]
        for window in (0, 4, 8, 15)
    }
    assert len(losses) == 4


@pytest.mark.parametrize("split", ["valid", "test"])
def test_figures_per_word_and_byte(composed, split):
    metrics, task = evaluate(composed("lm_softmax"), split)
    total = metrics["loss"] * len(task.data.streams[split])
    words = len(TEXT[split].split()) + TEXT[split].count("\n")
    assert metrics["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-6)
    size = len(TEXT[split].encode())
    assert metrics["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-9)
    plain = {name for name in metrics if not name.startswith("smoothed_")}
    assert plain == {"loss", "perplexity", "word_perplexity", "bits_per_byte"}


def test_batches_are_summed_in_double(composed):
    metrics, task = evaluate(composed("lm_softmax", "trainer.eval_batch_size=1"), "test")
    sums = []
    with torch.inference_mode():
        for batch in task.eval_loaders["test"]:
            counts = batch.targets != task.model.padding_index
            features = task.model(batch.inputs)[counts]
            loss = task.model.output.loss(features, batch.targets[counts], reduction="sum")
            sums.append(loss.item())
    assert len(sums) > 5
    assert metrics["loss"] == pytest.approx(sum(sums) / task.splits["test"], rel=1e-12)


def test_label_smoothing_is_of_training_alone(composed):
    plain, smoothed = (
        evaluate(composed("lm_softmax", f"loss.label_smoothing={share}"), "valid")[0]
        for share in (0, 0.3)
    )
    assert smoothed == plain


@pytest.mark.slow
@pytest.mark.parametrize("output", SPARSE)
def test_sparse_outputs_have_no_perplexity_but_a_smoothed_one(composed, output):
    metrics, task = evaluate(composed("lm_softmax", f"output={output}"), "valid")
    assert set(metrics) == {
        "loss", "smoothed_perplexity", "smoothed_word_perplexity", "smoothed_bits_per_byte",
    }  # fmt: skip
    with torch.inference_mode():
        p, targets = naive_probabilities(task, "valid")
        p = p.gather(1, targets[:, None]).squeeze(1).double()
        scores = task.model.output.scores(task.model(torch.tensor([[5, 6, 7]])))
        loss = task.model.output.loss(
            task.model(torch.tensor([[5, 6, 7]])), torch.tensor([[6, 7, 8]])
        )
        own = output_loss(task.model.output.normalizer, scores, torch.tensor([[6, 7, 8]]))
    assert (p == 0).any()
    smoothed = 0.99 * p + 0.01 / 270
    nll = -smoothed.log().sum().item()
    words = task.data.words["valid"]
    assert metrics["smoothed_perplexity"] == pytest.approx(math.exp(nll / len(p)), rel=1e-4)
    assert metrics["smoothed_word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert torch.equal(loss, own)
    assert math.isfinite(metrics["loss"])


def test_the_smoothed_likelihood_of_each_target():
    """Of a target that has no probability too, in float64."""
    output = Output(nn.Parameter(2 * torch.randn(7, 4)), {"name": "sparsemax"}, padding_index=0)
    features, targets = torch.randn(20, 4), torch.arange(20) % 7
    p = output.probabilities(features).double()[range(20), targets]
    assert (p == 0).any()
    assert (p > 0).any()
    expected = -sum(math.log(0.99 * value + 0.01 / 7) for value in p.tolist())
    found = language_modeling.smoothed_negative_log_likelihood(output, features, targets)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("adaptive", [(), ("model.adaptive_cutoffs=[40,100]",)])
def test_a_dense_output_has_smoothed_figures_of_the_test_split(composed, adaptive):
    config = composed("lm_multimax", *adaptive)
    assert set(evaluate(config, "valid")[0]) == {
        "loss", "perplexity", "word_perplexity", "bits_per_byte",
    }  # fmt: skip
    metrics, task = evaluate(config, "test", world_size=2)
    with torch.inference_mode():
        p, targets = naive_probabilities(task, "test")
    p = p.gather(1, targets[:, None]).squeeze(1).double()
    nll = -(0.99 * p + 0.01 / 270).log().sum().item()
    assert metrics["smoothed_perplexity"] == pytest.approx(math.exp(nll / len(p)), rel=1e-4)
    bits = nll / math.log(2) / task.data.bytes["test"]
    assert metrics["smoothed_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_sparse_are_those_that_give_zeros(composed, output):
    task = build(composed("lm_softmax", f"output={output}"))
    task.model.eval()
    with torch.inference_mode():
        p, _ = naive_probabilities(task, "valid")
    assert task.model.output.sparse == bool((p == 0).any()) == (output in SPARSE)


@pytest.mark.slow
def test_adaptive_output_is_evaluated_too(composed):
    adaptive = ("model.adaptive_cutoffs=[40,100]", "model.adaptive_factor=2")
    metrics, task = evaluate(composed("lm_multimax", *adaptive), "valid", world_size=2)
    with torch.inference_mode():
        p, targets = naive_probabilities(task, "valid")
    loss = -p.gather(1, targets[:, None]).log().double().mean().item()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    metrics, _ = evaluate(composed("lm_softmax", "output=entmax15", *adaptive), "valid")
    assert "smoothed_perplexity" in metrics


def test_training_loss_is_the_mean_over_the_targets_that_count(composed):
    task = build(composed("lm_softmax", "trainer.batch_size=1"))
    task.model.eval()
    batches = list(task.train_loader.batches(0))
    short = [batch for batch in batches if batch.tokens < 16]
    assert len(short) == 1
    for batch in [*short, batches[0]]:
        count = task.weight(batch)
        assert count == (batch.targets != task.model.padding_index).sum()
        p = task.model.output.probabilities(task.model(batch.inputs))[0, :count]
        expected = -p.gather(1, batch.targets[0, :count, None]).log().mean()
        torch.testing.assert_close(task.loss(task.model, batch), expected)
    smooth = build(composed("lm_softmax", "trainer.batch_size=1", "loss.label_smoothing=0.1"))
    assert smooth.loss(smooth.model.eval(), batches[0]) > task.loss(task.model, batches[0])


def test_padding_counts_neither_in_the_loss_nor_in_the_weight(composed):
    task = build(composed("lm_softmax"))
    model, spans = task.model.eval(), [(0, 0, 16), (32, 32, 37)]
    both, *alone = (
        task.data.batch("train", chosen, task.device) for chosen in (spans, spans[:1], spans[1:])
    )
    assert [task.weight(batch) for batch in (both, *alone)] == [21, 16, 5]
    assert both.targets.numel() == 32
    with torch.no_grad():
        expected = sum(task.loss(model, batch) * task.weight(batch) for batch in alone) / 21
        torch.testing.assert_close(task.loss(model, both), expected)


@pytest.mark.slow
def test_training_batches_are_those_of_seed_and_rank(composed):
    def targets(seed, rank=0, world_size=1):
        task = build(composed("lm_softmax", f"seed={seed}"), rank, world_size)
        return next(task.train_loader.batches(0)).targets

    whole = targets(seed=3)
    assert not torch.equal(targets(seed=4), whole)
    assert torch.equal(torch.cat([targets(3, rank, 2) for rank in range(2)]), whole)


def test_what_is_inspected(composed, monkeypatch):
    task = build(composed("lm_multimax"))
    sizes = set()
    task.model.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    with torch.inference_mode():
        rows = task.inspect(task.model.eval())
    assert sizes == {1}  # scores of more long blocks would not fit into memory
    layers = {f"decoder.layers.{layer}.self_attn.normalizer" for layer in range(2)}
    assert set(rows) == layers | {"decoder.output_projection.normalizer"}
    assert (
        rows["decoder.output_projection.normalizer"]["entropy_count"]
        == task.splits["test"]
        < 4 * 64
    )
    assert all(row["entropy_count"] > 0 and row["entropy"] > 0 for row in rows.values())
    monkeypatch.setattr(language_modeling, "INSPECTED_ROWS", 5)
    monkeypatch.setattr(language_modeling, "INSPECTED_BATCHES", 2)
    with torch.inference_mode():
        rows = task.inspect(task.model)
    assert rows["decoder.output_projection.normalizer"]["entropy_count"] == 2 * 5


def test_first_lines_of_a_run(composed):
    lines = build(composed("lm_multimax")).describe()
    assert lines["data"].startswith("text: ")
    assert lines["data"].endswith("test tokens, vocabulary of 270, blocks of 16")
    assert lines["attention"] == lines["output"] == "MultiMax(order=2, init='paper')"


def test_a_token_that_is_missing_is_found(composed):
    task = build(composed("lm_softmax"))
    loader = task.eval_loaders["valid"]
    loader.blocks = range(loader.blocks.stop - 1)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"evaluated \d+ of \d+ valid"):
        task.evaluate(task.model.eval(), "valid", lambda totals: totals)


@pytest.mark.parametrize("factor", [1e6, math.nan])
def test_divergence_is_said(composed, factor):
    task = build(composed("lm_softmax"))
    with torch.no_grad():
        task.model.output.weight.mul_(factor)
    with torch.inference_mode(), pytest.raises(FloatingPointError, match=r"valid loss is .*lr"):
        task.evaluate(task.model.eval(), "valid", lambda totals: totals)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(composed, experiment):
    config = composed(experiment)
    with open("/dev/null", "w") as nowhere:
        result = run(config, Console(file=nowhere))
    assert result["updates"] == 3
    assert result["metrics"]["valid"]["examples"] == len(
        np.concatenate([build(config).data.streams["valid"]])
    )
    assert {"perplexity", "word_perplexity"} < set(result["metrics"]["test"])
    assert bool(result["learned_scalars"]) == (experiment == "lm_multimax")
    assert result["best"]["metric"] == "valid/loss"


@pytest.mark.slow
def test_it_learns(composed):
    config = composed(
        "lm_multimax",
        "trainer.updates=60",
        "optimizer.lr=1e-2",
        "model.dropout=0",
        "trainer.log_every=1",
    )
    with open("/dev/null", "w") as nowhere:
        result = run(config, Console(file=nowhere))
    (path,) = Path(config.output_dir).rglob("metrics.jsonl")
    losses = [json.loads(line).get("train/loss") for line in path.open()]
    losses = [loss for loss in losses if loss is not None]
    counts = np.bincount(build(config).data.streams["train"])
    shares = counts[counts > 0] / counts.sum()
    unigram = -(shares * np.log(shares)).sum()
    assert losses[0] > unigram
    assert losses[-1] < unigram / 2
    assert result["metrics"]["valid"]["loss"] < losses[0]


@pytest.mark.slow
def test_a_checkpoint_with_another_vocabulary_is_refused(composed, tmp_path):
    config = composed("lm_softmax")
    with open("/dev/null", "w") as nowhere:
        run(config, Console(file=nowhere))
    (checkpoint,) = Path(config.output_dir).rglob("last.pt")
    (tmp_path / "text" / "train.txt").write_text("an other text with other pairs of words\n" * 50)
    with open("/dev/null", "w") as nowhere, pytest.raises(ValueError, match="is of other data"):
        run(composed("lm_softmax", f"resume={checkpoint}", "seed=1"), Console(file=nowhere))
    with open("/dev/null", "w") as nowhere, pytest.raises(ValueError, match="another vocabulary"):
        run(composed("lm_softmax", f"weights={checkpoint}", "seed=1"), Console(file=nowhere))
