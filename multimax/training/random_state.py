"""Seeding and saving every random number generator that training draws from."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seed Python, NumPy and torch for one epoch of one process.

    Each epoch has its own stream, so that an interrupted epoch can be begun again; DeiT seeds each
    process with seed + rank in the same way.
    """
    mixed = np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint32).item()
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def random_state() -> dict[str, Any]:
    """The state of all generators as tensors and plain values."""
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = numpy_state
    keys = torch.from_numpy(keys.astype(np.int64))  # processes cannot exchange uint32 tensors
    return {
        "python": random.getstate(),
        "numpy": (name, keys, position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all generators to a state that `random_state` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
