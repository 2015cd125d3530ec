import random
import resource
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest

from multimax.data.prepare import wikitext103 as prepare_wikitext103
from multimax.data.prepare.wikitext103 import MEMBERS, OFFICIAL, Sizes, prepare
from multimax.data.text import build_text_source

SPLITS = ("train", "valid", "test")
SIZES = dict(block_size=16, context_window=8)


def text_of(split):
    """A text of WikiText's form: a space around each line, empty lines, `<unk>`."""
    generator = random.Random(split)
    words = ["the", "of", "@-@", "<unk>", "=", "東京", "Ü", ",", *(f"w{i}" for i in range(20))]
    lines = [" ", " = Title = ", " "]
    for _ in range(40 if split == "train" else 12):
        lines += [" ".join(["", *generator.choices(words, k=generator.randint(1, 30)), ""])]
    return "".join(f"{line}\n" for line in lines)


TEXTS = {split: text_of(split) for split in SPLITS}
TOKENS = {split: len(text.split()) + text.count("\n") for split, text in TEXTS.items()}
WORDS = {word for word in TEXTS["train"].split() if word != "<unk>"}
EXPECTED = Sizes(**TOKENS, vocabulary=-(-(4 + len(WORDS)) // 8) * 8)


def write_archive(path, texts=TEXTS):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, text in texts.items():
            content = text if isinstance(text, bytes) else text.encode()
            archive.writestr(MEMBERS[split], content)
    return path


@pytest.fixture
def archive(tmp_path):
    return write_archive(tmp_path / "wikitext-103-v1.zip")


@pytest.fixture
def prepared(archive, tmp_path):
    prepare(archive, tmp_path / "prepared", EXPECTED, report=lambda line: None)
    return tmp_path / "prepared"


def test_what_is_prepared_is_the_text(prepared):
    data = build_text_source("wikitext103", root=prepared, **SIZES).load()
    assert data.sizes == data.words == TOKENS
    assert data.bytes == {split: len(text.encode()) for split, text in TEXTS.items()}
    assert data.vocabulary.size == EXPECTED.vocabulary
    for split, text in TEXTS.items():
        lines = [" ".join(line.split()) for line in text.split("\n")]
        seen = WORDS | {"<unk>"}
        lines = [" ".join(w if w in seen else "<unk>" for w in line.split()) for line in lines]
        assert "".join(data.vocabulary.decode(data.streams[split].tolist())) == "\n".join(lines)
    frequent = Counter(TEXTS["train"].split()).most_common()
    counts = [count for word, count in frequent if word != "<unk>"]
    written = [line.split() for line in (prepared / "dict.txt").read_text().splitlines()]
    assert [int(count) for _, count in written[: len(WORDS)]] == counts


def test_tokens_are_memory_mapped(prepared):
    data = build_text_source("wikitext103", root=prepared, **SIZES).load()
    for stream in data.streams.values():
        assert isinstance(stream, np.memmap)
        assert stream.dtype == np.int32
    batch = next(data.train_loader(2, 0, 1, "cpu", 0).batches(0))
    assert batch.inputs.shape == (2, 16)


def test_unpacked_folder_is_the_same(prepared, archive, tmp_path):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "unpacked")
    for place in ("unpacked", "unpacked/wikitext-103"):
        again = tmp_path / "again" / place
        prepare(tmp_path / place, again, EXPECTED, report=lambda line: None)
        for name in ("train.npy", "valid.npy", "test.npy", "dict.txt", "facts.json"):
            assert (again / name).read_bytes() == (prepared / name).read_bytes()


def test_only_the_vocabulary_is_needed_to_read_text(prepared):
    for split in SPLITS:
        (prepared / f"{split}.npy").unlink()
    vocabulary = build_text_source("wikitext103", root=prepared, **SIZES).vocabulary
    assert vocabulary.size == EXPECTED.vocabulary
    with pytest.raises(FileNotFoundError, match=r"train\.npy; prepare it with"):
        build_text_source("wikitext103", root=prepared, **SIZES).load()


def test_the_text_is_read_by_lines(archive, tmp_path, monkeypatch):
    longest = max(len(line) for text in TEXTS.values() for line in text.splitlines())
    seen = []
    original = prepare_wikitext103._lines

    def watched(*arguments):
        class Watched:
            def __enter__(self):
                self.context = original(*arguments)
                lines = self.context.__enter__()
                return (seen.append(len(line)) or line for line in lines)

            def __exit__(self, *error):
                return self.context.__exit__(*error)

        return Watched()

    monkeypatch.setattr(prepare_wikitext103, "_lines", watched)
    prepare(archive, tmp_path / "prepared", EXPECTED, report=lambda line: None)
    assert max(seen) == longest + 1
    assert sum(seen) == 2 * sum(len(text) for text in TEXTS.values())


@pytest.mark.parametrize("split", SPLITS)
def test_incomplete_text(tmp_path, split):
    short = TEXTS | {split: TEXTS[split][: len(TEXTS[split]) // 2]}
    archive = write_archive(tmp_path / "a.zip", short)
    problem = rf"{split} tokens, not {TOKENS[split]:,}: it is not the official"
    with pytest.raises(ValueError, match=problem):
        prepare(archive, tmp_path / "prepared", EXPECTED)
    assert not (tmp_path / "prepared").exists()


def test_another_vocabulary(archive, tmp_path):
    with pytest.raises(ValueError, match="words in the vocabulary, not 8:"):
        prepare(archive, tmp_path / "prepared", EXPECTED._replace(vocabulary=8))


def test_official_sizes():
    # As `fairseq-preprocess` reports them.
    assert OFFICIAL == (103_227_021, 217_646, 245_569, 267_744)


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_truncated_archive(archive, tmp_path, cut):
    archive.write_bytes(archive.read_bytes()[: int(cut * archive.stat().st_size)])
    with pytest.raises(ValueError, match=r"wikitext-103-v1\.zip is truncated or damaged"):
        prepare(archive, tmp_path / "prepared", EXPECTED)


def test_damaged_archive(archive, tmp_path):
    content = bytearray(archive.read_bytes())
    content[200] ^= 255
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        prepare(archive, tmp_path / "prepared", EXPECTED)


def test_a_file_that_unpacks_to_too_much_is_not_read(archive, tmp_path):
    with (
        zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb,
        bomb.open("wikitext-103/wiki.train.tokens", "w") as stream,
    ):
        for _ in range(1001):
            stream.write(bytes(10**6))
    assert archive.stat().st_size < 2 * 10**6
    message = r"wiki\.train\.tokens in .* would be 1,001,000,000 bytes, more than"
    with pytest.raises(ValueError, match=message):
        prepare(archive, tmp_path / "prepared", EXPECTED)
    assert not (tmp_path / "prepared").exists()


def test_text_that_is_not_utf8(tmp_path):
    archive = write_archive(tmp_path / "a.zip", TEXTS | {"test": b" caf\xe9 \n"})
    with pytest.raises(ValueError, match=r"wiki\.test\.tokens in .*a\.zip is not UTF-8"):
        prepare(archive, tmp_path / "prepared", EXPECTED)


def test_wrong_or_missing_archive(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no .*gone\.zip: give the path of wikitext-103-v1"
    ):
        prepare(tmp_path / "gone.zip", tmp_path, EXPECTED)
    raw = write_archive(tmp_path / "wikitext-103-raw-v1.zip", {})
    with pytest.raises(ValueError, match=r"no wikitext-103/wiki\.train\.tokens; this is the raw"):
        prepare(raw, tmp_path, EXPECTED)
    with pytest.raises(FileNotFoundError, match=r"no wiki\.train\.tokens in"):
        prepare(tmp_path, tmp_path, EXPECTED)


def test_preparing_anew_takes_the_facts_away_first(prepared, archive, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(prepare_wikitext103, "_write_tokens", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare(archive, prepared, EXPECTED, report=lambda line: None)
    with pytest.raises(FileNotFoundError, match=r"no .*facts\.json"):
        build_text_source("wikitext103", root=prepared, **SIZES).load()


def test_preparing_on_a_full_disk(archive, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(OSError, match=r"too large while writing .*train\.npy; .*Free some"):
            prepare(archive, tmp_path / "prepared", EXPECTED, report=lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["dict.txt"]
    prepare(archive, tmp_path / "prepared", EXPECTED, report=lambda line: None)


def test_the_fingerprint_is_of_the_tokens_wherever_they_are(prepared, archive, tmp_path):
    def fingerprint(root):
        return build_text_source("wikitext103", root=root, **SIZES).fingerprint

    before = fingerprint(prepared)
    assert fingerprint(prepared.rename(tmp_path / "moved")) == before
    swapped = TEXTS["valid"].replace("東京", "w1", 1)  # as many tokens, and as many words
    size = dict(TEXTS, valid=swapped)
    other = write_archive(tmp_path / "other.zip", size)
    prepare(other, tmp_path / "other", EXPECTED, report=lambda line: None)
    assert fingerprint(tmp_path / "other") != before


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_facts(prepared, content):
    (prepared / "facts.json").write_text(content)
    with pytest.raises(ValueError, match=r"facts\.json .*; prepare it with"):
        build_text_source("wikitext103", root=prepared, **SIZES).load()


def test_files_that_do_not_belong_together(prepared):
    path = prepared / "valid.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    with pytest.raises(ValueError, match=r"valid\.npy is truncated or damaged"):
        build_text_source("wikitext103", root=prepared, **SIZES).load()
    np.save(path, np.zeros(3, dtype=np.int32))
    with pytest.raises(ValueError, match=rf"valid\.npy has shape \(3,\), not \({TOKENS['valid']},"):
        build_text_source("wikitext103", root=prepared, **SIZES).load()
    path.write_bytes(content)
    first, second, *others = (prepared / "dict.txt").read_text().splitlines(keepends=True)
    (prepared / "dict.txt").write_text("".join([second, first, *others]))
    with pytest.raises(ValueError, match=r"dict\.txt is not the vocabulary .* was prepared with"):
        build_text_source("wikitext103", root=prepared, **SIZES).load()


def test_root_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root=null: .*prepare.wikitext103"):
        build_text_source("wikitext103", root=None, **SIZES).load()
    with pytest.raises(FileNotFoundError, match=r"facts\.json.*data\.root=FOLDER"):
        build_text_source("wikitext103", root=tmp_path, **SIZES).load()


def test_command_line(archive, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["prepare_wikitext103", str(archive), str(folder)])
    problem = f"^error: {archive} has {TOKENS['train']:,} train tokens, not 103,227,021"
    with pytest.raises(SystemExit, match=problem):
        prepare_wikitext103.main()
    assert not folder.exists()
    monkeypatch.setattr(prepare_wikitext103.prepare, "__defaults__", (EXPECTED, print))
    prepare_wikitext103.main()
    assert (
        build_text_source("wikitext103", root=folder, **SIZES).vocabulary.size
        == EXPECTED.vocabulary
    )
