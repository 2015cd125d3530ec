"""Other work on the cores that training uses: threads that wait for each other lose most by it."""

import multiprocessing
import os
import time
from pathlib import Path

STAT = Path("/proc/stat")  # of Linux: what all cores have done since they started


class Neighbours:
    """The cores that others than this process and its workers have used since this was made."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = _others_and_now()

    def cores(self) -> float:
        """How many, on average; 0 where the system does not tell."""
        now = _others_and_now()
        if now is None or self._start is None or now[1] <= self._start[1]:
            return 0.0
        return max(0.0, (now[0] - self._start[0]) / (now[1] - self._start[1]))


def advice(threads: int, taken: float, cores: int | None = None) -> str | None:
    """What to say to a user whose threads do not find a core each; None if they do.

    Args:
        threads: of this process.
        taken: cores that others use.
        cores: of the machine; None is this one.
    """
    cores = cores or os.cpu_count() or 1
    if threads == 1 or threads + taken < cores + 0.5:
        return None
    return (
        f"other work uses {taken:.1f} of the {cores} cores, and training has {threads} threads, "
        "which wait for each other: OMP_NUM_THREADS=1 may be faster"
    )


def _others_and_now() -> tuple[float, float] | None:
    """Seconds of all cores that were neither this process's nor its workers', and the time."""
    try:
        user, nice, system, _, _, *interrupts = STAT.read_text().split("\n", 1)[0].split()[1:9]
        ticks = sum(map(int, (user, nice, system, *interrupts)))
        ticks -= sum(_ticks(worker.pid) for worker in multiprocessing.active_children())
        busy = ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    return busy - time.process_time(), time.monotonic()


def _ticks(process: int | None) -> int:
    """Of the processor, that a process has used; 0 if it has ended."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(after_name[11]) + int(after_name[12])
