"""The embedded data sets next to what is said of them."""

import gzip
import re
from collections import Counter, defaultdict
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from multimax.data import loading
from multimax.data.images import build_image_data
from multimax.data.pairs import build_pair_source
from multimax.data.text import build_text_source

EMBEDDED = resources.files("multimax.data") / "embedded"
CONFIGS = Path(__file__).parents[2] / "configs" / "data"
EVALUATION = ("valid", "test")
SPLITS = ("train", *EVALUATION)
README = (EMBEDDED / "README.md").read_text(encoding="utf-8")


def text(name):
    return gzip.decompress((EMBEDDED / f"{name}.gz").read_bytes()).decode()


def first_line(config):
    return (CONFIGS / f"{config}.yaml").read_text(encoding="utf-8").partition("\n")[0]


@pytest.fixture(scope="module")
def pairs():
    """(German, English) lines by split."""
    files = {split: text(f"libreoffice_help.de-en.{split}.tsv") for split in SPLITS}
    return {
        split: [tuple(line.split("\t")) for line in file.removesuffix("\n").split("\n")]
        for split, file in files.items()
    }


def test_images():
    with np.load(str(EMBEDDED / "fashion_mnist_10k.npz")) as arrays:
        found = {name: arrays[name] for name in arrays}
    counts = {"train": 8000, "test": 2000}
    assert set(found) == {f"{split}_{kind}" for split in counts for kind in ("images", "labels")}
    for split, count in counts.items():
        assert found[f"{split}_images"].shape == (count, 28, 28)
        assert np.bincount(found[f"{split}_labels"]).tolist() == [count // 10] * 10
        assert f"`{split}_images` ({count}, 28, 28)" in README
        assert f"`{split}_labels` ({count},)" in README
        assert f"{count:,} {'training' if split == 'train' else split}" in first_line(
            "fashion_mnist_subset"
        )
    images = [*found["train_images"], *found["test_images"]]
    assert len({image.tobytes() for image in images}) == len(images)


def test_articles():
    articles, words = {}, {}
    for split in SPLITS:
        content = text(f"wikipedia_en.{split}.txt")
        articles[split] = [article.partition("\n")[0] for article in content.split("\n\n")]
        words[split] = len(content.split())
    titles = text_lines("wikipedia_en.titles.txt")
    assert titles == [f"{split}\t{title[2:-2]}" for split in SPLITS for title in articles[split]]
    assert len(set(titles)) == len(titles)
    said = " / ".join(str(len(articles[split])) for split in SPLITS)
    counted = " / ".join(f"{words[split] / 1000:.0f}k" for split in SPLITS)
    assert f"{said} whole Wikipedia articles, {counted} words" in README
    assert first_line("wikipedia").startswith(f"# {len(titles)} Wikipedia articles")


def text_lines(name):
    return (EMBEDDED / name).read_text(encoding="utf-8").removesuffix("\n").split("\n")


def test_sentence_pairs(pairs):
    assert all(len(pair) == 2 and all(pair) for split in SPLITS for pair in pairs[split])
    sizes = [len(pairs[split]) for split in SPLITS]
    for side in range(2):
        assert len({pair[side] for split in SPLITS for pair in pairs[split]}) == sum(sizes)
    said = " / ".join(f"{size:,}" for size in sizes)
    assert f"{said}; split by document, no source or target sentence occurs twice" in README
    assert first_line("libreoffice_help").startswith(f"# {sum(sizes):,} German-English")


TEXT = dict(vocabulary_size=500, block_size=8, context_window=0)


@pytest.mark.parametrize(
    ("name", "file", "load"),
    [
        ("fashion_mnist_subset", "fashion_mnist_10k.npz", build_image_data),
        ("wikipedia", "wikipedia_en.", lambda name: build_text_source(name, **TEXT).load()),
        (
            "libreoffice_help",
            "libreoffice_help.de-en.",
            lambda name: build_pair_source(name).load(),
        ),
    ],
)
def test_a_data_set_that_is_not_there_as_in_a_wheel(tmp_path, monkeypatch, name, file, load):
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path)
    found = rf"embedded data set {name} is not here, there is no {tmp_path}/{re.escape(file)}.*: "
    with pytest.raises(FileNotFoundError, match=f"{found}wheels .* Install from the repository: "):
        load(name)


def edit_distance(one, other):
    row = list(range(len(other) + 1))
    for i, word in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, counterpart in enumerate(other, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != counterpart))
            diagonal, row[j] = row[j], best
    return row[-1]


def near_copies(sentences, others):
    """Which sentences can be turned into one of the others by changing a tenth of the words.

    That is, of the words of the longer one of the two.
    """
    sets = [set(other) for other in others]
    frequency = Counter(word for words in sets for word in words)
    places = defaultdict(list)
    for number, words in enumerate(sets):
        for word in words:
            places[word].append(number)
    found = []
    for sentence in sentences:
        changed = len(sentence) // 9  # words of a sentence that its near copy can lack
        rarest = sorted(sentence, key=frequency.__getitem__)[: changed + 1]
        candidates = {number for word in rarest for number in places.get(word, [])}
        longest = (
            (max(len(sentence), len(others[number])), others[number])
            for number in candidates
            if len(set(sentence) - sets[number]) <= changed
        )
        found.append(any(10 * edit_distance(sentence, other) <= size for size, other in longest))
    return found


def test_near_copies_of_a_few_words():
    ten = list("abcdefghij")
    assert edit_distance(list("abc"), list("bcde")) == 3
    assert near_copies([ten], [ten[1:]]) == [True]
    assert near_copies([ten], [["x", *ten[1:]]]) == [True]
    assert near_copies([ten], [["x", "y", *ten[2:]]]) == [False]
    assert near_copies([ten[:9], ten[:3]], [ten[:8], ten[:3]]) == [False, True]


@pytest.mark.slow
def test_near_copies_of_training_sentences(pairs):
    words = {
        (split, side): [pair[side].split() for pair in pairs[split]]
        for split in SPLITS for side in range(2)
    }  # fmt: skip
    shares = []
    for split in EVALUATION:
        german, english = (
            near_copies(words[split, side], words["train", side]) for side in range(2)
        )
        both = sum(map(all, zip(german, english, strict=True)))
        counts = (sum(german), sum(english), both)
        shares.append([100 * count / len(german) for count in counts])
    valid, test = (re.escape(" / ".join(f"{share:.1f}" for share in row)) for row in shares)
    assert re.search(rf"{valid} % of the valid .* {test} % of the test", README)
