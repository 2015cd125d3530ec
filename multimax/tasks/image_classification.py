"""Image classification with a DeiT: any normalizer in attention and in the output layer."""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from timm.data import Mixup
from torch import Tensor, nn

from multimax.data.images import IMAGE_DATA
from multimax.data.images.base import ImageData
from multimax.data.images.made import made_images
from multimax.losses import output_loss
from multimax.models.registry import IMAGE_CLASSIFIERS
from multimax.normalizers import Normalizer
from multimax.options import NotNegative, Probability, Rate, Section
from multimax.recording import NormalizerRecorder
from multimax.tasks.base import (
    DataSets,
    Sections,
    Task,
    batch_size_per_process,
    check_counted,
    check_finite,
    describe_model,
    inspected_split,
    made_sizes,
)

INSPECTED_IMAGES = 2000  # of each process: all of the small test split
INSPECTED_AT_ONCE = 50  # the scores of all tokens are held, unlike in training


class ImageLoss(Section):
    """The loss of image classification; mixup and cutmix give soft targets."""

    label_smoothing: Rate = Field(description="share of the target that is spread over all classes")
    mixup: NotNegative = Field(description="alpha of mixup; 0 switches it off")
    cutmix: NotNegative = Field(description="alpha of cutmix; 0 switches it off")
    mixup_switch_prob: Probability = Field(
        description="probability of cutmix where a batch can have either"
    )


class ImageClassification(Task):
    """A model on labelled images; metrics are top-1 and top-5 accuracy in percent and the loss.

    Arguments and errors are those of `multimax.tasks.build_task`.
    """

    data_kind: ClassVar[str] = "image data set"
    data_sets: ClassVar[DataSets] = IMAGE_DATA
    models = IMAGE_CLASSIFIERS
    model_arguments: ClassVar[tuple[str, ...]] = (
        "attention",
        "output",
        "num_classes",
        "image_size",
        "in_channels",
    )
    sections: ClassVar[Sections] = {"loss": ImageLoss}
    unit = "images"
    monitor = "valid/top1"
    higher_is_better = True

    def __init__(
        self,
        config: Any,
        source: ImageData,
        model: nn.Module,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.data: ImageData = source
        self.model: nn.Module = model
        self.open_loaders(self.data, config, rank, world_size, device)
        self.label_smoothing: float = config.loss.label_smoothing
        batch_size = batch_size_per_process(config, world_size)
        self.mixup: Mixup | None = _build_mixup(config.loss, self.data.num_classes, batch_size)

    @classmethod
    def make_data(cls, config: Any, world_size: int) -> ImageData:
        options = config.data.given()
        return made_images(options.pop("name"), options, *made_sizes(config, world_size))

    @classmethod
    def model_options(cls, config: Any, source: ImageData) -> dict[str, Any]:
        return config.model.given() | {
            "attention": config.attention.given(),
            "output": config.output.given(),
            "num_classes": source.num_classes,
            "image_size": source.image_size,
            "in_channels": source.channels,
        }

    @property
    def output(self) -> Normalizer:
        """The output layer's normalizer, a part of the model."""
        return cast(Normalizer, self.model.output)

    def describe(self) -> dict[str, str]:
        sizes = ", ".join(f"{size:,} {split}" for split, size in self.data.sizes.items())
        attention = next(m for name, m in self.model.named_modules() if name.endswith("normalizer"))
        side = self.data.image_size
        return {
            "data": f"{self.data.name}: {sizes} images of {side} x {side}",
            "model": describe_model(self.model),
            "attention": str(attention),
            "output": str(self.output),
        }

    def weight(self, batch: tuple[Tensor, Tensor]) -> int:
        return len(batch[1])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch
        if self.mixup is None:
            return output_loss(
                self.output, model(images), targets, label_smoothing=self.label_smoothing
            )
        # timm mixes in place and smooths the labels while it mixes them.
        images, soft_targets = self.mixup(images.clone(), targets)
        return output_loss(self.output, model(images), soft_targets)

    def evaluate(
        self, model: nn.Module, split: str, reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        totals = torch.zeros(4, dtype=torch.float64)
        for images, targets in self.evaluation_batches(split):
            scores = model(images)
            output = cast(Normalizer, model.output)
            loss = output_loss(output, scores, targets, reduction="sum")
            order = output.in_order(scores).topk(min(5, scores.size(-1)), dim=-1).indices
            ranked = order == targets[:, None]
            counts = [ranked[:, 0].sum(), ranked.sum(), loss, torch.tensor(len(targets))]
            totals += torch.stack([count.double().cpu() for count in counts])
        top1, top5, loss, count = reduce(totals.to(self.device)).tolist()
        check_counted(split, count, self.splits[split], self.unit)
        check_finite(split, loss / count)
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}

    def inspect(self, model: nn.Module) -> dict[str, dict[str, float]]:
        split = inspected_split(self.splits)
        left = INSPECTED_IMAGES
        with NormalizerRecorder(model) as recorder:
            for images, _ in self.evaluation_batches(split):
                for part in images[:left].split(INSPECTED_AT_ONCE):
                    cast(Normalizer, model.output)(model(part))
                left -= len(images)
                if left <= 0:
                    break
        return recorder.summary()


def _build_mixup(options: ImageLoss, num_classes: int, batch_size: int) -> Mixup | None:
    if not (options.mixup or options.cutmix):
        return None
    if batch_size % 2:
        raise ValueError(
            f"mixup pairs the images of a batch, which has {batch_size} per process: make "
            "trainer.batch_size / (processes x trainer.accumulation) even, or set loss.mixup=0 "
            "and loss.cutmix=0"
        )
    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        switch_prob=options.mixup_switch_prob,
        label_smoothing=options.label_smoothing,
        num_classes=num_classes,
    )
