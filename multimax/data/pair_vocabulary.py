"""Vocabularies of translation: sentences as they are, as lines of a file, and as tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from sacremoses import MosesDetokenizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE

from multimax.data.vocabulary import END, PADDING, BytePairVocabulary, WordVocabulary

CONTINUED = "@@ "  # subword-nmt's mark between the parts of a word


class PairVocabulary(ABC):
    """The words of one side, or of both, and how sentences are split into them.

    A sentence has three forms: plain text; a line, the form in which the files of the data set
    hold it; and tokens, of which `eos_index` is the last.

    Attributes:
        size: number of words.
        padding_index: the word that stands for nothing.
        eos_index: the word that ends a sentence.
        unknown_index: the word that stands for all others; -1 if there are no others.
        fingerprint: hexadecimal digits that no other vocabulary has.
    """

    size: int
    padding_index: int
    eos_index: int
    unknown_index: int
    fingerprint: str

    @abstractmethod
    def line(self, text: str) -> str:
        """The line of a plain sentence."""

    @abstractmethod
    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """The tokens of each line."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The line of some tokens, whether `eos_index` is among them or not."""

    @abstractmethod
    def plain(self, line: str) -> str:
        """The plain sentence of a line."""

    def words(self, line: str) -> str | None:
        """The tokenized words of a line with spaces between them; None if it is plain text."""
        return None

    @abstractmethod
    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token by itself, for a reader."""


class BytePairs(PairVocabulary):
    """Byte-level BPE: a line is the plain sentence, and nothing is unknown.

    Args:
        vocabulary: trained on lines that each begin with a space, so that a word is the same at the
            beginning of a sentence and inside.
    """

    unknown_index = -1

    def __init__(self, vocabulary: BytePairVocabulary) -> None:
        self.vocabulary = vocabulary
        self.size, self.fingerprint = vocabulary.size, vocabulary.fingerprint
        self.padding_index, self.eos_index = vocabulary.padding_index, vocabulary.eos_index

    def line(self, text: str) -> str:
        return text.strip()

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        encoded = self.vocabulary.encode_lines([f" {line}" for line in lines])
        return [[*tokens, self.eos_index] for tokens in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        kept = (token for token in tokens if token not in (self.padding_index, self.eos_index))
        return "".join(self.vocabulary.decode(kept)).removeprefix(" ")

    def plain(self, line: str) -> str:
        return line

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        names = {self.padding_index: PADDING, self.eos_index: END}
        return [names.get(token) or "".join(self.vocabulary.decode([token])) for token in tokens]


class MosesSubwords(PairVocabulary):
    """Moses tokens in lower case, BPE-split by subword-nmt, numbered by fairseq's dictionary.

    Args:
        dictionary: `dict.<language>.txt`, a word and its count in each line.
        codes: the merges of subword-nmt.
        language: such as "de".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not in its format.
    """

    def __init__(self, dictionary: Path, codes: Path, language: str) -> None:
        self.vocabulary = WordVocabulary.read(dictionary)
        self.size, self.fingerprint = self.vocabulary.size, self.vocabulary.fingerprint
        self.padding_index = self.vocabulary.padding_index
        self.eos_index = self.vocabulary.eos_index
        self.unknown_index = self.vocabulary.unknown_index
        if not codes.is_file():
            raise FileNotFoundError(f"there are no BPE codes at {codes}: prepare the data again")
        self.codes, self.language = codes, language

    @cached_property
    def _tokenizer(self) -> MosesTokenizer:
        return MosesTokenizer(lang=self.language)

    @cached_property
    def _detokenizer(self) -> MosesDetokenizer:
        return MosesDetokenizer(lang=self.language)

    @cached_property
    def _byte_pairs(self) -> BPE:
        return read_codes(self.codes)

    def line(self, text: str) -> str:
        words = str(self._tokenizer.tokenize(text, return_str=True))
        return self._byte_pairs.process_line(words.lower())

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        return [[*self.vocabulary.encode_line(line), self.eos_index] for line in lines]

    def decode(self, tokens: Sequence[int]) -> str:
        kept = (token for token in tokens if token not in (self.padding_index, self.eos_index))
        return " ".join(self.vocabulary.words[token] for token in kept)

    def words(self, line: str) -> str:
        return f"{line} ".replace(CONTINUED, "").rstrip()

    def plain(self, line: str) -> str:
        return str(self._detokenizer.detokenize(self.words(line).split()))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        return [self.vocabulary.words[token] for token in tokens]


def read_codes(path: Path) -> BPE:
    """The merges that subword-nmt learned.

    Raises:
        ValueError: the file is in another format.
    """
    with path.open(encoding="utf-8", newline="\n") as stream:
        try:
            return BPE(stream)
        except SystemExit:  # what the package does with a bad line
            raise ValueError(f"{path} holds no BPE codes: prepare the data again") from None
