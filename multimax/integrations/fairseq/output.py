"""The output layers of fairseq's decoders, full and adaptive, over any normalizer."""

from collections.abc import Mapping
from typing import Any

import torch
from fairseq.modules import AdaptiveSoftmax
from torch import Tensor, nn

from multimax.functional import to_compute_precision
from multimax.losses import output_loss
from multimax.normalizers import Normalizer, build_normalizer
from multimax.normalizers.base import check_has_loss


def normalize_output(decoder: nn.Module, normalizer: Mapping[str, Any]) -> None:
    """Give a decoder of fairseq another output normalizer, in place; names of parameters stay.

    Args:
        decoder: its `output_projection` or `adaptive_softmax` is changed.
        normalizer: name and options. Plain SoftMax leaves the decoder as it is. Head and bands of
            an adaptive softmax get one each.

    Raises:
        ValueError: the output layer is of a kind that is not known here.
    """
    if dict(normalizer) == {"name": "softmax"}:
        return
    check_has_loss(build_normalizer(**normalizer))
    output = decoder_output(decoder)
    if type(output) is nn.Linear:
        output.__class__ = NormalizedOutput
        output.normalizer = build_normalizer(**normalizer)
    elif type(output) is AdaptiveSoftmax:
        output.__class__ = NormalizedAdaptiveSoftmax
        output.normalizers = nn.ModuleList(build_normalizer(**normalizer) for _ in output.cutoff)
    else:
        raise ValueError(
            f"the output layer is a {type(output).__name__}, which takes no normalizer: use "
            "--output-normalizer softmax"
        )


def decoder_output(decoder: nn.Module) -> nn.Module:
    """The output layer of a decoder."""
    adaptive = getattr(decoder, "adaptive_softmax", None)
    return decoder.output_projection if adaptive is None else adaptive


def has_likelihood(output: nn.Module) -> bool:
    """False for an output that can give probabilities of exactly 0, whose logarithm is infinite."""
    if isinstance(output, NormalizedAdaptiveSoftmax):
        return not output.normalizers[0].sparse
    return not (isinstance(output, NormalizedOutput) and output.normalizer.sparse)


def _log(normalizer: Normalizer, scores: Tensor) -> Tensor:
    """Log-probabilities, fp32 or wider; about -87 for 0, so that beam search can always end."""
    if not normalizer.sparse:
        return normalizer.log_probabilities(scores)
    probabilities = normalizer(to_compute_precision(scores))
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def _refuse_likelihood(normalizer: Normalizer | nn.Module) -> None:
    if normalizer.sparse:
        raise ValueError(
            f"the log-likelihood of the sparse output {type(normalizer).__name__} is infinite: "
            "train and validate with --criterion multimax_output_loss"
        )


class NormalizedOutput(nn.Linear):
    """The projection to the vocabulary, with logits whose SoftMax is the distribution.

    fairseq's criteria and its beam search then work unchanged. A sparse output has such logits only
    in evaluation, for beam search; `loss` is what it is trained with.
    """

    normalizer: Normalizer

    def forward(self, features: Tensor) -> Tensor:
        """(..., words) logits, fp32 or wider."""
        scores = super().forward(features)
        if not self.normalizer.sparse:
            return self.normalizer.logits(scores)
        if self.training:
            _refuse_likelihood(self.normalizer)
        return _log(self.normalizer, scores)

    def loss(
        self, features: Tensor, target: Tensor, label_smoothing: float, padding_index: int
    ) -> Tensor:
        """Sum of `multimax.losses.output_loss` over the targets that are not padding."""
        return output_loss(
            self.normalizer,
            super().forward(features),
            target,
            label_smoothing=label_smoothing,
            ignore_index=padding_index,
            reduction="sum",
        )


class NormalizedAdaptiveSoftmax(AdaptiveSoftmax):
    """The adaptive softmax with a normalizer for its head, `normalizers[0]`, and for each band.

    The probability of a rare word is that of its band times its own in the band, so that all of
    them sum to one whatever the normalizer.
    """

    normalizers: nn.ModuleList

    def forward(self, input: Tensor, target: Tensor) -> tuple[list[Any], list[Any]]:
        """Logits and targets of the head and the bands; None for a band without a target."""
        _refuse_likelihood(self.normalizers[0])
        scores, targets = super().forward(input, target)
        pairs = zip(self.normalizers, scores, strict=True)
        return [x if x is None else normalizer.logits(x) for normalizer, x in pairs], targets

    def get_log_prob(self, input: Tensor, target: Tensor | None) -> Tensor:
        """(rows, tokens, words) log-probabilities, fp32 or wider.

        Args:
            input: (rows, tokens, dim).
            target: (rows, tokens); only words of its bands are filled in. None for all words.
        """
        first, *others = self.normalizers
        x = input.reshape(-1, input.size(-1))
        head = _log(first, self.head(x))
        log_probs = head.new_zeros(len(x), self.vocab_size)
        log_probs[:, : self.cutoff[0]] = head[:, : self.cutoff[0]]
        everything = [slice(None)] * len(others)
        chosen = everything if target is None else self.adapt_target(target)[1]
        for band, (tail, normalizer, rows) in enumerate(
            zip(self.tail, others, chosen, strict=True)
        ):
            if rows is not None:
                inside = _log(normalizer, tail(x[rows]))
                prior = head[rows, self.cutoff[0] + band, None]
                log_probs[rows, self.cutoff[band] : self.cutoff[band + 1]] = inside + prior
        return log_probs.view(*input.shape[:-1], -1)

    def loss(
        self, features: Tensor, target: Tensor, label_smoothing: float, padding_index: int
    ) -> Tensor:
        """The head's loss plus the loss of each band, summed over its targets.

        Raises:
            ValueError: `label_smoothing` is not 0; it is not defined over bands.
        """
        if label_smoothing:
            raise ValueError(
                f"the adaptive softmax has no label smoothing, got {label_smoothing}: use 0"
            )
        scores, targets = super().forward(features, target)
        total = features.new_zeros((), dtype=torch.float32)
        for normalizer, x, y in zip(self.normalizers, scores, targets, strict=True):
            if x is not None:
                # In a band, the number of the padding word is that of another word.
                ignored = padding_index if normalizer is self.normalizers[0] else -100
                total = total + output_loss(normalizer, x, y, ignore_index=ignored, reduction="sum")
        return total
