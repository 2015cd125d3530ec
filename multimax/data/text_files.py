"""Text from plain files as byte-level BPE: the embedded Wikipedia articles, or any other."""

import gzip
import hashlib
import os
import tempfile
import zlib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from multimax.data.text_data import SPLITS, TextData
from multimax.data.vocabulary import BytePairVocabulary

CACHE = "~/.cache/multimax"


def wikipedia(
    vocabulary_size: int, block_size: int, context_window: int, cache: str | None = None
) -> TextData:
    """The embedded Wikipedia articles, 339 thousand words for training; see data/embedded.

    Args:
        vocabulary_size: of the BPE, which is trained on the training split.
        block_size, context_window: as in `TextData`.
        cache: folder for the vocabulary; None is ~/.cache/multimax.

    Raises:
        ValueError: an option is out of range.
    """
    vocabulary = wikipedia_vocabulary(vocabulary_size, cache)
    return _text_data("wikipedia", _embedded(), vocabulary, block_size, context_window)


def wikipedia_vocabulary(vocabulary_size: int, cache: str | None = None) -> BytePairVocabulary:
    """The vocabulary of `wikipedia`, arguments as there."""
    return _vocabulary(_embedded()["train"], vocabulary_size, cache)


def text_files(
    root: str | Path | None,
    vocabulary_size: int,
    block_size: int,
    context_window: int,
    cache: str | None = None,
) -> TextData:
    """Any text that fits into memory.

    Args:
        root: folder with train.txt, valid.txt and test.txt in UTF-8, or the same as .txt.gz.
        vocabulary_size, block_size, context_window, cache: as in `wikipedia`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, no UTF-8 or empty, or an option is out of range.
    """
    files = _files(root)
    vocabulary = _vocabulary(files["train"], vocabulary_size, cache)
    return _text_data(Path(str(root)).name, files, vocabulary, block_size, context_window)


def text_files_vocabulary(
    root: str | Path | None, vocabulary_size: int, cache: str | None = None
) -> BytePairVocabulary:
    """The vocabulary of `text_files`, arguments and errors as there."""
    return _vocabulary(_files(root)["train"], vocabulary_size, cache)


def _embedded() -> dict[str, Traversable]:
    folder = resources.files("multimax.data") / "embedded"
    return {split: folder / f"wikipedia_en.{split}.txt.gz" for split in SPLITS}


def _files(root: str | Path | None) -> dict[str, Traversable]:
    if root is None:
        raise ValueError(
            "data.root=null: give the folder that has train.txt, valid.txt and test.txt"
        )
    found: dict[str, Traversable] = {}
    for split in SPLITS:
        places = [Path(root) / f"{split}.txt", Path(root) / f"{split}.txt.gz"]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            raise FileNotFoundError(f"there is no {places[0]} and no {places[1].name}: add one")
        found[split] = place
    return found


def read_lines(path: Traversable) -> list[str]:
    """The lines of a text without their ends, which are "\\n" alone.

    Raises:
        ValueError: the file is truncated, not UTF-8, or has no word.
    """
    content = path.read_bytes()
    try:
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
        text = content.decode()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): copy it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {content[error.start]:#04x}): convert it, "
            "for example with iconv -f latin1 -t utf-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty: it needs text, a paragraph in each line")
    return text.removesuffix("\n").split("\n")


def _vocabulary(train: Traversable, size: int, cache: str | None) -> BytePairVocabulary:
    return byte_pairs(read_lines(train), size, cache)


def byte_pairs(lines: list[str], size: int, cache: str | None = None) -> BytePairVocabulary:
    """The BPE of a text, from the cache, or trained and put there; errors as in `text_files`."""
    # Another version may train another vocabulary.
    key = "\n".join([tokenizers.__version__, *lines])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = Path(cache or CACHE).expanduser() / f"bpe-{size}-{digest}.json"
    if not path.exists():
        vocabulary = BytePairVocabulary.train(lines, size)
        _write(path, vocabulary.tokenizer.to_str())
        return vocabulary
    try:
        return BytePairVocabulary(Tokenizer.from_file(str(path)))
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{path} is no vocabulary ({error}): delete it") from error


def _write(path: Path, content: str) -> None:
    """Several processes may write the same at once; each replaces the whole file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
            stream.write(content)
        os.replace(stream.name, path)
    except OSError as error:
        message = f"{error.strerror}: the vocabulary cannot be kept there, set data.cache"
        raise OSError(error.errno, message, str(path)) from error


def _text_data(
    name: str,
    files: dict[str, Traversable],
    vocabulary: BytePairVocabulary,
    block_size: int,
    context_window: int,
) -> TextData:
    streams, words, sizes = {}, {}, {}
    for split, path in files.items():
        lines = read_lines(path)
        encoded = vocabulary.encode_lines(lines)
        tokens = [token for line in encoded for token in (*line, vocabulary.eos_index)]
        streams[split] = np.array(tokens, dtype=np.int32)
        words[split] = sum(len(line.split()) + 1 for line in lines)
        sizes[split] = sum(len(line.encode()) + 1 for line in lines)
    return TextData(name, vocabulary, block_size, context_window, streams, words, sizes)
