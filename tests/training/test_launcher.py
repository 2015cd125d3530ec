"""What becomes of the processes that torchrun started when it, or one of them, is killed."""

import os
import signal
import sys
import time
from contextlib import suppress

import pytest
from test_distributed import launch, wait_for_update, worker

from multimax.files import load_checkpoint
from multimax.training import signals

LONG = "trainer.updates=100000"


def started(launcher):
    with suppress(LookupError, OSError):
        return [worker(launcher.pid, rank) for rank in (0, 1)]
    return []


def wait(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent")
@pytest.mark.parametrize("moment", ["data", "training"])
def test_processes_end_with_a_launcher_that_is_killed(tmp_path, moment):
    launcher, workers = launch(tmp_path, LONG), []
    try:
        wait(launcher, lambda: started(launcher))
        workers = started(launcher)
        if moment == "data":  # the folder is made before they are read
            wait(launcher, lambda: list(tmp_path.rglob(".lock")))
        if moment == "training":
            wait_for_update(launcher, tmp_path, 5)
        launcher.kill()
        # The output ends with the last of them.
        output, _ = launcher.communicate(timeout=10)
    finally:
        launcher.kill()
        for process in workers:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    saved = list(tmp_path.rglob("last.pt"))
    if moment == "training":
        update = load_checkpoint(saved[0])["position"]["update"]
        assert output.count(f"stopped by a signal after update {update};") == 2
    else:
        assert not saved


def test_a_launcher_that_went_before_the_signal_was_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(signals, "signal_at_death_of_parent", asked.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    signals.end_with_launcher(-1)
    assert not asked
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(sys, "platform", "linux")
    signals.end_with_launcher(os.getppid())
    with pytest.raises(SystemExit, match="the launcher of this process has gone"):
        signals.end_with_launcher(-1)
    assert asked == [signal.SIGTERM] * 2


BREAK = """
import os, runpy, signal
from multimax.training.trainer import Trainer

real = Trainer._update

def update(self, group):
    if os.environ["RANK"] == "1" and self.position.update == 7:
        open({sign!r}, "w").close()
        {breaks}
    return real(self, group)

Trainer._update = update
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
        ("raise RuntimeError('broken here')", "RuntimeError: broken here"),
    ],
)
def test_all_end_with_a_process_that_breaks(tmp_path, breaks, said):
    """The last checkpoint, of the evaluation before, stays as it was."""
    script, sign = tmp_path / "break.py", tmp_path / "broken"
    script.write_text(BREAK.format(sign=str(sign), breaks=breaks))
    launcher = launch(tmp_path, LONG, "trainer.evaluate_every=5", script=script)
    try:
        wait(launcher, sign.exists)
        output, _ = launcher.communicate(timeout=20)
    finally:
        launcher.terminate()
    assert launcher.returncode > 0
    assert said in output
    (saved,) = tmp_path.rglob("last.pt")
    position = load_checkpoint(saved)["position"]
    assert (position["update"], position["due"]) == (5, False)
    assert not list(tmp_path.rglob(".*.partial"))
