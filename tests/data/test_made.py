"""Made data has the shapes and sizes of the data sets that it stands for."""

import pytest
import torch

from multimax.data.images import build_image_data
from multimax.data.images.made import made_images
from multimax.data.pairs import build_pair_source
from multimax.data.pairs.made import STATED, MadePairs
from multimax.data.text.made import made_text


def test_images_are_as_many_as_large_and_of_as_many_classes():
    real = build_image_data("fashion_mnist_subset", valid_size=500)
    made = made_images("fashion_mnist_subset", {"valid_size": 500}, 7, None)
    for name in ("num_classes", "image_size", "channels"):
        assert getattr(made, name) == getattr(real, name)
    assert made.sizes == {"train": real.sizes["train"], "valid": 7, "test": 7}
    loaders = [data.train_loader(20, 1, 2, "cpu", 0) for data in (made, real)]
    assert len(loaders[0]) == len(loaders[1]) == 187
    (images, labels), (of_real, _) = (next(iter(loader.batches(0))) for loader in loaders)
    assert (images.shape, images.dtype) == (of_real.shape, of_real.dtype)
    assert labels.min() >= 0
    assert labels.max() < 10


def test_pairs_are_as_many_and_as_long():
    options = {"source": "en", "target": "de", "vocabulary_size": 500}
    made = MadePairs("libreoffice_help", options, 512, 60).load()
    stated = STATED["libreoffice_help"]
    real = sum(1 for _ in build_pair_source("libreoffice_help").read("train"))
    train = made.splits["train"]
    assert len(train) == stated.pairs == real
    for side, language in ((train.source, "en"), (train.target, "de")):
        assert side.tokens.size == pytest.approx(stated.tokens[language], rel=0.03)
        assert side.lengths.max() == 60
        assert side.tokens.max() < 500
        assert (side.tokens == train.eos_index).sum() == len(train)
    loader = made.eval_loader("valid", 256, 0, 2, "cpu")
    ((indices, batch),) = loader  # one batch of each process
    assert len(indices) == len(batch.source)


def test_iwslt14_has_the_vocabularies_and_about_the_updates_of_its_tokens():
    """985 batches of 4,096 tokens, and what padding adds to them."""
    made = MadePairs("iwslt14", {}, 4096, 1024).load()
    assert 1050 < len(made.train_loader(4096, 0, 1, "cpu", 0)) < 1200
    languages = made.languages
    assert (languages.source_vocabulary.size, languages.target_vocabulary.size) == (8848, 6632)


def test_text_is_as_long_and_its_words_are_as_frequent_as_zipf_says():
    data = made_text("wikitext103", {"block_size": 512, "context_window": 400}, 3, None).load()
    assert data.sizes == {"train": 103_227_021, "valid": 512, "test": 512}
    assert data.vocabulary.size == 267_744
    batch = next(data.train_loader(64, 0, 2, "cpu", 0).batches(0))
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    frequent = (batch.targets < 20_000).float().mean()
    assert frequent == pytest.approx(0.80, abs=0.01)  # (log 20,000 + 0.58) / (log 267,740 + 0.58)
