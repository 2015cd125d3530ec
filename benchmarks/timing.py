"""Timing of several providers of the same result, interleaved so that drift hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def time_interleaved(
    providers: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, by provider: every round calls all of them in turn.

    Args:
        providers: what to call, by name.
        rounds: counted calls of each provider.
        warmup: rounds before these, not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(warmup + rounds):
        for name, call in providers.items():
            _synchronize()
            started = time.perf_counter()
            call()
            _synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile in milliseconds."""
    fifths = statistics.quantiles(seconds, n=5)
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "p20_ms": 1e3 * fifths[0],
        "p80_ms": 1e3 * fifths[3],
    }
