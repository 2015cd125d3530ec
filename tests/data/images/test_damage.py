"""Damaged image data: the message begins with the file, and says what to do."""

import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from multimax.data.images import build_image_data
from multimax.data.workers import DataError


@pytest.fixture
def folder(tmp_path):
    """Two classes with two images each in train and val."""
    for split in ("train", "val"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(2):
                pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{number}.png")
    return tmp_path


def build(root, workers=0):
    return build_image_data("timm", root=root, num_workers=workers, image_size=32)


def evaluate(root, workers=0):
    return list(build(root, workers).eval_loader("valid", 2, 0, 1, "cpu"))


def truncate(file):
    file.write_bytes(file.read_bytes()[:2000])


def replace_by_text(file):
    file.write_text("this is no picture")


def break_a_chunk(file):
    content = file.read_bytes()
    file.write_bytes(content[:40] + bytes(4) + content[44:])


def enlarge(file):
    Image.new("1", (14_000, 14_000)).save(file)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [truncate, replace_by_text, break_a_chunk, enlarge])
def test_a_bad_image_is_named_first(folder, workers, damage):
    file = folder / "val" / "b" / "1.png"
    damage(file)
    with pytest.raises(DataError) as error:
        evaluate(folder, workers)
    assert str(error.value).startswith(f"image {file} cannot be read (")
    assert str(error.value).endswith("): replace it")
    assert "Traceback" not in str(error.value)
    if damage is enlarge:
        assert "196000000 pixels" in str(error.value)


def pack(folder, split):
    """`split`.tar in the place of the folder."""
    with tarfile.open(folder / f"{split}.tar", "w") as tar:
        for place in sorted((folder / split).iterdir()):
            tar.add(place, place.name)
    (folder / split).rename(folder / f"unpacked_{split}")
    return folder / f"{split}.tar"


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_truncated_archive(folder, kept):
    file = pack(folder, "train")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"train\.tar is truncated or damaged .*: copy it again"):
        build(folder)


def test_an_archive_without_images(folder):
    with tarfile.open(folder / "train.tar", "w") as tar:
        tar.add(__file__, "a/test.py")
    (folder / "train").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"there is no image in .*train\.tar; type data\.root="):
        build(folder)


def test_a_bad_image_in_an_archive(folder):
    truncate(folder / "val" / "a" / "0.png")
    file = pack(folder, "val")
    with pytest.raises(DataError, match=rf"^image a/0\.png in {file} cannot be read"):
        evaluate(folder)


@pytest.mark.parametrize("splits", [("train", "val"), ("val",), ("train",)])
def test_an_empty_class_is_named(folder, splits):
    for split in splits:
        (folder / split / "c").mkdir()
        (folder / split / "c" / "notes.txt").write_text("to be filled")
        (folder / split / ".cache").mkdir()
    with pytest.raises(ValueError, match=rf"1 class folder.*{splits[0]} have no .* such as c"):
        build(folder)


@pytest.mark.parametrize(("count", "side"), [(0, 28), (2, 0)])
def test_idx_files_without_images(tmp_path, count, side):
    for begin in ("train", "t10k"):
        header = struct.pack(">4I", 0x803, count, side, side)
        (tmp_path / f"{begin}-images-idx3-ubyte").write_bytes(header + bytes(count * side * side))
        labels = struct.pack(">2I", 0x801, count) + bytes(count)
        (tmp_path / f"{begin}-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match=r"the train-\* files hold no images; the Debian package"):
        build_image_data("fashion_mnist", root=tmp_path)


def test_fingerprints_of_archives_and_torchvision_data(folder):
    """Each way to read images tells another content, and none the place."""
    prints = [build(folder).fingerprint]
    other = build_image_data("timm", root=folder, dataset="torch/folder", num_workers=0)
    prints.append(other.fingerprint)
    for split in ("train", "val"):
        pack(folder, split)
    prints.append(build(folder).fingerprint)
    assert prints[0] == prints[1]
    assert len({len(p) for p in prints}) == 1
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert build(moved).fingerprint == prints[2]
    with tarfile.open(moved / "train.tar", "a") as tar:
        tar.add(moved / "unpacked_val" / "a" / "0.png", "a/3.png")
    assert build(moved).fingerprint != prints[2]
