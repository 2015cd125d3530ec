"""Adaptive-scalable entmax: 1.5-entmax of scores times a learned function of the length."""

import math

import torch
from torch import Tensor, nn

from multimax.normalizers.base import REFERENCE_LENGTH
from multimax.normalizers.entmax import EntMax


class ASEntMax(EntMax):
    """1.5-entmax of `(delta + beta log(n)^gamma) x`, n being the allowed entries of the row.

    delta and beta, which stay positive, and gamma are learned scalars; the paper computes beta and
    gamma from the hidden states of the model instead, which a normalizer does not see. At the start
    delta is 1/2, beta 1 / (2 log(reference_length)) and gamma 1.

    Args:
        reference_length: the n at which the factor starts as 1; an integer >= 2.
        heads: learn three scalars for each of this many heads; scores must then be of shape
            (..., heads, queries, keys). None shares them.

    Source: Vasylenko et al., Long-Context Generalization with Sparse Attention, 2025, arXiv
    2506.16640.
    """

    def __init__(self, reference_length: int = REFERENCE_LENGTH, heads: int | None = None) -> None:
        super().__init__(1.5, False, heads, "scores", reference_length)

    def _learn_length_factor(self, reference_length: int) -> None:
        def scalar(value: float) -> nn.Parameter:
            return nn.Parameter(torch.full((self.heads or 1,), value))

        self.log_delta: nn.Parameter = scalar(-math.log(2))
        self.log_beta: nn.Parameter = scalar(-math.log(2 * math.log(reference_length)))
        self.gamma: nn.Parameter = scalar(1.0)

    def length_factor(self, log_length: Tensor) -> Tensor:
        scalars = torch.stack([self.log_delta, self.log_beta, self.gamma]).to(log_length.dtype)
        log_delta, log_beta, gamma = map(self._of_heads, scalars)
        return log_delta.exp() + (log_beta + gamma * log_length.log()).exp()
