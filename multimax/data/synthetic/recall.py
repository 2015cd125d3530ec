"""Multi-query associative recall: keys that come again, each to be followed by its value."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from multimax.data.synthetic.base import (
    NOT_COUNTED,
    Arrays,
    Length,
    Setting,
    SyntheticData,
    choose,
)
from multimax.options import Count, checked

POWER = 0.01  # of the distribution of where queries are: most come soon after the pairs

Pair = Annotated[Sequence[Length], Field(min_length=2, max_length=2)]


class MultiQueryRecall(SyntheticData):
    """Sequences of key-value pairs, after which every key comes again; the target is its value.

    The first half of the vocabulary are keys, the other half values. A sequence begins with its
    pairs, whose keys differ. Each key then comes once more, at one of the even places after them,
    which are drawn without replacement with probabilities that fall as `place ** (POWER - 1)`. All
    other tokens are random values. Only the place of a key that comes again has a target, and what
    follows it says nothing of it.

    Args:
        vocabulary_size: tokens; number 0 stands for nothing.
        settings: lengths, each with its number of pairs; a training batch has one of them, each
            with the same probability. The last one is what "valid" is of.
        valid_size: sequences of the split "valid".
        test_size: sequences of the split "test", of each setting.

    Raises:
        ValueError: a sequence has no place for its pairs and their queries, or the vocabulary has
            fewer keys than a sequence.

    Source: Arora et al., Zoology, 2023, arXiv 2312.04927.
    """

    @checked
    def __init__(
        self,
        vocabulary_size: Annotated[int, Field(ge=6, le=2**20)] = 8192,
        settings: Annotated[Sequence[Pair], Field(min_length=1)] = ((64, 4), (128, 8), (256, 16)),
        valid_size: Count = 1000,
        test_size: Count = 1000,
    ) -> None:
        self.vocabulary_size: int = vocabulary_size
        self.keys: int = vocabulary_size // 2
        self.trained: list[Setting] = [Setting(*pair) for pair in settings]
        for length, pairs in self.trained:
            if 4 * pairs > length or pairs >= self.keys:
                raise ValueError(
                    f"data.settings=[[{length}, {pairs}]]: {pairs} pairs and their queries need a "
                    f"length of at least {4 * pairs} and data.vocabulary_size of more than "
                    f"{2 * pairs + 1}"
                )
        named = {f"n{setting.length}": setting for setting in self.trained}
        options = {
            "vocabulary": vocabulary_size,
            "settings": self.trained,
            "sizes": [valid_size, test_size],
        }
        super().__init__(
            "multi_query_recall", options, {"": self.trained[-1]} | named, valid_size, test_size
        )

    def draw_setting(self, generator: np.random.Generator) -> Setting:
        return self.trained[generator.integers(len(self.trained))]

    def draw(self, generator: np.random.Generator, rows: int, setting: Setting) -> Arrays:
        """Tokens (rows, length) and targets (rows, length), 0 where none counts; int64."""
        length, pairs = setting
        keys = 1 + choose(generator, rows, self.keys - 1, pairs)
        values = generator.integers(self.keys, self.vocabulary_size, (rows, pairs))
        tokens = generator.integers(self.keys, self.vocabulary_size, (rows, length))
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + 2 * self._gaps(generator, rows, (length - 2 * pairs) // 2, pairs)
        row = np.arange(rows)[:, None]
        targets = np.full((rows, length), NOT_COUNTED)
        tokens[row, places], targets[row, places] = keys, values
        return tokens, targets

    @staticmethod
    def _gaps(generator: np.random.Generator, rows: int, places: int, count: int) -> np.ndarray:
        """(rows, count) different places, drawn one after the other as the class says."""
        weights = np.arange(1, places + 1) ** (POWER - 1)
        # The largest of log(weight) + Gumbel noise are a draw without replacement.
        ranked = np.log(weights) + generator.gumbel(size=(rows, places))
        return np.argsort(-ranked, axis=1)[:, :count]
