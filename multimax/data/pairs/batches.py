"""Sentence pairs as numbers, and batches of them by token count."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from multimax.data.loading import EvalLoader, TrainLoader, derive_seed


class PairBatch(NamedTuple):
    """Sentences of similar length, each filled up with padding on the right.

    Attributes:
        source: (sentences, source tokens) int64.
        target_in: (sentences, target tokens) int64, what the decoder reads: the target with
            its end of sentence moved to the front.
        target: (sentences, target tokens) int64, what it is to predict.
        tokens: how many of the target are not padding.
    """

    source: Tensor
    target_in: Tensor
    target: Tensor
    tokens: int


class Sentences:
    """Sequences of tokens in one flat array, four bytes a token.

    Args:
        sequences: the tokens of each sentence.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        self.lengths: np.ndarray = np.array([len(array) for array in arrays], dtype=np.int64)
        self.ends: np.ndarray = self.lengths.cumsum()
        self.tokens: np.ndarray = np.concatenate(arrays) if arrays else np.empty(0, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.ends[index] - self.lengths[index] : self.ends[index]]

    def padded(self, indices: Sequence[int] | np.ndarray, padding: int) -> np.ndarray:
        """(indices, longest) int64 with padding on the right."""
        indices = np.asarray(indices)
        rows = np.full((len(indices), self.lengths[indices].max()), padding, np.int64)
        for row, index in zip(rows, indices, strict=True):
            row[: self.lengths[index]] = self[index]
        return rows


@dataclass(frozen=True)
class Pairs:
    """Source and target sentences of a split, one to one.

    Attributes:
        source, target: the sentences, each of which ends with `eos_index`.
        padding_index: the token that stands for nothing.
        eos_index: the token that ends a sentence.
    """

    source: Sentences
    target: Sentences
    padding_index: int
    eos_index: int

    def __len__(self) -> int:
        return len(self.source)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each pair as fairseq counts them: those of its longer side."""
        return np.maximum(self.source.lengths, self.target.lengths)

    def batch(self, indices: Sequence[int] | np.ndarray, device: torch.device) -> PairBatch:
        """The pairs with these indices."""
        source = self.source.padded(indices, self.padding_index)
        target = self.target.padded(indices, self.padding_index)
        target_in = np.roll(target, 1, axis=1)
        target_in[:, 0] = self.eos_index
        target_in[target == self.padding_index] = self.padding_index
        return PairBatch(
            torch.from_numpy(source).to(device),
            torch.from_numpy(target_in).to(device),
            torch.from_numpy(target).to(device),
            int(self.target.lengths[np.asarray(indices)].sum()),
        )


def sorted_by_length(pairs: Pairs, order: np.ndarray) -> np.ndarray:
    """`order` sorted by source length, then target length; equal ones stay in order."""
    by_target = order[np.argsort(pairs.target.lengths[order], kind="stable")]
    return by_target[np.argsort(pairs.source.lengths[by_target], kind="stable")]


def cut_by_tokens(sizes: np.ndarray, max_tokens: int) -> list[slice]:
    """Cut a sequence of pairs into batches of at most `max_tokens`, padding included.

    A batch counts as its largest size times its number of pairs, as in fairseq (which also rounds
    the number of pairs down to a multiple of 8). A pair larger than `max_tokens` is alone.
    """
    batches, start, largest = [], 0, 0
    for end, size in enumerate(sizes.tolist()):
        largest = max(largest, size)
        if end > start and largest * (end - start + 1) > max_tokens:
            batches.append(slice(start, end))
            start, largest = end, size
    return [*batches, slice(start, len(sizes))] if len(sizes) else []


class TokenTrainLoader(TrainLoader):
    """Shuffled batches of similar length, the same number on every rank.

    The lengths of the batches are the same in every epoch; which of the equally long pairs come
    together, and the order of the batches, depend on seed and epoch alone. Of the batches that do
    not share evenly over the ranks, `left_over` others are left out in every epoch.

    Args:
        pairs: the training split.
        max_tokens: of a batch of one process, padding included; see `cut_by_tokens`.
        rank: of this process.
        world_size: number of processes.
        device: where the batches are wanted.
        seed: >= 0, the same on all ranks.

    Raises:
        ValueError: there are fewer batches than ranks, or a pair is larger than `max_tokens`.
    """

    def __init__(
        self,
        pairs: Pairs,
        max_tokens: int,
        rank: int,
        world_size: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.pairs: Pairs = pairs
        self.rank: int = rank
        self.world_size: int = world_size
        self.device: torch.device = device
        self.seed: int = seed
        order = sorted_by_length(pairs, np.arange(len(pairs)))
        sizes = pairs.sizes[order]
        if len(sizes) and sizes.max() > max_tokens:
            raise ValueError(
                f"a training sentence has {sizes.max()} tokens, more than the {max_tokens} of a "
                "batch of one process: use a larger trainer.batch_size or a smaller data.max_length"
            )
        self.cuts: list[slice] = cut_by_tokens(sizes, max_tokens)
        if len(self.cuts) < world_size:
            raise ValueError(
                f"{len(pairs)} training pairs give {len(self.cuts)} batches of {max_tokens} tokens "
                f"for {world_size} process(es): use a smaller trainer.batch_size"
            )

    @property
    def left_over(self) -> int:
        """Batches of an epoch that no rank gets."""
        return len(self.cuts) % self.world_size

    def __len__(self) -> int:
        return len(self.cuts) // self.world_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        generator = np.random.default_rng(derive_seed(self.seed, epoch))
        order = sorted_by_length(self.pairs, generator.permutation(len(self.pairs)))
        cuts = generator.permutation(len(self.cuts))[self.rank :: self.world_size]
        for cut in cuts[start : len(self)]:
            yield self.pairs.batch(order[self.cuts[cut]], self.device)


class TokenEvalLoader(EvalLoader):
    """Indices and batches of a rank's share; together the ranks have every pair once.

    Args:
        pairs: the split.
        max_tokens, rank, world_size, device: as in `TokenTrainLoader`.
    """

    def __init__(
        self, pairs: Pairs, max_tokens: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.pairs: Pairs = pairs
        self.device: torch.device = device
        self.order: np.ndarray = sorted_by_length(pairs, np.arange(len(pairs)))
        self.cuts: list[slice] = cut_by_tokens(pairs.sizes[self.order], max_tokens)[
            rank::world_size
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, PairBatch]]:
        for cut in self.cuts:
            indices = self.order[cut]
            yield torch.from_numpy(indices).to(self.device), self.pairs.batch(indices, self.device)
