"""What is said of other work on the cores."""

import io
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from multimax.training import loggers, neighbours
from multimax.training.loggers import ProgressDisplay
from multimax.training.neighbours import Neighbours, advice


@pytest.mark.parametrize(
    ("threads", "taken", "cores", "said"),
    [
        (2, 0.1, 2, False),
        (2, 0.9, 2, True),
        (1, 2.0, 2, False),
        (4, 3.0, 8, False),
        (8, 1.0, 8, True),
    ],
)
def test_threads_without_a_core_each_are_told(threads, taken, cores, said):
    text = advice(threads, taken, cores)
    assert bool(text) == said
    if said:
        assert f"other work uses {taken:.1f} of the {cores} cores" in text
        assert "OMP_NUM_THREADS=1" in text


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells")
def test_a_busy_process_is_seen_and_this_one_is_not():
    watched = Neighbours()
    before = time.process_time()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        while time.process_time() - before < 0.5:
            pass
        cores = watched.cores()
        other.kill()
    assert 0.2 < cores <= os.cpu_count()


def _work(seconds):
    before = time.process_time()
    while time.process_time() - before < seconds:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells")
def test_workers_are_not_others():
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(30,))
    before = neighbours._others_and_now()
    worker.start()
    _work(0.5)
    after = neighbours._others_and_now()
    busy = neighbours._ticks(worker.pid) / os.sysconf("SC_CLK_TCK")
    ran = neighbours._others_and_now()
    worker.kill()
    worker.join()
    without = neighbours._others_and_now()  # what it did counts, now that it is gone
    assert busy > 0.1
    assert without[0] - ran[0] > 0.8 * busy
    assert after[0] - before[0] < without[0] - before[0] - 0.8 * busy


@pytest.mark.parametrize(("processes", "gpu"), [("2", False), ("1", True)])
def test_it_is_not_said_of_several_processes_or_a_gpu(monkeypatch, processes, gpu):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    with ProgressDisplay(Console(file=io.StringIO()), "rows") as shown:
        shown.start_at(0, 10)
        assert shown.neighbours is None


def test_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "STAT", tmp_path / "none")
    assert Neighbours().cores() == 0.0
    (tmp_path / "none").write_text("cpu one two\n")
    assert Neighbours().cores() == 0.0


def test_it_is_said_once(monkeypatch, tmp_path):
    monkeypatch.setattr(Neighbours, "cores", lambda self: 100.0)
    monkeypatch.setattr(loggers, "SECONDS_FOR_NEIGHBOURS", -1.0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    with (
        (tmp_path / "said").open("w") as stream,
        ProgressDisplay(Console(file=stream), "rows") as shown,
    ):
        shown.start_at(0, 10)
        for update in (1, 2, 3):
            shown.show(update, 0, 1.0, 0.1, 5.0)
    assert (tmp_path / "said").read_text().count("other work uses 100.0") == 1
