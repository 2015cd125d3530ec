"""Image data sets that timm reads, with DeiT's augmentation: ImageNet in folders, and others."""

from pathlib import Path
from typing import Any

from timm.data.dataset import ImageDataset
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform

from multimax.data.augmentation import check_probability
from multimax.data.image_data import ImageData
from multimax.data.image_files import FileImageData

EVAL_CROP = 0.875  # of the shorter side: 224 pixels out of 256
_STREAMS = ("wds", "tfds", "hfids")
_FOLDERS = (
    "type data.root=/path/to/imagenet, a folder with train/ and val/ in which each class has a "
    "folder of images (or train.tar and val.tar with the same inside)"
)


def timm_images(
    root: str | Path | None = None,
    dataset: str = "",
    num_classes: int | None = None,
    title: str | None = None,
    train_split: str = "train",
    valid_split: str = "val",
    image_size: int = 224,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.3,
    random_erasing: float = 0.25,
    repeated_augmentation: int = 3,
    num_workers: int = 8,
) -> ImageData:
    """An image data set that timm reads, with the augmentation of DeiT.

    Images are resized bicubically; evaluation takes the centre (224 pixels of 256). The split
    "valid" is all there is for evaluation, as is usual for ImageNet.

    Args:
        root: folder of the data.
        dataset: "" for folders or tar files of images; "hfds/..." (Hugging Face) or "torch/..."
            (torchvision), as in timm.
        num_classes: what is expected; None takes the number that is found.
        title: name in tables; None is `dataset`, or the name of `root`.
        train_split: name of the training split; for folders, the folder's.
        valid_split: name of the validation split.
        image_size: height and width in pixels.
        auto_augment: policy string of timm; None switches it off.
        color_jitter: strength; timm, like DeiT, applies it only without `auto_augment`.
        random_erasing: in [0, 1], probability of pixel noise in a rectangle.
        repeated_augmentation: >= 1; 1 shows each image once an epoch.
        num_workers: processes that load images, for each rank.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: an option is out of range, the splits differ in their classes, or their number
            is not `num_classes`.

    Source: Touvron et al., DeiT, ICML 2021.
    """
    check_probability("random_erasing", random_erasing)
    for field, value, least in (
        ("image_size", image_size, 1),
        ("repeated_augmentation", repeated_augmentation, 1),
        ("num_workers", num_workers, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{field} must be an integer >= {least}, got {value!r}")
    if dataset.partition("/")[0].lower() in _STREAMS:
        raise ValueError(
            f"dataset={dataset!r} is a stream, which can neither be shuffled exactly nor be shared "
            "out to processes exactly: unpack it to folders, or use hfds/... or torch/..."
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
    return FileImageData(
        name=title or dataset or Path(str(root)).name,
        num_classes=len(classes),
        class_names=classes,
        image_size=image_size,
        channels=3,
        sizes={split: len(images) for split, images in splits.items()},
        splits=splits,
        train_transform=create_transform(
            is_training=True, auto_augment=auto_augment, color_jitter=color_jitter, **shared
        ),
        eval_transform=create_transform(crop_pct=EVAL_CROP, **shared),
        random_erasing=random_erasing,
        repeated_augmentation=repeated_augmentation,
        num_workers=num_workers,
    )


def _open(dataset: str, root: str | Path | None, split: str) -> Any:
    if dataset:
        try:
            return create_dataset(dataset, root=root and str(root), split=split)
        except (RuntimeError, AssertionError) as error:  # missing files, an unknown name
            raise FileNotFoundError(f"{dataset} cannot be read from {root}: {error}") from error
    if root is None:
        raise ValueError(f"no folder of images is given: {_FOLDERS}")
    # timm would go on with `root` itself if there were no folder for the split.
    places = [Path(root) / split, Path(root) / f"{split}.tar"]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise FileNotFoundError(f"there is no {places[0]}: {_FOLDERS}")
    try:
        images = ImageDataset(str(place))
    except RuntimeError as error:  # timm's, for a folder without images
        raise FileNotFoundError(f"{error}; {_FOLDERS}") from error
    images._max_retries = 1  # timm would put the next image in the place of a damaged one
    return images


def _check_classes(splits: dict[str, Any], num_classes: int | None) -> list[str]:
    """Class names by label, the same ones in both splits."""
    train, valid = (_classes(images) for images in splits.values())
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


def _classes(images: Any) -> list[str]:
    source = getattr(images, "reader", images)
    index = getattr(source, "class_to_idx", None) or source.class_name_to_idx
    return sorted(index, key=index.__getitem__)
