"""Max retrieval: the class of the item with the highest priority."""

import numpy as np

from multimax.data.synthetic.base import (
    Arrays,
    Length,
    Lengths,
    Setting,
    SyntheticData,
    length_settings,
)
from multimax.options import Count, Width, checked


class Maximum(SyntheticData):
    """Sets of items with a priority and a class; the target is the class of the highest priority.

    An item has the priority, uniform in [0, 1), and the class as a one-hot vector, each class with
    the same probability. The sets of a training batch have one length, each with the same
    probability.

    Args:
        length: the largest number of items of a set in training.
        least_length: the smallest one.
        classes: number of classes.
        test_lengths: lengths of the sets of the test split.
        valid_size: sets of the split "valid", all of the largest length of training.
        test_size: sets of the split "test", of each length.

    Raises:
        ValueError: the smallest length is above the largest.

    Source: Velickovic et al., softmax is not enough (for sharp out-of-distribution), 2024, arXiv
    2410.01104; the smallest length is ours.
    """

    @checked
    def __init__(
        self,
        length: Length = 16,
        least_length: Length = 5,
        classes: Width = 10,
        test_lengths: Lengths = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
        valid_size: Count = 1000,
        test_size: Count = 500,
    ) -> None:
        if least_length > length:
            raise ValueError(
                f"data.least_length={least_length} must be at most data.length={length}"
            )
        self.least_length: int = least_length
        self.outputs: int = classes
        self.features: int = 1 + classes
        settings = length_settings(Setting(length, 1), test_lengths)
        options = {
            "lengths": [least_length, length],
            "classes": classes,
            "settings": settings,
            "sizes": [valid_size, test_size],
        }
        super().__init__("maximum", options, settings, valid_size, test_size)

    def draw_setting(self, generator: np.random.Generator) -> Setting:
        longest = super().draw_setting(generator)
        length = generator.integers(self.least_length, longest.length, endpoint=True)
        return longest._replace(length=int(length))

    def draw(self, generator: np.random.Generator, rows: int, setting: Setting) -> Arrays:
        """Items (rows, length, 1 + classes) float32 and targets (rows,) int64."""
        classes = generator.integers(self.outputs, size=(rows, setting.length))
        items = np.zeros((rows, setting.length, self.features), dtype=np.float32)
        items[..., 0] = generator.random((rows, setting.length), dtype=np.float32)
        np.put_along_axis(items, 1 + classes[..., None], 1.0, axis=2)
        highest = items[..., 0].argmax(1)
        return items, classes[np.arange(rows), highest]
