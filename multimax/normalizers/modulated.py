"""SoftMax of modulated scores: the modulator of MultiMax, and the form that the kernels accept."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from multimax.functional import check_mask, masked_softmax, to_compute_precision
from multimax.kernels import c_rows
from multimax.normalizers.base import LogitNormalizer


class ModulatedSoftMax(LogitNormalizer):
    """SoftMax of scores that are first changed one by one: the form that fused kernels accept.

    A subclass that overrides `modulate` or `forward` is not fused unless it also overrides
    `coefficients`, with `fusible`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if {"modulate", "forward"} & own.keys() and not {"fusible", "coefficients"} <= own.keys():
            cls.fusible = property(lambda self: False)  # pyright: ignore[reportAttributeAccessIssue]

    @abstractmethod
    def modulate(self, scores: Tensor) -> Tensor:
        """Element-wise modulated scores, in compute precision (fp32 or wider)."""

    @property
    def fusible(self) -> bool:
        """Whether `coefficients` can describe the modulation."""
        return False

    def coefficients(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The modulation as numbers, for the kernels: sigma(scale * score + shift).

        Args:
            dtype: of the result, fp32 or wider.
            device: of the result.

        Returns:
            (2 + 4 N,), `[scale, shift, ts (2N), ranges (2N)]` with `ts` and `ranges` of
            `modulate` and N = 0, 1 or 2; it leads gradients to the parameters.

        Raises:
            NotImplementedError: it is not `fusible`.
        """
        raise NotImplementedError(f"{self} is not of the form that the kernels compute")

    def logits(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        return self.modulate(scores)

    def forward(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        check_mask(mask)
        x = to_compute_precision(scores)
        if not (self.fusible and c_rows.usable(x)):
            return masked_softmax(self.modulate(x), dim, mask).to(scores.dtype)
        coefficients = self.coefficients(x.dtype, x.device)
        return c_rows.modulated_softmax(x, coefficients, dim, mask).to(scores.dtype)
