"""Random images in the place of those of a data set, which need not be there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from multimax.data.images.base import Batch, ImageData
from multimax.data.images.tensors import FASHION_MNIST_CLASSES
from multimax.data.loading import EvalLoader, TrainLoader, batches_per_epoch

# Images to train on, "valid" not yet held out. Sources: Russakovsky et al., ImageNet, IJCV 2015;
# Xiao et al., Fashion-MNIST, 2017; data/embedded/README.md.
TRAINING = {"imagenet": 1_281_167, "fashion_mnist": 60_000, "fashion_mnist_subset": 8_000}
FASHION_MNIST_SIDE = 28  # pixels


@dataclass
class MadeImages(ImageData):
    """Images of standard normal noise with random labels; every batch of a loader is the same."""

    @cached_property
    def fingerprint(self) -> str:
        return "made"

    def make_train_loader(self, *arguments: Any) -> TrainLoader:
        return _TrainLoader(self, *arguments)

    def make_eval_loader(self, split: str, *arguments: Any) -> EvalLoader:
        return _EvalLoader(self, *arguments)

    def batch(self, size: int, device: torch.device) -> Batch:
        """Images (size, C, H, W) and labels (size,)."""
        shape = size, self.channels, self.image_size, self.image_size
        labels = torch.randint(self.num_classes, (size,), device=device)
        return torch.randn(shape, device=device), labels


@dataclass
class _TrainLoader(TrainLoader):
    data: MadeImages
    batch_size: int
    rank: int
    world_size: int
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        images = self.data.sizes["train"]
        self.length: int = batches_per_epoch(
            self.data.name, images, self.batch_size, self.world_size
        )

    def __len__(self) -> int:
        return self.length

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        batch = self.data.batch(self.batch_size, self.device)
        for _ in range(start, self.length):
            yield batch


@dataclass
class _EvalLoader(EvalLoader):
    data: MadeImages
    batch_size: int
    rank: int
    world_size: int
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        yield self.data.batch(self.batch_size, self.device)


def made_images(
    name: str, options: Mapping[str, Any], evaluated: int, trained: int | None
) -> MadeImages:
    """Random images of the size, the classes and the number that a data set has.

    Args:
        name: of the data set, a key of `IMAGE_DATA`.
        options: of it, as the configuration has them.
        evaluated: images of each evaluation split, a batch for every process.
        trained: images to train on where the data set does not say how many it has; None refuses.

    Raises:
        ValueError: the data set does not say how many images or classes it has.
    """
    fashion = name.startswith("fashion_mnist")
    held_out = options.get("valid_size", 1000) if fashion else 0
    train = TRAINING.get(name, trained)
    if train is None:
        raise ValueError(
            f"data.name={name} does not say how many images there are to train on: give the length "
            "as trainer.updates="
        )
    classes = len(FASHION_MNIST_CLASSES) if fashion else options.get("num_classes")
    if name == "imagenet" and classes is None:
        classes = 1000
    if classes is None:
        raise ValueError(
            f"data.name={name} does not say how many classes there are: type data.num_classes="
        )
    splits = ["valid"] * (held_out > 0 or not fashion) + ["test"] * fashion
    return MadeImages(
        name=f"random images like {name}",
        num_classes=classes,
        class_names=[str(label) for label in range(classes)],
        image_size=FASHION_MNIST_SIDE if fashion else options.get("image_size", 224),
        channels=1 if fashion else 3,
        sizes={"train": train - held_out} | dict.fromkeys(splits, evaluated),
    )
