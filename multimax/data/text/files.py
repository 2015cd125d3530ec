"""Text from plain files as byte-level BPE: the embedded Wikipedia articles, or any other."""

from abc import abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from multimax.data.loading import SPLITS, embedded_file, unzipped
from multimax.data.text.blocks import TextData
from multimax.data.text.source import TextSource
from multimax.data.vocabulary import BytePairSize, BytePairVocabulary
from multimax.files import digest, digest_parts, user_cache, write_atomically
from multimax.options import Count, Whole, checked


class TextFileSource(TextSource):
    """Text that fits into memory, with a byte-level BPE trained on its training split.

    Args:
        vocabulary_size: of the BPE.
        block_size, context_window: as in `TextSource`.
        cache: folder that keeps the BPE; None is ~/.cache/multimax.
    """

    name: str

    @checked
    def __init__(
        self,
        vocabulary_size: BytePairSize,
        block_size: Count,
        context_window: Whole,
        cache: str | None = None,
    ) -> None:
        super().__init__(block_size, context_window)
        self.vocabulary_size: int = vocabulary_size
        self.cache: str | None = cache

    @abstractmethod
    def file(self, split: str) -> Path:
        """The text of a split in UTF-8, gzipped if its name ends with ".gz".

        Raises:
            FileNotFoundError: there is none.
        """

    @cached_property
    def vocabulary(self) -> BytePairVocabulary:
        return byte_pairs(read_lines(self.file("train")), self.vocabulary_size, self.cache)

    @cached_property
    def fingerprint(self) -> str:
        """Of the text of all splits."""
        return digest_parts("\n".join(read_lines(self.file(split))) for split in SPLITS)

    def load(self) -> TextData:
        streams, words, sizes = {}, {}, {}
        files = {split: self.file(split) for split in SPLITS}
        vocabulary = self.vocabulary
        for split, file in files.items():
            lines = read_lines(file)
            encoded = vocabulary.encode_lines(lines)
            tokens = [token for line in encoded for token in (*line, vocabulary.eos_index)]
            streams[split] = np.array(tokens, dtype=np.int32)
            words[split] = sum(len(line.split()) + 1 for line in lines)
            sizes[split] = sum(len(line.encode()) + 1 for line in lines)
        sizes_of_blocks = self.block_size, self.context_window
        return TextData(
            self.name, vocabulary, *sizes_of_blocks, streams, words, sizes, self.fingerprint
        )


class Wikipedia(TextFileSource):
    """The embedded Wikipedia articles, 339 thousand words for training; see data/embedded.

    Args:
        vocabulary_size, block_size, context_window, cache: as in `TextFileSource`.
    """

    name = "wikipedia"

    def file(self, split: str) -> Path:
        return embedded_file(self.name, f"wikipedia_en.{split}.txt.gz")


class TextFiles(TextFileSource):
    """Any text that fits into memory.

    Args:
        root: folder with train.txt, valid.txt and test.txt in UTF-8, or the same as .txt.gz; its
            name is that of the data set.
        vocabulary_size, block_size, context_window, cache: as in `TextFileSource`.

    Raises:
        ValueError: `root` is None.
    """

    @checked
    def __init__(
        self,
        root: str | Path | None,
        vocabulary_size: BytePairSize,
        block_size: Count,
        context_window: Whole,
        cache: str | None = None,
    ) -> None:
        super().__init__(vocabulary_size, block_size, context_window, cache)
        if root is None:
            raise ValueError(
                "data.root=null: give the folder that has train.txt, valid.txt and test.txt"
            )
        self.root: Path = Path(root)
        self.name: str = self.root.name

    def file(self, split: str) -> Path:
        places = [self.root / f"{split}.txt", self.root / f"{split}.txt.gz"]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            raise FileNotFoundError(f"there is no {places[0]} and no {places[1].name}: add one")
        return place


def read_lines(path: Path) -> list[str]:
    """The lines of a text without their ends, which are "\\n" alone.

    Raises:
        ValueError: the file is truncated, not UTF-8, has no word, or is a gzip bomb.
    """
    content = unzipped(path) if path.name.endswith(".gz") else path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {content[error.start]:#04x}): convert it, "
            "for example with iconv -f latin1 -t utf-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty: it needs text, a paragraph in each line")
    return text.removesuffix("\n").split("\n")


def byte_pairs(lines: list[str], size: int, cache: str | None = None) -> BytePairVocabulary:
    """The BPE of a text, from the cache, or trained and put there; errors as in `text_files`."""
    # Another version may train another vocabulary.
    key = "\n".join([tokenizers.__version__, *lines])
    folder = Path(cache).expanduser() if cache else user_cache()
    path = folder / f"bpe-{size}-{digest(key)}.json"
    if not path.exists():
        vocabulary = BytePairVocabulary.train(lines, size)
        content = vocabulary.tokenizer.to_str().encode()
        remedy = "The vocabulary cannot be kept there: set data.cache to another folder"
        write_atomically(path, lambda stream: stream.write(content), remedy, several_writers=True)
        return vocabulary
    try:
        content = path.read_text()
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror} while reading {path}: set data.cache to another folder"
        ) from error
    try:
        return BytePairVocabulary(Tokenizer.from_str(content))
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{path} is no vocabulary ({error}): delete it") from error
