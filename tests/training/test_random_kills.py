"""Runs that are killed at any moment, again and again, lose nothing.

MULTIMAX_KILLS=98 python -m pytest tests/training/test_random_kills.py
"""

import multiprocessing
import os
import random
import signal
import time

import pytest
from tiny import assert_same, history, outcome, run_quietly, state, tiny_config

KILLS = int(os.environ.get("MULTIMAX_KILLS", "5"))
OPTIONS = ("trainer.updates=12", "+trainer.keep=2")
SERVER = multiprocessing.get_context("forkserver")


def _train(folder):
    run_quietly(tiny_config(folder, *OPTIONS))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    SERVER.set_forkserver_preload(["multimax.training.run"])  # so that a process trains at once
    draw = random.Random(0)

    def start(folder):
        process = SERVER.Process(target=_train, args=(folder,))
        process.start()
        return process

    first = start(tmp_path / "warm")  # starts the server
    first.join()
    started = time.monotonic()
    whole = start(tmp_path / "whole")
    whole.join()
    seconds, expected = time.monotonic() - started, tmp_path / "whole"
    assert whole.exitcode == 0

    killed = number = 0
    while killed < KILLS:
        folder, ended = tmp_path / f"run{number}", False
        while not ended:
            process = start(folder)
            if killed < KILLS:
                process.join(draw.uniform(0.2, 1.0) * seconds)
                process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
            ended = process.exitcode != -signal.SIGKILL
            assert process.exitcode in (0, -signal.SIGKILL)
        assert outcome(folder) == outcome(expected)
        assert history(folder) == history(expected)
        assert_same(state(folder), state(expected))
        number += 1
