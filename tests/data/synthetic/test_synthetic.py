"""Drawn data: what the examples are, next to loops over them, and that they come again."""

import math

import numpy as np
import pytest
import torch

from multimax.data.loading import derive_seed
from multimax.data.synthetic import (
    KMean,
    Maximum,
    MultiQueryRecall,
    MultiTokenRecall,
    Reverse,
    Sort,
)
from multimax.data.synthetic.base import BLOCK, Setting

DATA = {
    "k_mean": lambda **sizes: KMean(12, 3, (12, 20), (1, 5), **sizes),
    "maximum": lambda **sizes: Maximum(8, 3, 4, (8, 20), **sizes),
    "recall": lambda **sizes: MultiQueryRecall(40, ((16, 2), (24, 4)), **sizes),
    "multi_token": lambda **sizes: MultiTokenRecall(9, 2, 24, 12, (12, 40), **sizes),
    "reverse": lambda **sizes: Reverse(20, 12, 10, (12, 20), **sizes),
    "sort": lambda **sizes: Sort(20, 12, 10, (12, 20), **sizes),
}
every_data_set = pytest.mark.parametrize("name", DATA)


def drawn(data, rows, length, count, seed=0):
    return data.draw(np.random.default_rng(seed), rows, Setting(length, count))


def within(found, expected, deviation, count):
    """Whether a mean of so many values is within five standard errors of what is expected."""
    return abs(found - expected) < 5 * deviation / math.sqrt(count)


@pytest.mark.parametrize(("length", "marked"), [(10, 3), (10, 1), (7, 7)])
def test_the_target_of_k_mean_is_that_of_the_marked_items(length, marked):
    items, targets = drawn(KMean(), 400, length, marked)
    assert items.shape == (400, length, 9)
    assert items.dtype == targets.dtype == np.float32
    for item, target in zip(items, targets, strict=True):
        values = [row[1:].astype(float) for row in item if row[0] > 0.5]
        assert len(values) == marked
        assert target == pytest.approx(marked**0.5 * sum(values) / marked, abs=1e-5)


def test_relevance_and_values_of_k_mean():
    items, targets = drawn(KMean(), 4000, 10, 3)
    relevance, values = items[..., 0], items[..., 1:]
    marked = relevance > 0.5
    for group in (relevance[marked] - 1, relevance[~marked]):
        assert -0.3 <= group.min() < -0.299
        assert 0.299 < group.max() <= 0.3 + 1e-6
        assert within(group.mean(), 0, 0.6 / 12**0.5, group.size)
        assert within((group**2).mean(), 0.03, 0.027, group.size)  # of a uniform one
    for place in range(10):
        assert within(marked[:, place].mean(), 0.3, 0.21**0.5, 4000)
    for sample in (values, targets):  # N(0, 1)
        assert within(sample.mean(), 0, 1, sample.size)
        assert within((sample**2).mean(), 1, 2**0.5, sample.size)
        assert within((sample**4).mean(), 3, 96**0.5, sample.size)
    assert within((relevance[..., None] * values).mean(), 0, (relevance**2).mean() ** 0.5, 320000)


def test_the_target_of_max_retrieval_is_the_class_of_the_highest_priority():
    items, targets = drawn(Maximum(classes=4), 2000, 6, 1)
    assert items.shape == (2000, 6, 5)
    for item, target in zip(items, targets, strict=True):
        (highest,) = [row for row in item if all(row[0] >= other[0] for other in item)]
        assert highest[1:].tolist() == [number == target for number in range(4)]
    assert (items[..., 1:].sum(-1) == 1).all()
    assert 0 <= items[..., 0].min() < 0.001 < 0.999 < items[..., 0].max() < 1
    for number in range(4):
        assert within((targets == number).mean(), 0.25, 0.1875**0.5, 2000)


def test_lengths_of_max_retrieval_in_training():
    batches = list(Maximum(8, 3, 4, (20,)).train_loader(2, 0, 1, "cpu", 0).batches(0))
    lengths = [batch.inputs.size(1) for batch in batches]
    assert set(lengths) == set(range(3, 9))
    assert all(within(lengths.count(n) / 1000, 1 / 6, 0.38, 1000) for n in range(3, 9))


@pytest.mark.parametrize(("length", "pairs"), [(24, 4), (16, 4), (17, 1)])
def test_the_target_of_recall_is_the_value_of_the_key(length, pairs):
    sequences, targets = drawn(MultiQueryRecall(40, ((24, 4),)), 300, length, pairs)
    for tokens, wanted in zip(sequences.tolist(), targets.tolist(), strict=True):
        value_of = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(value_of) == pairs
        assert all(1 <= key < 20 <= value < 40 for key, value in value_of.items())
        places = [place for place in range(length) if wanted[place]]
        assert all(place >= 2 * pairs and place % 2 == 0 for place in places)
        assert sorted(tokens[place] for place in places) == sorted(value_of)
        assert all(wanted[place] == value_of[tokens[place]] for place in places)
        others = set(range(2 * pairs, length)) - set(places)
        assert all(20 <= tokens[place] < 40 for place in others)


def test_most_queries_of_recall_come_soon():
    """The first of two that are drawn, and so the only one of a pair, by its probability."""
    _, targets = drawn(MultiQueryRecall(40, ((24, 4),)), 5000, 20, 1)
    weights = [place**-0.99 for place in range(1, 10)]
    for gap, weight in enumerate(weights):
        expected = weight / sum(weights)
        found = (targets[:, 2 + 2 * gap] > 0).mean()
        assert within(found, expected, (expected * (1 - expected)) ** 0.5, 5000)


def test_settings_of_recall_in_training():
    batches = DATA["recall"]().train_loader(1, 0, 1, "cpu", 0).batches(0)
    lengths = [batch.inputs.size(1) for batch in batches]
    assert set(lengths) == {16, 24}
    assert within(lengths.count(16) / 1000, 0.5, 0.5, 1000)


@pytest.mark.parametrize(("length", "queries"), [(24, 2), (40, 8), (10, 3), (5, 1)])
def test_the_target_of_multi_token_recall_is_the_value_of_the_key(length, queries):
    data = MultiTokenRecall(9, 1, 24, 12, (12, 40))
    sequences, targets = drawn(data, 300, length, queries)
    pairs, filler, asked = int(0.8 * length / 4), 11, []
    queries = min(queries, pairs)
    for tokens, wanted in zip(sequences.tolist(), targets.tolist(), strict=True):
        read, asking = tokens[:length], tokens[length + 1 :]
        assert tokens[length] == 1
        assert len(asking) == 4 * queries - 1
        letters = [place for place in range(length) if read[place] != filler]
        starts = letters[::4]
        assert letters == [start + i for start in starts for i in range(4)]
        assert all(2 <= read[place] < filler for place in letters)
        value_of = {tuple(read[s : s + 2]): read[s + 2 : s + 4] for s in starts}
        assert len(value_of) == pairs
        assert wanted[:length] == [0] * length
        answers = wanted[length:]
        keys = [tuple(asking[4 * query : 4 * query + 2]) for query in range(queries)]
        assert len(set(keys)) == queries
        asked.append([list(value_of).index(key) for key in keys])
        assert answers == [token for key in keys for token in (0, 0, *value_of[key])]
        assert asking[2::4] == answers[2::4]  # the second letter is predicted after the first
        assert asking[3::4] == answers[3::4][: queries - 1]
    for query in range(queries):  # any pair in any place
        for pair in range(pairs):
            chance = 1 / pairs
            found = [row[query] for row in asked].count(pair) / 300
            assert abs(found - chance) <= 5 * (chance * (1 - chance) / 300) ** 0.5


def test_fillers_and_queries_are_anywhere():
    data = MultiTokenRecall(9, 1, 24, 12, (12, 40))
    tokens, _ = drawn(data, 4000, 10, 1)  # two pairs and two fillers
    assert within((tokens[:, 0] == data.filler).mean(), 0.5, 0.5, 4000)
    assert within((tokens[:, 9] == data.filler).mean(), 0.5, 0.5, 4000)
    whole = tokens[(tokens[:, 8:10] == data.filler).all(1)]
    first_is_asked = (whole[:, :2] == whole[:, 11:13]).all(1)
    assert within(first_is_asked.mean(), 0.5, 0.5, len(whole))


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("build", [Reverse, Sort])
def test_the_answer_has_the_same_letters(build, length):
    data = build(5, 5, test_lengths=(5,))
    sequences, targets = drawn(data, 300, length, 0)
    assert sequences.shape == targets.shape == (300, 2 * length)
    for tokens, wanted in zip(sequences.tolist(), targets.tolist(), strict=True):
        letters, answer = tokens[:length], wanted[length:]
        assert len(set(letters)) == length
        assert all(2 <= letter < 7 for letter in letters)
        expected = [letters[length - 1 - place] for place in range(length)]
        assert answer == (expected if build is Reverse else sorted(letters))
        assert tokens[length:] == [1, *answer[:-1]]
        assert wanted[:length] == [0] * length
    for place in range(length):
        for letter in range(2, 7):
            assert within((sequences[:, place] == letter).mean(), 0.2, 0.4, 300)


def test_lengths_of_sequences_in_training():
    batches = DATA["sort"]().train_loader(1, 0, 1, "cpu", 0).batches(0)
    lengths = [batch.setting.length for batch in batches]
    assert all(within(lengths.count(n) / 1000, 1 / 3, 0.48, 1000) for n in (10, 11, 12))


def first(data, number, seed=0, epoch=0, start=0, rank=0, world_size=1, rows=6):
    loader = data.train_loader(rows // world_size, rank, world_size, "cpu", seed)
    batches = loader.batches(epoch, start)
    return [next(batches) for _ in range(number)]


def equal(one, other):
    return (
        one.setting == other.setting
        and torch.equal(one.inputs, other.inputs)
        and torch.equal(one.targets, other.targets)
    )


@every_data_set
def test_a_training_batch_depends_on_seed_epoch_and_index_alone(name):
    data = DATA[name]()
    whole = first(data, 5)
    torch.manual_seed(7)
    np.random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    for got, expected in zip(first(DATA[name](), 2, start=3), whole[3:], strict=True):
        assert equal(got, expected)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    others = [*whole, *first(data, 3, seed=1), *first(data, 3, epoch=1)]
    for i, batch in enumerate(others):
        assert not any(equal(batch, other) for other in others[:i])


@every_data_set
def test_processes_share_a_training_batch(name):
    data = DATA[name]()
    for whole, *parts in zip(
        first(data, 3), *(first(data, 3, rank=rank, world_size=2) for rank in (0, 1)), strict=True
    ):
        assert all(len(part.targets) == 3 for part in parts)
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


def examples(data, split, batch_size=BLOCK, world_size=1):
    """Inputs and targets by setting, of all processes."""
    found = {}
    for rank in range(world_size):
        for batch in data.eval_loader(split, batch_size, rank, world_size, "cpu"):
            assert 1 <= len(batch.targets) <= batch_size
            pairs = zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
            found.setdefault(batch.setting, []).extend(pairs)
    return found


@every_data_set
def test_evaluation_splits_are_fixed(name):
    sizes = dict(valid_size=2 * BLOCK + 3, test_size=BLOCK + 1)
    data = DATA[name](**sizes)
    for split, settings in data.settings.items():
        expected = examples(data, split)
        assert set(expected) == set(settings.values())
        assert all(len(rows) == sizes[f"{split}_size"] for rows in expected.values())
        for batch_size, world_size in ((7, 1), (30, 2), (1000, 4)):
            assert examples(DATA[name](**sizes), split, batch_size, world_size) == expected
    assert list(data.settings["valid"]) == [""]


@every_data_set
def test_no_two_streams_begin_alike(name):
    data = DATA[name](valid_size=3 * BLOCK, test_size=3 * BLOCK)
    setting = data.settings["valid"][""]
    streams = {split: examples(data, split)[setting] for split in ("valid", "test")}
    rows = [row for stream in streams.values() for row in stream]
    seeds = [derive_seed(seed, 0, 0) for seed in range(3)]
    for seed in seeds:
        inputs, targets = data.draw(np.random.default_rng(seed), 20, setting)
        rows += list(zip(inputs.tolist(), targets.tolist(), strict=True))
    assert len({str(row) for row in rows}) == len(rows)


def test_settings_have_examples_of_their_own():
    data = KMean(8, 2, (8, 9), (2, 3), valid_size=5, test_size=5)
    values = [
        batch.inputs[:, :, 1].flatten().tolist()
        for batch in data.eval_loader("test", 5, 0, 1, "cpu")
    ]
    assert len(values) == 3  # of 8 items with 2 marked, of 9 with 2, of 8 with 3
    assert not set(values[0]) & set(values[1]) | set(values[0]) & set(values[2])


def test_a_fingerprint_tells_data_apart():
    different = [
        KMean(), KMean(marked=3), KMean(length=65), KMean(test_marked=(1,)), KMean(valid_size=5),
        KMean(test_lengths=(64,)), Maximum(), Maximum(classes=9), Maximum(least_length=4),
        MultiQueryRecall(), MultiQueryRecall(vocabulary_size=100), Sort(), Reverse(), Sort(200),
        Sort(least_length=2), Sort(test_lengths=(16,)), MultiTokenRecall(),
        MultiTokenRecall(queries=3), MultiTokenRecall(40),
    ]  # fmt: skip
    assert len({data.fingerprint for data in different}) == len(different)
    assert KMean().fingerprint == KMean(64, 4).fingerprint


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: KMean(3, 4), r"data\.marked=4 must be at most 3, data\.length"),
        (lambda: KMean(test_lengths=(64, 2)), r"data\.marked=4 must be at most 2, the least of"),
        (lambda: KMean(test_marked=(1, 65)), r"data\.test_marked=65 must be at most 64"),
        (lambda: KMean(test_lengths=()), r"test_lengths=\[\] must be a list of whole"),
        (lambda: Maximum(4), r"data\.least_length=5 must be at most data\.length=4"),
        (lambda: MultiQueryRecall(64, ((15, 4),)), r"4 pairs .* need a length of at least 16"),
        (lambda: MultiQueryRecall(10, ((64, 5),)), r"vocabulary_size of more than 11"),
        (lambda: MultiQueryRecall(64, ((64,),)), "settings="),
        (lambda: Sort(length=3, least_length=4), r"data\.least_length=4 must be at most .*=3"),
        (lambda: Reverse(1), r"alphabet=1 must be a whole number"),
        (lambda: Reverse(127), r"data\.alphabet=127 must be at least 128, the largest length"),
        (lambda: MultiTokenRecall(least_length=4), "a sequence of length 4 has no pair: .* is 5"),
        (lambda: MultiTokenRecall(test_lengths=(64, 3)), "a sequence of length 3 has no pair"),
        (lambda: MultiTokenRecall(10), r"alphabet=10 makes 100 keys, fewer than the 102 pairs"),
    ],
)
def test_what_cannot_be_drawn(build, said):
    with pytest.raises(ValueError, match=said):
        build()
