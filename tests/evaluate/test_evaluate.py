"""`python -m multimax.evaluate` on tiny trained runs gives the figures of their result again."""

import json
import shutil

import pytest
import torch
from tiny_runs import settings_of, train, write_text

from multimax import evaluate as command
from multimax.data.pairs.sources import Languages
from multimax.data.vocabulary import BytePairVocabulary
from multimax.files import load_checkpoint, save_checkpoint
from multimax.training.trained import load_run

pytestmark = pytest.mark.slow

TASKS = ("deit", "lm", "mt")


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def evaluated(tmp_path, *arguments):
    """What the command writes for these arguments."""
    command.main([*map(str, arguments), "--json", str(tmp_path / "report.json")])
    return json.loads((tmp_path / "report.json").read_text())


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def change_weights(path):
    """Double the last matrix of a checkpoint."""
    state = load_checkpoint(path)
    name = [name for name, tensor in state["model"].items() if tensor.ndim > 1][-1]
    state["model"][name] = 2 * state["model"][name]
    save_checkpoint(path, state)


@pytest.mark.parametrize("name", TASKS)
def test_a_finished_run_has_its_figures_again(runs, tmp_path, capsys, name):
    result, report = result_of(runs[name]), evaluated(tmp_path, runs[name])
    assert report["metrics"] == result["metrics"]  # bit for bit
    assert set(report["metrics"]) == {"valid", "test"}
    same = "task", "scale", "seed", "experiment", "config_hash", "notes", "parameters"
    assert {key: report[key] for key in same} == {key: result[key] for key in same}
    assert report["data"] == report["trained_on"] == result["inputs"]["data"]
    assert report["same_as_result"] is True
    out = capsys.readouterr().out
    assert "these are the figures of its result.json" in out
    assert f"n = {result['metrics']['test']['examples']:,}" in out


@pytest.mark.parametrize("name", ["deit", "lm"])
def test_averages_and_mixed_precision(tmp_path, name):
    write_text(tmp_path)
    more = "trainer.ema_decay=0.5", "trainer.precision=bf16", "trainer.updates=4"
    folder = train(tmp_path, [*settings_of(name, tmp_path), *more])
    result, report = result_of(folder), evaluated(tmp_path, folder)
    assert report["metrics"] == result["metrics"]
    assert result["metrics"]["test"]["ema_loss"] != result["metrics"]["test"]["loss"]
    plain = evaluated(tmp_path, folder, "--set", "trainer.precision=no")["metrics"]["test"]
    assert plain != result["metrics"]["test"]
    state = load_checkpoint(folder / "last.pt")
    state["ema"].popitem()
    save_checkpoint(folder / "last.pt", state)
    with pytest.raises(SystemExit, match=r"the averaged weights of .*last\.pt are damaged"):
        command.main([str(folder)])
    assert plain["loss"] == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-2)


def test_other_weights_have_other_figures(runs, tmp_path, capsys):
    folder = copied(runs["deit"], tmp_path)
    change_weights(folder / "last.pt")
    report = evaluated(tmp_path, folder)
    assert report["same_as_result"] is False
    was, now = (r["metrics"]["test"]["loss"] for r in (result_of(folder), report))
    out = capsys.readouterr().out
    assert f"test/loss: {now!r}, there {was!r}" in out
    assert "these are the figures" not in out


def test_the_named_checkpoint_is_evaluated(runs, tmp_path):
    folder = copied(runs["deit"], tmp_path)
    last = evaluated(tmp_path, folder / "last.pt")
    assert last["same_as_result"] is True
    change_weights(folder / "best.pt")
    best = evaluated(tmp_path, folder / "best.pt")
    assert best["metrics"] != last["metrics"]
    assert best["same_as_result"] is None  # the result is of last.pt


def test_a_split_and_settings(runs, tmp_path):
    expected = result_of(runs["deit"])["metrics"]["test"]
    report = evaluated(tmp_path, runs["deit"], "--split", "test")
    assert report["metrics"] == {"test": expected}
    assert report["same_as_result"] is True
    batches = evaluated(tmp_path, runs["deit"], "--set", "trainer.eval_batch_size=7", "seed=3")
    assert batches["metrics"]["test"] == pytest.approx(expected, rel=1e-5)
    assert (batches["same_as_result"], batches["seed"]) == (None, 3)
    searched = evaluated(tmp_path, runs["mt"], "--split", "test", "--set", "decoding.beam=1",
                         "decoding.max_len_b=1")  # fmt: skip
    assert searched["metrics"]["test"]["chrf"] != result_of(runs["mt"])["metrics"]["test"]["chrf"]


def test_other_data_is_said(runs, tmp_path, capsys):
    write_text(tmp_path, test=9)
    report = evaluated(tmp_path, runs["lm"], "--data-root", tmp_path)
    metrics, expected = report["metrics"], result_of(runs["lm"])["metrics"]
    assert metrics["valid"] == expected["valid"]
    assert metrics["test"]["examples"] > expected["test"]["examples"]
    assert report["data"] != report["trained_on"]
    assert report["same_as_result"] is None
    assert "this is other data than that of the training" in capsys.readouterr().out


def test_a_run_that_has_no_result(runs, tmp_path):
    folder = copied(runs["deit"], tmp_path)
    expected = result_of(folder)["metrics"]
    (folder / "result.json").unlink()
    report = evaluated(tmp_path, folder)
    assert (report["metrics"], report["same_as_result"]) == (expected, None)


def test_load_run(runs):
    loaded = {name: load_run(str(folder)) for name, folder in runs.items()}
    for name, run in loaded.items():
        state = load_checkpoint(run.path)
        assert not any(module.training for module in run.model.modules())
        assert all(torch.equal(v, state["model"][k]) for k, v in run.model.state_dict().items())
        assert run.averaged is None
        assert run.config.recorded() == result_of(runs[name])["config"]
    assert loaded["deit"].vocabulary is None
    assert isinstance(loaded["lm"].vocabulary, BytePairVocabulary)
    assert list(loaded["lm"].vocabulary.decode(loaded["lm"].vocabulary.encode("a cat")))
    assert isinstance(loaded["mt"].vocabulary, Languages)
    assert loaded["mt"].path.name == "best.pt"  # the reported weights


def text_of_another_vocabulary(runs, tmp_path):
    write_text(tmp_path)
    (tmp_path / "train.txt").write_text(
        "quite an other text with other pairs of words in it\n" * 20
    )
    return runs["lm"], "--data-root", tmp_path


def half_a_checkpoint(runs, tmp_path):
    folder = copied(runs["deit"], tmp_path)
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:-5000])
    return (folder,)


def broken_result(runs, tmp_path):
    folder = copied(runs["deit"], tmp_path)
    (folder / "result.json").write_text("{")
    return (folder,)


def alone(runs, tmp_path):
    return (shutil.copy(runs["deit"] / "last.pt", tmp_path / "a.pt"),)


BAD = {
    "no folder": (lambda runs, tmp: (tmp / "x",), r"there is no .*config\.yaml"),
    "no run": (lambda runs, tmp: (tmp,), r"there is no .*config\.yaml"),
    "no configuration": (alone, r"there is no .*config\.yaml.* --experiment"),
    "half a checkpoint": (half_a_checkpoint, r"last\.pt cannot be read as a checkpoint"),
    "no such experiment": (
        lambda runs, tmp: (*alone(runs, tmp), "--experiment", "deit_maximax"),
        r"deit_maximax",
    ),
    "experiment of a folder": (
        lambda runs, tmp: (runs["deit"], "--experiment", "deit_multimax"),
        r"is a folder, which has a configuration of its own",
    ),
    "no such setting": (
        lambda runs, tmp: (runs["deit"], "--set", "trainer.eval_batchsize=3"),
        r"there is no setting trainer\.eval_batchsize; did you mean trainer\.eval_batch_size",
    ),
    "no value": (lambda runs, tmp: (runs["deit"], "--set", "seed"), r"'seed' must be NAME=VALUE"),
    "several values": (
        lambda runs, tmp: (runs["deit"], "--set", "seed=1,2"),
        r"'seed=1,2' must be NAME=VALUE with a single value",
    ),
    "out of range": (
        lambda runs, tmp: (runs["mt"], "--set", "decoding.beam=0"),
        r"decoding\.beam=0 must be",
    ),
    "another model": (
        lambda runs, tmp: (runs["deit"], "--set", "model.depth=3"),
        r"last\.pt does not fit the model",
    ),
    "another vocabulary": (text_of_another_vocabulary, r"trained with another vocabulary"),
    "no data": (
        lambda runs, tmp: (runs["lm"], "--data-root", tmp / "gone"),
        r"there is no .*gone/train\.txt",
    ),
    "a folder for the report": (
        lambda runs, tmp: (runs["deit"], "--json", tmp),
        r"--json .* is a folder",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_data_is_loaded(runs, tmp_path, monkeypatch, case):
    def load(*_):
        raise AssertionError("data was loaded")

    monkeypatch.setattr(command, "build_task", load)
    arguments, message = BAD[case]
    with pytest.raises(SystemExit, match=f"error: .*{message}") as stop:
        command.main(list(map(str, arguments(runs, tmp_path))))
    assert stop.value.code != 0


def test_a_damaged_result_and_a_missing_split_are_named(runs, tmp_path):
    with pytest.raises(SystemExit, match=r"result\.json is damaged"):
        command.main([str(broken_result(runs, tmp_path)[0])])
    without_valid = "data.valid_size=0", "data.crop_padding=1"
    with pytest.raises(SystemExit, match=r"has no split 'valid'; it has: test"):
        command.main([str(runs["deit"]), "--split", "valid", "--set", *without_valid])
