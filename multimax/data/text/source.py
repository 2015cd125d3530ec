"""What every text data set has: a vocabulary, and its text as streams of tokens."""

from abc import ABC, abstractmethod
from functools import cached_property

from multimax.data.text.blocks import TextData
from multimax.data.vocabulary import Vocabulary


class TextSource(ABC):
    """The files of a text data set.

    Args:
        block_size: tokens that the model sees at once, at most.
        context_window: in evaluation, tokens that are seen but do not count, before each block; in
            [0, block_size).
    """

    def __init__(self, block_size: int, context_window: int) -> None:
        self.block_size, self.context_window = block_size, context_window

    @cached_property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, without the rest of the text.

        Raises:
            FileNotFoundError, ValueError: as `load`.
        """

    @abstractmethod
    def load(self) -> TextData:
        """Read everything.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or not what it should be, or an option is out of range.
        """
