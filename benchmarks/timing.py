"""Time of several providers of the same result, interleaved so that drift hits all alike."""

import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

INFERENCE = "inference"
LEAST_ROUNDS = 3  # even where they take longer than they may
# Of glibc's mallopt: memory is never given back to the system, which would make new pages of it.
ALLOCATOR = {"M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**28), "M_MMAP_MAX": (-4, 0)}


@dataclass(frozen=True)
class Workload:
    """What a provider does in each round.

    Attributes:
        phases: by name and in order; each is called with what the one before has returned. Their
            sum is a step, but for "inference", which is a phase of its own.
        leaves: tensors that exist before a round; their gradients are dropped between rounds.
    """

    phases: Mapping[str, Callable[[Any], Any]]
    leaves: Sequence[Tensor]

    def drop_gradients(self) -> None:
        """As `zero_grad(set_to_none=True)`."""
        for leaf in self.leaves:
            leaf.grad = None


def settle_allocator() -> None:
    """Let freed memory be used again: else the same code takes up to several times as long."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # of glibc alone
        for option in ALLOCATOR.values():
            mallopt(*option)


def time_phases(
    workloads: Mapping[str, Workload], rounds: int, seconds: float, warmup: int = 2
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each phase and of the "step" that they add up to, by provider.

    Every round runs all providers, each time in another order.

    Args:
        workloads: by provider.
        rounds: counted rounds, at most.
        seconds: no round starts after as many, once there are three.
        warmup: rounds before these, not counted.
    """
    settle_allocator()
    names = list(workloads)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    started = time.perf_counter()
    for turn in range(-warmup, rounds):
        if turn == 0:
            started = time.perf_counter()
        if turn >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for phase, elapsed in _time_round(workloads[name]).items():
                if turn >= 0:
                    times[name].setdefault(phase, []).append(elapsed)
    return times


def _time_round(workload: Workload) -> dict[str, float]:
    workload.drop_gradients()
    elapsed: dict[str, float] = {}
    value: Any = None
    for phase, call in workload.phases.items():
        started = time.perf_counter()
        value = call(value)
        elapsed[phase] = time.perf_counter() - started
    workload.drop_gradients()
    step = sum(seconds for phase, seconds in elapsed.items() if phase != INFERENCE)
    return elapsed | {"step": step}


def quantiles(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile of each phase in milliseconds, by name of the column."""
    columns: dict[str, float] = {}
    for phase, values in seconds.items():
        low, median, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
        columns[f"{phase}_ms"] = 1e3 * median
        columns[f"{phase}_p20_ms"] = 1e3 * low
        columns[f"{phase}_p80_ms"] = 1e3 * high
    return columns
