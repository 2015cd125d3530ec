"""Processes that load data, under signals and without a parent."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import Dataset

from multimax.data.workers import STOP_SIGNALS, DataError, WorkerLoader

PARENT = """
import os, time
import torch
from torch.utils.data import Dataset
from multimax.data.workers import WorkerLoader

class Slow(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        time.sleep(0 if index < 2 else 3600)
        return os.getpid()

batches = iter(WorkerLoader(Slow(), 1, num_workers=2))
print(*(next(batches).item() for _ in range(2)), flush=True)
next(batches)
"""

FAILING = PARENT.replace("next(batches)\n", "") + "raise SystemExit('error: as it happens')"


class Signalled(Dataset):
    """Each process sends itself every wish to stop before it gives an example."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        return index


class Damaged(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("the cause")
        except OSError as error:
            raise DataError("file x is damaged: replace it") from error


def test_workers_ignore_every_wish_to_stop():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert torch.cat(list(WorkerLoader(Signalled(), 2, num_workers=2))).tolist() == [0, 1, 2, 3]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_keeps_its_message(workers):
    with pytest.raises(DataError) as error:
        list(WorkerLoader(Damaged(), 1, num_workers=workers))
    assert str(error.value) == "file x is damaged: replace it"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent")
def test_workers_end_with_their_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    workers = [int(number) for number in parent.stdout.readline().split()]
    assert len(set(workers)) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 3
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_an_error_ends_the_workers_too():
    """A loader that a traceback holds is not closed, and its workers do not heed SIGTERM."""
    command = [sys.executable, "-c", FAILING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "error: as it happens\n")
    assert not any(map(alive, map(int, done.stdout.split())))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
