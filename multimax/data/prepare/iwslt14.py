"""Turn the official IWSLT14 German-English archive into the folder that `data.root` names.

python -m multimax.data.prepare.iwslt14 de-en.tgz FOLDER

Does what fairseq's examples/translation/prepare-iwslt14.sh and fairseq-preprocess do: Moses
tokenization, pairs of 1-175 words a side with a length ratio of at most 1.5, lower case, every 23rd
pair for validation, joint BPE with 10,000 merges, and a dictionary for each language. Two things
can differ in rare lines: tokenization is by sacremoses, a Python port of the Perl script, and lower
case is Python's. The archive is part of the 2014-01 release of WIT3.
"""

import gzip
import io
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import IO, cast

from sacremoses import MosesTokenizer
from subword_nmt.learn_bpe import learn_bpe

from multimax.data.loading import SPLITS
from multimax.data.prepare import check_size, run_command_line
from multimax.data.vocabulary import WordVocabulary, read_codes

LANGUAGES = ("de", "en")
TESTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
MERGES = 10_000
MAX_WORDS, MAX_RATIO, MAX_CHARACTERS = 175, 1.5, 1000  # the last of a word: Moses' own limit
VALID_EVERY = 23
LARGEST = 2 * 10**8  # bytes of a file in the archive; the largest one has a tenth of that
LARGEST_READ = 2**24  # bytes at once: the headers of an archive can promise any size


def prepare(archive: Path, folder: Path, report: Callable[[str], None] = print) -> None:
    """Write `{train,valid,test}.{de,en}`, `code` and `dict.{de,en}.txt`, all or nothing.

    A language is read at a time and a line is held at a time, but for the counts of words.

    Args:
        archive: de-en.tgz.
        folder: where to write; it must not exist.
        report: receives a line for each part of the work.

    Raises:
        FileNotFoundError: there is no archive.
        ValueError: it is truncated, not the official one, or `folder` exists.
        OSError: a file cannot be written.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: give another folder, or delete it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        raw, done = work / "raw", work / "done"
        raw.mkdir()
        done.mkdir()
        for language in LANGUAGES:
            _tokenize(archive, language, raw)
            report(f"{language}: tokenized")
        _split(raw, report)
        _byte_pairs(raw, done, report)
        for language in LANGUAGES:
            size = _write_dictionary(done, language)
            report(f"dict.{language}.txt: {size:,} words, 4 special ones included")
        os.replace(done, folder)
    finally:
        shutil.rmtree(work)


def _tokenize(archive: Path, language: str, raw: Path) -> None:
    """Write the tokenized `tags.<language>`, and the tokenized `test.<language>` in lower case."""
    tokenizer = MosesTokenizer(lang=language)

    def tokenized(lines: Iterable[str]) -> Iterator[str]:
        return (str(tokenizer.tokenize(line, return_str=True)) for line in lines)

    train = f"train.tags.de-en.{language}"
    tests = [f"IWSLT14.{name}.de-en.{language}.xml" for name in TESTS]
    with _members(archive, [train, *tests]) as members:
        _write(raw / f"tags.{language}", tokenized(training_text(members(train))))
        for number, name in enumerate(tests):
            lines = (line.lower() for line in tokenized(segments(members(name))))
            _write(raw / f"test{number}.{language}", lines)


def training_text(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a file of training talks that hold text, without the tags around it."""
    for line in lines:
        if not any(tag in line for tag in ("<url>", "<talkid>", "<keywords>")):
            yield re.sub(r"</?(title|description)>", "", line)


def segments(lines: Iterable[str]) -> Iterator[str]:
    """The sentences of an XML file of test talks; its entities stay as they are."""
    for line in lines:
        if "<seg id" in line:
            line = re.sub(r'<seg id="[0-9]*">\s*', "", line)
            yield re.sub(r"\s*</seg>\s*", "", line).replace("’", "'")  # noqa: RUF001


def is_clean(german: str, english: str) -> bool:
    """Whether Moses' clean-corpus-n.perl keeps a pair of tokenized lines."""
    words = german.split(), english.split()
    shorter, longer = sorted(map(len, words))
    return (
        shorter >= 1
        and longer <= MAX_WORDS
        and longer / shorter <= MAX_RATIO
        and all(len(word) <= MAX_CHARACTERS for side in words for word in side)
    )


def _split(raw: Path, report: Callable[[str], None]) -> None:
    """Clean `tags` into `train` and `valid`, and join the parts of `test`."""
    total = kept = empty = 0
    sides = [{s: _create(raw / f"{s}.{x}") for s in ("train", "valid", "test")} for x in LANGUAGES]
    try:
        for pair in _parallel(raw, "tags"):
            total += 1
            empty += not all(side.strip() for side in pair)
            if is_clean(*pair):
                kept += 1
                split = "train" if kept % VALID_EVERY else "valid"
                for side, line in zip(sides, pair, strict=True):
                    side[split].write(" ".join(line.split()).lower() + "\n")
        report(f"{total:,} training pairs: {kept:,} kept, {total - kept:,} left out as empty "
               f"({empty:,}), too long or of too unequal lengths; every {VALID_EVERY}rd kept one "
               "is for validation")  # fmt: skip
        for number in range(len(TESTS)):
            for pair in _parallel(raw, f"test{number}"):
                for side, line in zip(sides, pair, strict=True):
                    side["test"].write(line + "\n")
    finally:
        for stream in chain.from_iterable(side.values() for side in sides):
            stream.close()


def _byte_pairs(raw: Path, done: Path, report: Callable[[str], None]) -> None:
    sides = [_read(raw / f"train.{language}") for language in LANGUAGES]
    with _create(done / "code") as codes, sides[0], sides[1]:
        learn_bpe(chain(*sides), codes, MERGES)
    byte_pairs = read_codes(done / "code")
    for split in SPLITS:
        count = 0
        for language in LANGUAGES:
            with _read(raw / f"{split}.{language}") as lines:
                count = _write(
                    done / f"{split}.{language}",
                    (byte_pairs.process_line(line.rstrip("\n")) for line in lines),
                )
        report(f"{split}: {count:,} pairs")


def _write_dictionary(done: Path, language: str) -> int:
    counts: Counter[str] = Counter()
    with _read(done / f"train.{language}") as lines:
        for line in lines:
            counts.update(line.split())
    words = WordVocabulary.count(counts)
    _write(done / f"dict.{language}.txt", (f"{word} {count}" for word, count in words))
    return WordVocabulary(word for word, _ in words).size


def _parallel(raw: Path, name: str) -> Iterator[tuple[str, str]]:
    with _read(raw / f"{name}.de") as german, _read(raw / f"{name}.en") as english:
        for number, (de, en) in enumerate(zip_longest(german, english), 1):
            if de is None or en is None:
                raise ValueError(
                    f"the German and the English {name.replace('tags', 'training talks')} of the "
                    f"archive have unequal numbers of lines (one ends at line {number - 1}): it is "
                    "not the official one, copy de-en.tgz again"
                )
            yield de.rstrip("\n"), en.rstrip("\n")


class _Bounded(gzip.GzipFile):
    """A gzip file of which no more than `LARGEST_READ` bytes are read at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_READ:
            raise tarfile.ReadError(f"a part of {size:,} bytes is more than it can have")
        return super().read(size)


@contextmanager
def _members(archive: Path, names: list[str]) -> Iterator[Callable[[str], Iterator[str]]]:
    """A function from the name of a file in the archive to its lines."""
    if not archive.is_file():
        raise FileNotFoundError(
            f"there is no {archive}: give the path of de-en.tgz, from texts/de/en of WIT3's "
            "2014-01 release"
        )
    try:
        with _Bounded(archive) as stream, tarfile.open(fileobj=stream) as opened:
            found = {Path(member.name).name: member for member in opened if member.isfile()}
            missing = [name for name in names if name not in found]
            if missing:
                raise ValueError(
                    f"{archive} has no {', '.join(missing)}: give de-en.tgz of the 2014-01 release"
                )

            for name in names:
                check_size(archive, name, found[name].size, LARGEST)

            def lines(name: str) -> Iterator[str]:
                content = cast(IO[bytes], opened.extractfile(found[name]))
                with io.TextIOWrapper(content, encoding="utf-8", newline="\n") as stream:
                    yield from (line.rstrip("\n") for line in stream)

            yield lines
    except (tarfile.ReadError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{archive} is truncated or damaged ({error}): copy it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"text in {archive} is not UTF-8 ({error}): copy it again") from error


def _write(path: Path, lines: Iterable[str]) -> int:
    """Write lines; returns how many."""
    count = 0
    with _create(path) as stream:
        for count, line in enumerate(lines, 1):  # noqa: B007
            stream.write(line + "\n")
    return count


# Only "\n" ends a line: a sentence may hold a "\r".
def _create(path: Path) -> IO[str]:
    return path.open("w", encoding="utf-8", newline="\n")


def _read(path: Path) -> IO[str]:
    return path.open(encoding="utf-8", newline="\n")


def main() -> None:
    """Run from the command line."""
    run_command_line(
        prepare,
        "Prepare IWSLT14 German-English for training.",
        "de-en.tgz of WIT3's 2014-01 release",
    )


if __name__ == "__main__":
    main()
