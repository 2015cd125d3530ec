"""The loss that belongs to the output normalizer, as a criterion of fairseq."""

from dataclasses import dataclass, field
from typing import Any

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from multimax.integrations.fairseq.output import (
    NormalizedAdaptiveSoftmax,
    NormalizedOutput,
    decoder_output,
)


@dataclass
class OutputLossConfig(FairseqDataclass):
    """The options of `multimax_output_loss`."""

    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of the target that is spread over all words"}
    )
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("multimax_output_loss", dataclass=OutputLossConfig)
class OutputLoss(FairseqCriterion):
    """The loss of the output normalizer, `multimax.losses.output_loss`, in nats per token.

    That of a sparse output is no likelihood of what it gives: no perplexity is logged.

    Args:
        task: the task.
        sentence_avg: divide by the number of sentences, not of tokens.
        label_smoothing: in [0, 1); spread over all words, the target included.
    """

    def __init__(self, task: Any, sentence_avg: bool, label_smoothing: float) -> None:
        super().__init__(task)
        self.sentence_avg = sentence_avg
        self.label_smoothing = label_smoothing

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """The summed loss, the number to divide its gradient by, and what is logged.

        Raises:
            ValueError: the output layer has no normalizer, or the loss has no such option.
        """
        output = decoder_output(model.decoder)
        if not isinstance(output, NormalizedOutput | NormalizedAdaptiveSoftmax):
            raise ValueError(
                "multimax_output_loss is for an output normalizer other than plain softmax: use "
                "fairseq's own criterion, or choose --output-normalizer"
            )
        features = model(**sample["net_input"], features_only=True)
        target = model.get_targets(sample, features)
        loss = output.loss(features[0], target, self.label_smoothing, self.padding_idx)
        sample_size = target.size(0) if self.sentence_avg else sample["ntokens"]
        logged = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample_size,
        }
        return loss, sample_size, logged

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log the mean loss over the processes."""
        total = sum(log["loss"] for log in logging_outputs)
        sample_size = sum(log["sample_size"] for log in logging_outputs)
        metrics.log_scalar("loss", total / sample_size, sample_size, round=3)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
