"""What the loaders of all data sets share: their interface, shares of ranks, and seeds."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

SPLITS = ("train", "valid", "test")


class TrainLoader(ABC):
    """Shuffled training batches of one process; the same number of them on every rank."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from batch `start` on.

        They depend on the loader's seed, the epoch, the batch index and the rank alone, not on the
        global random state, which is also left as it is: a run that resumes at `start` sees what
        the uninterrupted run saw.
        """


class EvalLoader(ABC):
    """Every example of the rank's share once; the shares of all ranks are the split.

    Ranks can differ in the number of batches, and batches in their size.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...


def check_share(batch_size: int, rank: int, world_size: int) -> None:
    """Raise ValueError for a batch size or rank that cannot be."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got {rank} of {world_size}")


def batches_per_epoch(name: str, examples: int, batch_size: int, world_size: int) -> int:
    """Complete batches that every rank can get.

    Raises:
        ValueError: there is none.
    """
    count = examples // (batch_size * world_size)
    if not count:
        raise ValueError(
            f"{name}: {examples} training examples are fewer than one batch of {batch_size} on "
            f"{world_size} process(es): use a batch_size of at most {examples // world_size}"
        )
    return count


def share(examples: int, rank: int, world_size: int) -> range:
    """The consecutive examples that a rank evaluates; together the ranks cover each one once."""
    return range(examples * rank // world_size, examples * (rank + 1) // world_size)


def derive_seed(*key: int) -> int:
    """A 64-bit seed from integers >= 0; neighbouring keys give unrelated seeds."""
    # Its length, because SeedSequence takes (1, 2) and (1, 2, 0) for the same.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0])
