"""Image data sets that timm reads, with DeiT's augmentation: ImageNet in folders, and others."""

import os
import tarfile
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, cast

from PIL import Image
from pydantic import AfterValidator, Field
from timm.data import auto_augment as operations_of_timm
from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform

from multimax.data.images.base import ImageData
from multimax.data.images.files import FileImageData
from multimax.data.images.streams import StreamImageData
from multimax.options import Count, NotNegative, Probability, checked

EVAL_CROP = 0.875  # of the shorter side: 224 pixels out of 256
_PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets"}
_SIZES = {  # of the streams: what to do if the number of examples is unknown
    "wds": "list the shards of each split and their number of examples in an _info.json in "
    "data.root, or type both, as in 'data.train_split=\"train-{0000..1023}.tar|1281167\"'",
    "hfids": "take hfds/... in place of hfids/..., which counts them",
}
_FOLDERS = (
    "type data.root=/path/to/imagenet, a folder with train/ and val/ in which each class has a "
    "folder of images (or train.tar and val.tar with the same inside)"
)


def _check_policy(policy: str) -> str:
    try:
        create_transform(32, is_training=True, auto_augment=policy)
    except Exception as error:  # timm asserts, and reads numbers
        raise ValueError(
            f"{error}; a policy of timm begins with rand, augmix, original, originalr, v0, v0r or "
            "3a, as in rand-m9-mstd0.5-inc1; null is none"
        ) from error
    return policy


Policy = Annotated[str, AfterValidator(_check_policy)]
ImageSize = Annotated[int, Field(ge=1, le=16_384)]
Repeats = Annotated[int, Field(ge=1, le=100)]
Workers = Annotated[int, Field(ge=0, le=1024)]


@checked
def timm_images(
    root: str | Path | None = None,
    dataset: str = "",
    num_classes: Count | None = None,
    title: str | None = None,
    train_split: str = "train",
    valid_split: str = "val",
    image_size: ImageSize = 224,
    auto_augment: Policy | None = "rand-m9-mstd0.5-inc1",
    color_jitter: NotNegative = 0.3,
    random_erasing: Probability = 0.25,
    repeated_augmentation: Repeats = 3,
    num_workers: Workers = 8,
) -> ImageData:
    """An image data set that timm reads, with the augmentation of DeiT.

    Images are resized bicubically; evaluation takes the centre (224 pixels of 256). The split
    "valid" is all there is for evaluation, as is usual for ImageNet.

    Args:
        root: folder of the data.
        dataset: "" for folders or tar files of images; "hfds/..." (Hugging Face), "torch/..."
            (torchvision), or a stream (see `StreamImageData`): "wds/" (WebDataset shards) or
            "hfids/..." (Hugging Face without a download), as in timm.
        num_classes: what is expected; None takes the number that is found. WebDataset shards do
            not tell it.
        title: name in tables; None is `dataset`, or the name of `root`.
        train_split: name of the training split; for folders, the folder's; for shards, a name in
            their _info.json or "<pattern>|<number of examples>".
        valid_split: name of the validation split.
        image_size: height and width in pixels.
        auto_augment: policy string of timm; None switches it off.
        color_jitter: strength; timm, like DeiT, applies it only without `auto_augment`.
        random_erasing: probability of pixel noise in a rectangle.
        repeated_augmentation: how often an image occurs in an epoch, each time augmented
            anew; 1 is all a stream can do.
        num_workers: processes that load images, for each rank.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: an option is out of range, a package is missing, the splits differ in their
            classes, their number is not `num_classes`, or a stream does not tell its length.

    Source: Touvron et al., DeiT, ICML 2021.
    """
    streamed = _kind(dataset) in _SIZES
    if streamed and repeated_augmentation != 1:
        raise ValueError(
            f"dataset={dataset!r} is a stream, in which an example cannot be repeated at will: "
            "type data.repeated_augmentation=1"
        )
    splits = {
        "train": _open(dataset, root, train_split),
        "valid": _open(dataset, root, valid_split),
    }
    classes = _check_classes(splits, num_classes)
    # "Prefetcher" means uint8 tensors: normalization and erasing are left to the loader.
    shared: dict[str, Any] = dict(
        input_size=image_size, interpolation="bicubic", use_prefetcher=True
    )
    return (StreamImageData if streamed else FileImageData)(
        name=title or dataset or Path(str(root)).name,
        num_classes=len(classes),
        class_names=classes,
        image_size=image_size,
        channels=3,
        sizes={split: len(images) for split, images in splits.items()},
        splits=splits,
        train_transform=_posterizing_to_black(
            create_transform(
                is_training=True, auto_augment=auto_augment, color_jitter=color_jitter, **shared
            )
        ),
        eval_transform=create_transform(crop_pct=EVAL_CROP, **shared),
        random_erasing=random_erasing,
        repeated_augmentation=repeated_augmentation,
        num_workers=num_workers,
    )


def _posterizing_to_black(transform: Any) -> Any:
    """The transform with posterizing to 0 bits, which timm draws at its largest magnitudes.

    It makes the image black; Pillow 13 refuses it, in about 1 of 650 images of DeiT's recipe.
    """
    for step in transform.transforms:
        operations = [*getattr(step, "ops", ()), *chain(*getattr(step, "policy", ()))]
        for operation in operations:
            if operation.aug_fn is operations_of_timm.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return operations_of_timm.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _kind(dataset: str) -> str:
    return dataset.partition("/")[0].lower()


def _open(dataset: str, root: str | Path | None, split: str) -> Any:
    if dataset:
        return _open_named(dataset, root, split)
    if root is None:
        raise ValueError(f"no folder of images is given: {_FOLDERS}")
    # timm would go on with `root` itself if there were no folder for the split.
    places = [Path(root) / split, Path(root) / f"{split}.tar"]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise FileNotFoundError(f"there is no {places[0]}: {_FOLDERS}")
    if place.is_file():
        return _open_tar(place)
    try:
        images = ImageDataset(str(place))
    except RuntimeError as error:  # timm's, for a folder without images
        raise FileNotFoundError(f"{error}; {_FOLDERS}") from error
    _check_folders(place, images)
    return images


def _open_tar(place: Path) -> ImageDataset:
    try:
        images = ImageDataset(str(place))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{place} is truncated or damaged ({error}): copy it again") from error
    except ValueError as error:  # timm's way with an archive in which it finds nothing
        raise ValueError(f"there is no image in {place}; {_FOLDERS}") from error
    return images


def _check_folders(place: Path, images: ImageDataset) -> None:
    """Raise ValueError for a folder of a class that has no image, which timm would leave out."""
    start = len(str(place)) + 1
    samples = cast(Any, images.reader).samples
    filled = {path[start:].split(os.sep, 1)[0] for path, _ in samples}
    with os.scandir(place) as entries:
        found = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
    if empty := sorted(set(found) - filled):
        raise ValueError(
            f"{len(empty)} class folder(s) of {place} have no image, such as {empty[0]}: fill "
            "them, or delete them in all splits"
        )


def _open_named(dataset: str, root: str | Path | None, split: str) -> Any:
    kind = _kind(dataset)
    package = _PACKAGES.get(kind)
    if package and find_spec(package) is None:
        raise ValueError(f"dataset={dataset!r} needs {package}: type `pip install {package}`")
    if kind == "tfds":
        raise ValueError(f"dataset={dataset!r} is not supported: write it as WebDataset shards")
    if kind == "wds" and root is None:
        raise ValueError(f"dataset={dataset!r} needs data.root=/path/to/shards")
    try:
        images = create_dataset(dataset, root=root and str(root), split=split)
    except (RuntimeError, AssertionError, KeyError, ValueError) as error:
        if kind in _SIZES:
            raise ValueError(f"{_unknown_size(dataset, split)} ({error})") from error
        # missing files, an unknown name
        raise FileNotFoundError(f"{dataset} cannot be read from {root}: {error}") from error
    if kind in _SIZES:
        _check_stream(images, dataset, split)
    return images


def _check_stream(images: Any, dataset: str, split: str) -> None:
    images.reader.dist_num_replicas = 1  # len() is then that of the split, not of a rank
    if not len(images):
        raise ValueError(_unknown_size(dataset, split))
    if _kind(dataset) == "wds" and Path(images.reader.root).is_dir():
        files = [Path(images.reader.root, name) for name in images.reader.split_info.filenames]
        if missing := [str(file) for file in files if not file.exists()]:
            raise FileNotFoundError(f"{len(missing)} shards are missing, such as {missing[0]}")


def _unknown_size(dataset: str, split: str) -> str:
    remedy = _SIZES[_kind(dataset)]
    return f"the number of examples in {split!r} of {dataset!r} is not known: {remedy}"


def _check_classes(splits: dict[str, Any], num_classes: int | None) -> list[str]:
    """Class names by label, the same ones in both splits."""
    train, valid = (_classes(images, num_classes) for images in splits.values())
    if train != valid:
        differing = sorted(set(train) ^ set(valid)) or train
        raise ValueError(
            f"train has {len(train)} classes and valid {len(valid)}, which must be the same ones; "
            f"they differ in {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}"
        )
    if num_classes is not None and num_classes != len(train):
        raise ValueError(
            f"{len(train)} classes were found, not num_classes={num_classes}: "
            f"complete the data or type data.num_classes={len(train)}"
        )
    return train


def _classes(images: Any, num_classes: int | None) -> list[str]:
    source = getattr(images, "reader", images)
    index = getattr(source, "class_to_idx", None) or getattr(source, "class_name_to_idx", None)
    if index:
        return sorted(index, key=index.__getitem__)
    if num_classes is None:
        raise ValueError("the data does not name its classes: type data.num_classes=1000, or so")
    return [str(label) for label in range(num_classes)]
