"""Random sentence pairs in the place of those of a data set, which need not be there."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, cast

import numpy as np

from multimax.data.pairs.batches import Pairs, Sentences
from multimax.data.pairs.sources import Languages, Line, PairData, PairSource
from multimax.data.text.made import made_vocabulary
from multimax.data.vocabulary import FAIRSEQ_SPECIALS, PairVocabulary, WordVocabulary

SHAPE = 3.0  # of the gamma distribution of lengths: deviation by mean is 0.58
RATIO_SPREAD = 0.2  # deviation of the logarithm of target length by source length


class Stated(NamedTuple):
    """How large a data set is.

    Attributes:
        words: of each language, "de" and "en"; None is `data.vocabulary_size`.
        pairs: to train on.
        tokens: of them in each language, ends of sentence included.
    """

    words: Mapping[str, int] | None
    pairs: int
    tokens: Mapping[str, int]


# Sources: what `fairseq-preprocess` says of IWSLT14 with 10,000 merges; counted, with 4,000 words.
STATED = {
    "iwslt14": Stated({"de": 8_848, "en": 6_632}, 160_239, {"de": 4_035_591, "en": 3_949_114}),
    "libreoffice_help": Stated(None, 30_066, {"de": 659_419, "en": 592_610}),
}


class _Words(PairVocabulary):
    """Sentences of numbers."""

    def __init__(self, vocabulary: WordVocabulary) -> None:
        super().__init__(vocabulary)
        self.vocabulary = vocabulary
        self.unknown_index = vocabulary.unknown_index

    def line(self, text: str) -> str:
        return text

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        return [[*self.vocabulary.encode_line(line), self.eos_index] for line in lines]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(self.pieces(tokens))

    def plain(self, line: str) -> str:
        return line

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        return [self.vocabulary.words[token] for token in tokens]


class MadePairs(PairSource):
    """Pairs of random sentences, whose lengths have a gamma distribution.

    Args:
        name: of the data set, a key of `PAIR_DATA`.
        options: of it, as the configuration has them.
        evaluated: tokens of each evaluation split, a batch for every process.
        longest: tokens of the longest sentence.
    """

    def __init__(self, name: str, options: Mapping[str, Any], evaluated: int, longest: int) -> None:
        source, target = options.get("source", "de"), options.get("target", "en")
        super().__init__(source, target, longest)
        self.name = f"random sentences like {name}"
        stated = STATED[name]
        size = options.get("vocabulary_size", 4000)
        self.words = stated.words or {"de": size, "en": size}
        self.means = {side: tokens / stated.pairs for side, tokens in stated.tokens.items()}
        mean = max(self.means.values())
        few = max(1, int(evaluated / mean / 2))  # not all are of one length: padding comes to it
        self.pairs = {"train": stated.pairs, "valid": few, "test": few}

    @cached_property
    def languages(self) -> Languages:
        vocabularies = [
            _Words(made_vocabulary(self.words[side])) for side in (self.source, self.target)
        ]
        return Languages(self.source, self.target, *vocabularies)

    @cached_property
    def fingerprint(self) -> str:
        return "made"

    def read(self, split: str) -> Iterator[Line]:
        raise NotImplementedError("made sentences have no text")

    def load(self) -> PairData:
        data = PairData(self.name, self.languages, self.fingerprint, sizes=self.pairs)
        special = self.languages.target_vocabulary
        words = self.languages.source_vocabulary.size, special.size
        means = self.means[self.source], self.means[self.target]
        for split, count in self.pairs.items():
            source, target = _sentences(count, self.max_length, means, words)
            data.splits[split] = Pairs(source, target, special.padding_index, special.eos_index)
            if split != "train":
                lines = [special.decode(target[index].tolist()) for index in range(count)]
                data.references[split] = lines
        return data


@lru_cache(maxsize=4)  # the cells of a study share them
def _sentences(
    count: int, longest: int, means: tuple[float, float], words: tuple[int, int]
) -> tuple[Sentences, Sentences]:
    """Source and target sentences; lengths in [2, longest], the last token is the end."""
    generator = np.random.default_rng(0)
    source = generator.gamma(SHAPE, means[0] / SHAPE, count)
    target = source * means[1] / means[0] * generator.lognormal(0, RATIO_SPREAD, count)
    sides = []
    for lengths, size in zip((source, target), words, strict=True):
        ends = lengths.round().clip(2, longest).astype(np.int64).cumsum()
        tokens = generator.integers(len(FAIRSEQ_SPECIALS), size, ends[-1], dtype=np.int32)
        tokens[ends - 1] = WordVocabulary.eos_index
        sides.append(Sentences(cast(Any, np.split(tokens, ends[:-1]))))
    return sides[0], sides[1]
