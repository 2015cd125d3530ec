"""Image data sets too large for memory: loaders over timm's data sets and transforms."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.dataset import ImageDataset
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, Subset

from multimax.data.images.augmentation import random_erase
from multimax.data.images.base import Batch, ImageData
from multimax.data.images.listing import listing
from multimax.data.loading import (
    EvalLoader,
    TrainLoader,
    batches_per_epoch,
    derive_seed,
    share,
)
from multimax.data.workers import DataError, WorkerLoader
from multimax.files import digest_parts


@dataclass
class FileImageData(ImageData):
    """An image data set on disk.

    Attributes:
        splits: map-style data sets of PIL images and labels, by split.
        train_transform: from a PIL image to a (C, H, W) uint8 tensor, random.
        eval_transform: likewise, deterministic.
        random_erasing: probability.
        repeated_augmentation: how often an example occurs in an epoch, each time augmented anew;
            an epoch keeps its length and sees fewer examples.
        num_workers: processes that load images; 0 loads in the calling process.
    """

    splits: dict[str, Dataset[Any]]
    train_transform: Any
    eval_transform: Any
    random_erasing: float
    repeated_augmentation: int
    num_workers: int

    @cached_property
    def fingerprint(self) -> str:
        """Of the classes, and of what `listing` says of each split."""
        parts = [part for images in self.splits.values() for part in listing(images)]
        return digest_parts([*self.class_names, *parts])

    def make_train_loader(self, *arguments: Any) -> TrainLoader:
        return _FileTrainLoader(self, *arguments)

    def make_eval_loader(self, split: str, *arguments: Any) -> EvalLoader:
        return _FileEvalLoader(self, split, *arguments)


class _FileTrainLoader(TrainLoader):
    def __init__(self, data, batch_size, rank, world_size, device, seed) -> None:
        self.data, self.batch_size, self.rank, self.seed = data, batch_size, rank, seed
        # DeiT's sampler also for one process, where timm's loader factory refuses it.
        self.sampler = RepeatAugSampler(
            data.splits["train"], world_size, rank, num_repeats=data.repeated_augmentation
        )
        self.length = batches_per_epoch(
            data.name, len(self.sampler) * world_size, batch_size, world_size
        )
        # One prefetcher for all epochs: each has a CUDA stream with a memory pool of its own.
        self.prefetcher = build_prefetcher(
            data.splits["train"], batch_size, data.num_workers, device
        )

    def __len__(self) -> int:
        return self.length

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        key = (self.seed, epoch, self.rank)
        self.sampler.set_epoch(derive_seed(self.seed, epoch))
        order = list(self.sampler)
        dataset = _AugmentedImages(self.data.splits["train"], self.data.train_transform, order, key)
        chosen = range(start * self.batch_size, self.length * self.batch_size)
        self.prefetcher.loader = image_loader(
            Subset(dataset, chosen), self.batch_size, self.data.num_workers, self.prefetcher.device
        )
        for index, (images, labels) in enumerate(self.prefetcher, start):
            yield erase(images, self.data.random_erasing, *key, index), labels


class _FileEvalLoader(EvalLoader):
    def __init__(self, data, split, batch_size, rank, world_size, device) -> None:
        images = _Images(data.splits[split], data.eval_transform)
        mine = Subset(images, share(data.sizes[split], rank, world_size))
        self.prefetcher = build_prefetcher(mine, batch_size, data.num_workers, device)

    def __len__(self) -> int:
        return len(self.prefetcher)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.prefetcher)


def erase(images: torch.Tensor, probability: float, *key: int) -> torch.Tensor:
    """Random erasing of a batch, a function of `key` alone."""
    if not probability:
        return images
    # 1 keeps it apart from the augmentation of the example of the same number.
    generator = torch.Generator().manual_seed(derive_seed(*key, 1))
    return random_erase(images, probability, generator)


def build_prefetcher(
    dataset: Dataset[Any], batch_size: int, workers: int, device: torch.device
) -> PrefetchLoader:
    """Batches of the data set in order, normalized on the device; on CUDA, one ahead."""
    loader = image_loader(dataset, batch_size, workers, device)
    return PrefetchLoader(loader, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, device=device)


def image_loader(
    dataset: Dataset[Any], batch_size: int, workers: int, device: torch.device, seed: int = 0
) -> DataLoader:
    """Batches of the data set in order, uint8 in CPU memory; `seed` is that of the workers."""
    return WorkerLoader(
        dataset,
        batch_size,
        num_workers=workers,
        collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
        # Its own, so that the worker seeds are not drawn from the global random state.
        generator=torch.Generator().manual_seed(seed),
    )


class _Images(Dataset):
    """Transformed images of a data set."""

    def __init__(self, dataset: Any, transform: Any) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.load(index)
        return self.transform(image), label

    def load(self, index: int) -> tuple[Any, int]:
        """RGB image and label.

        Raises:
            DataError: the file is damaged, or has more pixels than Pillow reads.
        """
        try:
            image, label = self._decode(index)
        except Exception as error:  # the decoders of a dozen formats have no common class
            reason = str(error) or type(error).__name__
            raise DataError(
                f"{self._place(index)} cannot be read ({reason}): replace it"
            ) from error
        return image if image.mode == "RGB" else image.convert("RGB"), label

    def _decode(self, index: int) -> tuple[Any, int]:
        if not isinstance(self.dataset, ImageDataset):
            return self.dataset[index]
        # timm's own way would put the next image in the place of a damaged one.
        stream, label = cast(Any, self.dataset.reader)[index]
        return Image.open(stream).convert("RGB"), -1 if label is None else label

    def _place(self, index: int) -> str:
        if isinstance(self.dataset, ImageDataset):
            name = self.dataset.filename(index, absolute=True)
            root = Path(str(getattr(self.dataset.reader, "root", "")))
            return f"image {name} in {root}" if root.suffix == ".tar" else f"image {name}"
        samples = getattr(self.dataset, "samples", None)
        return f"image {samples[index][0]}" if samples else f"image number {index}"


class _AugmentedImages(_Images):
    """Images in the order of an epoch, each augmented from a seed of its own.

    So neither the number of workers nor what was drawn before changes an image.
    """

    def __init__(self, dataset: Any, transform: Any, order: list[int], key: tuple) -> None:
        super().__init__(dataset, transform)
        self.order, self.key = order, key

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.load(self.order[index])
        with seeded(derive_seed(*self.key, index)):
            return self.transform(image), label


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The three global CPU generators seeded inside, and as before outside."""
    torch_generator = torch.default_generator  # torch.manual_seed would reset CUDA too
    states = random.getstate(), np.random.get_state(), torch_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch_generator.set_state(states[2])
