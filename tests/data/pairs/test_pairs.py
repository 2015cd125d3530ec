import gzip
from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from multimax.data.pairs import build_pair_source
from multimax.data.pairs.batches import (
    Pairs,
    Sentences,
    TokenEvalLoader,
    TokenTrainLoader,
    cut_by_tokens,
)
from multimax.data.pairs.sources import LibreOfficeHelp

EMBEDDED = Path(__file__).parents[3] / "multimax" / "data" / "embedded"
PADDING, EOS = 7, 9


def columns(split):
    text = gzip.decompress((EMBEDDED / f"libreoffice_help.de-en.{split}.tsv.gz").read_bytes())
    return [line.split("\t") for line in text.decode().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def embedded(cache):
    return build_pair_source(
        "libreoffice_help", vocabulary_size=2000, max_length=100, cache=str(cache)
    ).load()


@pytest.fixture
def little(monkeypatch):
    """The embedded data has 200 pairs a split; returns the splits that are read."""
    read, whole = [], LibreOfficeHelp._columns

    def columns(self, split):
        read.append(split)
        return islice(whole(self, split), 200)

    monkeypatch.setattr(LibreOfficeHelp, "_columns", columns)
    return read


@pytest.mark.slow
class TestEmbedded:
    def test_every_pair_is_there_but_for_the_long_ones_which_are_counted(self, embedded):
        [(reason, long)] = embedded.left_out["train"].items()
        assert reason == "longer than 100 tokens"
        sizes = {split: len(pairs) for split, pairs in embedded.splits.items()}
        assert sizes == {"train": 30066 - long, "valid": 1287, "test": 1351}
        assert 0 < long < 300
        assert embedded.left_out["valid"] == embedded.left_out["test"] == {}
        assert embedded.splits["train"].sizes.max() == 100
        assert embedded.splits["test"].sizes.max() > 100

    def test_tokens_give_the_text_back(self, embedded):
        vocabulary = embedded.languages.target_vocabulary
        german, english = zip(*columns("test"), strict=True)
        for side, texts in (("source", german), ("target", english)):
            sentences = getattr(embedded.splits["test"], side)
            for i, text in enumerate(texts):
                assert sentences[i][-1] == vocabulary.eos_index
                assert vocabulary.decode(sentences[i].tolist()) == text
        assert embedded.references["test"] == list(english)
        assert list(embedded.references) == ["valid", "test"]

    @pytest.mark.parametrize("text", ["x  y", "日本語 → \u2028 ß", "<pad></s> <unk>", "\t.", "\0"])
    def test_any_text_has_tokens(self, embedded, text):
        vocabulary = embedded.languages.target_vocabulary
        (tokens,) = vocabulary.encode([text])
        assert vocabulary.decode(tokens) == text
        assert vocabulary.eos_index not in tokens[:-1]
        assert vocabulary.padding_index not in tokens

    def test_a_word_is_the_same_at_the_beginning_and_inside(self, embedded):
        vocabulary = embedded.languages.source_vocabulary
        first, second = vocabulary.encode(["Klicken Sie", "Dann Klicken Sie"])
        assert second[-len(first) :] == first
        assert vocabulary.pieces(first) == [" Klicken", " Sie", "</s>"]
        assert vocabulary.line(" Klicken Sie\n") == "Klicken Sie"
        assert vocabulary.plain("Klicken Sie") == "Klicken Sie"
        assert vocabulary.words("Klicken Sie") is None

    def test_both_sides_and_both_directions_have_one_vocabulary(self, embedded, cache):
        back = build_pair_source(
            "libreoffice_help", source="en", target="de", vocabulary_size=2000, cache=str(cache)
        )
        languages = embedded.languages
        assert languages.source_vocabulary is languages.target_vocabulary
        assert languages.source_vocabulary.size == 2000
        assert back.languages.source_vocabulary.fingerprint == (
            languages.source_vocabulary.fingerprint
        )
        assert back.languages.fingerprint != languages.fingerprint
        english, german = next(back.read("valid"))
        assert [german, english] == columns("valid")[0]
        assert len(list(cache.iterdir())) == 1

    def test_the_vocabulary_is_of_the_training_split_and_kept(self, little, tmp_path):
        sources = [LibreOfficeHelp(vocabulary_size=400, cache=str(tmp_path)) for _ in range(2)]
        fresh, kept = (source.languages.fingerprint for source in sources)
        assert little == ["train", "train"]
        assert fresh == kept
        (file,) = tmp_path.iterdir()
        file.write_text(file.read_text()[:1000])
        with pytest.raises(ValueError, match=rf"{file.name}.*delete it"):
            _ = LibreOfficeHelp(vocabulary_size=400, cache=str(tmp_path)).languages

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"source": "fr"}, r"source='fr' must be de or en"),
            ({"source": "en"}, r"must be de and en, or en and de"),
            ({"max_length": 1}, r"max_length=1 must be a whole number >= 2"),
            ({"max_length": 2.5}, r"max_length=2\.5 must"),
            ({"vocabulary_size": 100}, r"vocabulary_size=100 must be a whole number in"),
            ({"size": 3}, r"has no option size; it has: source, target, max_length"),
        ],
    )
    def test_bad_options(self, options, message, cache):
        with pytest.raises(ValueError, match=message):
            build_pair_source("libreoffice_help", **{"cache": str(cache), **options}).load()

    def test_unknown_data_set(self):
        with pytest.raises(ValueError, match=r"'wmt'; known: libreoffice_help, iwslt14"):
            build_pair_source("wmt")


class TestCuts:
    def test_largest_size_times_number_of_pairs_is_limited(self):
        assert cut_by_tokens(np.array([1, 1, 2, 2, 3, 9, 1, 1]), 6) == [
            slice(0, 3), slice(3, 5), slice(5, 6), slice(6, 8)
        ]  # fmt: skip
        assert cut_by_tokens(np.array([], dtype=int), 6) == []

    def test_no_batch_could_have_taken_another_pair(self):
        sizes = np.sort(np.random.default_rng(0).integers(1, 40, 500))
        cuts = cut_by_tokens(sizes, 128)
        assert np.concatenate([np.arange(500)[cut] for cut in cuts]).tolist() == list(range(500))
        for cut, following in pairwise(cuts):
            assert sizes[cut].max() * (cut.stop - cut.start) <= 128
            assert sizes[following][0] * (cut.stop - cut.start + 1) > 128


def make_pairs(count=300, longest=20):
    """Pairs whose source begins with a number of their own, which the target repeats."""
    generator = np.random.default_rng(1)

    def sentences():
        return Sentences(
            [100 + i, *generator.integers(10, 90, generator.integers(0, longest - 2)), EOS]
            for i in range(count)
        )

    return Pairs(sentences(), sentences(), PADDING, EOS)


def numbers(batches):
    return [batch.source[:, 0].tolist() for batch in batches]


def load(pairs, rank=0, world_size=1, seed=0, max_tokens=60):
    return TokenTrainLoader(pairs, max_tokens, rank, world_size, "cpu", seed)


class TestBatches:
    def test_a_batch(self):
        sentences = [[1, 2, EOS], [3, EOS], [4, 5, 6, EOS]], [[11, EOS], [12, 13, EOS], [14, EOS]]
        pairs = Pairs(*map(Sentences, sentences), PADDING, EOS)
        batch = pairs.batch([1, 0], torch.device("cpu"))
        assert batch.source.tolist() == [[3, EOS, PADDING], [1, 2, EOS]]
        assert batch.target.tolist() == [[12, 13, EOS], [11, EOS, PADDING]]
        assert batch.target_in.tolist() == [[EOS, 12, 13], [EOS, 11, PADDING]]
        assert batch.tokens == 5
        assert {t.dtype for t in batch[:3]} == {torch.int64}
        assert pairs.sizes.tolist() == [3, 3, 4]

    def test_an_epoch_has_every_pair_once_with_its_translation(self):
        pairs = make_pairs()
        batches = list(load(pairs).batches(0))
        assert len(batches) == len(load(pairs))
        assert Counter(chain(*numbers(batches))) == Counter(range(100, 400))
        for batch in batches:
            assert torch.equal(batch.source[:, 0], batch.target[:, 0])
            assert batch.tokens == (batch.target != PADDING).sum()
            longest = max(batch.source.size(1), batch.target.size(1))
            assert longest * len(batch.source) <= 60
            assert (batch.source == EOS).sum(1).tolist() == [1] * len(batch.source)

    def test_little_is_padding(self):
        batches = list(load(make_pairs()).batches(0))
        real = sum((batch.source != PADDING).sum() for batch in batches)
        assert real / sum(batch.source.numel() for batch in batches) > 0.97

    def test_epochs_and_seeds_differ_and_the_number_of_batches_does_not(self):
        pairs = make_pairs()
        orders = [numbers(load(pairs, seed=s).batches(e)) for s, e in ((0, 0), (0, 1), (1, 0))]
        assert len({len(order) for order in orders}) == 1
        assert orders[0] != orders[1] != orders[2] != orders[0]
        # Not only the order of the batches: also which pairs are together.
        assert {frozenset(b) for b in orders[0]} != {frozenset(b) for b in orders[1]}

    def test_lengths_are_mixed_over_an_epoch(self):
        lengths = [batch.source.size(1) for batch in load(make_pairs()).batches(0)]
        assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))

    def test_batches_start_anywhere_and_leave_the_global_random_state_alone(self):
        pairs = make_pairs()
        whole = numbers(load(pairs).batches(3))
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        assert numbers(load(pairs).batches(3, start=5)) == whole[5:]
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]

    @pytest.mark.parametrize("world_size", [2, 3, 4])
    def test_ranks_have_equally_many_batches_and_no_pair_twice(self, world_size):
        pairs = make_pairs()
        whole = numbers(load(pairs).batches(2))
        shares = [numbers(load(pairs, r, world_size).batches(2)) for r in range(world_size)]
        assert {len(share) for share in shares} == {len(whole) // world_size}
        together = [batch for batches in zip(*shares, strict=True) for batch in batches]
        assert together == whole[: len(together)]

    def test_what_does_not_share_evenly_changes_with_the_epoch(self):
        pairs = make_pairs()
        loaders = [load(pairs, rank, 4) for rank in range(4)]
        assert len(load(pairs)) % 4
        seen = [
            {n for loader in loaders for batch in numbers(loader.batches(epoch)) for n in batch}
            for epoch in range(3)
        ]
        assert all(len(s) < 300 for s in seen)
        assert len(set.union(*seen)) == 300

    @pytest.mark.parametrize("world_size", [1, 3])
    def test_evaluation_has_every_pair_once(self, world_size):
        pairs = make_pairs()
        got = []
        for rank in range(world_size):
            for indices, batch in TokenEvalLoader(pairs, 60, rank, world_size, torch.device("cpu")):
                assert (batch.source[:, 0] - 100).tolist() == indices.tolist()
                got += indices.tolist()
        assert sorted(got) == list(range(300))

    def test_a_pair_that_is_too_long_to_train_on_is_refused_and_is_evaluated(self):
        pairs = make_pairs()
        longest = int(pairs.sizes.max())
        with pytest.raises(ValueError, match=rf"{longest} tokens.*trainer\.batch_size"):
            load(pairs, max_tokens=longest - 1)
        batches = list(TokenEvalLoader(pairs, longest - 1, 0, 1, torch.device("cpu")))
        assert sum(len(indices) for indices, _ in batches) == 300

    def test_fewer_batches_than_processes(self):
        with pytest.raises(ValueError, match=r"3 training pairs give 1 batches .* 2 process"):
            load(make_pairs(3), 0, 2, max_tokens=1000)

    def test_sentences_are_four_bytes_a_token(self):
        assert make_pairs().source.tokens.dtype == np.int32
