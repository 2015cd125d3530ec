"""The image data sets, and the registry that builds one from its name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from multimax.data.images.base import ImageData
from multimax.data.images.tensors import fashion_mnist, fashion_mnist_subset
from multimax.data.images.timm_images import timm_images
from multimax.registry import build

IMAGE_DATA: dict[str, Callable[..., ImageData]] = {
    "fashion_mnist_subset": fashion_mnist_subset,
    "fashion_mnist": fashion_mnist,
    "imagenet": partial(timm_images, num_classes=1000, title="imagenet"),
    "timm": timm_images,
}


def build_image_data(name: str, **options: Any) -> ImageData:
    """An image data set.

    Args:
        name: a key of `IMAGE_DATA`.
        options: arguments of its function, such as `root` or `valid_size`.

    Raises:
        FileNotFoundError: the files are not where `root` says.
        ValueError: see `multimax.registry.build`; or the files are not what they should be.
    """
    return build("image data set", IMAGE_DATA, name, options)
