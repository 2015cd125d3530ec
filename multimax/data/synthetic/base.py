"""Examples that are drawn when they are wanted, and are the same ones whenever they are."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from multimax.data.loading import SPLITS, EvalLoader, LoadedData, TrainLoader, derive_seed, share
from multimax.files import digest

EPOCH = 1000  # batches of training that the trainer counts as an epoch: there is no end of them
NOT_COUNTED = 0  # as a target of a language model; no token of a sequence
BLOCK = 50  # examples of an evaluation split that have a seed of their own

Length = Annotated[int, Field(ge=1, le=2**20)]
Lengths = Annotated[Sequence[Length], Field(min_length=1)]
Arrays = tuple[np.ndarray, np.ndarray]


class Setting(NamedTuple):
    """How large an example is.

    Attributes:
        length: items, or tokens.
        relevant: how many of them are to be found.
    """

    length: int
    relevant: int


class Batch(NamedTuple):
    """Examples of one setting.

    Attributes:
        inputs: (rows, length, ...).
        targets: (rows, ...).
        setting: of all of them.
    """

    inputs: Tensor
    targets: Tensor
    setting: Setting


class SyntheticData(LoadedData):
    """Endless training examples, and fixed ones for evaluation.

    Batch i of epoch e of a run with seed s is a function of (s, e, i), whatever the number of
    processes. The evaluation splits have seeds of their own: they are the same in all runs.

    Args:
        name: as in `LoadedData`.
        options: what, beside the seed, the examples depend on; as JSON.
        settings: of the evaluation, by the end of the name of their metrics, such as "n128"; "" is
            the one that training is monitored at, which is the only one of the split "valid".
        valid_size: examples of the split "valid".
        test_size: examples of the split "test", of each setting.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        settings: Mapping[str, Setting],
        valid_size: int,
        test_size: int,
    ) -> None:
        self.name: str = name
        self.sizes: dict[str, int] = {"valid": valid_size, "test": test_size}
        self.fingerprint: str = digest(json.dumps([name, dict(options)], sort_keys=True))
        self.settings: dict[str, dict[str, Setting]] = {
            "valid": {"": settings[""]},
            "test": dict(settings),
        }

    @abstractmethod
    def draw(self, generator: np.random.Generator, rows: int, setting: Setting) -> Arrays:
        """Inputs (rows, length, ...) and targets (rows, ...) of a setting."""

    def draw_setting(self, generator: np.random.Generator) -> Setting:
        """The setting of a training batch."""
        return self.settings["valid"][""]

    def make_train_loader(self, *arguments: Any) -> TrainLoader:
        return EndlessLoader(self, *arguments)

    def make_eval_loader(self, split: str, *arguments: Any) -> EvalLoader:
        return FixedLoader(self, split, *arguments)


class EndlessLoader(TrainLoader):
    """Batches of training examples; each process takes its rows of a batch of all of them."""

    def __init__(
        self,
        data: SyntheticData,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.data: SyntheticData = data
        self.rows: int = batch_size * world_size
        self.own: slice = slice(rank * batch_size, (rank + 1) * batch_size)
        self.device: torch.device = device
        self.seed: int = seed

    def __len__(self) -> int:
        return EPOCH

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, EPOCH):
            generator = np.random.default_rng(derive_seed(self.seed, epoch, index))
            setting = self.data.draw_setting(generator)
            arrays = self.data.draw(generator, self.rows, setting)
            yield _batch(arrays, self.own, setting, self.device)


class FixedLoader(EvalLoader):
    """All examples of a split at each of its settings, a block after another."""

    def __init__(
        self,
        data: SyntheticData,
        split: str,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.data: SyntheticData = data
        self.split: str = split
        self.batch_size: int = batch_size
        self.device: torch.device = device
        self.blocks: range = share(-(-data.sizes[split] // BLOCK), rank, world_size)

    def __iter__(self) -> Iterator[Batch]:
        size = self.data.sizes[self.split]
        for setting in dict.fromkeys(self.data.settings[self.split].values()):
            for block in self.blocks:
                # Four numbers, where training has three: it draws nothing that is here.
                seed = derive_seed(SPLITS.index(self.split), *setting, block)
                rows = min(BLOCK, size - block * BLOCK)
                arrays = self.data.draw(np.random.default_rng(seed), rows, setting)
                for start in range(0, rows, self.batch_size):
                    own = slice(start, start + self.batch_size)
                    yield _batch(arrays, own, setting, self.device)


def _batch(arrays: Arrays, own: slice, setting: Setting, device: torch.device) -> Batch:
    inputs, targets = (torch.from_numpy(array[own]).to(device) for array in arrays)
    return Batch(inputs, targets, setting)


def length_settings(setting: Setting, lengths: Sequence[int]) -> dict[str, Setting]:
    """The settings of an evaluation at several lengths, see `SyntheticData`."""
    return {"": setting} | {f"n{length}": setting._replace(length=length) for length in lengths}


def choose(generator: np.random.Generator, rows: int, length: int, count: int) -> np.ndarray:
    """(rows, count) different places of `length`, each set of them with the same probability."""
    keys = generator.random((rows, length), dtype=np.float32)
    return np.argpartition(keys, count - 1, axis=1)[:, :count]
