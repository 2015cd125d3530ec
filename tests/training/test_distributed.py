import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from forked import Forked
from tiny import (
    ROOT,
    assert_same,
    history,
    only,
    outcome,
    run_quietly,
    state,
    tiny_config,
    tiny_overrides,
)

from multimax.files import load_checkpoint

pytestmark = pytest.mark.slow

# No dropout and no augmentation, so that the parts of a batch are what one process sees whole; an
# odd split, which two processes cannot halve; an accumulation, for which DDP must wait; and scalars
# that two layers share.
OPTIONS = (
    "trainer.updates=60",
    "trainer.evaluate_every=20",
    "trainer.accumulation=2",
    "trainer.ema_decay=0.9",
    "data.valid_size=999",
    "model.depth=2",
    "attention.shared=true",
)


def launch(folder, *overrides, script="train.py"):
    """Both processes, by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launcher, script, *tiny_overrides(folder, *OPTIONS, *overrides)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the run in one process."""
    folder = tmp_path_factory.mktemp("one")
    run_quietly(tiny_config(folder, *OPTIONS))
    return folder


def finish(folder, *overrides):
    """Run both processes as srun does, to their end; what the main one said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_PORT": port,
    }  # fmt: skip
    with ExitStack() as stack:
        processes = []
        for rank in "01":
            place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            output = folder.with_suffix(f".{rank}")
            command = tiny_overrides(folder, *OPTIONS, *overrides)
            process = Forked(command, output, **step, **place)
            processes.append(stack.enter_context(process))
        (code, said), other = (process.finish() for process in processes)
    assert (code, other[0]) == (0, 0), said + other[1]
    return said


def worker(launcher, rank):
    """The process id of a worker, once it has logged an update."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"\0LOCAL_RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise LookupError(f"no worker of rank {rank}")


def wait_for_update(process, folder, update):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        files = list(folder.rglob("metrics.jsonl"))
        if files and files[0].read_text().count("\n") > update:
            return
        time.sleep(0.01)
    raise TimeoutError


def assert_as_one_process(folder, one):
    assert len(history(folder)) == len(history(one)) == 63
    for got, expected in zip(history(folder), history(one), strict=True):
        assert list(got) == list(expected)
        for name, value in expected.items():
            # A rounding difference can tip single images of the 999.
            tolerance = {"abs": 0.31} if "top" in name else {"rel": 2e-4}
            assert got[name] == pytest.approx(value, **tolerance), name
    metrics, expected = outcome(folder)["metrics"], outcome(one)["metrics"]
    for split, examples in (("valid", 999), ("test", 2000)):
        assert metrics[split]["examples"] == examples
        assert metrics[split]["loss"] == pytest.approx(expected[split]["loss"], rel=2e-4)


def interrupt(folder, *overrides):
    """Start the run and send a signal to one of its processes; the update that both stop after."""
    process = launch(folder, *overrides)
    wait_for_update(process, folder, 5)
    os.kill(worker(process.pid, rank=1), signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "exitcode  : 143" in output
    stopped = load_checkpoint(only(folder, "last.pt"))["position"]["update"]
    assert 5 <= stopped < 60
    assert f"stopped by a signal after update {stopped};" in output
    assert not list(folder.rglob("result.json"))
    return stopped


def test_two_processes(one, tmp_path):
    """They give the numbers of one, stop at the same update, and resume exactly."""
    two, parts = tmp_path / "two", tmp_path / "parts"
    output = finish(two)
    assert output.count("run       deit_multimax") == 1
    assert "2 x cpu" in output
    assert len(load_checkpoint(only(two, "last.pt"))["random_states"]) == 2

    assert_as_one_process(two, one)
    names = [
        sorted(path.name for path in only(folder, "result.json").parent.iterdir())
        for folder in (one, two)
    ]
    assert names[0] == names[1]

    stopped = interrupt(parts)
    assert f"at update {stopped}" in finish(parts)
    assert_same(state(parts), state(two))
    assert history(parts) == history(two)
    assert outcome(parts) == outcome(two)


def assert_close(got, expected):
    """Checkpoints with the same tensors, but for rounding."""
    assert got.keys() == expected.keys()
    for name in ("model", "ema"):
        assert list(got[name]) == list(expected[name])
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4)
    for name in ("state", "param_groups"):
        first, second = got["optimizer"][name], expected["optimizer"][name]
        torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-4)


def test_shards(one, tmp_path):
    """They give the numbers of one process, stop together, and resume exactly, or go on whole."""
    two, parts, other = (tmp_path / name for name in ("two", "parts", "other"))
    finish(two, "+trainer.shard=true")
    assert_as_one_process(two, one)
    assert_close(state(two), state(one))
    assert outcome(two)["parameters"] == outcome(one)["parameters"]

    stopped = interrupt(parts, "+trainer.shard=true")
    shutil.copytree(parts, other)
    assert f"at update {stopped}" in finish(parts, "+trainer.shard=true")
    assert_same(state(parts), state(two))
    assert outcome(parts) == outcome(two)
    finish(other)
    assert_as_one_process(other, one)
