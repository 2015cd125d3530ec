"""Signals as a wish to stop, which training grants after the update it is in.

Beside SIGTERM and Ctrl-C these are what a cluster sends before a time limit (SIGUSR1, or SIGUSR2 to
the jobs of submitit), and what a closed terminal sends (SIGHUP).
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from multimax.data.workers import STOP_SIGNALS, signal_at_death_of_parent


def end_with_launcher(launcher: int) -> None:
    """Let this process get SIGTERM when the torchrun that started it ends, however that is.

    Does nothing in other processes, and on other systems than Linux.

    Args:
        launcher: the parent of this process when it began.

    Raises:
        SystemExit: the launcher has gone already.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        signal_at_death_of_parent(signal.SIGTERM)
        if os.getppid() != launcher:
            raise SystemExit("error: the launcher of this process has gone")


class StopSignal:
    """Whether this process has been asked to stop, while it is a context.

    A second Ctrl-C does not wait; other signals can come in pairs, from a launcher and a cluster.

    Attributes:
        received: the numbers of the signals that have come.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether any signal has come."""
        return bool(self.received)

    def __enter__(self) -> "StopSignal":
        # A launcher that is killed cannot tell its processes any more.
        of_joblib = multiprocessing.current_process().name.startswith("Loky")
        if sys.platform == "linux" and of_joblib:
            signal_at_death_of_parent(signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received.add(number)


def hand_on(numbers: Iterable[int]) -> bool:
    """Send signals to the handlers from before a `StopSignal`, now that the state is on disk.

    That of submitit queues the job again and exits, in the main process; in others it returns.

    Returns:
        Whether there was such a handler, beside Python's own of Ctrl-C.
    """
    handled = [n for n in numbers if n != signal.SIGINT and callable(signal.getsignal(n))]
    for number in handled:
        signal.raise_signal(number)
    return bool(handled)
