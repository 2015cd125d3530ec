"""The files of a vocabulary, which travel with a published model of text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from multimax.data.pairs.sources import Languages
from multimax.data.vocabulary import (
    FAIRSEQ_SPECIALS,
    BytePairs,
    BytePairVocabulary,
    MosesSubwords,
    Vocabulary,
    WordVocabulary,
)
from multimax.files import write_atomically

TOKENIZER = "tokenizer.json"  # of the package tokenizers
WORDS = "dict.txt"  # of fairseq
CODES = "code"  # of subword-nmt
FILES = (TOKENIZER, "dict*.txt", CODES)


def save_vocabulary(vocabulary: Vocabulary | Languages, folder: Path) -> dict[str, Any]:
    """Write the files of a vocabulary.

    Args:
        vocabulary: of a language model, or of a translation model.
        folder: where to.

    Returns:
        What `load_vocabulary` needs beside the files, as JSON.

    Raises:
        ValueError: it is of a kind that has no files here.
    """
    described: dict[str, Any] = {"fingerprint": vocabulary.fingerprint}
    if isinstance(vocabulary, BytePairVocabulary):
        _write(folder / TOKENIZER, vocabulary.tokenizer.to_str())
        return described | {"kind": "byte_pairs"}
    if isinstance(vocabulary, WordVocabulary):
        _write_words(folder / WORDS, vocabulary)
        return described | {"kind": "words"}
    if isinstance(vocabulary, Languages):
        described |= {"source": vocabulary.source, "target": vocabulary.target}
        sides = vocabulary.source_vocabulary, vocabulary.target_vocabulary
        source, target = sides
        if isinstance(source, BytePairs) and source is target:
            _write(folder / TOKENIZER, source.vocabulary.tokenizer.to_str())
            return described | {"kind": "byte_pairs_of_both"}
        if isinstance(source, MosesSubwords) and isinstance(target, MosesSubwords):
            for side in (source, target):
                _write_words(folder / f"dict.{side.language}.txt", side.vocabulary)
            _write(folder / CODES, source.codes.read_bytes())
            return described | {"kind": "moses_subwords"}
    raise ValueError(f"a vocabulary of {type(vocabulary).__name__} cannot be published")


def load_vocabulary(described: Mapping[str, Any], folder: Path) -> Vocabulary | Languages:
    """The vocabulary whose files are in a folder.

    Args:
        described: what `save_vocabulary` returned.
        folder: where the files are.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or not the one that was saved.
    """
    kind = described.get("kind")
    read = READERS.get(str(kind))
    if read is None:
        raise ValueError(
            f"vocabulary.kind={kind!r} in {folder / 'config.json'} must be one of "
            f"{', '.join(READERS)}: the file is damaged or of a newer version"
        )
    try:
        vocabulary = read(described, folder)
    except KeyError as error:
        raise ValueError(f"vocabulary in {folder / 'config.json'} lacks {error}") from error
    if vocabulary.fingerprint != described.get("fingerprint"):
        raise ValueError(
            f"the vocabulary in {folder} ({vocabulary.fingerprint}) is not the one that the model "
            f"was trained with ({described.get('fingerprint')}): copy or download its files again"
        )
    return vocabulary


def _byte_pairs(described: Mapping[str, Any], folder: Path) -> BytePairVocabulary:
    path = folder / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: copy or download the model again")
    try:
        return BytePairVocabulary(Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error


def _words(described: Mapping[str, Any], folder: Path) -> WordVocabulary:
    return WordVocabulary.read(folder / WORDS)


def _byte_pairs_of_both(described: Mapping[str, Any], folder: Path) -> Languages:
    both = BytePairs(_byte_pairs(described, folder))
    return Languages(described["source"], described["target"], both, both)


def _moses_subwords(described: Mapping[str, Any], folder: Path) -> Languages:
    names = described["source"], described["target"]
    sides = (MosesSubwords(folder / f"dict.{n}.txt", folder / CODES, n) for n in names)
    return Languages(*names, *sides)


READERS = {
    "byte_pairs": _byte_pairs,
    "words": _words,
    "byte_pairs_of_both": _byte_pairs_of_both,
    "moses_subwords": _moses_subwords,
}


def _write_words(path: Path, vocabulary: WordVocabulary) -> None:
    # Their counts, which fairseq's format has a place for, are not known any more.
    words = vocabulary.words[len(FAIRSEQ_SPECIALS) :]
    _write(path, "".join(f"{word} 0\n" for word in words))


def _write(path: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    write_atomically(path, lambda stream: stream.write(data), "Publish the model again")
