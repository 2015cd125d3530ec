"""Processes that load data: what they do when the main process is asked to stop, or has gone."""

import atexit
import ctypes
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import weakref
from typing import Any

from torch.utils.data import DataLoader

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
    if hasattr(signal, name)  # Windows lacks some
)
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


_iterators: weakref.WeakSet[Any] = weakref.WeakSet()  # with workers


class DataError(ValueError):
    """Something in the data that cannot be read; its message says what, and what to do.

    A loader raises it anew in the main process, with the traceback of the worker before the
    message, which is taken off.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{DataError.__name__}: ", 1)[-1].strip())


class WorkerLoader(DataLoader):
    """A loader whose workers leave a wish to stop to the main process.

    That one still needs batches until it has saved its state. A worker ends with its loader, or,
    on Linux at once, with the process that started it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, worker_init_fn=prepare_worker, **options)

    def __iter__(self) -> Any:
        # A worker begins with the mask: no signal can reach it before it ignores them.
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            iterator = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _iterators.add(iterator)
        return iterator


def prepare_worker(_worker: int) -> None:
    """Ignore every wish to stop, and end with the process that started this one."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if sys.platform == "linux":
        signal_at_death_of_parent(signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # it has gone already
            os._exit(1)


@atexit.register  # before that of multiprocessing, which would send SIGTERM and wait for ever
def end_workers() -> None:
    """End the workers of iterators that the traceback of an error holds; they ignore SIGTERM."""
    for iterator in list(_iterators):
        iterator.__del__()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def signal_at_death_of_parent(number: int) -> None:
    """Ask Linux for a signal to this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
