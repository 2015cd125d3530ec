"""What the trainer asks of a task; a task knows its data, its model and its loss."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multimax.data.loading import EvalLoader, LoadedData, TrainLoader
from multimax.models.registry import Models, build_model
from multimax.options import Section
from multimax.registry import build

DataSets = Mapping[str, Callable[..., Any]]
Sections = Mapping[str, type[Section]]

MADE_UPDATES = 2  # that made data is enough for, where its data set does not say how large it is
LARGEST_LOSS = 700  # nats; beyond it the perplexity is no number
DIVERGED = "training has diverged. Lower optimizer.lr or set trainer.clip_norm"


class DivergedError(FloatingPointError):
    """A loss over the data of all processes is not finite, and so in each of them."""


class Task(ABC):
    """Data, model and loss of a task.

    Attributes:
        data_kind: what its data sets are called in messages.
        data_sets: what `config.data` can name.
        models: what `config.model` can name.
        model_arguments: arguments of its models that the task fills in, which are no settings.
        sections: parts of the configuration that are the task's own, such as `loss`.
        unit: what a batch is counted in, such as "images".
        monitor: the metric that picks the best checkpoint, such as "valid/top1".
        higher_is_better: whether `monitor` is to rise.
        model: the network; the trainer moves it to its device and wraps it.
        train_loader: training batches of this process.
        eval_loaders: evaluation batches of this process, by split.
        splits: names of the evaluation splits, each with its number of examples.
        fingerprint: of what gives the weights their meaning beside the model, such as the
            vocabulary; a checkpoint with another one is refused.
        data_fingerprint: of the data, wherever its files lie; a run on other data is another one.
        before_batch: called before each batch of an evaluation; an exception ends it.
        notes: what a reader of the metrics has to know, such as the signature of BLEU; as JSON.
    """

    data_kind: ClassVar[str]
    data_sets: ClassVar[DataSets]
    models: ClassVar[Models]
    model_arguments: ClassVar[tuple[str, ...]]
    sections: ClassVar[Sections] = {}
    unit: ClassVar[str]
    monitor: ClassVar[str]
    higher_is_better: ClassVar[bool]

    model: nn.Module
    train_loader: TrainLoader
    eval_loaders: dict[str, EvalLoader]
    splits: dict[str, int]
    fingerprint: str = ""
    data_fingerprint: str = ""
    before_batch: Callable[[], None] = staticmethod(lambda: None)
    notes: Mapping[str, Any] = {}

    @classmethod
    def open_data(cls, config: Any) -> Any:
        """The data set that `config.data` names; of text, only the vocabulary is read when needed.

        Raises:
            ValueError, FileNotFoundError: as `multimax.tasks.build_task`, of the data.
        """
        options = config.data.given()
        return build(cls.data_kind, cls.data_sets, options.pop("name"), options)

    @classmethod
    def make_data(cls, config: Any, world_size: int) -> Any:
        """Random data of the shapes and sizes that `config.data` names, as `open_data` returns it.

        It needs no files: for dry runs, and for plans. Each evaluation split is about one batch for
        every process.

        Args:
            config: as in `multimax.tasks.build_task`.
            world_size: number of processes.

        Raises:
            ValueError: the task makes none, or the data set does not say how large it is.
        """
        raise ValueError(f"task={config.task.name} has no made data: leave trainer.dry_run=false")

    @staticmethod
    def vocabulary(source: Any) -> Any:
        """What the numbers in a data set stand for, which has a fingerprint; None if nothing."""
        return None

    @classmethod
    @abstractmethod
    def model_options(cls, config: Any, source: Any) -> dict[str, Any]:
        """Name and options of the model that `config` describes, as `build_model` takes them."""

    @classmethod
    def build_model(cls, config: Any, source: Any) -> nn.Module:
        """The model that `config` describes, with new weights.

        Args:
            config: `model`, `attention` and `output` are read.
            source: as `open_data` returns it, which decides how large input and output are.

        Raises:
            ValueError: an option of the model or a normalizer is out of range.
        """
        return build_model(cls.models, **cls.model_options(config, source))

    def open_loaders(
        self, data: LoadedData, config: Any, rank: int, world_size: int, device: torch.device
    ) -> None:
        """Set splits and loaders, with the batch sizes of `config.trainer`.

        Raises:
            ValueError: the training split is smaller than one batch over all processes.
        """
        self.device = device
        self.data_fingerprint = data.fingerprint
        self.splits = {name: size for name, size in data.sizes.items() if name != "train"}
        share = rank, world_size, device
        self.train_loader = data.train_loader(
            batch_size_per_process(config, world_size), *share, config.seed
        )
        self.eval_loaders = {
            split: data.eval_loader(split, config.trainer.eval_batch_size, *share)
            for split in self.splits
        }

    def evaluation_batches(self, split: str) -> Iterator[Any]:
        """What the loader of an evaluation split gives, with `before_batch` in between."""
        for batch in self.eval_loaders[split]:
            self.before_batch()
            yield batch

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What a reader wants to know before training starts: data, model, normalizers."""

    @abstractmethod
    def weight(self, batch: Any) -> int:
        """Units in a batch; losses of several batches are averaged with this weight."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean training loss of a batch; `model` is `self.model` as wrapped by the trainer."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, split: str, reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Metrics of one split over all processes; `reduce` sums a tensor over them."""

    @abstractmethod
    def inspect(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Measures of each normalizer on a few evaluation batches, by module name."""


def inspected_split(splits: Iterable[str]) -> str:
    """The split that normalizers are measured on: that of the reported metrics."""
    names = list(splits)
    return "test" if "test" in names else names[0]


def batch_size_per_process(config: Any, world_size: int) -> int:
    """Units in one batch of one process, of which `trainer.accumulation` make an update."""
    return config.trainer.batch_size // (world_size * config.trainer.accumulation)


def made_sizes(config: Any, world_size: int) -> tuple[int, int | None]:
    """Units of each evaluation split of made data, and of as much to train on as is asked for.

    The second is None where the length of the training depends on how much there really is.
    """
    options = config.trainer
    enough = None if options.epochs else MADE_UPDATES * options.batch_size
    return options.eval_batch_size * world_size, enough


def describe_model(model: nn.Module) -> str:
    """Class and number of parameters."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__}, {parameters:,} parameters"


def check_counted(split: str, counted: float, expected: int, unit: str) -> None:
    """Raise RuntimeError unless every example of a split was evaluated exactly once."""
    if counted != expected:
        raise RuntimeError(f"evaluated {counted:.0f} of {expected} {split} {unit}")


def check_not_diverged(split: str, loss_per_token: float, *others: float) -> None:
    """Raise DivergedError for means, in nats, that have no perplexity."""
    if not all(mean < LARGEST_LOSS for mean in (loss_per_token, *others)):
        raise DivergedError(f"the {split} loss is {loss_per_token:.4g} per token: {DIVERGED}")


def check_finite(split: str, loss: float) -> None:
    """Raise DivergedError for a loss that is infinite or not a number."""
    if not math.isfinite(loss):
        raise DivergedError(f"the {split} loss is {loss}: {DIVERGED}")
