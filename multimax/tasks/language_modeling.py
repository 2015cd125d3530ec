"""Language modelling: any normalizer in attention and in the output layer."""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from multimax.data.text import TEXT_DATA
from multimax.data.text.blocks import TextBatch, TextData
from multimax.data.text.made import made_text
from multimax.data.text.source import TextSource
from multimax.data.vocabulary import Vocabulary
from multimax.models.adaptive import AdaptiveOutput
from multimax.models.output import Output
from multimax.models.registry import LANGUAGE_MODELS
from multimax.models.transformer import LanguageModel
from multimax.normalizers import Normalizer
from multimax.options import Rate, Section
from multimax.recording import NormalizerRecorder
from multimax.tasks.base import (
    DataSets,
    Sections,
    Task,
    check_counted,
    check_not_diverged,
    describe_model,
    inspected_split,
    made_sizes,
)

INSPECTED_BATCHES = 4  # of an evaluation split
INSPECTED_ROWS = 64  # of each: an output row of WikiText-103 has 267,744 entries
EPSILON = 0.01  # what `smoothed_perplexity` spreads evenly over the vocabulary


class TokenLoss(Section):
    """The loss of a prediction of tokens."""

    label_smoothing: Rate = Field(description="share of the target that is spread over all words")


class LanguageModeling(Task):
    """A Transformer that predicts each token of a text from those before it.

    Metrics of a split, of which every token counts once:

    - `loss`: the output normalizer's own loss per token; nats for SoftMax and MultiMax.
    - `perplexity`: exp of the mean negative log-likelihood of a token; depends on the vocabulary.
    - `word_perplexity`: the same per word, where the words are those between white space and the
      line ends, as WikiText counts them. It compares over vocabularies; of a vocabulary of words
      it is the perplexity.
    - `bits_per_byte`: of the text in UTF-8.

    The likelihood of a token to which a sparse output normalizer gives nothing is 0, so that there
    is no perplexity. Instead, `smoothed_perplexity`, `smoothed_word_perplexity` and
    `smoothed_bits_per_byte` are those of the mixture of its distribution (weight 0.99) and the
    uniform one over the vocabulary (`EPSILON` = 0.01): what Martins et al., Sparse Text Generation,
    EMNLP 2020, call epsilon-perplexity. The test split has them of every output, to compare with.

    A batch is counted in blocks. Arguments and errors are those of `multimax.tasks.build_task`.
    """

    data_kind: ClassVar[str] = "text data set"
    data_sets: ClassVar[DataSets] = TEXT_DATA
    models = LANGUAGE_MODELS
    model_arguments: ClassVar[tuple[str, ...]] = (
        "vocabulary_size",
        "padding_index",
        "attention",
        "output",
    )
    sections: ClassVar[Sections] = {"loss": TokenLoss}
    unit = "tokens"
    monitor = "valid/loss"
    higher_is_better = False

    def __init__(
        self,
        config: Any,
        source: TextSource,
        model: nn.Module,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.data: TextData = source.load()
        self.fingerprint: str = self.data.vocabulary.fingerprint
        self.model: LanguageModel = cast(LanguageModel, model)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.open_loaders(self.data, config, rank, world_size, device)
        self.label_smoothing: float = config.loss.label_smoothing

    @classmethod
    def make_data(cls, config: Any, world_size: int) -> TextSource:
        options = config.data.given()
        return made_text(options.pop("name"), options, *made_sizes(config, world_size))

    @staticmethod
    def vocabulary(source: TextSource) -> Vocabulary:
        return source.vocabulary

    @classmethod
    def model_options(cls, config: Any, source: TextSource) -> dict[str, Any]:
        return config.model.given() | {
            "attention": config.attention.given(),
            "output": config.output.given(),
            "vocabulary_size": source.vocabulary.size,
            "padding_index": source.vocabulary.padding_index,
        }

    def describe(self) -> dict[str, str]:
        data, model = self.data, self.model
        sizes = ", ".join(f"{size:,} {split}" for split, size in data.sizes.items())
        attention = next(m for m in model.decoder.layers.modules() if isinstance(m, Normalizer))
        return {
            "data": f"{data.name}: {sizes} tokens, vocabulary of {data.vocabulary.size:,}, "
            f"blocks of {data.block_size}",
            "model": describe_model(model),
            "attention": str(attention),
            "output": str(_normalizers(model.output)[0]),
        }

    def weight(self, batch: TextBatch) -> int:
        return batch.tokens

    def loss(self, model: nn.Module, batch: TextBatch) -> Tensor:
        features = model(batch.inputs)
        return self.model.output.loss(features, batch.targets, label_smoothing=self.label_smoothing)

    def evaluate(
        self, model: nn.Module, split: str, reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        output = cast(LanguageModel, model).output
        sparse = output.sparse
        smoothed = sparse or split == "test"
        totals = torch.zeros(3, dtype=torch.float64)
        for batch in self.evaluation_batches(split):
            counts = batch.targets != self.model.padding_index
            features, targets = model(batch.inputs)[counts], batch.targets[counts]
            loss = output.loss(features, targets, reduction="sum")
            nll = smoothed_negative_log_likelihood(output, features, targets) if smoothed else loss
            totals += torch.stack([loss, nll, loss.new_tensor(len(targets))]).cpu()
        loss, nll, count = reduce(totals.to(self.device)).tolist()
        check_counted(split, count, self.splits[split], self.unit)
        check_not_diverged(split, loss / count, (nll if sparse else loss) / self.data.words[split])
        metrics = {"loss": loss / count}
        if not sparse:
            metrics |= self._likelihood_metrics(split, loss, count)
        if smoothed:
            metrics |= self._likelihood_metrics(split, nll, count, "smoothed_")
        return metrics

    def _likelihood_metrics(
        self, split: str, nll: float, count: float, prefix: str = ""
    ) -> dict[str, float]:
        """Perplexities and bits of a split from its negative log-likelihood, in nats."""
        return {
            f"{prefix}perplexity": math.exp(nll / count),
            f"{prefix}word_perplexity": math.exp(nll / self.data.words[split]),
            f"{prefix}bits_per_byte": nll / math.log(2) / self.data.bytes[split],
        }

    def inspect(self, model: nn.Module) -> dict[str, dict[str, float]]:
        split = inspected_split(self.splits)
        with NormalizerRecorder(model) as recorder:
            for batch in islice(self.evaluation_batches(split), INSPECTED_BATCHES):
                # A block at a time: its scores are held, unlike in training.
                features = torch.cat([model(block) for block in batch.inputs.split(1)])
                features = features[batch.targets != self.model.padding_index]
                cast(LanguageModel, model).output.probabilities(features[:INSPECTED_ROWS])
        return recorder.summary()


def smoothed_negative_log_likelihood(
    output: Output | AdaptiveOutput, features: Tensor, targets: Tensor
) -> Tensor:
    """The negative logarithm of the smoothed probability of the targets, summed, in nats.

    Args:
        output: the output layer.
        features: (tokens, dim).
        targets: (tokens,) int64.
    """
    if output.sparse:
        log_p = output.log_probabilities(features)
        log_p = log_p.gather(-1, targets.unsqueeze(-1))
    else:  # without a matrix of the size of the vocabulary
        log_p = -output.loss(features, targets, reduction="none")
    return -torch.log((1 - EPSILON) * log_p.exp() + EPSILON / output.words).sum()


def _normalizers(output: nn.Module) -> list[Normalizer]:
    return [module for module in output.modules() if isinstance(module, Normalizer)]
