"""Checkpoints outside a run folder: official ones, converted ones of fairseq, and our own."""

import json
import shutil
import sys
from argparse import Namespace

import pytest
import torch
from tiny_runs import DEIT, LM, TEXT, settings_of, train

from multimax import evaluate as command
from multimax.data.prepare.wikitext103 import MEMBERS, Sizes, prepare
from multimax.evaluate import foreign
from multimax.files import load_checkpoint, save_checkpoint
from multimax.integrations.fairseq import convert
from multimax.models.official_names import to_official_state_dict
from multimax.tasks import TASKS
from multimax.training.trained import load_run

pytestmark = pytest.mark.slow


def evaluated(checkpoint, name, folder, *settings):
    """The figures of a checkpoint of the experiment of a tiny run, whose data is in a folder."""
    _, *given = settings_of(name, folder)
    path = checkpoint.parent / "report.json"
    arguments = [checkpoint, "--experiment", f"{name}_multimax", "--json", path, "--set"]
    command.main([*map(str, arguments), *given, *settings])
    return json.loads(path.read_text())


def result_of(folder):
    return json.loads((folder / "result.json").read_text())["metrics"]


def data_of(folder):
    """Where the tiny run of this folder has its data."""
    return folder.parents[3]


def official(runs, tmp_path):
    """The tiny run of a DeiT as the official code would have written it."""
    weights = to_official_state_dict(load_run(runs["deit"]).model)
    assert "blocks.0.attn.ts" in weights
    content = {"model": weights, "args": Namespace(lr=1), "epoch": 3}
    torch.save(content, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def content_of(folder):
    """A run as a converted checkpoint: class, options and weights."""
    run = load_run(folder)
    options = TASKS[run.config.task.name].model_options(run.config, run.source)
    del options["name"]
    weights = run.model.state_dict()
    return {"class": type(run.model).__name__, "options": options, "model": weights}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The run of a language model on words, which are numbered as fairseq numbers them."""
    folder = tmp_path_factory.mktemp("words")
    text = TEXT * 12
    for name in MEMBERS.values():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    size = len(text.split()) + text.count("\n")
    kinds = -(-(4 + len(set(text.split()))) // 8) * 8
    prepare(folder, folder / "data", Sizes(size, size, size, kinds), report=lambda line: None)
    own = [setting for setting in LM if "vocabulary_size" not in setting]
    return train(folder, [*own, "data=wikitext103", f"data.root={folder / 'data'}"])


@pytest.fixture
def converted(words, tmp_path, monkeypatch):
    """That run as a checkpoint of fairseq, turned into one of ours."""
    theirs, ours = tmp_path / "checkpoint_best.pt", tmp_path / "model.pt"
    save_checkpoint(theirs, convert.to_fairseq(content_of(words)))
    monkeypatch.setattr(sys, "argv", ["convert", "to-multimax", str(theirs), str(ours)])
    convert.main()
    return ours


def evaluated_words(checkpoint, words, *settings):
    own = [setting for setting in LM[1:] if "vocabulary_size" not in setting]
    path = checkpoint.parent / "report.json"
    arguments = [checkpoint, "--experiment", "lm_multimax", "--json", path, "--data-root",
                 data_of(words) / "data", "--set"]  # fmt: skip
    command.main([*map(str, arguments), *own, "data=wikitext103", *settings])
    return json.loads(path.read_text())


def test_an_official_checkpoint(runs, tmp_path):
    report = evaluated(official(runs, tmp_path), "deit", tmp_path)
    assert report["metrics"] == result_of(runs["deit"])
    assert (report["trained_on"], report["same_as_result"]) == (None, None)


def test_a_converted_checkpoint_of_fairseq(words, converted):
    assert evaluated_words(converted, words)["metrics"] == result_of(words)


def test_a_converted_translation_model(runs, tmp_path):
    save_checkpoint(tmp_path / "model.pt", content_of(runs["mt"]))
    report = evaluated(tmp_path / "model.pt", "mt", data_of(runs["mt"]))
    assert report["metrics"] == result_of(runs["mt"])


@pytest.mark.parametrize("name", ["deit", "lm", "mt"])
def test_a_checkpoint_of_a_run_that_was_moved(runs, tmp_path, name):
    path = shutil.copy(load_run(runs[name]).path, tmp_path / "moved.pt")
    report = evaluated(path, name, data_of(runs[name]))
    assert report["metrics"] == result_of(runs[name])
    assert report["trained_on"] == report["data"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.num_heads=4"], r"num_heads=2, the configuration num_heads=4: --set model\.num_h"),
        (["model.depth=2"], r"has depth=1, the configuration depth=2: --set model\.depth="),
        (["attention=softmax"], r"has attention=\{name: 'multimax', .*: choose the experiment"),
        (["output.order=1"], r"has output=\{.*order: 2.*the configuration output=\{.*order: 1"),
    ],
)
def test_a_converted_checkpoint_of_another_model(words, converted, settings, message):
    """Of which some would fit the weights: the number of heads has no shape."""
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        evaluated_words(converted, words, *settings)


def test_a_converted_checkpoint_of_another_vocabulary(runs, converted):
    message = "has vocabulary_size=16, the configuration vocabulary_size=270: give the data that"
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        evaluated(converted, "lm", data_of(runs["lm"]))


def test_what_does_not_matter_in_evaluation_may_differ(words, converted):
    report = evaluated_words(converted, words, "model.dropout=0.3", "attention.init=identity")
    assert report["metrics"] == result_of(words)


def test_an_official_checkpoint_of_another_model(runs, tmp_path):
    path = official(runs, tmp_path)
    for settings, message in {
        ("attention=softmax",): "its attention is MultiMax, the model's is not",
        ("model.qkv_bias=true",): r"the model has a query-key-value bias, it has none",
        ("model.depth=1",): r"blocks\.1\.attn\..* does not exist here",
    }.items():
        with pytest.raises(SystemExit, match=f"error: .*checkpoint\\.pth does not fit .*{message}"):
            evaluated(path, "deit", tmp_path, *settings)


def test_a_checkpoint_of_another_run(runs, tmp_path):
    path = shutil.copy(runs["deit"] / "last.pt", tmp_path / "moved.pt")
    with pytest.raises(SystemExit, match=r"moved\.pt does not fit the model of --experiment and"):
        evaluated(path, "deit", tmp_path, "model.depth=3")


def test_what_is_no_checkpoint_of_the_experiment(runs, words, converted, tmp_path):
    fairseq = converted.with_name("checkpoint_best.pt")
    for path, name, message in (
        (fairseq, "lm", "is a checkpoint of fairseq: python -m .*convert to-multimax"),
        (converted, "mt", "is a LanguageModel, not the TranslationModel of"),
        (tmp_path / "gone.pt", "deit", r"no checkpoint at .*gone\.pt"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            evaluated(path, name, data_of(runs["mt"]))
    damaged = load_checkpoint(converted)
    del damaged["model"]["decoder.layers.0.fc1.bias"]
    save_checkpoint(converted, damaged)
    with pytest.raises(SystemExit, match=r"model\.pt is damaged, its weights do not fit"):
        evaluated_words(converted, words)


def test_settings_are_checked_as_those_of_train(tmp_path, monkeypatch):
    for settings, message in {
        ("scale=huge",): "huge",
        ("trainer.eval_batchsize=3",): r"trainer\.eval_batch_size",
        ("trainer.eval_batch_size=0",): r"trainer\.eval_batch_size=0 must be a whole number >= 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            foreign.compose_experiment("deit_multimax", [*DEIT[1:], *settings])
    monkeypatch.setattr(foreign, "CONFIGS", tmp_path / "configs")
    with pytest.raises(FileNotFoundError, match="experiments are files of the repository"):
        foreign.compose_experiment("deit_multimax")
