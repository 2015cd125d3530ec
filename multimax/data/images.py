"""The image data sets, and the registry that builds one from its name."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from multimax.data.image_data import ImageData
from multimax.data.image_tensors import fashion_mnist, fashion_mnist_subset
from multimax.data.timm_images import timm_images

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
        ValueError: the name or an option is unknown (the message lists the known ones), an option
            is out of range, or the files are not what they should be.
    """
    if name not in IMAGE_DATA:
        raise ValueError(f"unknown image data set {name!r}; known: {', '.join(IMAGE_DATA)}")
    known = list(inspect.signature(IMAGE_DATA[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"image data set {name!r} has no option {', '.join(unknown)}; "
            f"it has: {', '.join(known)}"
        )
    return IMAGE_DATA[name](**options)
