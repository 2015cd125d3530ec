"""What every text data set has: a vocabulary, and its text as streams of tokens."""

from abc import ABC, abstractmethod
from functools import cached_property

from multimax.data.text.blocks import TextData
from multimax.data.vocabulary import Vocabulary
from multimax.options import Count, Whole, checked


class TextSource(ABC):
    """The files of a text data set.

    Args:
        block_size: tokens that the model sees at once, at most.
        context_window: in evaluation, tokens that are seen but do not count, before each block; in
            [0, block_size).
    """

    @checked
    def __init__(self, block_size: Count, context_window: Whole) -> None:
        if context_window >= block_size:
            raise ValueError(
                f"data.context_window={context_window} must be less than "
                f"data.block_size={block_size}: 0 gives the first tokens of each block no context"
            )
        self.block_size: int = block_size
        self.context_window: int = context_window

    @cached_property
    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, without the rest of the text.

        Raises:
            FileNotFoundError, ValueError: as `load`.
        """

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """Tells data sets apart, wherever their files lie; see `LoadedData`.

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
