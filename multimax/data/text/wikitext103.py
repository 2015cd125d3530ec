"""WikiText-103 by words as fairseq reads it, memory-mapped from a prepared folder."""

import json
from functools import cached_property
from pathlib import Path

import numpy as np

from multimax.data.loading import SPLITS
from multimax.data.text.blocks import TextData
from multimax.data.text.source import TextSource
from multimax.data.vocabulary import WordVocabulary
from multimax.files import digest
from multimax.options import Count, Whole, checked

FORMAT = 1
VOCABULARY, FACTS = "dict.txt", "facts.json"
PREPARE = (
    "prepare it with `python -m multimax.data.prepare.wikitext103 wikitext-103-v1.zip FOLDER` and "
    "give data.root=FOLDER"
)


class WikiText103(TextSource):
    """WikiText-103, 103 million tokens for training and a vocabulary of 267,744 words.

    Args:
        root: what `python -m multimax.data.prepare.wikitext103` wrote.
        block_size, context_window: as in `TextSource`.

    Source: Merity et al., Pointer Sentinel Mixture Models, ICLR 2017.
    """

    @checked
    def __init__(self, root: str | Path | None, block_size: Count, context_window: Whole) -> None:
        super().__init__(block_size, context_window)
        if root is None:
            raise ValueError(f"data.root=null: WikiText-103 must be prepared first; {PREPARE}")
        self.root: Path = Path(root)

    @cached_property
    def _facts(self) -> dict:
        path = self.root / FACTS
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}, as a prepared folder has; {PREPARE}")
        try:
            facts = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); {PREPARE}") from error
        if not isinstance(facts, dict):
            raise ValueError(f"{path} holds no facts; {PREPARE}")
        if facts.get("format") != FORMAT:
            raise ValueError(f"{path} has format {facts.get('format')}, not {FORMAT}; {PREPARE}")
        return facts

    @cached_property
    def fingerprint(self) -> str:
        """Of the facts: numbers of tokens and bytes, the vocabulary, and digests of the tokens."""
        return digest(json.dumps(self._facts, sort_keys=True))

    @cached_property
    def vocabulary(self) -> WordVocabulary:
        expected, path = self._facts["vocabulary"], self.root / VOCABULARY
        vocabulary = WordVocabulary.read(path)
        if vocabulary.fingerprint != expected:
            raise ValueError(
                f"{path} is not the vocabulary that the data was prepared with; {PREPARE}"
            )
        return vocabulary

    def load(self) -> TextData:
        tokens = self._facts["tokens"]
        return TextData(
            "wikitext103",
            self.vocabulary,
            self.block_size,
            self.context_window,
            {split: self._stream(split, tokens[split]) for split in SPLITS},
            words=tokens,  # every word is a token, and so is every line end
            bytes=self._facts["bytes"],
            fingerprint=self.fingerprint,
        )

    def _stream(self, split: str, tokens: int) -> np.ndarray:
        path = self.root / f"{split}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}; {PREPARE}")
        try:
            stream = np.load(path, mmap_mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is truncated or damaged ({error}); {PREPARE}") from error
        if stream.shape != (tokens,):
            raise ValueError(f"{path} has shape {stream.shape}, not ({tokens},); {PREPARE}")
        return stream
