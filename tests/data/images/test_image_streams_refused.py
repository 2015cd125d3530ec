"""Streams that are damaged, too small, or not what their settings say."""

import sys
import tarfile

import pytest
from streams import NAMES, build, build_streamed, picture, write


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


def test_an_unknown_number_of_examples(shards, pictures, tmp_path):
    (tmp_path / "val-0000.tar").symlink_to(shards / "val-0000.tar")
    for split in ("train", "val-{0000..0000}.tar"):
        with pytest.raises(ValueError, match=r"is not known: list the shards .*_info\.json"):
            build(tmp_path, train_split=split, valid_split="val-{0000..0000}.tar|3")
    with pytest.raises(ValueError, match=r"is not known: take hfds/\.\.\. in place of hfids/"):
        build(tmp_path, f"hfids/{pictures}")


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
