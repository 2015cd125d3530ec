"""Turn the official WikiText-103 archive into memory-mapped tokens, a line at a time.

python -m multimax.data.prepare.wikitext103 wikitext-103-v1.zip FOLDER
"""

import hashlib
import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from multimax.data.loading import SPLITS
from multimax.data.prepare import check_size, run_command_line
from multimax.data.text.wikitext103 import FACTS, FORMAT, VOCABULARY
from multimax.data.vocabulary import WordVocabulary
from multimax.files import write_atomically, write_json

MEMBERS = {split: f"wikitext-103/wiki.{split}.tokens" for split in SPLITS}


class Sizes(NamedTuple):
    """Tokens of each split, line ends included, and of the vocabulary."""

    train: int
    valid: int
    test: int
    vocabulary: int


LARGEST = 10**9  # bytes of a file in the archive; the largest one has half of that
OFFICIAL = Sizes(train=103_227_021, valid=217_646, test=245_569, vocabulary=267_744)


def prepare(
    archive: Path, folder: Path, expected: Sizes = OFFICIAL, report: Callable[[str], None] = print
) -> None:
    """Write `train.npy`, `valid.npy`, `test.npy` (int32), `dict.txt` and, last, `facts.json`.

    Words, their order and the line ends are those of `fairseq-preprocess --only-source`; `dict.txt`
    is its dictionary. The text is read twice, the first time to count its words.

    Args:
        archive: wikitext-103-v1.zip, or a folder with what it unpacks to.
        folder: where to write.
        expected: sizes that must come out.
        report: receives a line for each part of the work.

    Raises:
        FileNotFoundError: the archive or a file of it is missing.
        ValueError: it is truncated, damaged, not UTF-8, or has other sizes.
        OSError: a file cannot be written.
    """
    facts = {"format": FORMAT, "tokens": {}, "bytes": {}, "digests": {}}
    counts: Counter[str] = Counter()
    for split in SPLITS:
        tokens = size = 0
        with _lines(archive, split) as lines:
            for line in lines:
                words = line.split()
                tokens += len(words) + 1
                size += len(line.encode())
                if split == "train":
                    counts.update(words)
        _check(archive, f"{split} tokens", tokens, getattr(expected, split))
        facts["tokens"][split], facts["bytes"][split] = tokens, size
        report(f"{split}: {tokens:,} tokens, {size:,} bytes")
    entries = WordVocabulary.count(counts)
    vocabulary = WordVocabulary(word for word, _ in entries)
    _check(archive, "words in the vocabulary", vocabulary.size, expected.vocabulary)
    text = "".join(f"{word} {count}\n" for word, count in entries)
    # Without its facts, a folder that is only half rewritten is not taken for a whole one.
    (folder / FACTS).unlink(missing_ok=True)
    write_atomically(folder / VOCABULARY, lambda stream: stream.write(text.encode()))
    for split in SPLITS:
        path = folder / f"{split}.npy"
        tokens = facts["tokens"][split]
        facts["digests"][split] = _write_tokens(archive, path, split, vocabulary, tokens)
        report(f"{path} written")
    write_json(folder / FACTS, facts | {"vocabulary": vocabulary.fingerprint})


def _write_tokens(
    archive: Path, path: Path, split: str, vocabulary: WordVocabulary, tokens: int
) -> str:
    """Write the tokens of a split, of which a line is in memory at a time; their digest."""
    total = hashlib.sha256()
    header = {"descr": "<i4", "fortran_order": False, "shape": (tokens,)}

    def write(stream: BinaryIO) -> None:
        np.lib.format.write_array_header_1_0(stream, header)
        with _lines(archive, split) as lines:
            for line in lines:
                ids = [*vocabulary.encode_line(line), vocabulary.eos_index]
                content = np.array(ids, dtype="<i4").tobytes()
                total.update(content)
                stream.write(content)

    # Not a memory map: on a full disk, that one kills the process without a word.
    write_atomically(path, write, "Free some space and prepare the data again")
    return total.hexdigest()[:16]


@contextmanager
def _lines(archive: Path, split: str) -> Iterator[Iterator[str]]:
    """The lines of a split, each with its end."""
    member = MEMBERS[split]
    try:
        if archive.is_dir():
            places = [archive / member, archive / Path(member).name]
            place = next((place for place in places if place.is_file()), None)
            if place is None:
                name = places[1].name
                raise FileNotFoundError(f"there is no {name} in {archive}{_hint(archive)}")
            with place.open(encoding="utf-8") as lines:
                yield lines
            return
        if not archive.is_file():
            raise FileNotFoundError(f"there is no {archive}: give the path of wikitext-103-v1.zip")
        with zipfile.ZipFile(archive) as opened:
            if member not in opened.namelist():
                raise ValueError(f"{archive} has no {member}{_hint(archive)}")
            check_size(archive, member, opened.getinfo(member).file_size, LARGEST)
            with opened.open(member) as raw, io.TextIOWrapper(raw, encoding="utf-8") as lines:
                yield lines
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} is truncated or damaged ({error}): copy it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{member} in {archive} is not UTF-8 ({error}): copy it again") from error


def _hint(archive: Path) -> str:
    raw = "; this is the raw text, which has other words" if "raw" in archive.name else ""
    return f"{raw}: give wikitext-103-v1.zip or what it unpacks to"


def _check(archive: Path, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"{archive} has {found:,} {what}, not {expected:,}: it is not the official "
            "WikiText-103, or not all of it; copy wikitext-103-v1.zip again"
        )


def main() -> None:
    """Run from the command line."""
    run_command_line(
        prepare, "Prepare WikiText-103 for training.", "wikitext-103-v1.zip, or its unpacked folder"
    )


if __name__ == "__main__":
    main()
