"""What all normalizers share: the module interface, masking and precision."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


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
                exactly 0; an all-masked row is all zeros with zero gradients.
        """


class LogitNormalizer(Normalizer):
    """A normalizer that is SoftMax of some logits, so that its loss is cross-entropy."""

    @abstractmethod
    def logits(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Logits (fp32 or wider) whose SoftMax is the distribution trained with cross-entropy."""
