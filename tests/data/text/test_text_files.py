import gzip
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers import Tokenizer

from multimax.data.text import TEXT_DATA, build_text_source
from multimax.data.text import files as text_files
from multimax.data.vocabulary import BytePairVocabulary

SPLITS = ("train", "valid", "test")
SMALL = dict(vocabulary_size=280, block_size=8, context_window=4)
TEXT = "= The cat =\nThe cat sat on the mat, and the cat ate the hat.\n\nA naïve 東京 cat\n" * 4


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.txt").write_bytes(TEXT.encode())
    return folder


def build(folder, tmp_path, **options):
    return build_text_source(
        "text_files", root=folder, cache=str(tmp_path), **SMALL | options
    ).load()


@pytest.mark.slow
def test_the_embedded_text(tmp_path):
    options = dict(vocabulary_size=1000, block_size=64, context_window=32, cache=str(tmp_path))
    data = build_text_source("wikipedia", **options).load()
    # Words between white space and line ends, counted with `wc`.
    lines = {"train": 5787, "valid": 603, "test": 413}
    words = {"train": 338_725, "valid": 35_551, "test": 33_530}
    assert data.words == {split: lines[split] + words[split] for split in SPLITS}
    assert data.bytes == {"train": 2_135_866, "valid": 226_776, "test": 211_121}
    for split, stream in data.streams.items():
        assert (stream == data.vocabulary.eos_index).sum() == lines[split]
        assert stream.max() < data.vocabulary.size == 1000
        decoded = "".join(data.vocabulary.decode(stream[:20_000].tolist()))
        path = text_files.Wikipedia(**options).file(split)
        assert gzip.decompress(path.read_bytes()).decode().startswith(decoded)
    assert (
        build_text_source("wikipedia", **options).vocabulary.fingerprint
        == data.vocabulary.fingerprint
    )


@pytest.mark.parametrize("ending", ["\n", ""])
def test_files_are_counted_exactly(folder, tmp_path, ending):
    text = "one two\n\n three\t\u2028four"
    (folder / "valid.txt").write_bytes((text + ending).encode())
    data = build(folder, tmp_path, block_size=5)
    assert data.name == "text"
    assert "".join(data.vocabulary.decode(data.streams["valid"].tolist())) == text + "\n"
    assert data.words["valid"] == 4 + 3
    assert data.bytes["valid"] == len(text.encode()) + 1


def test_gzipped_files_are_the_same(folder, tmp_path):
    plain = build(folder, tmp_path)
    for split in SPLITS:
        path = folder / f"{split}.txt"
        (folder / f"{split}.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = build(folder, tmp_path)
    for split in SPLITS:
        assert np.array_equal(packed.streams[split], plain.streams[split])


def test_only_the_training_text_shapes_the_vocabulary(folder, tmp_path):
    before = build(folder, tmp_path).vocabulary.fingerprint
    (folder / "test.txt").write_text("quite other words in another order\n" * 9)
    assert build(folder, tmp_path).vocabulary.fingerprint == before
    (folder / "train.txt").write_text("quite other words in another order, which are many\n" * 9)
    assert build(folder, tmp_path, vocabulary_size=270).vocabulary.fingerprint != before


def test_the_vocabulary_is_trained_once(folder, tmp_path, monkeypatch):
    first = build(folder, tmp_path)
    (kept,) = tmp_path.glob("bpe-280-*.json")
    assert Tokenizer.from_file(str(kept)).get_vocab_size() == 280
    monkeypatch.setattr(BytePairVocabulary, "train", None)
    again = build(folder, tmp_path)
    assert again.vocabulary.fingerprint == first.vocabulary.fingerprint
    strange = "</s> naïve 東京\r"
    assert again.vocabulary.encode_line(strange) == first.vocabulary.encode_line(strange)
    with pytest.raises(TypeError):  # another size is another vocabulary
        build(folder, tmp_path, vocabulary_size=279)


def test_many_may_train_the_vocabulary_at_once(folder, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: build(folder, tmp_path).vocabulary.fingerprint, range(8)))
    assert len(set(found)) == 1
    assert len(list(tmp_path.glob("*"))) == 2  # the text and one vocabulary, nothing half written


def test_damaged_cache(folder, tmp_path):
    build(folder, tmp_path)
    (kept,) = tmp_path.glob("bpe-280-*.json")
    kept.write_text(kept.read_text()[:500])
    with pytest.raises(ValueError, match=rf"{kept.name} is no vocabulary .*: delete it"):
        build(folder, tmp_path)


def test_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"set data\.cache"):
        build(folder, tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n\n\t\n", "is empty"),
        ("caf\xe9".encode("latin1"), r"not UTF-8 \(byte 3 is 0xe9\).*iconv"),
    ],
)
def test_text_that_is_none(folder, tmp_path, content, problem):
    (folder / "valid.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"valid\.txt {problem}|valid\.txt is {problem}"):
        build(folder, tmp_path)


def test_a_gzip_bomb_is_refused(folder, tmp_path):
    (folder / "test.txt").unlink()
    (folder / "test.txt.gz").write_bytes(gzip.compress(bytes(5 * 2**20)))
    with pytest.raises(ValueError, match=r"test\.txt\.gz would be more than 1,[\d,]+ bytes, of 5,"):
        build(folder, tmp_path)


@pytest.mark.parametrize("change", [lambda b: b[:-9], lambda b: b"PK" + b[2:]])
def test_damaged_archive(folder, tmp_path, change):
    (folder / "test.txt").unlink()
    (folder / "test.txt.gz").write_bytes(change(gzip.compress(TEXT.encode())))
    with pytest.raises(ValueError, match=r"test\.txt\.gz is truncated or damaged"):
        build(folder, tmp_path)


def test_missing_files(folder, tmp_path):
    (folder / "valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.txt and no valid\.txt\.gz"):
        build(folder, tmp_path)
    with pytest.raises(ValueError, match=r"data\.root=null"):
        build(None, tmp_path)


def test_names_and_options_that_do_not_exist():
    with pytest.raises(ValueError, match=f"unknown text data .* known: {', '.join(TEXT_DATA)}"):
        build_text_source("wikitext2")
    with pytest.raises(ValueError, match="no option root; it has: vocabulary_size, block_size"):
        build_text_source("wikipedia", root="x", **SMALL)
