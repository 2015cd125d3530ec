import json
import os
import shutil
import signal
import time

import pytest
import torch
from forked import Forked
from tiny import (
    assert_same,
    history,
    only,
    outcome,
    run_quietly,
    state,
    tiny_config,
    tiny_overrides,
)

from multimax.files import load_checkpoint, locked, save_checkpoint
from multimax.training.trainer import InterruptedRunError, Trainer

pytestmark = pytest.mark.slow

# Eight updates an epoch; interrupted in the middle of the first and at its end.
EPOCHS = (
    "model.patch_size=14",
    "data.valid_size=6000",
    "trainer.batch_size=125",
    "trainer.epochs=2",
    "trainer.updates=null",
    "trainer.evaluate_every=1",
)
CASES = {
    "plain": (),
    "random": (
        "loss.mixup=0.8",
        "loss.cutmix=1.0",
        "loss.label_smoothing=0.1",
        "model.drop_path=0.3",
        "model.dropout=0.1",
        "model.attention_dropout=0.1",
        "trainer.ema_decay=0.9",
        "trainer.batch_size=124",
    ),
    "accumulation": ("trainer.accumulation=2", "trainer.batch_size=124", "model.dropout=0.1"),
    "augmentation": (
        "data.crop_padding=2",
        "data.horizontal_flip=0.5",
        "data.random_erasing=0.5",
        "schedule.per_epoch=true",
        "trainer.clip_norm=0.1",
    ),
    "ablation": (
        "model.depth=3",
        "attention.shared=true",
        "attention.before_scale=true",
        "attention.order=3",
        "+optimizer.decay_scalars=true",
        "trainer.ema_decay=0.9",
    ),
    "layout": (
        "+trainer.channels_last=true",
        "+optimizer.fused=true",
        "trainer.ema_decay=0.9",
        "trainer.precision=bf16",
    ),
    "updates": ("trainer.epochs=null", "trainer.updates=11", "trainer.evaluate_every=3"),
}


def terminate_after(monkeypatch, update):
    """Send a real SIGTERM to this process during an update."""
    real = Trainer._update

    def update_and_signal(self, group):
        done = real(self, group)
        if self.position.update + 1 == update:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(Trainer, "_update", update_and_signal)


def interrupt(config, monkeypatch, update):
    with monkeypatch.context() as context:
        terminate_after(context, update)
        with pytest.raises(InterruptedRunError, match=f"after update {update}$"):
            run_quietly(config)


def assert_same_run(folder, expected):
    assert_same(state(folder), state(expected))
    assert history(folder) == history(expected)
    assert outcome(folder) == outcome(expected)


@pytest.mark.parametrize("case", CASES)
def test_interrupted_run_equals_an_undisturbed_one(tmp_path, monkeypatch, case):
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    run_quietly(tiny_config(whole, *EPOCHS, *CASES[case]))
    config = tiny_config(parts, *EPOCHS, *CASES[case])
    for update in (5, 8):
        interrupt(config, monkeypatch, update)
        assert load_checkpoint(only(parts, "last.pt"))["position"]["update"] == update
        torch.manual_seed(update)  # what is drawn in between does not matter
    run_quietly(config)
    assert_same_run(parts, whole)


def test_resume_from_a_given_checkpoint(tmp_path, monkeypatch):
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    run_quietly(tiny_config(whole, "trainer.updates=6"))
    interrupt(tiny_config(first, "trainer.updates=6"), monkeypatch, 3)
    path = only(first, "last.pt")
    checkpoint = load_checkpoint(path)
    assert checkpoint["position"]["best_update"] == 2
    checkpoint["position"]["best"] = 99.0  # out of reach, but its weights stay in `first`
    save_checkpoint(path, checkpoint)
    for given in (path, path.parent):
        shutil.rmtree(second, ignore_errors=True)
        run_quietly(
            tiny_config(second, "trainer.updates=6", f"resume={given}", "trainer.report=best")
        )
        assert_same(state(second)["model"], state(whole)["model"])
        assert history(second) == [entry for entry in history(whole) if entry["update"] > 3]
        best = load_checkpoint(only(second, "best.pt"))["position"]
        assert outcome(second)["best"]["update"] == best["update"] > 3
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere"):
        run_quietly(tiny_config(tmp_path / "third", "resume=nowhere"))


def test_finished_run_is_read_back(tmp_path, monkeypatch):
    first = run_quietly(tiny_config(tmp_path))
    before = only(tmp_path, "result.json").read_bytes()
    monkeypatch.setattr("multimax.training.run.build_task", lambda *_: pytest.fail("repeated"))
    assert run_quietly(tiny_config(tmp_path)) == first
    assert only(tmp_path, "result.json").read_bytes() == before


def test_never_starts_afresh_and_keeps_the_old(tmp_path):
    run_quietly(tiny_config(tmp_path))
    old = only(tmp_path, "result.json").read_bytes(), history(tmp_path)
    for number in (1, 2):
        run_quietly(tiny_config(tmp_path, "resume=never"))
        folder = only(tmp_path, "result.json").parent
        kept = folder / f"previous-{number}"
        assert {"result.json", "last.pt", "best.pt", "metrics.jsonl"} <= set(os.listdir(kept))
        assert (folder / "previous-1" / "result.json").read_bytes() == old[0]
        assert history(tmp_path) == old[1]
    assert sorted(p.name for p in folder.glob("previous-*")) == ["previous-1", "previous-2"]


@pytest.mark.parametrize(
    "rest", ['{"update": 4, "train/lo', "", '{"update": 4, "valid/top1": 9.0}\n']
)
def test_metrics_of_a_killed_run_are_mended(tmp_path, monkeypatch, rest):
    """A kill can cut the last line short, and leave lines of updates after the checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_quietly(tiny_config(whole))
    interrupt(tiny_config(parts), monkeypatch, 3)
    with only(parts, "metrics.jsonl").open("a") as stream:
        stream.write(rest)
    run_quietly(tiny_config(parts))
    assert_same_run(parts, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.embed_dim=32",), r"last\.pt does not fit the configured model.*resume=never"),
        (("trainer.ema_decay=0.9",), r"written without EMA: set trainer\.ema_decay"),
    ],
)
def test_checkpoint_of_another_model(tmp_path, monkeypatch, changes, message):
    interrupt(tiny_config(tmp_path / "one"), monkeypatch, 3)
    path = only(tmp_path / "one", "last.pt")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run_quietly(tiny_config(tmp_path / "other", *changes, f"resume={path}"))


def test_weights_alone_cannot_be_resumed(tmp_path):
    run_quietly(tiny_config(tmp_path / "one"))
    path = only(tmp_path / "one", "best.pt")
    with pytest.raises(
        ValueError, match=r"best\.pt cannot be resumed \(missing: optimizer, .* weights=.*best\.pt"
    ):
        run_quietly(tiny_config(tmp_path / "other", f"resume={path}"))


def test_run_folder_in_use(tmp_path):
    run_quietly(tiny_config(tmp_path))
    result = only(tmp_path, "result.json")
    result.unlink()
    with (
        locked(result.parent),
        pytest.raises(ValueError, match="another process is running this very configuration"),
    ):
        run_quietly(tiny_config(tmp_path))


OPTIONS = ("trainer.updates=400", "trainer.evaluate_every=40", "model.dropout=0.1")


def start(folder):
    return Forked(tiny_overrides(folder, *OPTIONS), folder.with_suffix(".txt"))


def send_at(process, folder, number, update):
    """Send a signal as soon as the run has logged an update; its exit code and what it said."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        files = list(folder.rglob("metrics.jsonl"))
        lines = files[0].read_text().splitlines() if files else []
        if len(lines) > 1 and json.loads(lines[-2])["update"] >= update:
            break
        time.sleep(0.01)
    os.kill(process.pid, number)
    return process.finish()


def test_terminated_and_killed_process(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with start(whole) as process:
        code, said = process.finish()
    assert code == 0, said
    with start(parts) as process:
        code, said = send_at(process, parts, signal.SIGTERM, 60)
    assert code == 143, said
    stopped = load_checkpoint(only(parts, "last.pt"))["position"]["update"]
    assert 60 <= stopped < 400
    assert f"stopped by a signal after update {stopped}; the same command goes on" in said
    assert not list(parts.rglob("result.json"))

    with start(parts) as process:
        code, said = send_at(process, parts, signal.SIGKILL, stopped + 80)
    assert code == -signal.SIGKILL, said
    saved = load_checkpoint(only(parts, "last.pt"))["position"]["update"]
    assert stopped < saved < history_length(parts) < 400

    with start(parts) as process:
        code, said = process.finish()
    assert code == 0, said
    assert f"resuming from {only(parts, 'last.pt')} at update {saved}" in said
    assert_same_run(parts, whole)


def history_length(folder):
    lines = only(folder, "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-2])["update"]
