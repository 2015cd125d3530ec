"""Random tokens in the place of a text, which need not be there."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import numpy as np

from multimax.data.prepare.wikitext103 import OFFICIAL
from multimax.data.text.blocks import TextData
from multimax.data.text.source import TextSource
from multimax.data.vocabulary import FAIRSEQ_SPECIALS, Vocabulary, WordVocabulary

CYCLE = 2**18  # tokens that are drawn; a longer stream repeats them


def made_vocabulary(size: int) -> WordVocabulary:
    """A vocabulary of numbers."""
    return WordVocabulary(str(number) for number in range(size - len(FAIRSEQ_SPECIALS)))


class MadeText(TextSource):
    """Streams of random tokens, of which the r-th has a probability in proportion to 1 / r.

    So are the words of a text by Zipf's law, and those of a fairseq dictionary are in this order.

    Args:
        name: of the data.
        words: size of the vocabulary.
        sizes: tokens of each split.
        block_size, context_window: as in `TextSource`.
    """

    def __init__(
        self, name: str, words: int, sizes: Mapping[str, int], block_size: int, context_window: int
    ) -> None:
        super().__init__(block_size, context_window)
        self.name, self.words, self.sizes = name, words, dict(sizes)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return made_vocabulary(self.words)

    @cached_property
    def fingerprint(self) -> str:
        return "made"

    def load(self) -> TextData:
        tokens = self._draw()
        streams = {split: _Stream(tokens, size) for split, size in self.sizes.items()}
        sizes = self.block_size, self.context_window
        arrays = cast(dict[str, np.ndarray], streams)  # what is read of them is the same
        counts = self.sizes, self.sizes
        return TextData(self.name, self.vocabulary, *sizes, arrays, *counts, self.fingerprint)

    def _draw(self) -> np.ndarray:
        first = len(FAIRSEQ_SPECIALS)
        shares = 1 / np.arange(1, self.words - first + 1)
        drawn = np.random.default_rng(0).choice(len(shares), CYCLE, p=shares / shares.sum())
        return (first + drawn).astype(np.int32)


class _Stream:
    """The same tokens again and again, in the memory of once."""

    def __init__(self, tokens: np.ndarray, size: int) -> None:
        self.tokens, self.size = tokens, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Any) -> Any:
        places = range(self.size)[key]
        if isinstance(places, int):
            return self.tokens[places % len(self.tokens)]
        return self.tokens[np.arange(places.start, places.stop) % len(self.tokens)]


def made_text(
    name: str, options: Mapping[str, Any], evaluated: int, trained: int | None
) -> MadeText:
    """Random tokens of the vocabulary, the blocks and the number that a data set has.

    Args:
        name: of the data set, a key of `TEXT_DATA`.
        options: of it, as the configuration has them.
        evaluated: blocks of each evaluation split, a batch for every process.
        trained: blocks to train on where the data set does not say how many tokens it has; None
            refuses.

    Raises:
        ValueError: the data set does not say how many tokens it has.
    """
    block, context = options["block_size"], options["context_window"]
    known = name == "wikitext103"
    if not known and trained is None:
        raise ValueError(
            f"data.name={name} does not say how many tokens there are to train on: give the length "
            "as trainer.updates="
        )
    train: int = OFFICIAL.train if known else (trained or 0) * block
    few: int = max(block, evaluated * (block - context))
    sizes = {"train": train, "valid": few, "test": few}
    words = OFFICIAL.vocabulary if known else options["vocabulary_size"]
    return MadeText(f"random tokens like {name}", words, sizes, block, context)
