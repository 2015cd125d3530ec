"""SIGTERM and Ctrl-C as a wish to stop, which training grants after the update it is in."""

import signal
from types import FrameType
from typing import Any


class StopSignal:
    """Whether this process has been asked to stop, while it is a context.

    A second signal raises KeyboardInterrupt at once.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._remember) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested: bool = True
