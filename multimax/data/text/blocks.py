"""What every text data set offers to a language model: its facts, blocks and windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from multimax.data.loading import (
    EvalLoader,
    LoadedData,
    TrainLoader,
    batches_per_epoch,
    derive_seed,
    share,
)
from multimax.data.vocabulary import Vocabulary

Span = tuple[int, int, int]  # in a stream: where the context begins, the targets begin and end


class TextBatch(NamedTuple):
    """Rows of consecutive tokens.

    Attributes:
        inputs: (rows, tokens) int64, with padding at the end.
        targets: (rows, tokens) int64, the token that comes next; padding where it does not count.
        tokens: how many targets count.
    """

    inputs: Tensor
    targets: Tensor
    tokens: int


@dataclass
class TextData(LoadedData):
    """Each split is one stream of tokens, of which every one is predicted from those before it.

    The first token of a stream is predicted from a line end.

    Attributes:
        name: as in `LoadedData`.
        vocabulary: of the tokens.
        block_size: tokens that the model sees at once, at most.
        context_window: in evaluation, tokens that are seen but do not count, before each block; in
            [0, block_size). Blocks are shorter by as much.
        streams: (tokens,) integers by split, possibly memory-mapped.
        words: words between white space plus lines, by split: what perplexity per word is over.
        bytes: size of the text in UTF-8, by split.
        fingerprint: as in `LoadedData`.
        sizes: number of tokens by split; each is a target once.

    Raises:
        ValueError: a split is smaller than one block.
    """

    name: str
    vocabulary: Vocabulary
    block_size: int
    context_window: int
    streams: dict[str, np.ndarray]
    words: dict[str, int]
    bytes: dict[str, int]
    fingerprint: str = ""

    def __post_init__(self) -> None:
        self.sizes: dict[str, int] = {split: len(stream) for split, stream in self.streams.items()}
        for split, size in self.sizes.items():
            if size < self.block_size:
                raise ValueError(
                    f"{self.name}: {split} has {size} tokens, fewer than one block: use "
                    f"data.block_size <= {size}, or more text"
                )

    def make_train_loader(self, *arguments: Any) -> TrainLoader:
        return BlockLoader(self, *arguments)

    def make_eval_loader(self, split: str, *arguments: Any) -> EvalLoader:
        return WindowLoader(self, split, *arguments)

    def batch(self, split: str, spans: Sequence[Span], device: torch.device) -> TextBatch:
        """The tokens of some spans, each a row."""
        stream, vocabulary = self.streams[split], self.vocabulary
        shape = len(spans), max(end - first for first, _, end in spans)
        inputs = np.full(shape, vocabulary.padding_index, dtype=np.int64)
        targets = np.full(shape, vocabulary.padding_index, dtype=np.int64)
        for row, (first, start, end) in enumerate(spans):
            before = stream[first - 1] if first else vocabulary.eos_index
            inputs[row, 0] = before
            inputs[row, 1 : end - first] = stream[first : end - 1]
            targets[row, start - first : end - first] = stream[start:end]
        tokens = sum(end - start for _, start, end in spans)
        return TextBatch(
            torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), tokens
        )


class BlockLoader(TrainLoader):
    """Blocks of the training stream, cut anywhere and shuffled, equally many on every rank.

    Source: fairseq's `--sample-break-mode none`: blocks follow each other, the last is shorter;
    an incomplete last batch is dropped.
    """

    def __init__(
        self,
        data: TextData,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self.data: TextData = data
        self.batch_size: int = batch_size
        self.rank: int = rank
        self.world_size: int = world_size
        self.device: torch.device = device
        self.seed: int = seed
        self.blocks: int = -(-data.sizes["train"] // data.block_size)
        name = f"{data.name} in blocks of data.block_size={data.block_size}"
        self.length: int = batches_per_epoch(name, self.blocks, batch_size, world_size)

    def __len__(self) -> int:
        return self.length

    def batches(self, epoch: int, start: int = 0) -> Iterator[TextBatch]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.blocks, generator=generator)
        size, end = self.data.block_size, self.data.sizes["train"]
        for index in range(start, self.length):
            first = (index * self.world_size + self.rank) * self.batch_size
            starts = [b * size for b in order[first : first + self.batch_size].tolist()]
            spans = [(start, start, min(start + size, end)) for start in starts]
            yield self.data.batch("train", spans, self.device)


class WindowLoader(EvalLoader):
    """Every token of the rank's share as a target once, in order; the ranks share the split.

    Each block comes with the `context_window` tokens before it, or as many as there are.

    Source: `fairseq-eval-lm --context-window`.
    """

    def __init__(
        self,
        data: TextData,
        split: str,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.data: TextData = data
        self.split: str = split
        self.batch_size: int = batch_size
        self.device: torch.device = device
        self.step: int = data.block_size - data.context_window
        self.blocks: range = share(-(-data.sizes[split] // self.step), rank, world_size)

    def __len__(self) -> int:
        """Batches on this rank; ranks can differ by one, and the last batch can be smaller."""
        return -(-len(self.blocks) // self.batch_size)

    def __iter__(self) -> Iterator[TextBatch]:
        size = self.data.sizes[self.split]
        for index in range(0, len(self.blocks), self.batch_size):
            starts = [block * self.step for block in self.blocks[index : index + self.batch_size]]
            spans = [
                (max(0, start - self.data.context_window), start, min(start + self.step, size))
                for start in starts
            ]
            yield self.data.batch(self.split, spans, self.device)
