"""What all normalizers share: the module interface, masking and precision."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from multimax.functional import (
    check_mask,
    check_not_nested,
    masked_log_softmax,
    to_compute_precision,
)


class Normalizer(nn.Module, ABC):
    """A learned or fixed map from a row of scores to a probability distribution.

    Attention calls it on scores over the keys, the output layer on scores over the classes. Both
    use nothing but this interface.
    """

    @abstractmethod
    def forward(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Probabilities of the shape and dtype of `scores` that sum to one along `dim`.

        Args:
            scores: real, any shape; fp16 and bf16 are computed in fp32.
            dim: the dimension that sums to one.
            mask: bool, broadcastable to `scores`, True where mass is allowed. Masked entries get
                exactly 0; an all-masked row is all zeros with zero gradients. A score of -inf is
                masked too; with a modulator also one of at most `functional.MASK_FLOOR`.
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
                The same where there is no `modulate`.
        """
        x = to_compute_precision(scores)
        return self(x + bias.to(x.dtype), mask=mask).to(scores.dtype)

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
        """Logits, in fp32 or wider, whose SoftMax is the distribution."""
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
        """The rest of `forward`, after `modulate`."""
        return self(modulated, dim, mask)

    @property
    def fusible(self) -> bool:
        """Whether it is SoftMax of scores with a modulation that `coefficients` can describe."""
        return False

    def coefficients(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The modulation as numbers, for the kernels: sigma(scale * score + shift).

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
    """A normalizer that is SoftMax of some logits, so that its loss is cross-entropy."""

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
