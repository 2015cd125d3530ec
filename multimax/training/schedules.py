"""fairseq's learning rates as functions of the update, counted from 0."""

import math
from collections.abc import Callable

from multimax.registry import option_names


def inverse_sqrt(update: int, peak: float, *, warmup: int, warmup_lr: float) -> float:
    """Linear from `warmup_lr` to `peak`, then falling with the square root of the update.

    Args:
        update: of which the rate is wanted.
        peak: the rate after the warm-up.
        warmup: its length in updates; after a warm-up of 0 the rate falls from update 1 on.
        warmup_lr: the rate of update 0, if there is a warm-up.

    Source: fairseq's `inverse_sqrt`.
    """
    if update < warmup:
        return warmup_lr + (peak - warmup_lr) * update / warmup
    return peak * math.sqrt(max(warmup, 1) / max(update, 1))


def cosine_restarts(
    update: int,
    peak: float,
    *,
    warmup: int,
    warmup_lr: float,
    min_lr: float,
    period: int,
    period_growth: float,
    shrink: float,
) -> float:
    """Linear from `warmup_lr` to `peak`, then cosines that begin again with each period.

    Args:
        update, peak, warmup, warmup_lr: as in `inverse_sqrt`.
        min_lr: the rate that the first period goes down to.
        period: length of the first period in updates, after the warm-up.
        period_growth: length of a period by that of the one before, >= 1.
        shrink: rates of a period by those of the one before.

    Source: fairseq's `cosine`; timm's scheduler keeps the lowest rate from period to period.
    """
    if update < warmup:
        return warmup_lr + (peak - warmup_lr) * update / warmup
    position, length, number = update - warmup, float(period), 0
    while position >= length:
        position, length, number = position - length, length * period_growth, number + 1
    cosine = (1 + math.cos(math.pi * position / length)) / 2
    return (min_lr + (peak - min_lr) * cosine) * shrink**number


# What each schedule needs of `config.schedule`; cosine is timm's.
FORMULAS: dict[str, Callable[..., float]] = {
    "inverse_sqrt": inverse_sqrt,
    "cosine_restarts": cosine_restarts,
}
SCHEDULES: dict[str, list[str]] = {
    "cosine": ["warmup", "warmup_lr", "min_lr", "per_epoch"],
    **{name: option_names(formula)[2:] for name, formula in FORMULAS.items()},
}
