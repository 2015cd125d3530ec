import itertools

import numpy as np
import pytest
import torch

from multimax.data.text import build_text_source
from multimax.data.text.blocks import TextData
from multimax.data.vocabulary import WordVocabulary

PADDING, EOS = WordVocabulary.padding_index, WordVocabulary.eos_index


def text_data(train=103, valid=50, test=47, block_size=10, context_window=4, first=4):
    """Streams of ever new tokens, so that a token tells its position."""
    sizes = {"train": train, "valid": valid, "test": test}
    streams = {split: np.arange(first, first + size) for split, size in sizes.items()}
    return TextData(
        "counting", WordVocabulary([]), block_size, context_window, streams, sizes, sizes
    )


def rows(batch):
    """(inputs, targets) without padding of each row."""
    pairs = zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
    return [([t for t in x if t != PADDING], [t for t in y if t != PADDING]) for x, y in pairs]


def test_a_target_follows_its_input():
    data, counted = text_data(), 0
    for batch in itertools.chain(data.train_loader(1, 0, 1, "cpu", 0).batches(0),
                                 data.eval_loader("test", 3, 0, 1, "cpu")):  # fmt: skip
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens == (batch.targets != PADDING).sum()
        counted += batch.tokens
        for x, y in zip(batch.inputs.flatten(), batch.targets.flatten(), strict=True):
            if y != PADDING:
                assert x == (EOS if y == 4 else y - 1)
    assert counted == 103 + 47


@pytest.mark.parametrize("train", [100, 103, 109])
def test_an_epoch_is_each_block_once(train):
    data = text_data(train)
    batches = list(data.train_loader(1, 0, 1, "cpu", seed=5).batches(0))
    targets = [rows(batch)[0][1] for batch in batches]
    assert sorted(itertools.chain(*targets)) == list(range(4, 4 + train))
    starts = [target[0] - 4 for target in targets]
    assert sorted(starts) == list(range(0, train, 10))
    assert starts != sorted(starts)


def test_order_depends_on_seed_and_epoch_alone():
    data = text_data(400)

    def order(seed, epoch, start=0):
        loader = data.train_loader(4, 0, 1, "cpu", seed)
        return [rows(batch) for batch in loader.batches(epoch, start)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    reference = order(0, 3)
    assert len(reference) == 10
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert order(0, 3) == reference
    assert order(0, 3, start=7) == reference[7:]
    assert order(0, 4) != reference
    assert order(1, 3) != reference


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_of_training(world_size):
    data = text_data(403)
    loaders = [data.train_loader(2, rank, world_size, "cpu", 0) for rank in range(world_size)]
    together = [rows(b) for b in data.train_loader(2 * world_size, 0, 1, "cpu", 0).batches(1)]
    shares = zip(*(loader.batches(1) for loader in loaders), strict=True)
    assert [[row for batch in share for row in rows(batch)] for share in shares] == together
    assert {len(loader) for loader in loaders} == {41 // (2 * world_size)} == {len(together)}


@pytest.mark.parametrize("context_window", [0, 1, 4, 9])
@pytest.mark.parametrize("world_size", [1, 2, 5, 60])
def test_every_token_is_evaluated_once_with_its_context(context_window, world_size):
    data = text_data(valid=53, context_window=context_window)
    step, got = 10 - context_window, []
    for rank in range(world_size):
        loader = data.eval_loader("valid", 3, rank, world_size, "cpu")
        batches = list(loader)
        assert len(batches) == len(loader)
        got += [row for batch in batches for row in rows(batch)]
    assert [target for _, targets in got for target in targets] == list(range(4, 57))
    stream = [EOS, *range(4, 57)]
    for index, (inputs, targets) in enumerate(got):
        start = index * step
        first = max(0, start - context_window)
        assert inputs == stream[first : start + len(targets)]
        assert len(targets) == min(step, 53 - start)


def test_batches_are_padded_at_the_end():
    (batch,) = text_data(valid=12, context_window=0).eval_loader("valid", 9, 0, 1, "cpu")
    assert batch.inputs.tolist() == [[EOS, *range(4, 13)], [13, 14] + [PADDING] * 8]
    assert batch.targets.tolist() == [[*range(4, 14)], [14, 15] + [PADDING] * 8]
    assert batch.tokens == 12


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"block_size": 48}, "test has 47 tokens, fewer than one block: use data.block_size <= 47"),
        ({"valid": 0}, "valid has 0 tokens"),
    ],
)
def test_splits_that_are_too_small(options, problem):
    with pytest.raises(ValueError, match=problem):
        text_data(**options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"block_size": 0}, "block_size=0 must be a whole number >= 1"),
        ({"block_size": 2.5}, "block_size=2.5 must be a whole number >= 1"),
        ({"context_window": -1}, "context_window=-1 must be a whole number >= 0"),
        ({"context_window": 10}, "context_window=10 must be less than data.block_size=10"),
        (
            {"vocabulary_size": 257},
            r"vocabulary_size=257 must be a whole number in \[258, 1000000\]",
        ),
        ({"vocabulary_size": None}, "vocabulary_size=null must be"),
        ({"cache": 3}, "cache=3 must be text or null"),
    ],
)
def test_sizes_that_cannot_be(options, problem):
    sizes = {"vocabulary_size": 300, "block_size": 10, "context_window": 4}
    with pytest.raises(ValueError, match=problem):
        build_text_source("wikipedia", **sizes | options)


def test_loaders_that_cannot_be():
    data = text_data()
    with pytest.raises(ValueError, match=r"11 training examples .* batch_size of at most 5"):
        data.train_loader(6, 0, 2, "cpu", 0)
    with pytest.raises(ValueError, match="no split 'dev'; it has: train, valid, test"):
        data.eval_loader("dev", 1, 0, 1, "cpu")
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        data.eval_loader("test", 0, 0, 1, "cpu")
