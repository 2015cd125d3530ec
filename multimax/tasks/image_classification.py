"""Image classification with a DeiT: any normalizer in attention and in the output layer."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from timm.data import Mixup
from torch import Tensor, nn

from multimax.data.images import build_image_data
from multimax.losses import output_loss
from multimax.metrics import NormalizerRecorder
from multimax.models.vision import build_vision_transformer
from multimax.normalizers import Normalizer
from multimax.tasks.base import Task

INSPECTED_BATCHES = 4  # of an evaluation split: enough rows for two digits, cheap on one core


class ImageClassification(Task):
    """DeiT on labelled images; figures are top-1 and top-5 accuracy in percent and the loss.

    Args:
        config: the composed configuration; `data`, `model`, `attention`, `output`, `loss` and
            `trainer` are read.
        rank: of this process.
        world_size: number of processes.
        device: where batches go.

    Raises:
        ValueError: an option of the data, the model or a normalizer is out of range.
        FileNotFoundError: the data is not where the configuration says.
    """

    unit = "images"
    monitor = "valid/top1"
    higher_is_better = True

    def __init__(
        self, config: DictConfig, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.data = build_image_data(**_plain(config.data))
        self.splits = {name: size for name, size in self.data.sizes.items() if name != "train"}
        self.model = build_vision_transformer(
            **_plain(config.model),
            attention=_plain(config.attention),
            output=_plain(config.output),
            num_classes=self.data.num_classes,
            image_size=self.data.image_size,
            in_channels=self.data.channels,
        )
        options = config.trainer
        batch_size = options.batch_size // (world_size * options.accumulation)
        self.train_loader = self.data.train_loader(
            batch_size, rank, world_size, device, config.seed
        )
        self._eval_loaders = {
            split: self.data.eval_loader(split, options.eval_batch_size, rank, world_size, device)
            for split in self.splits
        }
        self.device = device
        self.label_smoothing = config.loss.label_smoothing
        self.mixup = _build_mixup(config.loss, self.data.num_classes, batch_size)

    @property
    def output(self) -> Normalizer:
        """The output layer's normalizer, a part of the model."""
        return cast(Normalizer, self.model.output)

    def describe(self) -> dict[str, str]:
        sizes = ", ".join(f"{size:,} {split}" for split, size in self.data.sizes.items())
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        attention = next(m for name, m in self.model.named_modules() if name.endswith("normalizer"))
        side = self.data.image_size
        return {
            "data": f"{self.data.name}: {sizes} images of {side} x {side}",
            "model": f"{type(self.model).__name__}, {parameters:,} parameters",
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
        for images, targets in self._eval_loaders[split]:
            scores = model(images).float()
            loss = output_loss(cast(Normalizer, model.output), scores, targets, reduction="sum")
            ranked = scores.topk(min(5, scores.size(-1)), dim=-1).indices == targets[:, None]
            counts = [ranked[:, 0].sum(), ranked.sum(), loss, torch.tensor(len(targets))]
            totals += torch.stack([count.double().cpu() for count in counts])
        top1, top5, loss, count = reduce(totals.to(self.device)).tolist()
        if count != self.splits[split]:
            raise RuntimeError(f"evaluated {count:.0f} of {self.splits[split]} {split} images")
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}

    def inspect(self, model: nn.Module) -> dict[str, dict[str, float]]:
        split = next(iter(self.splits))
        with NormalizerRecorder(model) as recorder:
            for images, _ in islice(iter(self._eval_loaders[split]), INSPECTED_BATCHES):
                cast(Normalizer, model.output)(model(images))
        return recorder.summary()


def _plain(section: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(section, resolve=True)  # type: ignore[return-value]


def _build_mixup(options: Mapping[str, Any], num_classes: int, batch_size: int) -> Mixup | None:
    for field in ("mixup", "cutmix"):
        if options[field] < 0:
            raise ValueError(f"loss.{field}={options[field]} must be >= 0; 0 switches it off")
    if not 0 <= options["mixup_switch_prob"] <= 1:
        raise ValueError(f"loss.mixup_switch_prob={options['mixup_switch_prob']} must be in [0, 1]")
    if not (options["mixup"] or options["cutmix"]):
        return None
    if batch_size % 2:
        raise ValueError(
            f"mixup pairs the images of a batch, which has {batch_size} per process: make "
            "trainer.batch_size / (processes x trainer.accumulation) even, or set loss.mixup=0 "
            "and loss.cutmix=0"
        )
    return Mixup(
        mixup_alpha=options["mixup"],
        cutmix_alpha=options["cutmix"],
        switch_prob=options["mixup_switch_prob"],
        label_smoothing=options["label_smoothing"],
        num_classes=num_classes,
    )
