"""The translation data sets: their files, and their sentences as numbers."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from multimax.data.loading import SPLITS, LoadedData, embedded_file, unzipped
from multimax.data.pairs.batches import Pairs, Sentences, TokenEvalLoader, TokenTrainLoader
from multimax.data.text.files import byte_pairs
from multimax.data.vocabulary import BytePairs, BytePairSize, MosesSubwords, PairVocabulary
from multimax.files import digest_parts
from multimax.options import checked

CHUNK = 2_000  # lines that are held as text at a time
MAX_EQUAL = 0.5  # share of pairs whose two sides are the same; there are none in the embedded data
MAX_UNKNOWN = 0.05  # share of unknown words; with a joint BPE only rare characters are unknown

Line = tuple[str, str]  # source and target
Language = Literal["de", "en"]
LongestPair = Annotated[int, Field(ge=2)]


@dataclass(frozen=True)
class Languages:
    """What a model reads and writes.

    Attributes:
        source: such as "de".
        target: such as "en".
        source_vocabulary: its words.
        target_vocabulary: its words; it can be the same one.
    """

    source: str
    target: str
    source_vocabulary: PairVocabulary
    target_vocabulary: PairVocabulary

    @property
    def fingerprint(self) -> str:
        """Tells languages and vocabularies apart."""
        return (
            f"{self.source} {self.source_vocabulary.fingerprint} - "
            f"{self.target} {self.target_vocabulary.fingerprint}"
        )


@dataclass
class PairData(LoadedData):
    """A translation data set in numbers; its batch sizes are in tokens of the longer side.

    Attributes:
        name, sizes: as in `LoadedData`.
        languages: of source and target.
        fingerprint: as in `LoadedData`.
        splits: "train", "valid" and "test".
        references: target lines of "valid" and "test".
        left_out: how many pairs of a split were left out, by reason.
    """

    name: str
    languages: Languages
    fingerprint: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    splits: dict[str, Pairs] = field(default_factory=dict)
    references: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    def make_train_loader(self, *arguments: Any) -> TokenTrainLoader:
        return TokenTrainLoader(self.splits["train"], *arguments)

    def make_eval_loader(self, split: str, *arguments: Any) -> TokenEvalLoader:
        return TokenEvalLoader(self.splits[split], *arguments)


class PairSource(ABC):
    """The files of a translation data set.

    Args:
        source: language to translate from, "de" or "en".
        target: the other one.
        max_length: training pairs with more tokens on a side, its end included, are left out.

    Raises:
        ValueError: an option is out of range.
    """

    name: str

    @checked
    def __init__(self, source: Language, target: Language, max_length: LongestPair) -> None:
        if source == target:
            raise ValueError(
                f"data.source={source} and data.target={target} must be de and en, or en and de"
            )
        self.source = source
        self.target = target
        self.max_length: int = max_length

    @cached_property
    @abstractmethod
    def languages(self) -> Languages:
        """The vocabularies, without the sentences.

        Raises:
            FileNotFoundError, ValueError: as `load`.
        """

    @abstractmethod
    def read(self, split: str) -> Iterator[Line]:
        """The lines of a split."""

    @cached_property
    def fingerprint(self) -> str:
        """Of the lines of all splits; see `LoadedData`."""
        return digest_parts(
            part for split in SPLITS for line in [(split, ""), *self.read(split)] for part in line
        )

    def load(self) -> PairData:
        """Read and encode everything.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or not what it should be.
        """
        data = PairData(self.name, self.languages, self.fingerprint)
        for split in SPLITS:
            self._load(split, data)
        return data

    def _load(self, split: str, data: PairData) -> None:
        limit = self.max_length if split == "train" else None
        sources, targets, references = [], [], []
        left_out, pairs, equal, words, unknown = Counter(), 0, 0, 0, 0
        source, target = self.languages.source_vocabulary, self.languages.target_vocabulary
        lines = self.read(split)
        while chunk := list(islice(lines, CHUNK)):
            kept = [line for line in chunk if line[0].strip() and line[1].strip()]
            left_out["with an empty side"] += len(chunk) - len(kept)
            pairs += len(kept)
            equal += sum(line[0] == line[1] for line in kept)
            source_tokens = source.encode([line[0] for line in kept])
            target_tokens = target.encode([line[1] for line in kept])
            for tokens in (*source_tokens, *target_tokens):
                words, unknown = words + len(tokens), unknown + tokens.count(source.unknown_index)
            for line, *both in zip(kept, source_tokens, target_tokens, strict=True):
                if limit and max(map(len, both)) > limit:
                    left_out[f"longer than {limit} tokens"] += 1
                    continue
                # Python's integers would be nine times as large.
                sources.append(np.array(both[0], dtype=np.int32))
                targets.append(np.array(both[1], dtype=np.int32))
                if split != "train":
                    references.append(line[1])
        self._check(split, len(sources), equal / max(pairs, 1), unknown / max(words, 1))
        data.sizes[split] = len(sources)
        data.splits[split] = Pairs(
            Sentences(sources), Sentences(targets), target.padding_index, target.eos_index
        )
        data.left_out[split] = {reason: count for reason, count in left_out.items() if count}
        if split != "train":
            data.references[split] = references

    def _check(self, split: str, pairs: int, equal: float, unknown: float) -> None:
        where = f"{split} split of {self.name}"
        if not pairs:
            raise ValueError(
                f"the {where} has no sentence pairs (data.max_length={self.max_length})"
            )
        if equal > MAX_EQUAL:
            raise ValueError(
                f"source equals target in {equal:.0%} of the {where}: both sides are in one "
                "language; prepare the data again"
            )
        if unknown > MAX_UNKNOWN:
            raise ValueError(
                f"{unknown:.0%} of the words in the {where} are not in its dictionaries: text and "
                "dictionaries were not tokenized and BPE-split alike; prepare the data again"
            )


class LibreOfficeHelp(PairSource):
    """Sentences of LibreOffice's help pages, embedded in the package, with a joint byte-level BPE.

    Args:
        source, target, max_length: as in `PairSource`.
        vocabulary_size: words of the BPE, which is trained on both sides of the training split.
        cache: the folder that keeps the BPE; None is ~/.cache/multimax.

    Raises:
        ValueError: an option is out of range.
    """

    name = "libreoffice_help"

    @checked
    def __init__(
        self,
        source: Language = "de",
        target: Language = "en",
        max_length: LongestPair = 128,
        vocabulary_size: BytePairSize = 4000,
        cache: str | None = None,
    ) -> None:
        super().__init__(source, target, max_length)
        self.vocabulary_size: int = vocabulary_size
        self.cache: str | None = cache

    @cached_property
    def languages(self) -> Languages:
        # In the order of the file, so that both directions have one BPE.
        lines = [f" {side}" for pair in self._columns("train") for side in pair]
        vocabulary = BytePairs(byte_pairs(lines, self.vocabulary_size, self.cache))
        return Languages(self.source, self.target, vocabulary, vocabulary)

    def read(self, split: str) -> Iterator[Line]:
        for german, english in self._columns(split):
            yield (german, english) if self.source == "de" else (english, german)

    def _columns(self, split: str) -> Iterator[Line]:
        file = embedded_file(self.name, f"libreoffice_help.de-en.{split}.tsv.gz")
        for line in unzipped(file).decode().rstrip("\n").split("\n"):
            german, english = line.split("\t")
            yield german, english


class Iwslt14(PairSource):
    """IWSLT14 German-English in a folder that multimax.data.prepare.iwslt14 made.

    Args:
        root: the folder, with `<split>.<language>`, `dict.<language>.txt` and `code`.
        source, target, max_length: as in `PairSource`; the script has already limited the length.

    Raises:
        FileNotFoundError: `root` is None or not a folder.
        ValueError: an option is out of range.
    """

    name = "iwslt14"

    @checked
    def __init__(
        self,
        root: str | None = None,
        source: Language = "de",
        target: Language = "en",
        max_length: LongestPair = 1024,
    ) -> None:
        super().__init__(source, target, max_length)
        remedy = (
            "python -m multimax.data.prepare.iwslt14 de-en.tgz FOLDER makes one from the archive"
        )
        if root is None:
            raise FileNotFoundError(f"data.root=null must be the folder of IWSLT14: {remedy}")
        self.root: Path = Path(root).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root={root} is not a folder: {remedy}")

    @cached_property
    def languages(self) -> Languages:
        vocabularies = [
            MosesSubwords(self.root / f"dict.{language}.txt", self.root / "code", language)
            for language in (self.source, self.target)
        ]
        return Languages(self.source, self.target, *vocabularies)

    def read(self, split: str) -> Iterator[Line]:
        files = [self.root / f"{split}.{language}" for language in (self.source, self.target)]
        for number, (source, target) in enumerate(zip_longest(*map(_lines, files)), 1):
            if source is None or target is None:
                short, long = files if source is None else reversed(files)
                raise ValueError(
                    f"{short} ends at line {number - 1}, {long} goes on: the lines of both must be "
                    "translations of each other; prepare the data again"
                )
            yield source, target


def _lines(file: Path) -> Iterator[str]:
    try:
        # Only "\n" ends a line: a sentence may hold a "\r".
        with file.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                yield line.rstrip("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {file}: prepare the data again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): prepare the data again") from error
