"""k-mean retrieval: the mean of the marked items of a set."""

import math
from collections.abc import Sequence

import numpy as np

from multimax.data.synthetic.base import (
    Arrays,
    Length,
    Lengths,
    Setting,
    SyntheticData,
    choose,
    length_settings,
)
from multimax.options import Count, checked

VALUES = 8  # numbers of an item beside its relevance
SPREAD = 0.3  # of the relevance


class KMean(SyntheticData):
    """Sets of items of which some are marked; the target is sqrt(marked) times their mean value.

    An item has nine numbers: its relevance, then its value, eight independent numbers of N(0, 1).
    The relevance is uniform in [-0.3, 0.3), and 1 more for the marked items, which are any of the
    set with the same probability. The value is all that the target depends on and, as a part of the
    item that says nothing of its relevance, the noise that the keys have to leave out. The factor
    sqrt(marked) gives every number of the target the variance 1: predicting zero has an expected
    squared error of 1, and the uniform mean of the set one of 1 - marked / length.

    Args:
        length: items of a set in training.
        marked: how many of them are marked.
        test_lengths: lengths of the sets of the test split, with as many marked items.
        test_marked: numbers of marked items in the test split, in sets of the length of training.
        valid_size: sets of the split "valid", which are like those of training.
        test_size: sets of the split "test", of each length and of each number of marked items.

    Raises:
        ValueError: more items are marked than there are.
    """

    features: int = 1 + VALUES
    outputs: int = VALUES

    @checked
    def __init__(
        self,
        length: Length = 64,
        marked: Count = 4,
        test_lengths: Lengths = (64, 128, 256, 512, 1024, 2048, 4096),
        test_marked: Sequence[Count] = (1, 2, 4, 8, 16),
        valid_size: Count = 1000,
        test_size: Count = 1000,
    ) -> None:
        _check_marked("data.marked", marked, length, "data.length")
        _check_marked("data.marked", marked, min(test_lengths), "the least of data.test_lengths")
        for count in test_marked:
            _check_marked("data.test_marked", count, length, "data.length")
        setting = Setting(length, marked)
        settings = length_settings(setting, test_lengths)
        settings |= {f"k{count}": setting._replace(relevant=count) for count in test_marked}
        options = {"length": length, "marked": marked, "settings": settings}
        super().__init__(
            "k_mean", options | {"sizes": [valid_size, test_size]}, settings, valid_size, test_size
        )

    def draw(self, generator: np.random.Generator, rows: int, setting: Setting) -> Arrays:
        """Items (rows, length, 9) and targets (rows, 8), float32."""
        length, marked = setting
        items = np.empty((rows, length, self.features), dtype=np.float32)
        items[..., 0] = generator.uniform(-SPREAD, SPREAD, (rows, length))
        items[..., 1:] = generator.standard_normal((rows, length, VALUES), dtype=np.float32)
        places = choose(generator, rows, length, marked)
        row = np.arange(rows)[:, None]
        items[row, places, 0] += 1
        targets = items[row, places, 1:].mean(1) * np.float32(math.sqrt(marked))
        return items, targets


def _check_marked(name: str, marked: int, length: int, of: str) -> None:
    if marked > length:
        raise ValueError(f"{name}={marked} must be at most {length}, {of}")
