"""What all normalizers share: the module interface, masking and precision."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from multimax.functional import (
    MASK_FLOOR,
    check_mask,
    check_not_nested,
    hidden_entries,
    masked_log_softmax,
    to_compute_precision,
)

LengthScale = Literal["scores", "modulated"]
REFERENCE_LENGTH = 64
SHORTEST = 2  # of the lengths that a factor is taken of: log(1) would make all scores 0


class Normalizer(nn.Module, ABC):
    """A learned or fixed map from a row of scores to a probability distribution.

    Attention calls it on scores over the keys, the output layer on scores over the classes. Both
    use nothing but this interface. The rows of a few, whose `sums_to_one` is False, are weights
    that need not sum to one: they are for attention alone, and have no loss.

    Args:
        length_scale: where the scores are multiplied by s log(n), with s > 0 learned and n the
            number of allowed entries of the row: "scores" is before the modulation, "modulated"
            after it, the same where there is none; None does not. One allowed entry counts as two.
        reference_length: the n at which that factor starts as 1, so that an untrained model is the
            plain one there; an integer >= 2. Causal attention over N keys has a mean log(n) of
            log(N) - 1, which is that of N / e.
        heads: learn one s for each of this many heads; scores must then be of shape
            (..., heads, queries, keys). None shares one.
        other_heads: whether a subclass has other scalars that heads can have.

    Raises:
        ValueError: an option is out of range, or `heads` has nothing to be for.

    Source: Nakanishi, Scalable-Softmax Is Superior for Attention, 2025, arXiv 2501.19399. For
    normalizers other than SoftMax it is this library's.
    """

    def __init__(
        self,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
        other_heads: bool = False,
    ) -> None:
        super().__init__()
        if length_scale not in (None, "scores", "modulated"):
            raise ValueError(
                f"length_scale must be 'scores', 'modulated' or None, got {length_scale!r}"
            )
        if not isinstance(reference_length, int) or reference_length < SHORTEST:
            raise ValueError(
                f"reference_length must be an integer >= {SHORTEST}, got {reference_length!r}"
            )
        if heads is not None and heads < 1:
            raise ValueError(f"heads must be an integer >= 1 or None, got {heads}")
        self.length_scale: LengthScale | None = length_scale
        self.heads = heads
        if length_scale is not None:
            self._learn_length_factor(reference_length)
        elif heads is not None and not other_heads:
            raise ValueError(f"heads={heads} needs learned scalars: give length_scale, or None")

    def _learn_length_factor(self, reference_length: int) -> None:
        start = -math.log(math.log(reference_length))
        self.log_length_factor: nn.Parameter = nn.Parameter(torch.full((self.heads or 1,), start))

    def length_factor(self, log_length: Tensor) -> Tensor:
        """The factor, > 0, on the scores of a row, of the logarithm of its number of entries."""
        return self._of_heads(self.log_length_factor).to(log_length.dtype).exp() * log_length

    def _of_heads(self, scalars: Tensor) -> Tensor:
        """Scalars of shape (heads or 1,), so that they broadcast to scores."""
        return scalars.squeeze(0) if scalars.numel() == 1 else scalars[:, None, None]

    def scaled_by_length(
        self, scores: Tensor, dim: int, mask: Tensor | None, floor: float = MASK_FLOOR
    ) -> Tensor:
        """Scores times the factor of their row, -inf where masked; unchanged without a length
        scale. Scores of at most `floor`, which the factor could lift, are masked and do not count.
        """
        if self.length_scale is None:
            return scores
        hidden = hidden_entries(scores, mask, floor)
        length = (~hidden).sum(dim, keepdim=True).clamp_min(SHORTEST)
        factor = self.length_factor(length.to(scores.dtype).log())
        return (factor * scores.masked_fill(hidden, 0.0)).masked_fill(hidden, -torch.inf)

    @abstractmethod
    def forward(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Probabilities of the shape and dtype of `scores` that sum to one along `dim`.

        Args:
            scores: real, any shape; fp16 and bf16 are computed in fp32.
            dim: the dimension that sums to one.
            mask: bool, broadcastable to `scores`, True where mass is allowed. Masked entries get
                exactly 0; an all-masked row is all zeros with zero gradients. A score of -inf is
                masked too; with a modulator, a cap or a length scale, and where weights do not sum
                to one, also one of at most `functional.MASK_FLOOR`.
        """

    def biased(
        self, scores: Tensor, bias: Tensor, mask: Tensor | None = None, place: str = "after"
    ) -> Tensor:
        """Probabilities of scores with a bias, along the last dimension.

        Args:
            scores: as in `forward`.
            bias: finite, broadcastable to `scores`; added in compute precision.
            mask: as in `forward`.
            place: "after" the modulation, which then does not depend on the bias, or "before" it.
                The same where there is no `modulate`: a length scale then multiplies the bias too.
        """
        x = to_compute_precision(scores)
        return self(x + bias.to(x.dtype), mask=mask).to(scores.dtype)

    @property
    def sums_to_one(self) -> bool:
        """Whether a row with an allowed entry sums to one; if not, no loss belongs to it."""
        return True

    @property
    def sparse(self) -> bool:
        """Whether an entry that is not masked can get exactly 0 in evaluation, underflow aside."""
        return True

    def log_probabilities(
        self, scores: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        """The logarithm of `forward`, in fp32 or wider; -inf where that is 0.

        That of a dense normalizer stays finite where a probability underflows.
        """
        return self(to_compute_precision(scores), dim, mask).log()

    def logits(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Logits, in fp32 or wider, whose SoftMax is the distribution, or the shares of the weights
        where they do not sum to one.
        """
        return self.log_probabilities(scores, dim, mask)

    def modulate(self, scores: Tensor) -> Tensor:
        """The part of `forward` that changes scores one by one, and so may precede any mask.

        The rest keeps their order: of two entries, the one with the larger modulated score has no
        smaller probability.
        """
        return scores

    def normalize_modulated(
        self, modulated: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        """The rest of `forward`, after `modulate`; not if that comes second."""
        return self(modulated, dim, mask)

    @property
    def modulates_first(self) -> bool:
        """Whether `normalize_modulated` of `modulate` is `forward`; no, if a length scale, which
        needs the mask, comes before the modulation.
        """
        return True

    def in_order(self, scores: Tensor) -> Tensor:
        """Numbers in the order of the probabilities, which that of the scores need not be.

        Unlike probabilities they differ where those of two entries are both 0. The rows are along
        the last dimension.
        """
        return self.modulate(scores) if self.modulates_first else self.logits(scores)

    def extra_repr(self) -> str:
        shown = [] if self.length_scale is None else [f"length_scale={self.length_scale!r}"]
        return ", ".join(shown + ([f"heads={self.heads}"] if self.heads else []))

    @property
    def fusible(self) -> bool:
        """Whether it is SoftMax of scores with a modulation that `coefficients` can describe, alone
        or with the steps of `ModulatedSoftMax`: the kernels of attention compute it.
        """
        return False

    @property
    def has_steps(self) -> bool:
        """Whether there is more than a modulation: a length scale, a cap or a sink. Of what is
        `fusible`, the kernels of rows and output layers compute that which has none.
        """
        return self.length_scale is not None

    def coefficients(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The modulation as numbers, for the kernels: sigma(scale * score + shift), uncapped.

        Args:
            dtype: of the result, fp32 or wider.
            device: of the result.

        Returns:
            (2 + 4 N,), `[scale, shift, ts (2N), ranges (2N)]` with `ts` and `ranges` of
            `multimax.functional.modulate` and N = 0, 1 or 2; it leads gradients to the parameters.

        Raises:
            NotImplementedError: it is not `fusible`.
        """
        raise NotImplementedError(f"{self} is not of the form that the kernels compute")


class LogitNormalizer(Normalizer):
    """A normalizer that is SoftMax of some logits, so that its loss is cross-entropy.

    Args:
        length_scale, reference_length, heads: as in `Normalizer`.
    """

    @abstractmethod
    def logits(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Logits (fp32 or wider) whose SoftMax is the distribution trained with cross-entropy."""

    @property
    def sparse(self) -> bool:
        return False

    def log_probabilities(
        self, scores: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        check_not_nested(scores)
        check_mask(mask, scores.shape)
        return masked_log_softmax(self.logits(scores, dim, mask), dim, mask)


def check_has_loss(normalizer: Normalizer) -> None:
    """Raise ValueError for a normalizer that no output layer can have.

    Its weights do not sum to one, so that no loss belongs to it, or it has scalars of heads.
    """
    if normalizer.heads is not None:
        raise ValueError(
            f"{normalizer} has scalars of heads, but an output layer has no heads: use heads=None"
        )
    if not normalizer.sums_to_one:
        remedy = " or sink=None" if getattr(normalizer, "sink", None) is not None else ""
        raise ValueError(
            f"{normalizer} has no loss, since its weights do not sum to one: use another "
            f"normalizer{remedy} in the output layer"
        )
