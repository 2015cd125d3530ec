"""Sequences that are read and then answered token by token, at lengths beyond those of training."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from multimax.data.synthetic.base import (
    NOT_COUNTED,
    Arrays,
    Length,
    Lengths,
    Setting,
    SyntheticData,
    choose,
    length_settings,
)
from multimax.options import Count, checked

SEPARATOR = 1  # after which the answer comes
FIRST = 2  # of the letters, which mean something

Alphabet = Annotated[int, Field(ge=2, le=2**20)]


class Sequences(SyntheticData):
    """Sequences of tokens with an answer, of which each token is predicted from those before it.

    Inputs have the answer in them, and targets are the next token where it is one of the answer, 0
    elsewhere. The sequences of a training batch have one length, which is each from the least to
    the largest with the same probability.

    Args:
        name: as in `SyntheticData`.
        vocabulary_size: number of tokens; number 0 stands for nothing.
        lengths: the least and the largest one in training; the split "valid" is of the largest.
        test_lengths: of the split "test".
        relevant: of the settings.
        sizes: of the split "valid" and, for each length, of the split "test".
        options: what the examples depend on beside these.

    Raises:
        ValueError: the least length is above the largest.
    """

    def __init__(
        self,
        name: str,
        vocabulary_size: int,
        lengths: tuple[int, int],
        test_lengths: Sequence[int],
        relevant: int,
        sizes: tuple[int, int],
        options: Mapping[str, Any],
    ) -> None:
        self.least_length, largest = lengths
        if self.least_length > largest:
            raise ValueError(
                f"data.least_length={self.least_length} must be at most data.length={largest}"
            )
        self.vocabulary_size: int = vocabulary_size
        settings = length_settings(Setting(largest, relevant), test_lengths)
        own = {"lengths": lengths, "settings": settings, "sizes": sizes}
        super().__init__(name, dict(options) | own, settings, *sizes)

    def draw_setting(self, generator: np.random.Generator) -> Setting:
        longest = super().draw_setting(generator)
        length = generator.integers(self.least_length, longest.length, endpoint=True)
        return longest._replace(length=int(length))


class Transformed(Sequences):
    """Different letters, a separator, and as the answer the same letters in another order.

    That no letter comes twice is ours: which one is meant is then never in doubt, and what is left
    is to find it.

    Args:
        alphabet: number of letters, each of which has the same probability at each place.
        length: the largest number of them in training.
        least_length: the smallest one.
        test_lengths: those of the split "test".
        valid_size: sequences of the split "valid", all of the largest length of training.
        test_size: sequences of the split "test", of each length.

    Raises:
        ValueError: as in `Sequences`, or a length is above the number of letters.

    Source: the tasks Reverse and Sort of Vasylenko et al., Long-Context Generalization with Sparse
    Attention, 2025, arXiv 2506.16640; the sizes are ours, and no token ends the answer.
    """

    name: str

    @checked
    def __init__(
        self,
        alphabet: Alphabet = 256,
        length: Length = 16,
        least_length: Length = 1,
        test_lengths: Lengths = (16, 24, 32, 64, 128),
        valid_size: Count = 1000,
        test_size: Count = 1000,
    ) -> None:
        longest = max(length, *test_lengths)
        if longest > alphabet:
            raise ValueError(
                f"data.alphabet={alphabet} must be at least {longest}, the largest length: no "
                "letter comes twice"
            )
        self.alphabet: int = alphabet
        super().__init__(
            self.name,
            FIRST + alphabet,
            (least_length, length),
            test_lengths,
            0,
            (valid_size, test_size),
            {"alphabet": alphabet},
        )

    @abstractmethod
    def answer(self, letters: np.ndarray) -> np.ndarray:
        """The answer to letters, both (rows, length)."""

    def draw(self, generator: np.random.Generator, rows: int, setting: Setting) -> Arrays:
        """Tokens and targets (rows, 2 * length), int64."""
        letters = choose(generator, rows, self.alphabet, setting.length)
        letters = FIRST + generator.permuted(letters, axis=1)
        answer, separator = self.answer(letters), np.full((rows, 1), SEPARATOR)
        silent = np.full_like(letters, NOT_COUNTED)
        tokens = np.concatenate([letters, separator, answer[:, :-1]], axis=1)
        return tokens, np.concatenate([silent, answer], axis=1)


class Reverse(Transformed):
    """Different letters, whose answer is the last one, the one before it, and so on.

    Args:
        alphabet, length, least_length, test_lengths, valid_size, test_size: as in `Transformed`.
    """

    name = "reverse"

    def answer(self, letters: np.ndarray) -> np.ndarray:
        return letters[:, ::-1]


class Sort(Transformed):
    """Different letters, whose answer is the smallest one, the next one, and so on.

    Args:
        alphabet, length, least_length, test_lengths, valid_size, test_size: as in `Transformed`.
    """

    name = "sort"

    def answer(self, letters: np.ndarray) -> np.ndarray:
        return np.sort(letters, axis=1)
