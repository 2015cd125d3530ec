import gzip
import random
import struct

import numpy as np
import pytest
import torch

from multimax.data.images import IMAGE_DATA, build_image_data
from multimax.data.images.tensors import stratified_choice
from multimax.data.loading import derive_seed

PLAIN = dict(crop_padding=0, horizontal_flip=0.0)
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def plain():
    return build_image_data("fashion_mnist_subset", **PLAIN)


@pytest.fixture(scope="module")
def augmented():
    return build_image_data("fashion_mnist_subset", random_erasing=0.5)


def pixels(data, images):
    return ((images * data.std + data.mean) * 255).round().to(torch.uint8)


def assert_same(got, expected):
    assert len(got) == len(expected) > 0
    for (images, labels), (expected_images, expected_labels) in zip(got, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_the_embedded_data(plain):
    assert plain.name == "fashion_mnist_subset"
    assert plain.sizes == {"train": 7000, "valid": 1000, "test": 2000}
    assert (plain.num_classes, plain.image_size, plain.channels) == (10, 28, 1)
    assert plain.class_names[0] == "T-shirt/top"
    assert plain.class_names[9] == "Ankle boot"
    for split, size in plain.sizes.items():
        assert plain.splits[split][1].bincount().tolist() == [size // 10] * 10


def test_no_image_is_in_two_splits_and_valid_size_moves_images_between_them(plain):
    whole = build_image_data("fashion_mnist_subset", valid_size=0)
    assert whole.sizes == {"train": 8000, "test": 2000}

    def rows(data, *splits):
        return sorted(row.numpy().tobytes() for s in splits for row in data.splits[s][0])

    assert rows(plain, "train", "valid") == rows(whole, "train")
    assert rows(plain, "test") == rows(whole, "test")
    assert len(set(rows(plain, *SPLITS))) == 10_000


def test_the_held_out_part_is_always_the_same_and_holds_all_classes(plain):
    torch.manual_seed(123)
    again = build_image_data("fashion_mnist_subset")
    assert torch.equal(again.splits["valid"][0], plain.splits["valid"][0])
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    chosen = stratified_choice(labels, 10)
    assert labels[chosen].bincount().tolist() == [5, 3, 2]
    assert stratified_choice(labels, 37).sum() == 37
    assert not torch.equal(chosen.nonzero()[:, 0], torch.arange(10))


def test_normalization_is_that_of_the_training_split(plain):
    images = torch.cat([images for images, _ in plain.eval_loader("train", 512, 0, 1, "cpu")])
    assert images.dtype == torch.float32
    assert abs(images.double().mean()) < 1e-5
    assert abs(images.double().std() - 1) < 1e-4


@pytest.mark.slow
def test_an_epoch_shows_each_image_once_with_its_label_in_a_new_order(plain):
    loader = plain.train_loader(500, 0, 1, "cpu", seed=0)
    assert len(loader) == 14
    known = {
        row.numpy().tobytes(): int(label) for row, label in zip(*plain.splits["train"], strict=True)
    }
    orders = []
    for epoch in (0, 1):
        batches = list(loader.batches(epoch))
        images = pixels(plain, torch.cat([images for images, _ in batches]))
        labels = torch.cat([labels for _, labels in batches])
        assert labels.dtype == torch.int64
        assert [known[row.numpy().tobytes()] for row in images] == labels.tolist()
        assert {row.numpy().tobytes() for row in images} == known.keys()
        orders.append(labels)
    assert not torch.equal(*orders)
    other_seed = plain.train_loader(500, 0, 1, "cpu", seed=1)
    assert not torch.equal(next(other_seed.batches(0))[1], orders[0][:500])


def test_ranks_share_the_global_batch(plain):
    whole = list(plain.train_loader(600, 0, 1, "cpu", seed=0).batches(3))
    shares = [list(plain.train_loader(200, r, 3, "cpu", seed=0).batches(3)) for r in range(3)]
    assert [len(share) for share in shares] == [11, 11, 11]
    joined = [
        (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.slow
def test_batches_start_anywhere_and_leave_the_global_random_state_alone(augmented):
    def make():
        return augmented.train_loader(300, 1, 2, "cpu", seed=7)

    loader = make()
    full = list(loader.batches(2))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for start in (0, 4, len(loader) - 1):
        assert_same(list(loader.batches(2, start)), full[start:])
        assert_same(list(make().batches(2, start=start)), full[start:])
    assert list(loader.batches(2, len(loader))) == []
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


def test_augmentation_differs_by_epoch_batch_rank_and_seed(plain):
    erasing = build_image_data("fashion_mnist_subset", **PLAIN, random_erasing=1.0)

    def erased(seed=0, rank=0, epoch=0, index=0):
        loaders = [data.train_loader(100, rank, 2, "cpu", seed) for data in (plain, erasing)]
        (before, _), (after, _) = (next(loader.batches(epoch, index)) for loader in loaders)
        return (before != after).flatten().tolist()

    places = [erased(), erased(seed=1), erased(rank=1), erased(epoch=1), erased(index=1)]
    assert erased() == places[0]
    for i, place in enumerate(places):
        assert any(place)
        assert place not in places[:i]


def test_each_place_has_a_seed_of_its_own():
    keys = [(0, 1), (1, 0), (0, 0), (1, 1), (0, 0, 1), (0, 1, 0)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_covers_each_example_once_in_order(augmented, split, world_size):
    loaders = [augmented.eval_loader(split, 170, r, world_size, "cpu") for r in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    assert sum(len(loader) for loader in loaders) == len(batches)
    images, labels = augmented.splits[split]
    assert torch.equal(pixels(augmented, torch.cat([images for images, _ in batches])), images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), labels)
    assert all(len(labels) <= 170 for _, labels in batches)


def test_more_ranks_than_examples():
    data = build_image_data("fashion_mnist_subset", valid_size=2)
    counts = [len(list(data.eval_loader("valid", 8, rank, 5, "cpu"))) for rank in range(5)]
    assert sum(counts) == 2


def test_bad_requests(plain):
    with pytest.raises(ValueError, match="no split 'val'; it has: train, valid, test"):
        plain.eval_loader("val", 10, 0, 1, "cpu")
    with pytest.raises(ValueError, match="use a batch_size of at most 3500"):
        plain.train_loader(4000, 0, 2, "cpu", 0)
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        plain.train_loader(0, 0, 1, "cpu", 0)
    with pytest.raises(ValueError, match="rank must be in"):
        plain.eval_loader("test", 10, 2, 2, "cpu")


def test_the_registry_lists_what_it_knows():
    assert list(IMAGE_DATA) == ["fashion_mnist_subset", "fashion_mnist", "imagenet", "timm"]
    with pytest.raises(ValueError, match="known: fashion_mnist_subset, fashion_mnist, imagenet"):
        build_image_data("mnist")
    with pytest.raises(ValueError, match="no option root; it has: valid_size, crop_padding"):
        build_image_data("fashion_mnist_subset", root="/data")
    for bad in (-1, 8000, 0.5):
        with pytest.raises(ValueError, match=f"valid_size={bad} must be"):
            build_image_data("fashion_mnist_subset", valid_size=bad)


# The IDX files of Fashion-MNIST, made of the embedded images.


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def files(tmp_path):
    """Writes the four files, unzipped, and returns their folder and their arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(40, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(20, dtype=np.uint8) % 10,
    }
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path, arrays


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(files, zipped):
    root, arrays = files
    if zipped:
        for name in arrays:
            content = (root / name).read_bytes()
            (root / f"{name}.gz").write_bytes(gzip.compress(content))
            (root / name).unlink()
    data = build_image_data("fashion_mnist", root=str(root), valid_size=10)
    assert data.sizes == {"train": 30, "valid": 10, "test": 20}
    assert data.splits["valid"][1].bincount().tolist() == [1] * 10
    images = torch.tensor(arrays["t10k-images-idx3-ubyte"])[:, None]
    assert torch.equal(data.splits["test"][0], images)
    assert data.splits["test"][1].tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def test_other_data_in_the_same_format(files):
    root, _ = files
    digits = [str(i) for i in range(10)]
    data = build_image_data("fashion_mnist", root=root, valid_size=0, class_names=digits)
    assert data.class_names == digits
    with pytest.raises(ValueError, match="label 9 in split 'train', but class_names has only 5"):
        build_image_data("fashion_mnist", root=root, valid_size=0, class_names=digits[:5])


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            IMAGES,
            lambda content: content[:-1],
            "31359 bytes of data, but its header promises 31360",
        ),
        (IMAGES, lambda content: content + b"x", "31361 bytes of data"),
        (IMAGES, lambda content: content[:10], "it is no IDX file of 3-dimensional bytes"),
        (IMAGES, lambda content: b"", "begins with nothing"),
        (IMAGES, lambda content: b"\0\0\x0d\3" + content[4:], "begins with 00 00 0d 03, not with"),
        (LABELS, lambda content: b"\0\0\x08\3" + content[4:], "not with 00 00 08 01"),
        (LABELS, lambda content: idx(np.zeros(39, np.uint8)), "40 images but 39 labels"),
        (IMAGES, lambda content: idx(np.zeros((40, 28, 27), np.uint8)), "must be square"),
    ],
)
def test_damaged_idx_files(files, name, change, message):
    root, _ = files
    (root / name).write_bytes(change((root / name).read_bytes()))
    with pytest.raises(ValueError, match=message):
        build_image_data("fashion_mnist", root=root)


def test_missing_and_truncated_files_say_where_to_get_them(files):
    root, _ = files
    with pytest.raises(ValueError, match=r"data\.root=/path/to/fashion-mnist"):
        build_image_data("fashion_mnist")
    zipped = gzip.compress((root / LABELS).read_bytes())
    (root / f"{LABELS}.gz").write_bytes(zipped[:-9])
    with pytest.raises(ValueError, match=rf"{LABELS}\.gz is truncated or damaged .*dataset-fash"):
        build_image_data("fashion_mnist", root=root)
    (root / f"{LABELS}.gz").write_bytes(zipped[:12] + b"\xff" + zipped[13:])
    with pytest.raises(ValueError, match=rf"{LABELS}\.gz is truncated or damaged"):
        build_image_data("fashion_mnist", root=root)
    (root / f"{LABELS}.gz").unlink()
    (root / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{LABELS} exists; .*dataset-fashion-mnist"):
        build_image_data("fashion_mnist", root=root)
