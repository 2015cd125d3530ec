import io
import json
import random
import sys
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
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


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def noisy_shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("noisy"), noise=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same images in folders, which Hugging Face's imagefolder reads too."""
    root = tmp_path_factory.mktemp("folder")
    for split, sizes in (("train", TRAIN), ("val", VALID)):
        for number in range(sum(sizes)):
            place = root / split / NAMES[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:06}.jpg").write_bytes(picture(number))
    return root


@pytest.fixture(scope="module")
def arrow(tmp_path_factory):
    """The same images in Arrow files with a data set card, as on the Hugging Face hub."""
    root = tmp_path_factory.mktemp("arrow")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    card = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, sizes in (("train", TRAIN), ("val", VALID)):
        card += [f"  - split: {split}", f"    path: {split}-*.arrow"]
        first = 0
        for shard, size in enumerate(sizes):
            mine = range(first, first + size)
            images = [dict(bytes=picture(number), path=None) for number in mine]
            rows = dict(image=images, label=[number % 2 for number in mine])
            with ArrowWriter(path=str(root / f"{split}-{shard}.arrow"), features=features) as file:
                file.write_table(datasets.Dataset.from_dict(rows, features).data.table)
                file.finalize()
            first += size
    card += ["dataset_info:", "  features:", "  - name: image", "    dtype: image"]
    card += ["  - name: label", "    dtype:", "      class_label:", "        names:"]
    card += [f"          '{label}': {name}" for label, name in enumerate(NAMES)] + ["  splits:"]
    for split, sizes in (("train", TRAIN), ("val", VALID)):
        card += [f"  - name: {split}", f"    num_examples: {sum(sizes)}", "    num_bytes: 1"]
    (root / "README.md").write_text("\n".join([*card, "---", ""]))
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


def test_facts(shards):
    data = build(shards)
    assert data.name == "wds/"
    assert data.sizes == {"train": sum(TRAIN), "valid": sum(VALID)}
    assert data.class_names == ["0", "1"]
    assert (data.num_classes, data.image_size, data.channels) == (2, 32, 3)


@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (5, 0), (1, 2), (2, 2)]
)
def test_evaluation_reads_each_example_once(shards, folder, world_size, num_workers):
    assert_evaluation_is_exact(build(shards, num_workers=num_workers), folder, world_size)


@pytest.mark.parametrize(
    ("world_size", "num_workers", "batch_size"),
    [(1, 0, 5), (2, 0, 3), (3, 0, 4), (1, 2, 3), (3, 2, 2)],
)
def test_ranks_train_on_shares_of_their_own(shards, world_size, num_workers, batch_size):
    data = build(shards, num_workers=num_workers, **PLAIN)
    ranks = ranks_of_training(data, world_size, batch_size)
    shown = Counter(i for batches in ranks for i in numbers(batches))
    assert max(shown.values()) == 1
    assert shown.total() == sum(TRAIN) // (batch_size * world_size) * batch_size * world_size
    for batches in ranks:
        assert torch.cat([labels for _, labels in batches]).tolist() == [
            i % 2 for i in numbers(batches)
        ]


def test_shares_are_drawn_from_seed_and_epoch(shards):
    data = build(shards, **PLAIN)
    drawn = [
        frozenset(i // 4 for i in numbers(ranks_of_training(data, 2, 4, epoch, seed)[0]))
        for epoch, seed in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))
    ]
    assert all(len(share) == 3 for share in drawn)
    assert len(set(drawn)) == 5  # (0, 1) and (1, 0) are not the same


@pytest.mark.parametrize("num_workers", [0, 1])
def test_examples_of_shards_are_shuffled(shards, num_workers):
    data = build(shards, train_split="train-{0001..0002}.tar|8", num_workers=num_workers, **PLAIN)
    orders = [
        numbers(ranks_of_training(data, 1, 4, epoch, seed)[0])
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert [sorted(order) for order in orders] == [list(range(4, 12))] * 3
    assert len({tuple(i % 4 for i in order if i < 8) for order in orders}) == 3
    assert all(set(order[:4]) not in ({4, 5, 6, 7}, {8, 9, 10, 11}) for order in orders)


def test_every_rank_gets_equally_many_batches_of_uneven_shards(shards, tmp_path):
    data = build(write(tmp_path, train=[9, 1, 1, 1]), **PLAIN)
    first, second = (numbers(batches) for batches in ranks_of_training(data, 2, 3))
    assert len(first) == len(second) == 6
    assert not set(first) & set(second)
    ranks_of_training(build(shards, num_workers=2), 1, 7)  # the workers' shares are no multiples


@pytest.mark.slow
@pytest.mark.parametrize("random_erasing", [0.0, 1.0])
def test_batches_start_anywhere(noisy_shards, random_erasing):
    def make(num_workers):
        data = build(noisy_shards, num_workers=num_workers, random_erasing=random_erasing)
        return data.train_loader(2, 1, 2, "cpu", seed=7)

    assert_batches_start_anywhere(make)


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(random_erasing=0.0), {**PLAIN, "random_erasing": 1.0}])
def test_copies_of_an_image_are_changed_differently(tmp_path, options):
    write(tmp_path, train=[1] * 8, noise=60)
    for file in tmp_path.glob("train-*.tar"):
        file.write_bytes((tmp_path / "train-0000.tar").read_bytes())
    data = build(tmp_path, num_workers=2, **options)
    shown = [
        images
        for rank in range(2)
        for epoch in range(2)
        for images, _ in data.train_loader(2, rank, 2, "cpu", seed=0).batches(epoch)
    ]
    assert len({image.double().sum().item() for image in torch.cat(shown)}) == 16


def test_each_batch_is_erased_differently(noisy_shards):
    kept, erased = (
        build(noisy_shards, random_erasing=p).train_loader(4, 0, 1, "cpu", seed=0)
        for p in (0.0, 1.0)
    )
    changed = [
        images != kept_images
        for (images, _), (kept_images, _) in zip(erased.batches(0), kept.batches(0), strict=True)
    ]
    shares = torch.cat(changed).double().mean((1, 2, 3))
    assert 0.01 < shares.min() <= shares.max() < 0.4
    assert len({mask.numpy().tobytes() for mask in changed}) == 6


def test_shards_can_be_listed_without_an_info_file(shards, folder, tmp_path):
    for file in shards.glob("*.tar"):
        (tmp_path / file.name).symlink_to(file)
    data = build(
        tmp_path,
        train_split="train-{0000..0005}.tar|24",
        valid_split="val-{0000..0002}.tar|7",
    )
    assert data.sizes == {"train": 24, "valid": 7}
    assert_evaluation_is_exact(data, folder, 2)


def test_the_process_group_is_not_asked(shards, folder, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    data = build(shards, **PLAIN)
    assert data.sizes == {"train": 24, "valid": 7}
    assert_evaluation_is_exact(data, folder, 1)
    assert_shares_are_disjoint(data, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2)])
def test_hugging_face_streams_evaluate_exactly(arrow, folder, tmp_path, world_size, num_workers):
    data = build_streamed(arrow, tmp_path, num_workers=num_workers, num_classes=None)
    assert data.sizes == {"train": 24, "valid": 7}
    assert data.class_names == NAMES
    assert_evaluation_is_exact(data, folder, world_size)


@pytest.mark.slow
def test_hugging_face_streams_train(arrow, tmp_path):
    data = build_streamed(arrow, tmp_path, **PLAIN)
    for world_size, batch_size in ((1, 4), (2, 3), (3, 4), (4, 3)):  # 4 does not divide 6 shards
        ranks = assert_shares_are_disjoint(data, world_size, batch_size)
    assert ranks != [numbers(batches) for batches in ranks_of_training(data, 4, 3, epoch=1)]
    assert_shares_are_disjoint(build_streamed(arrow, tmp_path, num_workers=2, **PLAIN), 4, 3)

    def make(num_workers):
        data = build_streamed(arrow, tmp_path, num_workers=num_workers)
        return data.train_loader(2, 1, 2, "cpu", seed=7)

    assert_batches_start_anywhere(make)


def test_hugging_face_files_read_as_folders_do(folder, tmp_path):
    options = dict(repeated_augmentation=3, **PLAIN)
    data = build(tmp_path, f"hfds/{folder}", valid_split="validation", **options)
    assert data.sizes == {"train": 24, "valid": 7}
    assert data.class_names == NAMES
    expected = build(folder, "", **options)
    for split in ("train", "valid"):
        loaders = [each.eval_loader(split, 4, 1, 2, "cpu") for each in (data, expected)]
        assert_same(*(list(loader) for loader in loaders))
    loaders = [each.train_loader(4, 1, 2, "cpu", seed=0) for each in (data, expected)]
    assert_same(*(list(loader.batches(1)) for loader in loaders))


def test_damage_is_reported_and_not_left_out(tmp_path):
    write(tmp_path)
    shard = tmp_path / "val-0001.tar"
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        place = tar.getmember("val/000004.jpg").offset_data
    shard.write_bytes(content[:place] + bytes(200) + content[place + 200 :])
    with pytest.raises(ValueError, match=r"example val/000004 in .*/val-0001\.tar cannot be read"):
        list(build(tmp_path).eval_loader("valid", 2, 0, 1, "cpu"))
    shard.write_bytes(content[:place])
    with pytest.raises(ValueError, match=r"breaks off .*val-0001"):
        list(build(tmp_path).eval_loader("valid", 2, 0, 1, "cpu"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 shards are missing, such as .*/val-0001\.tar"):
        build(tmp_path)


def test_a_damaged_hugging_face_image_is_not_replaced(tmp_path):
    for split in ("train", "test"):
        for name in NAMES:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            (tmp_path / "images" / split / name / "x.jpg").write_bytes(picture(5, noise=60))
    damaged = tmp_path / "images" / "test" / "cat" / "x.jpg"
    damaged.write_bytes(damaged.read_bytes()[:700])
    data = build(tmp_path / "cache", f"hfds/{tmp_path / 'images'}", valid_split="test")
    with pytest.raises(ValueError, match=r"image .*x\.jpg cannot be read"):
        list(data.eval_loader("valid", 2, 0, 1, "cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(repeated_augmentation=3), r"is a stream, .* data\.repeated_augmentation=1"),
        (dict(root=None), r"needs data\.root="),
        (dict(num_classes=None), r"does not name its classes: type data\.num_classes="),
        (dict(valid_split="test"), r"in 'test' of 'wds/' is not known: .* _info\.json"),
        (dict(valid_split="val-{0000..0002}.txt"), r"is not known: .*\.tar\|1281167"),
        (dict(dataset="tfds/mnist"), "tfds/mnist.* is not supported"),
    ],
)
def test_bad_options(shards, options, message):
    with pytest.raises(ValueError, match=message):
        build(shards, **options)


def test_an_unknown_number_of_examples(shards, folder, tmp_path):
    (tmp_path / "val-0000.tar").symlink_to(shards / "val-0000.tar")
    for split in ("train", "val-{0000..0000}.tar"):
        with pytest.raises(ValueError, match=r"is not known: list the shards .*_info\.json"):
            build(tmp_path, train_split=split, valid_split="val-{0000..0000}.tar|3")
    with pytest.raises(ValueError, match=r"is not known: take hfds/\.\.\. in place of hfids/"):
        build(tmp_path, f"hfids/{folder}")


def test_labels_are_checked(tmp_path):
    write(tmp_path, label=lambda number: number)
    loader = build(tmp_path, num_classes=7).eval_loader("valid", 7, 0, 1, "cpu")
    assert next(iter(loader))[1].tolist() == list(range(7))
    with pytest.raises(ValueError, match=r"label 5, of 5 classes: type data\.num_classes=6"):
        list(build(tmp_path, num_classes=5).eval_loader("valid", 2, 0, 1, "cpu"))


def test_each_worker_needs_a_shard(shards, arrow, tmp_path):
    for data in (
        build(shards, num_workers=4),
        build_streamed(arrow, tmp_path, num_workers=4),
    ):
        with pytest.raises(ValueError, match=r"6 shards are too few .* data\.num_workers=3"):
            data.train_loader(1, 0, 2, "cpu", seed=0)
    with pytest.raises(ValueError, match="too few for 7 processes: write more of them"):
        build(shards).train_loader(1, 0, 7, "cpu", seed=0)
    with pytest.raises(ValueError, match="use a batch_size of at most 12"):
        build(shards).train_loader(13, 0, 2, "cpu", seed=0)


@pytest.mark.parametrize(
    ("dataset", "package"),
    [("wds/", "webdataset"), ("hfds/x", "datasets"), ("hfids/x", "datasets")],
)
def test_a_missing_package_is_named(shards, monkeypatch, dataset, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs {package}: type `pip install {package}`"):
        build(shards, dataset)
