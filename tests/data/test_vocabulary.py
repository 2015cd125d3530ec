import os
import subprocess
import sys
from collections import Counter

import pytest

from multimax.data import vocabulary
from multimax.data.text.files import Wikipedia, read_lines
from multimax.data.vocabulary import BytePairVocabulary, WordVocabulary

LINES = ["The cat sat on the mat .", "", "the über-cat ate </s> the hat", " x  y\t<pad> "] * 8
STRANGE = [
    "plain words",
    "",
    "  two  spaces and a tab\t",
    "</s> <pad> <unk> <s>",
    "naïve 東京 😀 \u2028 \x85 \r",
    "\x00 \ufffd",
]


@pytest.fixture(scope="module")
def bpe():
    return BytePairVocabulary.train(LINES, 275)


@pytest.mark.parametrize("line", STRANGE)
def test_byte_pairs_have_every_text_exactly(bpe, line):
    tokens = bpe.encode_line(line)
    assert bpe.eos_index not in tokens
    assert bpe.padding_index not in tokens
    assert "".join(bpe.decode([*tokens, bpe.eos_index, *tokens])) == f"{line}\n{line}"
    assert bpe.encode_lines([line, "the cat"]) == [tokens, bpe.encode_line("the cat")]


def test_byte_pairs_are_learned(bpe):
    assert bpe.size == 275
    assert len(bpe.encode_line("the cat")) < len("the cat")
    assert len(BytePairVocabulary.train(LINES, 258).encode_line("the cat")) == len("the cat")


def test_decoding_holds_back_half_a_character(bpe):
    half = bpe.encode_line("a😀")[:-1]
    assert len(half) == 4
    assert list(bpe.decode(bpe.encode_line("a😀b"))) == ["a", "", "", "", "😀", "b", ""]
    assert list(bpe.decode(half)) == ["a", "", "", "", "\ufffd"]
    assert "".join(bpe.decode([*half, bpe.eos_index, *half[:1]])) == "a\ufffd\na"


# The module by its path, which spares the import of torch.
TRAIN = """
import gzip, importlib.util, sys
spec = importlib.util.spec_from_file_location("vocabulary", sys.argv[1])
spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
lines = gzip.decompress(open(sys.argv[2], "rb").read()).decode().split("\\n")[:-1]
print(module.BytePairVocabulary.train(lines, 600).fingerprint)
"""


@pytest.mark.slow
def test_the_same_text_gives_the_same_vocabulary_in_any_process():
    path = Wikipedia(1000, 64, 32).file("test")
    mine = BytePairVocabulary.train(read_lines(path), 600).fingerprint
    for threads in ("1", "4"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, vocabulary.__file__, str(path)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == mine, done.stderr
    assert BytePairVocabulary.train(LINES, 270).fingerprint != mine


def test_vocabulary_size_out_of_range():
    with pytest.raises(ValueError, match="vocabulary_size=257 must be a whole number >= 258"):
        BytePairVocabulary.train(LINES, 257)


def test_vocabulary_size_that_the_text_does_not_reach():
    with pytest.raises(ValueError, match=r"vocabulary_size=5000 .* use at most \d{3}$"):
        BytePairVocabulary.train(LINES, 5000)


def fairseq_dictionary(counts):
    """Symbols as `Dictionary.finalize` orders them, written out."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    rest = {word: count for word, count in counts.items() if word not in specials}
    symbols = specials + [word for word, _ in Counter(dict(sorted(rest.items()))).most_common()]
    number = 0
    while len(symbols) % 8:
        symbols.append(f"madeupword{number:04d}")
        number += 1
    return symbols


@pytest.mark.parametrize("number", [3, 4, 12, 29])
def test_words_are_numbered_as_in_fairseq(number):
    counts = Counter({f"w{i}": 1 + i % 3 for i in range(number)} | {"<unk>": 50, "</s>": 9, "Ü": 2})
    words = WordVocabulary(word for word, _ in WordVocabulary.count(counts))
    assert words.words == fairseq_dictionary(counts)
    assert words.size % 8 == 0
    assert (words.padding_index, words.eos_index, words.unknown_index) == (1, 2, 3)


def test_fillers_count_as_nothing_and_are_never_sampled():
    entries = WordVocabulary.count(Counter({"a": 2, "b": 1}))
    assert entries == [("a", 2), ("b", 1), ("madeupword0000", 0), ("madeupword0001", 0)]
    assert WordVocabulary([word for word, _ in entries]).never_sampled == [0, 3, 6, 7]


def test_words_to_numbers_and_back():
    words = WordVocabulary(["the", "cat", "."])
    tokens = words.encode(" the  dog .\n\nthe cat")
    assert tokens == [4, 3, 6, 2, 2, 4, 5]
    assert "".join(words.decode(tokens)) == "the <unk> .\n\nthe cat"
    assert words.encode("") == []


def test_read_is_the_inverse_of_fairseqs_format(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_bytes("the 10\n\x85é 3\nx 0\n".encode())
    words = WordVocabulary.read(path)
    assert words.words[4:] == ["the", "\x85é", "x"]
    assert words.fingerprint == WordVocabulary(["the", "\x85é", "x"]).fingerprint
    assert words.fingerprint != WordVocabulary(["\x85é", "the", "x"]).fingerprint


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"the 10\ncat\n", "line 2 is 'cat', not a word and its count"),
        (b"the ten\n", "line 1 is 'the ten'"),
        (b"the 3\ncat 2\nthe 1\n", "'the' is there 2 times"),
        (b"<unk> 3\n", "'<unk>' is there 2 times"),
        (b"\xff 1\n", "invalid start byte"),
    ],
)
def test_damaged_dictionary(tmp_path, content, problem):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"dict.txt is no vocabulary of words: .*{problem}.*anew"):
        WordVocabulary.read(path)


def test_missing_dictionary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dict\.txt"):
        WordVocabulary.read(tmp_path / "dict.txt")
