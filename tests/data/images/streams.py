"""Small data sets of numbered images in shards, and what must hold of any loader of them."""

import io
import json
import random
import tarfile

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from multimax.data.images import build_image_data

TRAIN, VALID = [4] * 6, [3, 3, 1]  # examples in each shard
PLAIN = dict(auto_augment=None, color_jitter=0.0, random_erasing=0.0)
NAMES = ["cat", "dog"]


def picture(number, noise=0):
    """JPEG of one grey, 10 times its number, or of noise around it."""
    rng = np.random.default_rng(number)
    array = np.full((40, 50, 3), 10 * number) + noise * rng.standard_normal((40, 50, 3))
    file = io.BytesIO()
    Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_shards(root, name, sizes, noise=0, label=lambda number: number % 2):
    """WebDataset shards `name-0000.tar`, ...; returns the entry of the split in _info.json."""
    first = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(root / f"{name}-{shard:04}.tar", "w") as tar:
            for number in range(first, first + size):
                parts = {"cls": str(label(number)).encode(), "jpg": picture(number, noise)}
                for suffix, content in parts.items():
                    member = tarfile.TarInfo(f"{name}/{number:06}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        first += size
    files = [f"{name}-{shard:04}.tar" for shard in range(len(sizes))]
    return dict(name=name, filenames=files, shard_lengths=sizes, num_samples=sum(sizes))


def write(root, train=TRAIN, valid=VALID, **options):
    splits = {
        name: write_shards(root, name, sizes, **options)
        for name, sizes in (("train", train), ("val", valid))
    }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def build(folder, dataset="wds/", **options):
    defaults = dict(root=folder, dataset=dataset, num_classes=2, image_size=32)
    defaults |= dict(repeated_augmentation=1, num_workers=0)
    return build_image_data("timm", **(defaults | options))


def build_streamed(arrow, cache, **options):
    return build(cache, f"hfids/{arrow}", **options)


def numbers(batches):
    """Which image each one is, by its mean grey."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    images = torch.cat([images for images, _ in batches])
    return ((images * std + mean).mean((1, 2, 3)) * 255 / 10).round().int().tolist()


def assert_same(got, expected):
    assert len(got) == len(expected) > 0
    for (images, labels), (expected_images, expected_labels) in zip(got, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def by_number(batches):
    """(images, labels) of all batches in the order of the images' numbers."""
    order = torch.tensor(numbers(batches)).argsort()
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    return images[order], labels[order]


def ranks_of_training(data, world_size, batch_size, epoch=0, seed=0):
    loaders = [data.train_loader(batch_size, r, world_size, "cpu", seed) for r in range(world_size)]
    ranks = [list(loader.batches(epoch)) for loader in loaders]
    for loader, batches in zip(loaders, ranks, strict=True):
        assert len(loader) == len(batches)
        assert all(len(images) == len(labels) == batch_size for images, labels in batches)
    assert len({len(batches) for batches in ranks}) == 1
    return ranks


def assert_evaluation_is_exact(data, folder, world_size):
    loaders = [data.eval_loader("valid", 2, rank, world_size, "cpu") for rank in range(world_size)]
    for _ in range(2):  # the second time as the first
        batches = [batch for loader in loaders for batch in loader]
        expected = build(folder, "", repeated_augmentation=3).eval_loader("valid", 9, 0, 1, "cpu")
        assert sorted(numbers(batches)) == list(range(sum(VALID)))
        assert_same([by_number(batches)], [by_number(list(expected))])


def assert_shares_are_disjoint(data, world_size, batch_size):
    ranks = [numbers(batches) for batches in ranks_of_training(data, world_size, batch_size)]
    assert sorted(i for shown in ranks for i in shown) == list(range(sum(TRAIN)))
    return ranks


def assert_batches_start_anywhere(make):
    """Of `make(num_workers)`, a loader of 6 batches; the same for each number of workers."""
    for num_workers in (0, 2):
        loader = make(num_workers)
        assert len(loader) == 6
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        full = list(loader.batches(2))
        for start in range(6) if not num_workers else (3, 4):
            assert_same(list(loader.batches(2, start)), full[start:])
        assert list(loader.batches(2, 6)) == []
        assert states[0] == random.getstate()
        assert states[1] == np.random.get_state()[1].tolist()
        assert torch.equal(states[2], torch.get_rng_state())
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        interleaved = zip(make(num_workers).batches(2), loader.batches(3), strict=True)
        assert_same([batch for batch, _ in interleaved], full)
