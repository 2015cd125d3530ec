"""`train.py` and `configs/` from the outside: every experiment, every pair of normalizers."""

import functools
import io
import json
import math
import os
import re
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from tiny_text import TINY_LANGUAGE_MODEL, TINY_TRANSLATION

from multimax.data.pairs.sources import PairSource
from multimax.tasks import build_task
from multimax.training.config import read_config
from multimax.training.run import run
from multimax.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
ATTENTIONS, OUTPUTS = (
    sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))
    for group in ("attention", "output")
)
TINY = ["debug=two_updates", "model.depth=1", "model.embed_dim=16", "trainer.batch_size=10"]
SYNTHETIC = ["debug=two_updates", "data.valid_size=100", "data.test_size=100"]
LENGTHS = "data.test_lengths=[64,80]"
TINY_TASK = {
    "image_classification": TINY,
    "language_modeling": TINY_LANGUAGE_MODEL,
    "translation": TINY_TRANSLATION,
    "retrieval": [*SYNTHETIC, LENGTHS],
    "max_retrieval": [*SYNTHETIC, LENGTHS],
    "associative_recall": [*SYNTHETIC, "data.vocabulary_size=64", "data.settings=[[32,2],[48,3]]"],
    "mqmtar": [*SYNTHETIC, LENGTHS],
    "reverse": [*SYNTHETIC, LENGTHS],
    "sort": [*SYNTHETIC, LENGTHS],
}

# What `result.json` holds, and the tables are made of.
SCHEMA = {
    "schema": int, "experiment": str, "task": str, "scale": str, "seed": int, "config_hash": str,
    "config": dict, "metrics": dict, "reported_weights": str, "best": dict, "normalizers": dict,
    "learned_scalars": dict, "parameters": int, "updates": int, "training_seconds": float,
    "processes": int, "versions": dict, "commit": str | None, "uncommitted_changes": bool,
    "inputs": dict, "origin": type(None), "notes": dict, "hardware": dict,
    "peak_memory_mib": dict, "finished": str,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("few_inspected")


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state()


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def run_and_read(config):
    """The result, as returned and as written, and what the run said."""
    said = io.StringIO()
    returned = run(config, Console(file=said, width=80))
    (path,) = Path(config.output_dir).rglob("result.json")
    assert json.loads(path.read_text()) == returned
    return returned, said.getvalue(), path.parent


def numbers(node):
    if isinstance(node, dict):
        return [number for value in node.values() for number in numbers(value)]
    return [node] if isinstance(node, int | float) else []


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for vocabularies, which are then trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def little_text(tmp_path, cache, monkeypatch):
    """Overrides for a text of a few lines; of the sentence pairs the first few of each split."""
    for source in PairSource.__subclasses__():
        read = source.read
        monkeypatch.setattr(source, "read", lambda self, split, r=read: islice(r(self, split), 100))
    for split in ("train", "valid", "test"):
        lines = [f"{split} {i} is one of {i * i} numbers" for i in range(100)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    return {
        "image_classification": [],
        "language_modeling": [f"data.root={tmp_path}", f"data.cache={cache}"],
        "translation": [f"data.cache={cache}"],
    }


# One of each task is enough for `make test-fast`.
@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=() if name.endswith("_multimax") else pytest.mark.slow)
        for name in EXPERIMENTS
    ],
)
def test_every_experiment(tmp_path, little_text, experiment):
    task = composed(f"experiment={experiment}").task.name
    small = [*TINY_TASK[task], *little_text.get(task, [])]
    config = composed(f"experiment={experiment}", *small, "name=test", f"output_dir={tmp_path}")
    result, _, folder = run_and_read(config)
    assert {key: type(value) for key, value in result.items() if key != "commit"} == {
        key: kind for key, kind in SCHEMA.items() if key != "commit"
    }
    assert isinstance(result["commit"], str | None)
    assert folder.parent == tmp_path / "small" / "test"
    assert result["updates"] == 2
    assert result["config"] == OmegaConf.to_container(config, resolve=True)
    assert list(result["metrics"]) == ["valid", "test"]
    for row in result["metrics"].values():
        assert row["examples"] >= 100
        assert row["loss"] > 0
        assert all(math.isfinite(number) for number in numbers(row))
    for measures in result["normalizers"].values():
        assert measures["entropy_count"] > 0
        assert 0 <= measures["entropy"] < 6
    learned = "learned" if experiment.endswith(("_multimax", "_temperature")) else "fixed"
    assert learned == ("learned" if result["learned_scalars"] else "fixed")
    losses = [json.loads(line).get("train/loss") for line in (folder / "metrics.jsonl").open()]
    assert [loss for loss in losses if loss is not None and math.isfinite(loss)] == losses[:2]


DROPOUT = {
    "deit_multimax": ("dropout", "attention_dropout", "drop_path"),
    "lm_multimax": ("dropout", "attention_dropout", "activation_dropout"),
    "mt_multimax": ("dropout", "attention_dropout", "activation_dropout"),
}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", DROPOUT)
def test_no_dropout_in_an_evaluation(tmp_path, little_text, experiment):
    task_name = composed(f"experiment={experiment}").task.name
    small = [f"experiment={experiment}", *TINY_TASK[task_name], *little_text[task_name]]
    accelerator, found = Accelerator(cpu=True), []
    for rate in (0.0, 0.5):
        rates = [f"model.{name}={rate}" for name in DROPOUT[experiment]]
        config = read_config(composed(*small, *rates))
        torch.manual_seed(0)
        trainer = Trainer(
            build_task(config, 0, 1, accelerator.device), config, tmp_path, accelerator, [], None
        )
        batch = next(iter(trainer.task.train_loader.batches(0)))
        losses = {trainer.task.loss(trainer.model.train(), batch).item() for _ in range(2)}
        assert len(losses) == (2 if rate else 1)
        inspected = trainer.inspect()
        trainer.model.train()
        found.append((trainer.evaluate("valid"), inspected))
    assert found[0] == found[1]


@pytest.mark.slow
def test_experiments_differ_in_nothing_but_the_normalizers():
    by_task = {}
    for experiment in EXPERIMENTS:
        config = OmegaConf.to_container(composed(f"experiment={experiment}"))
        for key in ("name", "attention", "output"):
            del config[key]
        by_task.setdefault(config["task"]["name"], []).append(config)
    assert set(by_task) == set(TINY_TASK)
    for configs in by_task.values():
        assert all(config == configs[0] for config in configs)


@functools.cache
def with_group(group, name):
    config = composed(*TINY, "trainer.updates=3", f"{group}={name}")
    return OmegaConf.to_container(config, resolve=True)


def with_normalizers(attention, output):
    """As composed with both: a group changes its own section alone."""
    return with_group("attention", attention) | {"output": with_group("output", output)["output"]}


def test_a_pair_of_normalizers_is_made_of_both():
    groups = "attention=entmax", "output=evsoftmax"
    config = composed(*TINY, "trainer.updates=3", *groups)
    assert with_normalizers("entmax", "evsoftmax") == OmegaConf.to_container(config, resolve=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "output"),
    [
        (attention, OUTPUTS[(index + shift) % len(OUTPUTS)])
        for index, attention in enumerate(ATTENTIONS)
        for shift in (0, 5)
    ],
)
def test_pairs_of_normalizers(tmp_path, attention, output):
    config = read_config(with_normalizers(attention, output))
    accelerator = Accelerator(cpu=True)
    task = build_task(config, 0, 1, accelerator.device)
    before = {name: tensor.clone() for name, tensor in task.model.named_parameters()}
    trainer = Trainer(task, config, tmp_path, accelerator, [], None)
    trainer.fit(stop_after=1)
    stuck = [name for name, now in task.model.named_parameters() if torch.equal(now, before[name])]
    assert stuck == []
    trainer.fit(stop_after=2)  # raises if a number is not finite


def test_first_lines_of_a_run(tmp_path):
    options = "attention=multimax", "name=first_lines", "seed=7", f"output_dir={tmp_path}"
    result, said, folder = run_and_read(composed(*TINY, *options))
    lines = dict(line.split(maxsplit=1) for line in said.splitlines()[:7])
    assert lines == {
        "run": "first_lines: image_classification at small scale, seed 7",
        "data": "fashion_mnist_subset: 7,000 train, 1,000 valid, 2,000 test images of 28 x 28",
        "model": f"VisionTransformer, {result['parameters']:,} parameters",
        "attention": "MultiMax(order=2, init='paper')",
        "output": "SoftMax(temperature=1)",
        "device": f"1 x cpu, {torch.get_num_threads()} threads, precision no",
        "results": str(folder),
    }
    assert str(folder / "result.json") in said
    assert "test (n = 2,000)" in said


def test_help_shows_experiments_and_examples(train):
    code, output, _ = train("--help")
    assert not code
    examples = (
        "python train.py -m experiment=",
        "torchrun",
        "trainer.batch_size=50",
        "scale=paper",
    )
    for text in (*EXPERIMENTS, *examples):
        assert text in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seeed=1"], "error: there is no setting 'seeed'\ndid you mean: seed\n"),
        (["-m", "attention=softmax,multimx"], "error: .* Could not find 'attention/multimx'"),
        (
            ["trainer.batch_size=0"],
            r"error: trainer\.batch_size=0 must be a whole number >= 1 \(of one",
        ),
        (["resume=/nowhere", *TINY], "error: no checkpoint at /nowhere: give the path"),
    ],
)
def test_error_is_a_message(train, tmp_path, arguments, said):
    message, _, _ = train(*arguments, f"output_dir={tmp_path}")
    assert re.match(said, message)


def test_configuration_can_be_shown(train):
    code, output, _ = train("experiment=deit_topk", "--cfg", "job")
    assert not code
    assert OmegaConf.create(output).attention.name == "topk"


@pytest.mark.slow
@pytest.mark.parametrize(("resume", "hint"), [("auto", ""), ("never", " with resume=auto")])
def test_interrupted_run_says_how_to_go_on(train, tmp_path, monkeypatch, resume, hint):
    real = Trainer._update

    def terminated(self, group):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, group)

    monkeypatch.setattr(Trainer, "_update", terminated)
    code, _, error = train(*TINY, f"output_dir={tmp_path}", f"resume={resume}")
    assert code == 143
    assert f"after update 1; the same command{hint} goes on from there\n" in error


@pytest.mark.slow
def test_sweep_makes_a_folder_for_each_run(train, tmp_path):
    code, _, error = train("-m", "seed=0,1", *TINY, f"output_dir={tmp_path}")
    assert not code, error
    folders = [path.parent.name for path in tmp_path.glob("small/debug/*/result.json")]
    assert sorted(name[-6:] for name in folders) == ["-seed0", "-seed1"]
    assert len({name[:-6] for name in folders}) == 1
