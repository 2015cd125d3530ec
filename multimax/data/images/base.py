"""What every image data set offers to a task: its facts and its loaders."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from multimax.data.loading import EvalLoader, TrainLoader

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) normalized float32, labels (B,) int64


@dataclass
class ImageData(ABC):
    """An image classification data set.

    Attributes:
        name: name in tables and in the first lines of a run.
        num_classes: number of classes.
        class_names: by label.
        image_size: height and width of the batches, in pixels.
        channels: of the batches.
        sizes: number of examples by split; "train" and, where they exist, "valid" and "test".
    """

    name: str
    num_classes: int
    class_names: list[str]
    image_size: int
    channels: int
    sizes: dict[str, int]

    @abstractmethod
    def train_loader(
        self, batch_size: int, rank: int, world_size: int, device: torch.device | str, seed: int
    ) -> TrainLoader:
        """Loader of the split "train".

        Args:
            batch_size: per process.
            rank: of this process.
            world_size: number of processes.
            device: where the batches are wanted.
            seed: >= 0, of order and augmentation; the same on all ranks.

        Raises:
            ValueError: the split is smaller than one batch over all ranks, or a value is out of
                range.
        """

    @abstractmethod
    def eval_loader(
        self, split: str, batch_size: int, rank: int, world_size: int, device: torch.device | str
    ) -> EvalLoader:
        """Loader of any split without augmentation; arguments as for `train_loader`.

        Raises:
            ValueError: the data set has no such split, or a value is out of range.
        """

    def check_split(self, split: str) -> None:
        """Raise ValueError for a split that the data set does not have."""
        if split not in self.sizes:
            raise ValueError(
                f"data set {self.name!r} has no split {split!r}; it has: {', '.join(self.sizes)}"
            )
