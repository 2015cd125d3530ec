import random
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import RandAugment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from multimax.data.images import build_image_data

TRAIN, VALID = 12, 7
PLAIN = dict(auto_augment=None, color_jitter=0.0, random_erasing=0.0)


def picture(brightness, noise=0):
    """(250, 300) image of one grey, or of noise around it."""
    rng = np.random.default_rng(brightness)
    array = np.full((250, 300, 3), brightness) + noise * rng.standard_normal((250, 300, 3))
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ImageNet-shaped: two classes; training image i is the plain grey 20 i."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count, noise in (("train", TRAIN, 0), ("val", VALID, 60)):
        for i in range(count):
            place = root / split / ("n01440764" if i < count // 2 else "n02102040")
            place.mkdir(parents=True, exist_ok=True)
            picture(20 * i, noise).save(place / f"image_{i}.JPEG", quality=95)
    return root


def build(root, name="timm", **options):
    return build_image_data(name, **{"root": root, "num_workers": 0, **options})


def brightness(images):
    """Which training image each one of a batch is, by its mean grey."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    return ((images * std + mean).mean((1, 2, 3)) * 255 / 20).round().int().tolist()


def assert_same(got, expected):
    assert len(got) == len(expected) > 0
    for (images, labels), (expected_images, expected_labels) in zip(got, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_facts(folder):
    data = build(folder)
    assert data.name == folder.name
    assert data.sizes == {"train": TRAIN, "valid": VALID}
    assert data.class_names == ["n01440764", "n02102040"]
    assert (data.num_classes, data.image_size, data.channels) == (2, 224, 3)
    assert build(folder, "imagenet", num_classes=2).name == "imagenet"


def test_the_augmentation_is_that_of_deit(folder):
    data = build(folder)
    crop, flip, augment, _ = data.train_transform.transforms
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert isinstance(flip, transforms.RandomHorizontalFlip)
    assert isinstance(augment, RandAugment)
    operation = augment.ops[0]
    assert (augment.num_layers, operation.magnitude, operation.magnitude_std) == (2, 9, 0.5)
    assert (data.random_erasing, data.repeated_augmentation) == (0.25, 3)
    jitter = build(folder, auto_augment=None).train_transform.transforms[2]
    assert isinstance(jitter, transforms.ColorJitter)
    assert jitter.brightness == (0.7, 1.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["rand-m10-n3-inc1", "rand-m0-n3", "v0", "original", "augmix-m10"]
)
def test_posterizing_to_no_bits_makes_an_image_black(folder, policy):
    transform = build(folder, auto_augment=policy).train_transform
    random.seed(0)
    for _ in range(100):  # Pillow 13 refuses it
        transform(picture(128, noise=60))
    steps = transform.transforms
    operations = [operation for step in steps for operation in getattr(step, "ops", [])]
    operations += [op for step in steps for pair in getattr(step, "policy", []) for op in pair]
    functions = {op.aug_fn for op in operations if "Posterize" in op.name}
    assert functions
    for function in functions:
        assert np.asarray(function(picture(128), 0)).tolist() == np.zeros((250, 300, 3)).tolist()
        expected = ImageOps.posterize(picture(200), 2)
        assert np.array_equal(np.asarray(function(picture(200), 2)), np.asarray(expected))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_covers_each_example_once_and_crops_the_centre(folder, world_size, num_workers):
    data = build(folder, num_workers=num_workers)
    loaders = [data.eval_loader("valid", 2, rank, world_size, "cpu") for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    assert sum(len(loader) for loader in loaders) == len(batches)
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (VALID, 3, 224, 224)
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1, 1]
    for i, got in enumerate(images):
        file = next((folder / "val").glob(f"*/image_{i}.JPEG"))
        image = Image.open(file).resize((307, 256), Image.Resampling.BICUBIC)
        left, top = round((307 - 224) / 2), 16
        array = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
        expected = (array - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
        torch.testing.assert_close(
            got, torch.tensor(expected).permute(2, 0, 1).float(), rtol=0, atol=1e-5
        )


def test_repeated_augmentation_in_one_process(folder):
    loader = build(folder, **PLAIN).train_loader(6, 0, 1, "cpu", seed=0)
    assert len(loader) == 2
    epochs = []
    for epoch in (0, 1):
        shown = [i for images, _ in loader.batches(epoch) for i in brightness(images)]
        assert len(shown) == TRAIN
        assert [shown.count(i) for i in sorted(set(shown))] == [3, 3, 3, 3]
        epochs.append(shown)
    assert epochs[0] != epochs[1]
    once = build(folder, repeated_augmentation=1, **PLAIN).train_loader(6, 0, 1, "cpu", seed=0)
    shown = [i for images, _ in once.batches(0) for i in brightness(images)]
    assert sorted(shown) == list(range(TRAIN))


def test_repeated_augmentation_spreads_the_copies_over_ranks(folder):
    data = build(folder, **PLAIN)
    loaders = [data.train_loader(2, rank, 3, "cpu", seed=0) for rank in range(3)]
    shown = [
        [i for images, _ in loader.batches(4) for i in brightness(images)] for loader in loaders
    ]
    assert shown[0] == shown[1] == shown[2]
    assert len(set(shown[0])) == 4
    other = data.train_loader(2, 0, 3, "cpu", seed=1)
    assert [i for images, _ in other.batches(4) for i in brightness(images)] != shown[0]
    # The same images on all ranks, each time changed in another way.
    for options in ({"random_erasing": 0.0}, {**PLAIN, "random_erasing": 1.0}):
        data = build(folder, **options)
        ranks = [next(data.train_loader(2, rank, 3, "cpu", 0).batches(4))[0] for rank in range(3)]
        assert not torch.equal(ranks[0], ranks[1])
        assert not torch.equal(ranks[1], ranks[2])


def test_copies_are_augmented_differently_and_labels_belong(folder):
    data = build(folder, random_erasing=1.0)
    batches = list(data.train_loader(6, 0, 1, "cpu", seed=0).batches(0))
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (12, 3, 224, 224)
    assert images.dtype == torch.float32
    assert len({image.double().sum().item() for image in images}) == 12
    plain = build(folder, **PLAIN).train_loader(6, 0, 1, "cpu", seed=0)
    for (_, labels), (greys, plain_labels) in zip(batches, plain.batches(0), strict=True):
        assert labels.dtype == torch.int64
        assert torch.equal(labels, plain_labels)
        assert labels.tolist() == [int(i >= TRAIN // 2) for i in brightness(greys)]


def test_random_erasing_is_switchable(folder):
    greys = next(build(folder, **PLAIN).train_loader(12, 0, 1, "cpu", 0).batches(0))[0]
    noisy = build(folder, **{**PLAIN, "random_erasing": 1.0}).train_loader(12, 0, 1, "cpu", 0)
    changed = next(noisy.batches(0))[0] != greys
    assert (greys[:, 0].amax((1, 2)) == greys[:, 0].amin((1, 2))).all()
    assert (changed.double().mean((1, 2, 3)) > 0.01).all()
    assert (changed.double().mean((1, 2, 3)) < 0.4).all()


@pytest.mark.slow
def test_batches_start_anywhere_whatever_the_workers_and_the_random_state(folder):
    def make(num_workers):
        data = build(folder, num_workers=num_workers)
        return data.train_loader(2, 1, 2, "cpu", seed=7)

    loader = make(0)
    assert len(loader) == 3
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    full = list(loader.batches(2))
    for start in range(3):
        assert_same(list(loader.batches(2, start)), full[start:])
    assert list(loader.batches(2, 3)) == []
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert_same(list(make(2).batches(2, start=1)), full[1:])
    interleaved = zip(loader.batches(2), loader.batches(3), strict=True)
    assert_same([batch for batch, _ in interleaved], full)
    assert not torch.equal(next(loader.batches(3))[0], full[0][0])


def test_tar_files_and_torchvision_data_read_the_same(folder, tmp_path):
    expected = list(build(folder).eval_loader("valid", 4, 0, 1, "cpu"))
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for place in sorted((folder / split).iterdir()):
                tar.add(place, place.name)
    packed = build(tmp_path)
    assert packed.class_names == ["n01440764", "n02102040"]
    assert_same(list(packed.eval_loader("valid", 4, 0, 1, "cpu")), expected)
    other = build(folder, dataset="torch/folder")
    assert other.name == "torch/folder"
    assert_same(list(other.eval_loader("valid", 4, 0, 1, "cpu")), expected)


def test_grey_images_become_rgb(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            picture(120).convert("L").save(tmp_path / split / label / "x.png")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">4I", 0x803, 2, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes([120]) * 2 * 28 * 28)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 2) + b"\0\1")
    for dataset in ("", "torch/fashion_mnist"):
        loader = build(tmp_path, dataset=dataset).eval_loader("valid", 2, 0, 1, "cpu")
        (images, labels), *rest = loader
        assert not rest
        assert images.shape == (2, 3, 224, 224)
        assert brightness(images) == [6, 6]
        assert labels.tolist() == [0, 1]


def test_a_damaged_image_is_named_and_not_replaced(tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            picture(50, noise=50).save(tmp_path / split / label / "x.jpg")
    damaged = tmp_path / "val" / "a" / "x.jpg"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    data = build(tmp_path)
    with pytest.raises(ValueError, match=r"image .*val/a/x\.jpg cannot be read"):
        list(data.eval_loader("valid", 2, 0, 1, "cpu"))


def test_missing_data_says_what_to_type(folder, tmp_path):
    with pytest.raises(ValueError, match=r"type data\.root=/path/to/imagenet, .* train/ and val/"):
        build_image_data("imagenet")
    with pytest.raises(FileNotFoundError, match=r"no .*/train: type data\.root="):
        build(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Found 0 images .* type data\.root="):
        build(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no .*/validation"):
        build(folder, valid_split="validation")
    with pytest.raises(FileNotFoundError, match="torch/cifar10 cannot be read from"):
        build(tmp_path, dataset="torch/cifar10")
    with pytest.raises(FileNotFoundError, match="torch/cifar11 cannot be read from"):
        build(tmp_path, dataset="torch/cifar11")


def test_classes_are_checked(folder, tmp_path):
    with pytest.raises(ValueError, match=r"2 classes were found, not num_classes=1000: .*=2"):
        build(folder, "imagenet")
    for split, labels in (("train", "abc"), ("val", "abd")):
        for label in labels:
            (tmp_path / split / label).mkdir(parents=True)
            picture(9).save(tmp_path / split / label / "x.png")
    with pytest.raises(
        ValueError, match=r"train has 3 classes and valid 3, .* they differ in c, d"
    ):
        build(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dataset="wds/imagenet"), "is a stream"),
        (dict(random_erasing=1.5), "random_erasing=1.5 must be a number in"),
        (
            dict(repeated_augmentation=0),
            r"repeated_augmentation=0 must be a whole number in \[1, 100\]",
        ),
        (dict(num_workers=-1), r"num_workers=-1 must be a whole number in \[0, 1024\]"),
        (dict(image_size=22.4), r"image_size=22.4 must be a whole number in \[1, 16384\]"),
        (dict(workers=1), "no option workers; it has: root, dataset, num_classes"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        build(folder, **options)


def test_a_batch_larger_than_the_data(folder):
    with pytest.raises(ValueError, match="use a batch_size of at most 6"):
        build(folder).train_loader(7, 0, 2, "cpu", seed=0)
