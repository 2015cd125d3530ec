"""What the trainer asks of a task; a task knows its data, its model and its loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from multimax.data.loading import TrainLoader


class Task(ABC):
    """Data, model and loss of one of the paper's tasks.

    Attributes:
        model: the network; the trainer moves it to its device and wraps it.
        train_loader: training batches of this process.
        splits: names of the evaluation splits, each with its number of examples.
        monitor: the figure that picks the best checkpoint, such as "valid/top1".
        higher_is_better: whether `monitor` is to rise.
        unit: what a batch is counted in, such as "images".
        fingerprint: of what gives the weights their meaning beside the model, such as the
            vocabulary; a checkpoint with another one is refused.
        notes: what a reader of the figures has to know, such as the signature of BLEU; as JSON.
    """

    model: nn.Module
    train_loader: TrainLoader
    splits: dict[str, int]
    monitor: str
    higher_is_better: bool
    unit: str
    fingerprint: str = ""
    notes: Mapping[str, Any] = {}

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
        """Figures of one split over all processes; `reduce` sums a tensor over them."""

    @abstractmethod
    def inspect(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Figures of each normalizer on a few evaluation batches, by module name."""
