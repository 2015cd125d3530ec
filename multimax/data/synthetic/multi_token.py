"""Multi-query multi-token associative recall (MQMTAR): pairs of keys and values of two tokens."""

import numpy as np

from multimax.data.synthetic.base import NOT_COUNTED, Arrays, Length, Lengths, Setting, choose
from multimax.data.synthetic.sequences import FIRST, SEPARATOR, Alphabet, Sequences
from multimax.options import Count, checked

KEY = 2  # letters of a key, and of a value
PAIR = 2 * KEY
DENSITY = 0.8  # the share of a sequence that are pairs
SHORTEST = 5  # length with a pair


class MultiTokenRecall(Sequences):
    """Pairs between fillers and, after a separator, some of them again, with values to be found.

    A key and a value are two letters each. The keys of a sequence differ in one letter at least, so
    that one letter alone does not name a pair. Pairs are 80 % of a sequence, and the rest are
    fillers, one token of their own, before, between and after them. The pairs that come again are
    any of them, in any order; the two letters of their values are the answer.

    Args:
        alphabet: number of letters, each of which has the same probability in a key and a value.
        queries: number of pairs that come again; all, if there are fewer.
        length: the largest number of tokens before the separator, in training.
        least_length: the smallest one.
        test_lengths: those of the split "test".
        valid_size: sequences of the split "valid", all of the largest length of training.
        test_size: sequences of the split "test", of each length.

    Raises:
        ValueError: a length is too short for a pair, or there are fewer keys than pairs.

    Source: Vasylenko et al., Long-Context Generalization with Sparse Attention, 2025, arXiv
    2506.16640; the sizes are ours, and a key is followed by its value at once.
    """

    @checked
    def __init__(
        self,
        alphabet: Alphabet = 128,
        queries: Count = 4,
        length: Length = 32,
        least_length: Length = SHORTEST,
        test_lengths: Lengths = (32, 64, 128, 256, 512),
        valid_size: Count = 1000,
        test_size: Count = 1000,
    ) -> None:
        shortest, longest = min(least_length, *test_lengths), max(length, *test_lengths)
        if not pairs_of(shortest):
            raise ValueError(
                f"a sequence of length {shortest} has no pair: the least is {SHORTEST}"
            )
        if pairs_of(longest) > alphabet**KEY:
            raise ValueError(
                f"data.alphabet={alphabet} makes {alphabet**KEY} keys, fewer than the "
                f"{pairs_of(longest)} pairs of a sequence of length {longest}"
            )
        self.alphabet: int = alphabet
        self.filler: int = FIRST + alphabet
        super().__init__(
            "multi_token_recall",
            self.filler + 1,
            (least_length, length),
            test_lengths,
            queries,
            (valid_size, test_size),
            {"alphabet": alphabet},
        )

    def draw(self, generator: np.random.Generator, rows: int, setting: Setting) -> Arrays:
        """Tokens and targets (rows, length + 4 * queries), int64."""
        pairs = pairs_of(setting.length)
        keys = self._letters(choose(generator, rows, self.alphabet**KEY, pairs))
        values = self._letters(generator.integers(self.alphabet**KEY, size=(rows, pairs)))
        whole = np.concatenate([keys, values], axis=2)
        asked = choose(generator, rows, pairs, min(setting.relevant, pairs))
        again = whole[np.arange(rows)[:, None], generator.permuted(asked, axis=1)]
        wanted = np.where(np.arange(PAIR) < KEY, NOT_COUNTED, again).reshape(rows, -1)
        read, separator = (
            self._spread(generator, whole, setting.length),
            np.full((rows, 1), SEPARATOR),
        )
        tokens = np.concatenate([read, separator, again.reshape(rows, -1)[:, :-1]], axis=1)
        return tokens, np.concatenate([np.full_like(read, NOT_COUNTED), wanted], axis=1)

    def _spread(self, generator: np.random.Generator, pairs: np.ndarray, length: int) -> np.ndarray:
        """(rows, length) tokens of pairs (rows, count, 4) with fillers anywhere between them."""
        rows, count, _ = pairs.shape
        # Of as many places as there are pairs and fillers, those of the pairs are then widened.
        places = np.sort(choose(generator, rows, length - (PAIR - 1) * count, count), axis=1)
        places = (places + (PAIR - 1) * np.arange(count))[..., None] + np.arange(PAIR)
        tokens = np.full((rows, length), self.filler)
        tokens[np.arange(rows)[:, None, None], places] = pairs
        return tokens

    def _letters(self, numbers: np.ndarray) -> np.ndarray:
        """(rows, count, 2) letters of numbers (rows, count) below alphabet ** KEY."""
        return FIRST + np.stack(np.divmod(numbers, self.alphabet), axis=2)


def pairs_of(length: int) -> int:
    """Pairs of a sequence of this length."""
    return int(DENSITY * length) // PAIR
