"""A disk that is full at any write of a run: the error says so, and the same command goes on."""

import errno
import os

import pytest
from tiny import assert_same, history, outcome, run_quietly, state, tiny_config

from multimax.training.loggers import JsonLinesLogger

pytestmark = pytest.mark.slow
OPTIONS = ("+trainer.keep=1", "trainer.ema_decay=0.9")


class Disk:
    """Counts the writes of a run, and is full at one of them.

    A file that is written atomically is flushed to the disk once; a line of metrics is appended.
    """

    def __init__(self, monkeypatch, full_at=None):
        self.writes, self.full_at = 0, full_at
        fsync, log = os.fsync, JsonLinesLogger.log

        def flush(descriptor):
            self._count()
            fsync(descriptor)

        def append(logger, update, metrics):
            try:
                self._count()
            except OSError:
                with logger.path.open("a") as stream:  # what still found room
                    stream.write('{"update": ')
                raise
            log(logger, update, metrics)

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(JsonLinesLogger, "log", append)

    def _count(self):
        self.writes += 1
        if self.writes == self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_any_write_costs_nothing(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    with monkeypatch.context() as context:
        disk = Disk(context)
        run_quietly(tiny_config(whole, *OPTIONS))
    assert disk.writes > 15
    for number in range(1, disk.writes + 1):
        folder = tmp_path / str(number)
        with monkeypatch.context() as context:
            Disk(context, number)
            with pytest.raises(OSError, match="No space left on device"):
                run_quietly(tiny_config(folder, *OPTIONS))
        assert not list(folder.rglob("*.partial")), number
        assert not list(folder.rglob("result.json")), number
        run_quietly(tiny_config(folder, *OPTIONS))
        assert_same(state(folder), state(whole), f"write {number}")
        assert history(folder) == history(whole), number
        assert outcome(folder) == outcome(whole), number
