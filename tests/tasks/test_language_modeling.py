import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from rich.console import Console

from multimax.data.vocabulary import WordVocabulary
from multimax.losses import output_loss
from multimax.tasks import build_task, language_modeling
from multimax.tasks.language_modeling import build_language_model
from multimax.training.config import read_config, run_folder
from multimax.training.run import run

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("lm_*.yaml"))
OUTPUTS = ["softmax", "multimax", "temperature", "sparsemax", "entmax15", "evsoftmax", "topk"]
SPARSE = OUTPUTS[3:]
TEXT = {
    "train": "the cat sat on the mat\nthe dog ate the hat of the cat\n\n" * 30,
    "valid": "the hat sat on the dog\n\nthe cat ate\n" * 3,
    "test": "a mat sat on the cat\nthe über-dog\n" * 4,
}
TINY = (
    "data=text_files", "data.vocabulary_size=270", "data.block_size=16", "data.context_window=8",
    "model.embed_dim=16", "model.ffn_dim=16", "model.depth=2", "model.num_heads=2", "scale.topk=4",
    "trainer.epochs=null", "trainer.updates=3", "trainer.batch_size=4", "trainer.eval_batch_size=3",
    "trainer.evaluate_every=2", "schedule.warmup=1", "logger.wandb=disabled",
)  # fmt: skip


@pytest.fixture
def composed(tmp_path):
    """Composes an experiment, on a small text if it is `tiny`."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split, text in TEXT.items():
        (folder / f"{split}.txt").write_text(text)

    def compose_experiment(experiment, *overrides, tiny=True):
        places = [f"data.root={folder}", f"data.cache={tmp_path}", f"output_dir={tmp_path}/out"]
        chosen = [*TINY, *places] if tiny else []
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return read_config(compose("config", [f"experiment={experiment}", *chosen, *overrides]))

    yield compose_experiment
    AcceleratorState._reset_state()


def build(config, rank=0, world_size=1):
    torch.manual_seed(0)
    task = build_task(config, rank, world_size, torch.device("cpu"))
    if not config.model.adaptive_cutoffs:
        with torch.no_grad():  # scores that are far enough apart for exact zeros
            task.model.output.weight.mul_(4)
    return task


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
    assert set(metrics) == {"loss", "perplexity", "word_perplexity", "bits_per_byte"}


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


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_sparse_are_those_that_give_zeros(composed, output):
    task = build(composed("lm_softmax", f"output={output}"))
    task.model.eval()
    with torch.inference_mode():
        p, _ = naive_probabilities(task, "valid")
    assert task.model.output.sparse == bool((p == 0).any()) == (output in SPARSE)


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


def test_training_batches_are_those_of_seed_and_rank(composed):
    def targets(seed, rank=0, world_size=1):
        task = build(composed("lm_softmax", f"seed={seed}"), rank, world_size)
        return next(task.train_loader.batches(0)).targets

    whole = targets(seed=3)
    assert not torch.equal(targets(seed=4), whole)
    assert torch.equal(torch.cat([targets(3, rank, 2) for rank in range(2)]), whole)


def test_what_is_inspected(composed, monkeypatch):
    task = build(composed("lm_multimax"))
    with torch.inference_mode():
        rows = task.inspect(task.model.eval())
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


@pytest.mark.slow
def test_experiments_differ_in_nothing_but_the_normalizers(composed):
    configs = [composed(name, tiny=False) for name in EXPERIMENTS]
    assert {config.attention.name for config in configs} == {
        "softmax", "topk", "sparsemax", "entmax15", "evsoftmax", "multimax",
    }  # fmt: skip
    for config in configs:
        expected = "multimax" if config.name == "lm_multimax" else "softmax"
        assert config.output.name == expected
    rest = [config.recorded() for config in configs]
    for settings in rest:
        for section in ("attention", "output", "name"):
            del settings[section]
    assert all(settings == rest[0] for settings in rest)


# The table of fairseq's recipes: what is composed, and what it is there.
PAPER = {
    "data.name": "wikitext103", "data.block_size": 512, "data.context_window": 400,
    "model.depth": 6, "model.embed_dim": 512, "model.ffn_dim": 2048, "model.num_heads": 8,
    "model.pre_norm": True, "model.final_norm": True, "model.dropout": 0.1,
    "model.attention_dropout": 0.0, "model.activation_dropout": 0.0, "model.tie_embeddings": True,
    "model.adaptive_cutoffs": None, "model.official_mismatch": False,
    "optimizer": {"name": "adamw", "lr": 5e-4, "weight_decay": 0.01, "eps": 1e-8,
                  "betas": [0.9, 0.98], "filter_bias_and_bn": False},
    "schedule": {"name": "inverse_sqrt", "warmup": 4000, "warmup_lr": 1e-7},
    "trainer.clip_norm": None, "trainer.updates": 50_000, "trainer.epochs": None,
    "trainer.precision": "fp16", "loss.label_smoothing": 0.0, "scale.name": "paper",
}  # fmt: skip
WIKI103 = {
    "data.name": "wikitext103", "data.block_size": 3072, "data.context_window": 2560,
    "model.depth": 16, "model.embed_dim": 1024, "model.ffn_dim": 4096, "model.num_heads": 8,
    "model.pre_norm": True, "model.final_norm": False, "model.dropout": 0.3,
    "model.attention_dropout": 0.1, "model.activation_dropout": 0.1,
    "model.adaptive_cutoffs": [20000, 60000], "model.adaptive_factor": 4,
    "model.adaptive_dropout": 0.2, "model.tie_embeddings": True,
    "optimizer": {"name": "nesterov", "lr": 1.0, "momentum": 0.99, "weight_decay": 0.0},
    "schedule": {"name": "cosine_restarts", "warmup": 16_000, "warmup_lr": 1e-7, "min_lr": 1e-4,
                 "period": 270_000, "period_growth": 2.0, "shrink": 0.75},
    "trainer.clip_norm": 0.1, "trainer.updates": 286_000, "scale.name": "paper_wiki103",
}  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "recipe", "tokens"),
    [("paper", PAPER, 2048 * 16 * 2), ("paper_wiki103", WIKI103, 3072 * 3 * 8)],
)
def test_paper_scale_is_fairseqs_recipe(composed, scale, recipe, tokens):
    for experiment in ("lm_topk", "lm_multimax"):
        config = composed(experiment, f"scale={scale}", "data.root=/data/a", tiny=False)
        for field, value in recipe.items():
            found = config
            for part in field.split("."):
                found = getattr(found, part)
            assert (found.given() if isinstance(value, dict) else found) == value, field
        assert config.trainer.batch_size * config.data.block_size == tokens
        assert config.data.root == "/data/a"
        if experiment == "lm_topk":
            assert config.attention.k == 100


def test_sizes_of_the_papers_models(composed):
    words = WordVocabulary(str(i) for i in range(267_740))
    for scale, millions in (("paper", 156.0), ("paper_wiki103", 247.0)):
        config = composed("lm_softmax", f"scale={scale}", tiny=False)
        with torch.device("meta"):
            model = build_language_model(config, words)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)
        assert words.size == 267_744


def test_data_root_is_needed_at_paper_scale(composed):
    with pytest.raises(ValueError, match=r"data\.root=null: .*prepare.wikitext103"):
        build(composed("lm_softmax", "scale=paper", tiny=False))


def test_places_of_files_do_not_name_a_run(composed):
    folders = {
        run_folder(composed("lm_softmax", f"data.cache={place}", f"data.root={place}"))
        for place in ("/a", "/b")
    }
    assert len(folders) == 1
    assert run_folder(composed("lm_softmax", "data.block_size=32")) not in folders


def test_warm_up_in_updates_goes_with_a_length_in_epochs(composed):
    by_updates = ("schedule.name=inverse_sqrt", "schedule.warmup=4000")
    composed("lm_softmax", *by_updates, "trainer.epochs=50", "trainer.updates=null")
    with pytest.raises(
        ValueError, match=r"schedule\.warmup=4000 leaves nothing of trainer\.updates=3"
    ):
        composed("lm_softmax", *by_updates)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("+schedule.period=0", r"schedule\.period=0 must be a whole number >= 1"),
        ("+schedule.period_growth=0.5", r"schedule\.period_growth=0\.5 must be a number >= 1"),
        ("+schedule.shrink=0", r"schedule\.shrink=0 must be a number in"),
    ],
)
def test_options_of_restarts_out_of_range(composed, override, problem):
    with pytest.raises(ValueError, match=problem):
        composed("lm_softmax", override)
