"""What every image data set offers to a task: its facts and its loaders."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from multimax.data.loading import LoadedData

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) normalized float32, labels (B,) int64


@dataclass
class ImageData(LoadedData):
    """An image classification data set.

    Attributes:
        name, sizes: as in `LoadedData`.
        num_classes: number of classes.
        class_names: by label.
        image_size: height and width of the batches, in pixels.
        channels: of the batches.
    """

    name: str
    num_classes: int
    class_names: list[str]
    image_size: int
    channels: int
    sizes: dict[str, int]

    @cached_property
    @abstractmethod
    def fingerprint(self) -> str:
        """Tells data sets apart, wherever their files lie; see `LoadedData`."""
