"""Signals, and an environment, that must not cost a run its result."""

import os
import signal
import subprocess
import sys
import time

import pytest
from forked import Forked
from tiny import ROOT, outcome, run_quietly, tiny_config, tiny_overrides

from multimax.training.signals import StopSignal, hand_on
from multimax.training.trainer import InterruptedRunError, Trainer


def test_every_wish_to_stop_saves_and_goes_on(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_quietly(tiny_config(whole, "trainer.updates=6"))
    real = Trainer._update
    for update, name in enumerate(("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGUSR2"), 1):

        def signalled(self, group, name=name):
            os.kill(os.getpid(), getattr(signal, name))
            return real(self, group)

        with monkeypatch.context() as context:
            context.setattr(Trainer, "_update", signalled)
            with pytest.raises(InterruptedRunError, match=rf"after update {update}$"):
                run_quietly(tiny_config(parts, "trainer.updates=6"))
    run_quietly(tiny_config(parts, "trainer.updates=6"))
    assert outcome(parts) == outcome(whole)


def test_only_a_second_ctrl_c_does_not_wait():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_handler_from_before_gets_the_signal_once_the_state_is_saved():
    """As submitit's, which queues the job again; none is of Ctrl-C, or of a signal by itself."""
    got = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: got.append(number))
    try:
        with StopSignal() as stop:
            for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM):
                os.kill(os.getpid(), number)
        assert not got
        assert hand_on(stop.received)
        assert got == [signal.SIGUSR2]
        assert not hand_on([signal.SIGTERM, signal.SIGINT])
    finally:
        signal.signal(signal.SIGUSR2, before)


KILLED = """
import os, signal, sys, time
from joblib import Parallel, delayed

def job(folder):
    from multimax.training.signals import StopSignal
    with StopSignal() as stop:
        open(f"{folder}/{os.getpid()}", "w").close()
        while not stop.requested:
            time.sleep(0.01)
    os.rename(f"{folder}/{os.getpid()}", f"{folder}/{os.getpid()}.stopped")

Parallel(n_jobs=2, backend="loky")(delayed(job)(sys.argv[1]) for _ in range(2))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent")
def test_jobs_of_a_sweep_stop_with_a_launcher_that_is_killed(tmp_path):
    launcher = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 5
    while len(list(tmp_path.glob("*.stopped"))) < 2:
        assert time.monotonic() < deadline, list(tmp_path.iterdir())
        time.sleep(0.05)


def test_accumulation_is_that_of_the_configuration(tmp_path, monkeypatch):
    run_quietly(tiny_config(tmp_path / "one"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run_quietly(tiny_config(tmp_path / "other"))
    assert outcome(tmp_path / "one") == outcome(tmp_path / "other")


def test_a_damaged_result_is_named(tmp_path):
    run_quietly(tiny_config(tmp_path))
    (file,) = tmp_path.rglob("result.json")
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match=r"result\.json is damaged .*resume=never keeps it aside"):
        run_quietly(tiny_config(tmp_path))


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_workers_alone(tmp_path):
    """As a cluster or a terminal sends it: the workers must not die before the state is saved."""
    from PIL import Image

    for split, count in (("train", 40), ("val", 4)):
        for number in range(count):
            folder = tmp_path / "images" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (number * 5, 0, 90)).save(folder / f"{number}.png")
    options = tiny_overrides(
        tmp_path, "data=timm", f"data.root={tmp_path}/images", "data.image_size=28",
        "data.repeated_augmentation=1", "data.num_workers=2", "trainer.updates=2000",
        "trainer.evaluate_every=2000", "model.patch_size=7",
    )  # fmt: skip
    dropped = ("data.crop_padding", "data.horizontal_flip")
    command = [o for o in options if not o.startswith(dropped)]
    with Forked(command, tmp_path / "said.txt") as process:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size for path in tmp_path.rglob("metrics.jsonl")):
            assert process.poll() is None, process.output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        code, said = process.finish()
    assert code == 143, said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert list(tmp_path.rglob("last.pt"))
