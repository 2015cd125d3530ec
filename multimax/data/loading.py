"""What all data sets share: where embedded ones lie, loaders, shares of ranks, and seeds."""

import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPLITS = ("train", "valid", "test")
EMBEDDED = Path(__file__).with_name("embedded")  # in the repository; a wheel has no data


def unzipped(path: Path) -> bytes:
    """The content of a gzip file.

    Raises:
        ValueError: it is damaged, or 100 times as large as the file, which no data are.
    """
    compressed = path.stat().st_size
    largest = 100 * compressed + 2**20
    try:
        with gzip.open(path) as stream:
            content = stream.read(largest + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): copy it again") from error
    if len(content) > largest:
        raise ValueError(
            f"{path} would be more than {largest:,} bytes, of {compressed:,} compressed ones: it "
            "cannot be data; unpack it yourself if it is"
        )
    return content


def embedded_file(data_set: str, name: str) -> Path:
    """A file of an embedded data set.

    Raises:
        FileNotFoundError: it is not there, as in a wheel.
    """
    path = EMBEDDED / name
    if not path.is_file():
        raise FileNotFoundError(
            f"the embedded data set {data_set} is not here, there is no {path}: wheels hold the "
            "library without data. Install from the repository: pip install -e '.[train]' in a "
            "checkout, or run train.py there; or choose another data set (data=...)"
        )
    return path


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


class LoadedData(ABC):
    """A data set that is ready to be drawn from.

    Attributes:
        name: name in tables and in the first lines of a run.
        sizes: number of examples by split; "train" and, where they exist, "valid" and "test".
        fingerprint: 16 hexadecimal digits that tell data sets apart, wherever their files lie: a
            run belongs to its data.
    """

    name: str
    sizes: dict[str, int]
    fingerprint: Any

    @abstractmethod
    def make_train_loader(self, *arguments: Any) -> TrainLoader:
        """`train_loader`, whose arguments have been checked."""

    @abstractmethod
    def make_eval_loader(self, split: str, *arguments: Any) -> EvalLoader:
        """`eval_loader`, whose arguments have been checked."""

    def train_loader(
        self, batch_size: int, rank: int, world_size: int, device: torch.device | str, seed: int
    ) -> TrainLoader:
        """Loader of the split "train".

        Args:
            batch_size: per process.
            rank: of this process.
            world_size: number of processes.
            device: where the batches are wanted.
            seed: >= 0, of order and augmentation; the same on all ranks.

        Raises:
            ValueError: the split is smaller than one batch over all ranks, or a value is out of
                range.
        """
        check_share(batch_size, rank, world_size)
        return self.make_train_loader(batch_size, rank, world_size, torch.device(device), seed)

    def eval_loader(
        self, split: str, batch_size: int, rank: int, world_size: int, device: torch.device | str
    ) -> EvalLoader:
        """Loader of any split without augmentation; arguments as for `train_loader`.

        Raises:
            ValueError: the data set has no such split, or a value is out of range.
        """
        if split not in self.sizes:
            raise ValueError(
                f"data set {self.name!r} has no split {split!r}; it has: {', '.join(self.sizes)}"
            )
        check_share(batch_size, rank, world_size)
        return self.make_eval_loader(split, batch_size, rank, world_size, torch.device(device))


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
