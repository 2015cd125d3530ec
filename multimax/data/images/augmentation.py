"""Augmentation of a batch of small images at once, from an explicit random generator."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from multimax.options import Probability, section_of, validate

Padding = Annotated[int, Field(ge=0, le=1000)]

ERASING_ATTEMPTS = 10  # timm's number of rectangles tried


@dataclass(frozen=True)
class Augmentation:
    """Which random changes a training batch gets; 0 switches one off.

    Attributes:
        crop_padding: pixels of black added on each side before a random crop of the old size.
        horizontal_flip: in [0, 1], probability.
        random_erasing: in [0, 1], probability of noise in a random rectangle.

    Raises:
        ValueError: a value is out of range.
    """

    crop_padding: Padding = 2
    horizontal_flip: Probability = 0.5
    random_erasing: Probability = 0.0

    def __post_init__(self) -> None:
        validate(section_of(Augmentation), vars(self))

    def __call__(self, images: Tensor, mean: Tensor, std: Tensor, generator: Generator) -> Tensor:
        """Augmented and normalized images.

        Args:
            images: (B, C, H, W) uint8, on any device.
            mean: (C, 1, 1), of pixels in [0, 1], on the images' device; `std` likewise.
            std: see `mean`.
            generator: on the CPU, so that a seed crops, flips and erases alike on all devices.
        """
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, generator)
        if self.horizontal_flip:
            images = random_flip(images, self.horizontal_flip, generator)
        images = normalize(images, mean, std)
        if self.random_erasing:
            images = random_erase(images, self.random_erasing, generator)
        return images


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images as float32 with the given mean and standard deviation taken out."""
    return (images.float() / 255 - mean) / std


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Each image moved by up to `padding` pixels in both directions; black moves in.

    Args:
        images: (B, C, H, W), any dtype.
        padding: pixels.
        generator: on the CPU.
    """
    batch, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator)
    rows = (top + torch.arange(height)).to(images.device)
    columns = (left + torch.arange(width)).to(images.device)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(batch, device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """Each image mirrored left to right with the given probability; (B, C, H, W) of any dtype."""
    chosen = torch.rand(len(images), generator=generator) < probability
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)


def random_erase(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """A random rectangle of each chosen image replaced by standard normal noise.

    The rectangle has 2 to 33 % of the area and an aspect ratio of 0.3 to 3.3; one that does not
    fit is drawn again. The law is that of `timm.data.RandomErasing(mode="pixel")`, which would
    draw from the global random state.

    Args:
        images: (B, C, H, W) float, normalized.
        probability: in [0, 1], for each image.
        generator: on the CPU; the noise itself is drawn on the images' device.

    Source: Zhong et al., Random Erasing Data Augmentation, AAAI 2020, with DeiT's pixel noise.
    """
    batch, _, height, width = images.shape
    area, aspect = torch.rand(2, ERASING_ATTEMPTS, batch, generator=generator)
    top, left, lot = torch.rand(3, batch, generator=generator)
    area = height * width * (0.02 + area * (1 / 3 - 0.02))
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / 0.3))
    rows, columns = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (rows < height) & (columns < width)
    first = fits.int().argmax(0, keepdim=True)
    chosen = (lot < probability) & fits.any(0)
    inside_rows = _interval(height, rows.gather(0, first)[0], top)
    inside_columns = _interval(width, columns.gather(0, first)[0], left)
    erased = chosen[:, None, None] & inside_rows[:, :, None] & inside_columns[:, None, :]
    device = images.device
    noise_seed = int(torch.randint(2**62, (), generator=generator))
    noise_generator = torch.Generator(device).manual_seed(noise_seed)
    noise = torch.randn(images.shape, generator=noise_generator, device=device, dtype=images.dtype)
    return torch.where(erased[:, None].to(device), noise, images)


def _interval(size: int, length: Tensor, position: Tensor) -> Tensor:
    """(B, size) bool: `length` consecutive pixels, placed by `position` in [0, 1)."""
    start = (position * (size - length + 1)).floor()
    pixel = torch.arange(size)
    return (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
