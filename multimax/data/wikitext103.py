"""WikiText-103 by words as fairseq reads it, memory-mapped from a prepared folder."""

import json
from pathlib import Path

import numpy as np

from multimax.data.text_data import SPLITS, TextData
from multimax.data.vocabulary import WordVocabulary

FORMAT = 1
VOCABULARY, FACTS = "dict.txt", "facts.json"
PREPARE = (
    "prepare it with `python -m multimax.data.prepare_wikitext103 wikitext-103-v1.zip FOLDER` and "
    "give data.root=FOLDER"
)


def wikitext103(root: str | Path | None, block_size: int, context_window: int) -> TextData:
    """WikiText-103, 103 million tokens for training and a vocabulary of 267,744 words.

    Args:
        root: what `multimax.data.prepare_wikitext103` wrote.
        block_size, context_window: as in `TextData`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not belong to the others, or an option is out of range.

    Source: Merity et al., Pointer Sentinel Mixture Models, ICLR 2017.
    """
    facts = _facts(root)
    vocabulary = wikitext103_vocabulary(root)
    streams = {split: _stream(Path(str(root)), split, facts["tokens"][split]) for split in SPLITS}
    return TextData(
        "wikitext103",
        vocabulary,
        block_size,
        context_window,
        streams,
        # Every word is a token, and so is every line end.
        words=facts["tokens"],
        bytes=facts["bytes"],
    )


def wikitext103_vocabulary(root: str | Path | None) -> WordVocabulary:
    """The vocabulary of `wikitext103`, arguments and errors as there."""
    facts = _facts(root)
    path = Path(str(root)) / VOCABULARY
    vocabulary = WordVocabulary.read(path)
    if vocabulary.fingerprint != facts["vocabulary"]:
        raise ValueError(f"{path} is not the vocabulary that the data was prepared with; {PREPARE}")
    return vocabulary


def _facts(root: str | Path | None) -> dict:
    if root is None:
        raise ValueError(f"data.root=null: WikiText-103 must be prepared first; {PREPARE}")
    path = Path(root) / FACTS
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, as a prepared folder has; {PREPARE}")
    facts = json.loads(path.read_text())
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path} has format {facts.get('format')}, not {FORMAT}; {PREPARE}")
    return facts


def _stream(root: Path, split: str, tokens: int) -> np.ndarray:
    path = root / f"{split}.npy"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; {PREPARE}")
    try:
        stream = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); {PREPARE}") from error
    if stream.shape != (tokens,):
        raise ValueError(f"{path} has shape {stream.shape}, not ({tokens},); {PREPARE}")
    return stream
