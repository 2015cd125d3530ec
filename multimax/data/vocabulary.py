"""Vocabularies: whole words in fairseq's order, byte-level BPE, and those of sentence pairs."""

import codecs
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, cast

from pydantic import Field
from sacremoses import MosesDetokenizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from multimax.files import digest

PADDING, END = "<pad>", "</s>"
FAIRSEQ_SPECIALS = ("<s>", PADDING, END, "<unk>")
FAIRSEQ_MULTIPLE = 8  # fairseq fills a dictionary up to a multiple of this
CONTINUED = "@@ "  # subword-nmt's mark between the parts of a word
SMALLEST_BPE = 2 + 256  # the two special tokens and a token for each byte
BytePairSize = Annotated[int, Field(ge=SMALLEST_BPE, le=10**6)]

# A byte of byte-level BPE is written as the character of that number if it can be seen, else as
# one from 256 on (GPT-2's table).
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)) - set(_VISIBLE))
_CHARACTERS = {chr(byte): byte for byte in _VISIBLE}
_CHARACTERS |= {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}


class Vocabulary(ABC):
    """Text as numbers, and back; `eos_index` stands for the end of a line.

    Attributes:
        size: number of tokens.
        padding_index: the token that stands for nothing.
        eos_index: the token that ends each line.
        never_sampled: further tokens that are no text.
        fingerprint: 16 hexadecimal digits that no other vocabulary has.
    """

    size: int
    padding_index: int
    eos_index: int
    never_sampled: list[int]
    fingerprint: str

    @abstractmethod
    def encode_line(self, line: str) -> list[int]:
        """Tokens of a line, without the one that ends it."""

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text, each as soon as its last token is there; a line ends with a newline."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, of which the last line goes on."""
        first, *others = text.split("\n")
        tokens = self.encode_line(first)
        for line in others:
            tokens += [self.eos_index, *self.encode_line(line)]
        return tokens


class WordVocabulary(Vocabulary):
    """Words between white space, numbered as in fairseq: the special ones, then by frequency.

    Args:
        words: without the special ones.
    """

    padding_index: int = FAIRSEQ_SPECIALS.index(PADDING)
    eos_index: int = FAIRSEQ_SPECIALS.index(END)
    unknown_index: int = FAIRSEQ_SPECIALS.index("<unk>")

    def __init__(self, words: Iterable[str]) -> None:
        self.words: list[str] = [*FAIRSEQ_SPECIALS, *words]
        self.size: int = len(self.words)
        self.indices: dict[str, int] = {word: index for index, word in enumerate(self.words)}
        if len(self.indices) < self.size:
            [(word, count)] = Counter(self.words).most_common(1)
            raise ValueError(
                f"a word must be in a vocabulary once, {word!r} is there {count} times"
            )
        fillers = [i for w, i in self.indices.items() if w.startswith("madeupword")]
        self.never_sampled: list[int] = [
            FAIRSEQ_SPECIALS.index("<s>"),
            self.unknown_index,
            *fillers,
        ]
        self.fingerprint: str = digest("\n".join(self.words))

    @classmethod
    def count(cls, counts: Counter[str]) -> list[tuple[str, int]]:
        """The words and counts of fairseq's dictionary of a text, in its order.

        Source: fairseq's `Dictionary.finalize`: by falling count, then by code points, filled up
        to a multiple of 8.
        """
        words = [pair for pair in counts.items() if pair[0] not in FAIRSEQ_SPECIALS]
        words.sort(key=lambda pair: (-pair[1], pair[0]))
        missing = -(len(FAIRSEQ_SPECIALS) + len(words)) % FAIRSEQ_MULTIPLE
        return words + [(f"madeupword{i:04d}", 0) for i in range(missing)]

    @classmethod
    def read(cls, path: Path) -> "WordVocabulary":
        """From fairseq's `dict.txt`, a word and its count in each line.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line is something else, or a word occurs twice.
        """
        if not path.is_file():
            raise FileNotFoundError(f"there is no vocabulary {path}")
        words = []
        try:
            # Only "\n" ends a line: a word may hold other characters that Python takes for an end.
            for number, line in enumerate(path.read_bytes().decode().split("\n")[:-1], 1):
                word, _, count = line.rpartition(" ")
                if not word or not count.isdecimal():
                    raise ValueError(f"line {number} is {line!r}, not a word and its count")
                words.append(word)
            return cls(words)
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(
                f"{path} is no vocabulary of words: {error}; prepare it anew"
            ) from error

    def encode_line(self, line: str) -> list[int]:
        return [self.indices.get(word, self.unknown_index) for word in line.split()]

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        space = ""
        for token in tokens:
            ends = token == self.eos_index
            yield "\n" if ends else space + self.words[token]
            space = "" if ends else " "


class BytePairVocabulary(Vocabulary):
    """Byte-level BPE: every text has tokens, and they have the text byte for byte.

    Args:
        tokenizer: as `train` returns it.
    """

    padding_index: int = 0
    eos_index: int = 1

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # a text that spells "</s>" does not end there
        self.size: int = tokenizer.get_vocab_size()
        self.never_sampled: list[int] = []
        self.fingerprint: str = digest(tokenizer.to_str())

    @classmethod
    def train(cls, lines: Iterable[str], size: int) -> "BytePairVocabulary":
        """The same vocabulary each time for the same lines and size.

        Args:
            lines: of the training text.
            size: number of tokens, at least 258: padding, line end and 256 bytes.

        Raises:
            ValueError: the size is too small, or too large for this text.
        """
        if size < SMALLEST_BPE:
            raise ValueError(f"vocabulary_size={size} must be a whole number >= {SMALLEST_BPE}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[PADDING, END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(lines, trainer)
        vocabulary = cls(tokenizer)
        if vocabulary.size < size:
            raise ValueError(
                f"vocabulary_size={size} is more than the training text has pairs for: use at most "
                f"{vocabulary.size}"
            )
        return vocabulary

    def encode_line(self, line: str) -> list[int]:
        return self.tokenizer.encode(line, add_special_tokens=False).ids

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Tokens of each line, without those that end them."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(lines, add_special_tokens=False)]

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        # The decoder of the package keeps back a U+FFFD that is in the text.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            ends = token == self.eos_index
            yield decoder.decode(b"" if ends else self._bytes(token), final=ends) + "\n" * ends
        yield decoder.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        return bytes(_CHARACTERS[c] for c in cast(str, self.tokenizer.id_to_token(token)))


class PairVocabulary(ABC):
    """The words of one side, or of both, and how sentences are split into them.

    A sentence has three forms: plain text; a line, the form in which the files of the data set
    hold it; and tokens, of which `eos_index` is the last.

    Attributes:
        size, padding_index, eos_index, fingerprint: those of the vocabulary of its tokens.
        unknown_index: the word that stands for all others; -1 if there are no others.
    """

    unknown_index: int

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.size: int = vocabulary.size
        self.fingerprint: str = vocabulary.fingerprint
        self.padding_index: int = vocabulary.padding_index
        self.eos_index: int = vocabulary.eos_index

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
        super().__init__(vocabulary)
        self.vocabulary = vocabulary

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
        self.vocabulary: WordVocabulary = WordVocabulary.read(dictionary)
        super().__init__(self.vocabulary)
        self.unknown_index: int = self.vocabulary.unknown_index
        if not codes.is_file():
            raise FileNotFoundError(f"there are no BPE codes at {codes}: prepare the data again")
        self.codes: Path = codes
        self.language: str = language

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
