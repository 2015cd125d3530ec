"""Sweeps: what one job does not do to the others, and what is said at the end."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import Forked
from tiny import PLAIN, only, run_quietly

from multimax.training.sweep import Job, _write, print_summary, summary

SOFTMAX = ["experiment=deit_softmax", *PLAIN, "trainer.updates=2"]


class FakeWandb:
    """W&B without its service: what it is told, one list for each call."""

    class Settings:
        def __init__(self, **_): ...

    def __init__(self):
        self.told, self.open_run = [], None

    def login(self, **_):
        return True

    def init(self, id, **_):
        # As W&B does: a run that is open takes in the next one.
        self.open_run = self.open_run or SimpleNamespace(
            id=id, summary={}, resumed=False, define_metric=lambda *_, **__: None,
            finish=self._finish, log=lambda _: self.told.append(["log", id]),
        )  # fmt: skip
        self.told.append(["init", id, self.open_run.id])
        return self.open_run

    def _finish(self, exit_code=0):
        self.told.append(["finish", self.open_run.id, exit_code])
        self.open_run = None


def recorded(folder):
    """The jobs of the last sweep."""
    record = sorted(folder.glob("sweeps/*/jobs.jsonl"))[-1]
    return [Job(**json.loads(line)) for line in record.read_text().splitlines()]


@pytest.mark.slow
def test_a_job_that_fails_ends_no_other(train, tmp_path):
    """The examples: a bad value, a diverging rate, and a folder that does not exist."""
    sweep = "-m", *SOFTMAX, f"output_dir={tmp_path}"
    code, said, errors = train(*sweep, "attention.temperature=1,-1", "optimizer.lr=1e-3,1e30,2e-3")
    jobs = recorded(tmp_path)
    assert code == 1
    assert [job.state for job in jobs] == ["finished", "failed", "finished", *["failed"] * 3]
    assert "Lower optimizer.lr" in jobs[1].said
    assert errors.count("error: attention.temperature must be a finite number > 0") == 3
    assert "Traceback" not in errors
    *_, title, first, _, _, fourth, _, _ = said.splitlines()
    assert title == "sweep of 6 jobs: 2 finished, 4 failed"
    assert first.split()[:4] == [
        "attention.temperature=1",
        "optimizer.lr=0.001",
        "finished",
        "test",
    ]
    assert first.endswith(jobs[0].folder)
    assert fourth.split()[2:4] == ["failed", "attention.temperature"]
    # The diverged run has a history to read; the refused ones leave nothing.
    kept = {job.folder for job in jobs if job.folder}
    folders = {str(path.parent) for path in tmp_path.glob("small/*/*/config.yaml")}
    assert kept == folders == {str(p) for p in tmp_path.glob("small/deit_softmax/*")}

    code, said, _ = train(*sweep, "attention.temperature=1", "optimizer.lr=1e-3,2e-3,3e-3")
    jobs = recorded(tmp_path)
    assert code == 0
    assert [job.state for job in jobs] == ["finished before", "finished before", "finished"]
    assert "sweep of 3 jobs: 2 finished before, 1 finished\n" in said


@pytest.mark.slow
def test_a_failed_job_closes_its_wandb_run(train, tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    code, *_ = train("-m", *SOFTMAX, f"output_dir={tmp_path}", "optimizer.lr=1e30,2e-3",
                     "trainer.updates=3", "logger.wandb=online")  # fmt: skip
    assert code == 1
    assert [job.state for job in recorded(tmp_path)] == ["failed", "finished"]
    first, second = (call[1] for call in wandb.told if call[0] == "init")
    assert first != second
    assert all(call[1] == call[2] for call in wandb.told if call[0] == "init")
    assert [call for call in wandb.told if call[0] == "finish"] == [
        ["finish", first, 1], ["finish", second, 0],
    ]  # fmt: skip
    assert {call[1] for call in wandb.told if call[0] == "log"} == {first, second}


@pytest.mark.slow
def test_a_signal_ends_the_sweep_with_its_summary(tmp_path):
    """SIGTERM to a sweep stops the job after its update; later jobs are not begun."""
    options = *SOFTMAX, "seed=0,1", "trainer.updates=100000", "trainer.evaluate_every=100000"
    sweep = ["-m", *options, f"output_dir={tmp_path}"]
    with Forked(sweep, tmp_path / "said.txt") as process:
        while not any(path.stat().st_size for path in tmp_path.rglob("metrics.jsonl")):
            assert process.poll() is None, process.output.read_text()
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        code, said = process.finish()
    assert code == 143
    assert "goes on from there" in said
    assert "sweep of 1 jobs: 1 interrupted\n" in said
    assert only(tmp_path, "last.pt").parent.name.endswith("-seed0")


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [[], ["-m"], ["-m", "study=table2", "cells=softmax"]])
def test_a_folder_that_cannot_be_written_is_named(train, sweep):
    message, out, error = train(*sweep, "output_dir=/proc/none", "logger.wandb=disabled")
    assert re.match(r"error: .* /proc/none\S* cannot be written: choose another output_", message)
    assert "Traceback" not in out + error


def test_a_record_on_a_full_disk_ends_nothing(tmp_path, capsys, monkeypatch):
    record = tmp_path / "jobs.jsonl"
    job = Job(["seed=1"], "finished", "test top1 80", "a")
    _write(record, job)
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    _write(record, job)
    monkeypatch.undo()
    assert "jobs.jsonl cannot be written (No space)" in capsys.readouterr().err
    with record.open("a") as stream:
        stream.write('{"settings": [')
    assert print_summary(record) == 0
    assert "sweep of 1 jobs: 1 finished" in capsys.readouterr().out


def test_the_last_word_on_a_job_counts(tmp_path, capsys):
    record = tmp_path / "jobs.jsonl"
    jobs = [Job([f"seed={seed}"], "launched", "killed", None) for seed in range(4)]
    _write(record, *jobs)
    for seed, state, said in (
        (1, "interrupted", "by a signal"), (0, "failed", "no data"), (1, "finished", "test top1 9"),
        (0, "failed", "the other process has gone"), (2, "interrupted", "by a signal"),
    ):  # fmt: skip
        _write(record, Job([f"seed={seed}"], state, said, None))
    assert print_summary(record) == 3
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["seed=0", "failed", "no", "data"], ["seed=1", "finished", "test", "top1", "9"],
        ["seed=2", "interrupted", "by", "a", "signal"], ["seed=3", "launched", "killed"],
    ]  # fmt: skip


def test_summary_shows_what_differs():
    jobs = [
        Job(["a=1", "seed=0"], "finished", "test top1 9", "out/x"),
        Job(["a=1", "seed=1"], "failed", "it broke\nin two lines", None),
    ]
    assert summary(jobs) == [
        "sweep of 2 jobs: 1 finished, 1 failed",
        "  seed=0  finished  test top1 9  out/x",
        "  seed=1  failed    it broke",
    ]
    assert summary(jobs[:1])[1] == "  a=1 seed=0  finished  test top1 9  out/x"
    assert summary([]) == ["sweep of 0 jobs: none"]


@pytest.mark.slow
def test_a_run_that_is_refused_leaves_no_folder(compose_tiny, tmp_path):
    for override in ("resume=/nowhere", "trainer.batch_size=8000", "data=fashion_mnist"):
        with pytest.raises((ValueError, OSError)):
            run_quietly(compose_tiny(override))
        assert not list(tmp_path.rglob("*-seed0"))
    run_quietly(compose_tiny())
    with pytest.raises(OSError, match="no checkpoint at /nowhere"):
        run_quietly(compose_tiny("resume=/nowhere", "seed=1"))
    assert [path.name[-5:] for path in tmp_path.glob("small/*/*")] == ["seed0"]
