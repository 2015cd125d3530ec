"""Going on with a run: what may change, what is refused, and what is set aside."""

import json

import pytest
import torch
from tiny import history, interrupted, only, run_quietly, tiny_config

from multimax.files import load_checkpoint, save_checkpoint
from multimax.training.trainer import Trainer


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The last.pt of a run of Adam, stopped after update 3 of an epoch of 8."""
    epochs = (
        "data.valid_size=6000", "trainer.batch_size=250", "trainer.epochs=2",
        "trainer.updates=null", "trainer.evaluate_every=1",
    )  # fmt: skip
    interrupted(tiny_config(tmp_path / "first", *epochs), monkeypatch, 3)
    return only(tmp_path / "first", "last.pt"), epochs


@pytest.mark.slow
def test_settings_of_the_optimizer_are_those_of_the_run(tmp_path, stopped, monkeypatch):
    path, epochs = stopped
    options = {"lr": 2e-3, "weight_decay": 0.3, "eps": 1e-5, "betas": [0.8, 0.9]}
    given = [f"++optimizer.{name}={value}".replace(" ", "") for name, value in options.items()]
    seen = []
    real = Trainer._update

    def look(self, group):
        metrics = real(self, group)
        seen.append([dict(g, params=None) for g in self.optimizer.param_groups])
        return metrics

    monkeypatch.setattr(Trainer, "_update", look)
    result = run_quietly(tiny_config(tmp_path / "second", *epochs, f"resume={path}", *given))
    assert len(seen) == 16 - 3
    plain, decayed = sorted(seen[0], key=lambda group: group["weight_decay"])
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0, 0.3)
    for group in (plain, decayed):
        assert (group["eps"], tuple(group["betas"])) == (1e-5, (0.8, 0.9))
        assert group["initial_lr"] == 2e-3
    assert result["config"]["optimizer"]["weight_decay"] == 0.3
    assert result["origin"] == f"resumed from {path} at update 3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.name=sgd", r"optimizer\.name=sgd, but .*last\.pt was trained with adamw"),
        ("++optimizer.filter_bias_and_bn=false", r"set optimizer\.filter_bias_and_bn"),
        ("++optimizer.decay_scalars=true", r"set optimizer\.filter_bias_and_bn, optimizer\.decay_"),
        ("trainer.batch_size=500", r"an epoch has 8 updates in .* and 4 here: .*batch_size"),
        ("trainer.batch_size=125", r"an epoch has 8 updates in .* and 16 here: .*batch_size"),
    ],
)
def test_what_cannot_change_is_refused(tmp_path, stopped, change, message):
    path, epochs = stopped
    with pytest.raises(ValueError, match=message):
        run_quietly(tiny_config(tmp_path / "second", *epochs, f"resume={path}", change))
    assert not list((tmp_path / "second").rglob("last.pt"))


@pytest.mark.slow
def test_accumulation_may_change_where_updates_stay(tmp_path, stopped):
    path, epochs = stopped
    options = *epochs, f"resume={path}", "trainer.accumulation=2"
    result = run_quietly(tiny_config(tmp_path / "second", *options))
    assert result["updates"] == 16


@pytest.mark.slow
def test_more_updates_than_the_run_has(tmp_path):
    run_quietly(tiny_config(tmp_path / "one"))
    path = only(tmp_path / "one", "last.pt")
    with pytest.raises(ValueError, match=r"has 4 updates, more than the 2 .* trainer\.updates"):
        run_quietly(tiny_config(tmp_path / "two", f"resume={path}", "trainer.updates=2"))


@pytest.mark.slow
@pytest.mark.parametrize("report", ["best", "last"])
def test_resume_at_the_end(tmp_path, report):
    first = run_quietly(tiny_config(tmp_path / "one"))
    path = only(tmp_path / "one", "last.pt")
    options = f"resume={path}", f"trainer.report={report}"
    second = run_quietly(tiny_config(tmp_path / "two", *options))
    assert second["metrics"] == first["metrics"]
    assert (second["updates"], second["best"]["update"]) == (4, 4)
    assert only(tmp_path / "two", "best.pt").exists()


@pytest.mark.slow
def test_what_a_folder_holds_is_set_aside_for_another_beginning(tmp_path, monkeypatch):
    run_quietly(tiny_config(tmp_path / "one"))
    interrupted(tiny_config(tmp_path / "two", "trainer.updates=6"), monkeypatch, 1)
    path = only(tmp_path / "one", "last.pt")
    result = run_quietly(tiny_config(tmp_path / "two", "trainer.updates=6", f"resume={path}"))
    assert result["updates"] == 6
    folder = only(tmp_path / "two", "result.json").parent
    assert load_checkpoint(folder / "previous-1" / "last.pt")["position"]["update"] == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert min(line["update"] for line in lines) > 4


@pytest.mark.slow
@pytest.mark.parametrize("began", ["never", "with another"])
def test_a_job_that_is_queued_again_goes_on(tmp_path, monkeypatch, began):
    """Whatever `resume` says, which holds for its beginning: here after update 0 or 4."""
    resume, start, origin = "never", 0, None
    if began == "with another":
        run_quietly(tiny_config(tmp_path / "first"))
        resume, start = only(tmp_path / "first", "last.pt"), 4
        origin = f"resumed from {resume} at update 4"
    folder, options = tmp_path / "job", (f"resume={resume}", f"trainer.updates={start + 4}")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # already, as it was preempted on its way
    interrupted(tiny_config(folder, *options), monkeypatch, start + 2)
    assert run_quietly(tiny_config(folder, *options))["origin"] == origin
    updates = [entry["update"] for entry in history(folder) if "train/loss" in entry]
    assert updates == list(range(start + 1, start + 5))
    assert not list(folder.rglob("previous-*"))


def spoil_result(folder):
    (folder / "result.json").write_text("[1]")


def old_result(folder):
    result = json.loads((folder / "result.json").read_text())
    del result["inputs"], result["training_seconds"]
    (folder / "result.json").write_text(json.dumps(result))


def bytes_of_a_disk(folder):
    (folder / "result.json").write_bytes(b"\xff\0\0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_result, "is of an earlier version or damaged"),
        (old_result, r"is of an earlier .* \(it lacks training_seconds, inputs\): "),
        (bytes_of_a_disk, "is damaged"),
    ],
)
def test_a_result_that_cannot_be_shown(tmp_path, spoil, message):
    run_quietly(tiny_config(tmp_path))
    folder = only(tmp_path, "result.json").parent
    spoil(folder)
    with pytest.raises(ValueError, match=rf"result\.json {message}.*resume=never"):
        run_quietly(tiny_config(tmp_path))
    run_quietly(tiny_config(tmp_path, "resume=never"))
    assert (folder / "previous-1" / "result.json").exists()


@pytest.mark.slow
def test_numbering_has_gaps_and_the_identity_is_empty(tmp_path):
    run_quietly(tiny_config(tmp_path))
    folder = only(tmp_path, "result.json").parent
    for name in ("previous-2", "previous-x"):
        (folder / name).mkdir()
    (folder / "wandb_id").write_text("")
    run_quietly(tiny_config(tmp_path, "resume=never"))
    assert (folder / "previous-3" / "result.json").exists()
    assert len((folder / "wandb_id").read_text()) == 8


@pytest.mark.slow
def test_an_empty_identity_is_drawn_anew(tmp_path, monkeypatch):
    interrupted(tiny_config(tmp_path), monkeypatch, 1)
    file = only(tmp_path, "wandb_id")
    known = file.read_text()
    file.write_text(" \n")
    interrupted(tiny_config(tmp_path), monkeypatch, 2)
    drawn = file.read_text()
    assert len(drawn) == 8 != len(known) or drawn != known
    run_quietly(tiny_config(tmp_path))
    assert file.read_text() == drawn


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, which is no checkpoint"),
        ({"model": {}}, r"cannot be resumed \(missing: ema, fingerprint, format"),
        (None, r"is damaged .*give another last\.pt"),
    ],
)
def test_a_checkpoint_that_is_none(tmp_path, monkeypatch, content, message):
    interrupted(tiny_config(tmp_path), monkeypatch, 1)
    path = only(tmp_path, "last.pt")
    if content is None:
        content = load_checkpoint(path)
        content["position"] = {"updates": 1}
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"last\.pt {message}.*resume=never"):
        run_quietly(tiny_config(tmp_path))


@pytest.mark.slow
def test_a_best_checkpoint_elsewhere_is_not_this_runs(tmp_path, monkeypatch):
    interrupted(tiny_config(tmp_path, "trainer.updates=6"), monkeypatch, 3)
    path = only(tmp_path, "last.pt")
    checkpoint = load_checkpoint(path)
    checkpoint["position"]["best"] = 99.0
    save_checkpoint(path, checkpoint)
    (path.parent / "best.pt").unlink()
    result = run_quietly(tiny_config(tmp_path, "trainer.updates=6"))
    assert 3 < result["best"]["update"] <= 6
    assert (path.parent / "best.pt").exists()


def test_a_finished_run_is_shown_where_nothing_can_be_written(tmp_path):
    result = run_quietly(tiny_config(tmp_path))
    folder = only(tmp_path, "result.json").parent
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()  # no one can open it, not even root
    assert run_quietly(tiny_config(tmp_path)) == json.loads(json.dumps(result))
    with pytest.raises(OSError, match="cannot be written: choose another output_dir="):
        run_quietly(tiny_config(tmp_path, "resume=never"))
