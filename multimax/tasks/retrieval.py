"""Synthetic tasks, and those that a layer of attention has to retrieve items for."""

import math
from abc import abstractmethod
from collections.abc import Callable
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from multimax.data.synthetic import MAX_RETRIEVAL_DATA, RETRIEVAL_DATA
from multimax.data.synthetic.base import Batch, SyntheticData
from multimax.data.synthetic.k_mean import KMean
from multimax.data.synthetic.maximum import Maximum
from multimax.losses import output_loss
from multimax.models.registry import MAX_RETRIEVAL_MODELS, RETRIEVAL_MODELS
from multimax.normalizers import Normalizer
from multimax.recording import NormalizerRecorder
from multimax.registry import build
from multimax.tasks.base import (
    DataSets,
    Task,
    check_counted,
    check_finite,
    describe_model,
    inspected_split,
    made_sizes,
)

INSPECTED_BATCHES = 4  # of an evaluation split


class SyntheticTask(Task):
    """A task whose examples are drawn.

    Metrics of a split are the loss and the measures, at the setting of training; the split "test"
    also has the measures at each other setting, under their name and that of the setting, such as
    "mse_n4096". Every example counts once. Arguments and errors are those of
    `multimax.tasks.build_task`.

    Attributes:
        measured: names of the measures.
    """

    measured: ClassVar[tuple[str, ...]]

    data_kind: ClassVar[str] = "synthetic data set"
    model_arguments: ClassVar[tuple[str, ...]] = ("features", "outputs", "attention", "output")
    unit = "examples"

    def __init__(
        self,
        config: Any,
        source: SyntheticData,
        model: nn.Module,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.data: SyntheticData = source
        self.model: nn.Module = model
        self.open_loaders(source, config, rank, world_size, device)

    @classmethod
    def make_data(cls, config: Any, world_size: int) -> SyntheticData:
        """The data set itself, which is made anyway, with small evaluation splits."""
        evaluated, _ = made_sizes(config, world_size)
        options = config.data.given() | {"valid_size": evaluated, "test_size": evaluated}
        return build(cls.data_kind, cls.data_sets, options.pop("name"), options)

    def describe(self) -> dict[str, str]:
        data, modules = self.data, self.model.named_modules()
        sizes = ", ".join(f"{size:,} {split}" for split, size in data.sizes.items())
        found = next(module for name, module in modules if name.endswith("attn.normalizer"))
        return {
            "data": f"{data.name}: endless training examples; {sizes} examples of each of "
            + ", ".join(name for name in data.settings["test"] if name),
            "model": describe_model(self.model),
            "attention": str(found),
        }

    def weight(self, batch: Batch) -> int:
        return len(batch.targets)

    @abstractmethod
    def measures(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Loss and measures of each example in evaluation, each (rows,)."""

    @abstractmethod
    def call_normalizers(self, model: nn.Module, batch: Batch) -> None:
        """Call the normalizer of each layer, which the loss of an output layer does not."""

    def evaluate(
        self, model: nn.Module, split: str, reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        named = self.data.settings[split]
        settings = list(dict.fromkeys(named.values()))
        totals = torch.zeros(len(settings), 2 + len(self.measured), dtype=torch.float64)
        for batch in self.evaluation_batches(split):
            measures = [measure.double().sum().cpu() for measure in self.measures(model, batch)]
            count = torch.tensor(float(self.weight(batch)), dtype=torch.float64)
            totals[settings.index(batch.setting)] += torch.stack([*measures, count])
        rows = reduce(totals.to(self.device)).tolist()
        for *_, count in rows:
            check_counted(split, count, self.splits[split], self.unit)
        means = {
            setting: [total / row[-1] for total in row[:-1]]
            for setting, row in zip(settings, rows, strict=True)
        }
        for loss, *_ in means.values():
            check_finite(split, loss)
        metrics = {"loss": means[named[""]][0]}
        for name, setting in named.items():
            for measure, mean in zip(self.measured, means[setting][1:], strict=True):
                metrics[f"{measure}_{name}" if name else measure] = mean
        return metrics

    def inspect(self, model: nn.Module) -> dict[str, dict[str, float]]:
        split = inspected_split(self.splits)
        with NormalizerRecorder(model) as recorder:
            for batch in islice(self.evaluation_batches(split), INSPECTED_BATCHES):
                self.call_normalizers(model, batch)
        return recorder.summary()


class Retrieval(SyntheticTask):
    """k-mean retrieval, see `KMean`; the measure is `mse`, the squared error of a number.

    1 is the error of predicting zero. The model predicts the mean of the marked values, and is not
    told how many are marked: the factor sqrt(marked) of the target is the task's, so that an error
    at another number of them is that of the attention.
    """

    data_sets: ClassVar[DataSets] = RETRIEVAL_DATA
    models = RETRIEVAL_MODELS
    model_arguments: ClassVar[tuple[str, ...]] = ("features", "outputs", "attention")
    measured = ("mse",)
    monitor = "valid/mse"
    higher_is_better = False

    @classmethod
    def model_options(cls, config: Any, source: KMean) -> dict[str, Any]:
        unused = type(config.output)(name="softmax")
        if config.output.model_dump() != unused.model_dump():
            raise ValueError(
                f"output.name={config.output.name} is for nothing in task=retrieval, whose models "
                "have no output layer: leave output=softmax"
            )
        return config.model.given() | {
            "attention": config.attention.given(),
            "features": source.features,
            "outputs": source.outputs,
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.measures(model, batch)[0].mean()

    def measures(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        predicted = math.sqrt(batch.setting.relevant) * model(batch.inputs)
        error = (predicted.float() - batch.targets).square().mean(1)
        return error, error

    def call_normalizers(self, model: nn.Module, batch: Batch) -> None:
        model(batch.inputs)


class MaxRetrieval(SyntheticTask):
    """Max retrieval, see `Maximum`; the measure is `accuracy`, in percent.

    The loss is the output normalizer's own; nats for SoftMax and MultiMax.
    """

    data_sets: ClassVar[DataSets] = MAX_RETRIEVAL_DATA
    models = MAX_RETRIEVAL_MODELS
    measured = ("accuracy",)
    monitor = "valid/accuracy"
    higher_is_better = True

    @classmethod
    def model_options(cls, config: Any, source: Maximum) -> dict[str, Any]:
        return config.model.given() | {
            "attention": config.attention.given(),
            "output": config.output.given(),
            "features": source.features,
            "outputs": source.outputs,
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return output_loss(cast(Normalizer, self.model.output), model(batch.inputs), batch.targets)

    def measures(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        scores, output = model(batch.inputs), cast(Normalizer, model.output)
        loss = output_loss(output, scores, batch.targets, reduction="none")
        right = output.in_order(scores).argmax(-1) == batch.targets
        return loss, 100 * right.float()

    def call_normalizers(self, model: nn.Module, batch: Batch) -> None:
        cast(Normalizer, model.output)(model(batch.inputs))
