"""Synthetic tasks for a language model: the tokens of an answer, each after those before it."""

from typing import Any, ClassVar, cast

from torch import Tensor, nn

from multimax.data.synthetic import (
    MULTI_TOKEN_RECALL_DATA,
    RECALL_DATA,
    REVERSE_DATA,
    SORT_DATA,
)
from multimax.data.synthetic.base import NOT_COUNTED, Batch
from multimax.models.registry import LANGUAGE_MODELS
from multimax.models.transformer import LanguageModel
from multimax.tasks.base import DataSets
from multimax.tasks.language_modeling import LanguageModeling
from multimax.tasks.retrieval import SyntheticTask


class Answering(SyntheticTask):
    """A sequence whose answer a language model gives token by token.

    The measures are `accuracy`, in percent of the answer's tokens, each predicted after the right
    ones before it, and `exact_match`, in percent of the sequences: those whose whole answer is
    right, which is what greedy decoding gets right. The loss is the output normalizer's own, of the
    answer alone.
    """

    models = LANGUAGE_MODELS
    model_arguments: ClassVar[tuple[str, ...]] = LanguageModeling.model_arguments
    measured = ("accuracy", "exact_match")
    monitor = "valid/accuracy"
    higher_is_better = True

    @classmethod
    def model_options(cls, config: Any, source: Any) -> dict[str, Any]:
        return config.model.given() | {
            "attention": config.attention.given(),
            "output": config.output.given(),
            "vocabulary_size": source.vocabulary_size,
            "padding_index": NOT_COUNTED,
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        counts = batch.targets != NOT_COUNTED
        output = cast(LanguageModel, self.model).output
        return output.loss(model(batch.inputs)[counts], batch.targets[counts])

    def measures(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        counts = batch.targets != NOT_COUNTED  # as many in each sequence
        features, targets = model(batch.inputs)[counts], batch.targets[counts]
        output = cast(LanguageModel, model).output
        loss = output.loss(features, targets, reduction="none")
        right = output.log_probabilities(features).argmax(-1) == targets
        loss, right = (each.view(len(batch.targets), -1) for each in (loss, right))
        return loss.mean(1), 100 * right.float().mean(1), 100 * right.all(1).float()

    def call_normalizers(self, model: nn.Module, batch: Batch) -> None:
        features = model(batch.inputs)[batch.targets != NOT_COUNTED]
        cast(LanguageModel, model).output.probabilities(features)


class AssociativeRecall(Answering):
    """Multi-query associative recall, see `MultiQueryRecall`."""

    data_sets: ClassVar[DataSets] = RECALL_DATA


class MultiTokenRecall(Answering):
    """Recall of values of several tokens, see `multimax.data.synthetic.sequences`."""

    data_sets: ClassVar[DataSets] = MULTI_TOKEN_RECALL_DATA


class Reverse(Answering):
    """The tokens of a sequence in reverse, see `multimax.data.synthetic.sequences`."""

    data_sets: ClassVar[DataSets] = REVERSE_DATA


class Sort(Answering):
    """The tokens of a sequence in order, see `multimax.data.synthetic.sequences`."""

    data_sets: ClassVar[DataSets] = SORT_DATA
