"""Vocabularies of every kind come back from their files as they were."""

from types import SimpleNamespace

import pytest

from multimax.data.pairs.sources import Languages
from multimax.data.vocabulary import (
    BytePairs,
    BytePairVocabulary,
    MosesSubwords,
    WordVocabulary,
)
from multimax.hub.vocabulary import load_vocabulary, save_vocabulary

LINES = ["the cat sat on the mat", "the dog ate the hat of the cat", "ein Haus, das naïve 東京"]


@pytest.fixture(scope="module")
def byte_pairs():
    return BytePairVocabulary.train(LINES, 268)


@pytest.fixture
def moses(tmp_path):
    """Dictionaries and codes as multimax.data.prepare.iwslt14 writes them."""
    source = tmp_path / "prepared"
    source.mkdir()
    (source / "code").write_text("#version: 0.2\nt h\nth e</w>\nc a\n")
    (source / "dict.de.txt").write_text("der@@ 9\nHund 4\nk 2\n")
    (source / "dict.en.txt").write_text("the 8\nca@@ 3\nt 3\nmadeupword0000 0\n")
    sides = (MosesSubwords(source / f"dict.{n}.txt", source / "code", n) for n in ("de", "en"))
    return Languages("de", "en", *sides)


def back(vocabulary, folder):
    folder.mkdir(exist_ok=True)
    return load_vocabulary(save_vocabulary(vocabulary, folder), folder)


def test_byte_pairs(byte_pairs, tmp_path):
    again = back(byte_pairs, tmp_path / "a")
    assert again.fingerprint == byte_pairs.fingerprint
    assert [again.encode(line) for line in LINES] == [byte_pairs.encode(line) for line in LINES]


def test_words_with_any_character_but_spaces(tmp_path):
    words = WordVocabulary(["the", "a\u2028b", "\r", "naïve", "madeupword0000"])
    again = back(words, tmp_path / "a")
    assert again.words == words.words
    assert (again.fingerprint, again.never_sampled) == (words.fingerprint, words.never_sampled)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["dict.txt"]


def test_byte_pairs_of_two_languages(byte_pairs, tmp_path):
    both = BytePairs(byte_pairs)
    again = back(Languages("en", "de", both, both), tmp_path / "a")
    assert again.fingerprint == Languages("en", "de", both, both).fingerprint
    assert again.source_vocabulary is again.target_vocabulary
    assert again.target_vocabulary.encode(LINES) == both.encode(LINES)


def test_moses_subwords(moses, tmp_path):
    again = back(moses, tmp_path / "a")
    assert again.fingerprint == moses.fingerprint
    for side in ("source_vocabulary", "target_vocabulary"):
        ours, theirs = getattr(again, side), getattr(moses, side)
        line = theirs.line("The cat's Hund")
        assert ours.line("The cat's Hund") == line
        assert ours.encode([line]) == theirs.encode([line])
        assert ours.plain(line) == theirs.plain(line)


@pytest.mark.parametrize("name", ["dict.de.txt", "dict.en.txt", "code"])
def test_a_missing_file_is_named(moses, tmp_path, name):
    described = save_vocabulary(moses, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_vocabulary(described, tmp_path)


def test_what_is_another_vocabulary_or_none(moses, byte_pairs, tmp_path):
    described = save_vocabulary(moses, tmp_path)
    (tmp_path / "dict.de.txt").write_text("der@@ 9\nHand 4\nk 2\n")
    with pytest.raises(ValueError, match="is not the one that the model was trained with"):
        load_vocabulary(described, tmp_path)
    del described["target"]
    with pytest.raises(ValueError, match=r"vocabulary in .*config\.json lacks 'target'"):
        load_vocabulary(described, tmp_path)
    with pytest.raises(ValueError, match="a vocabulary of SimpleNamespace cannot be published"):
        save_vocabulary(SimpleNamespace(fingerprint="0"), tmp_path)
