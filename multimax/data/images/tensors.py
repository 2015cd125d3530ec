"""Small image data sets that are held in memory: Fashion-MNIST, embedded or from its files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimax.data.images.augmentation import Augmentation, Padding, normalize
from multimax.data.images.base import Batch, ImageData
from multimax.data.loading import (
    EvalLoader,
    TrainLoader,
    batches_per_epoch,
    derive_seed,
    embedded_file,
    share,
    unzipped,
)
from multimax.files import digest_parts
from multimax.options import Probability, Whole, checked

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_IDX_FILES = {"train": "train", "test": "t10k"}  # split -> how its two file names begin
_IDX_SOURCE = (
    "the Debian package dataset-fashion-mnist (/usr/share/datasets/fashion-mnist) and "
    "https://github.com/zalandoresearch/fashion-mnist have these files"
)

Split = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8, labels (N,) int64


@dataclass
class TensorImageData(ImageData):
    """An image data set in memory.

    Attributes:
        splits: images and labels by split.
        augmentation: what training batches get.
        mean: (C, 1, 1), over the pixels of the training split, in [0, 1].
        std: (C, 1, 1), likewise.
    """

    splits: dict[str, Split]
    augmentation: Augmentation
    mean: Tensor
    std: Tensor

    @cached_property
    def fingerprint(self) -> str:
        """Of all pixels and labels."""
        tensors = [tensor for split in self.splits.values() for tensor in split]
        return digest_parts([*self.splits, *(tensor.numpy().tobytes() for tensor in tensors)])

    def make_train_loader(self, *arguments: Any) -> TrainLoader:
        return _TensorTrainLoader(self, *arguments)

    def make_eval_loader(self, split: str, *arguments: Any) -> EvalLoader:
        return _TensorEvalLoader(self, split, *arguments)


class _TensorTrainLoader(TrainLoader):
    def __init__(self, data, batch_size, rank, world_size, device, seed) -> None:
        self.length = batches_per_epoch(data.name, data.sizes["train"], batch_size, world_size)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.augmentation = seed, data.augmentation
        self.images, self.labels, self.mean, self.std = _on(device, data, "train")

    def __len__(self) -> int:
        return self.length

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        for index in range(start, self.length):
            first = (index * self.world_size + self.rank) * self.batch_size
            chosen = order[first : first + self.batch_size]
            generator.manual_seed(derive_seed(self.seed, epoch, index, self.rank))
            images = self.augmentation(self.images[chosen], self.mean, self.std, generator)
            yield images, self.labels[chosen]


class _TensorEvalLoader(EvalLoader):
    def __init__(self, data, split, batch_size, rank, world_size, device) -> None:
        self.batch_size = batch_size
        self.examples = share(data.sizes[split], rank, world_size)
        self.images, self.labels, self.mean, self.std = _on(device, data, split)

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(self.examples.start, self.examples.stop, self.batch_size):
            chosen = slice(first, min(first + self.batch_size, self.examples.stop))
            yield normalize(self.images[chosen], self.mean, self.std), self.labels[chosen]


def _on(device: torch.device, data: TensorImageData, split: str) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in (*data.splits[split], data.mean, data.std))


@checked
def fashion_mnist_subset(
    valid_size: Whole = 1000,
    crop_padding: Padding = 2,
    horizontal_flip: Probability = 0.5,
    random_erasing: Probability = 0.0,
) -> ImageData:
    """The embedded part of Fashion-MNIST: 8,000 images to train on and 2,000 to test on.

    Args:
        valid_size: how many training images are held out as the split "valid", an equal share of
            each class; always the same ones. 0 leaves the split out: nothing is evaluated before
            the end, and the result is that of the last weights.
        crop_padding, horizontal_flip, random_erasing: as in `Augmentation`.

    Raises:
        ValueError: an option is out of range.
    """
    augmentation = Augmentation(crop_padding, horizontal_flip, random_erasing)
    file = embedded_file("fashion_mnist_subset", "fashion_mnist_10k.npz")
    return replace(_embedded_subset(file, valid_size), augmentation=augmentation)


@lru_cache(maxsize=1)  # the jobs of a sweep share it
def _embedded_subset(file: Path, valid_size: int) -> TensorImageData:
    with np.load(file) as arrays:
        splits = {
            split: (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in _IDX_FILES
        }
    return _in_memory(
        "fashion_mnist_subset", splits, FASHION_MNIST_CLASSES, valid_size, Augmentation()
    )


@checked
def fashion_mnist(
    root: str | Path | None = None,
    class_names: Sequence[str] = FASHION_MNIST_CLASSES,
    valid_size: Whole = 1000,
    crop_padding: Padding = 2,
    horizontal_flip: Probability = 0.5,
    random_erasing: Probability = 0.0,
) -> ImageData:
    """Fashion-MNIST, or another data set in its four IDX files, gzipped or not.

    Args:
        root: folder with train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz,
            t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz.
        class_names: by label.
        valid_size, crop_padding, horizontal_flip, random_erasing: as in `fashion_mnist_subset`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what its name says, or an option is out of range.
    """
    augmentation = Augmentation(crop_padding, horizontal_flip, random_erasing)
    if root is None:
        raise ValueError(
            "fashion_mnist needs the folder of its files: data.root=/path/to/fashion-mnist; "
            + _IDX_SOURCE
        )
    splits = {split: _read_split(Path(root), begin) for split, begin in _IDX_FILES.items()}
    return _in_memory("fashion_mnist", splits, class_names, valid_size, augmentation)


def _read_split(root: Path, begin: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(root / f"{begin}-images-idx3-ubyte", dimensions=3)
    labels = read_idx(root / f"{begin}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{root}: {len(images)} images but {len(labels)} labels in the {begin}-* files: "
            f"they do not belong together; {_IDX_SOURCE}"
        )
    if not images.size:
        raise ValueError(f"{root}: the {begin}-* files hold no images; {_IDX_SOURCE}")
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"{root}: images must be square, got {images.shape[1:]} pixels")
    return images, labels


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes (the MNIST format).

    Args:
        path: without ".gz"; `path` with ".gz" is read if it exists, else `path` itself.
        dimensions: how many the array must have.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the file is damaged, truncated or of another type.
    """
    zipped = path.with_name(path.name + ".gz")
    file = zipped if zipped.is_file() else path
    if not file.is_file():
        raise FileNotFoundError(f"neither {zipped} nor {path} exists; {_IDX_SOURCE}")
    try:
        content = unzipped(file) if file == zipped else file.read_bytes()
    except ValueError as error:
        raise ValueError(f"{error}; {_IDX_SOURCE}") from error
    start = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"{file} begins with {content[:4].hex(' ') or 'nothing'}, not with {magic.hex(' ')}: "
            f"it is no IDX file of {dimensions}-dimensional bytes; {_IDX_SOURCE}"
        )
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).astype(np.int64)
    if len(content) - start != shape.prod():
        raise ValueError(
            f"{file} holds {len(content) - start} bytes of data, but its header promises "
            f"{shape.prod()}: it is truncated or damaged; {_IDX_SOURCE}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _in_memory(
    name: str,
    arrays: dict[str, tuple[np.ndarray, np.ndarray]],
    class_names: Sequence[str],
    valid_size: int,
    augmentation: Augmentation,
) -> TensorImageData:
    splits = {
        split: (torch.tensor(images)[:, None], torch.tensor(labels, dtype=torch.int64))
        for split, (images, labels) in arrays.items()
    }
    for split, (_, labels) in splits.items():
        if labels.max() >= len(class_names):
            raise ValueError(
                f"{name}: label {int(labels.max())} in split {split!r}, but class_names has only "
                f"{len(class_names)} names"
            )
    train_images, train_labels = splits["train"]
    if valid_size >= len(train_labels):
        raise ValueError(
            f"data.valid_size={valid_size} must be less than {len(train_labels)}, the number of "
            "training images"
        )
    if valid_size:
        held_out = stratified_choice(train_labels, valid_size)
        splits = {
            "train": (train_images[~held_out], train_labels[~held_out]),
            "valid": (train_images[held_out], train_labels[held_out]),
            "test": splits["test"],
        }
    pixels = splits["train"][0].double() / 255
    return TensorImageData(
        name=name,
        num_classes=len(class_names),
        class_names=list(class_names),
        image_size=pixels.size(-1),
        channels=pixels.size(1),
        sizes={split: len(labels) for split, (_, labels) in splits.items()},
        splits=splits,
        augmentation=augmentation,
        mean=pixels.mean((0, 2, 3))[:, None, None].float(),
        std=pixels.std((0, 2, 3), correction=0)[:, None, None].float(),
    )


def stratified_choice(labels: Tensor, count: int) -> Tensor:
    """`count` examples that hold the classes in the proportions of `labels`, always the same ones.

    Args:
        labels: (N,) int64.
        count: in [0, N].

    Returns:
        (N,) bool, True for the chosen ones.
    """
    # A random order within each class, then the examples by their relative rank in their class:
    # any beginning of this order holds all classes in proportion.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    relative_rank = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        relative_rank[members] = (torch.arange(len(members)) + 0.5).double() / len(members)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[relative_rank.argsort(stable=True)[:count]] = True
    return chosen
