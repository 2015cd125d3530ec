"""SoftMax of modulated scores: the modulator of MultiMax, and the form that the kernels accept."""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from multimax.functional import check_mask, masked_softmax, to_compute_precision
from multimax.kernels import c_rows
from multimax.normalizers.base import LogitNormalizer


class ModulatedSoftMax(LogitNormalizer):
    """SoftMax of scores that are first changed one by one: the form that fused kernels accept.

    A subclass that overrides `modulate`, `forward` or `biased` is not fused unless it also
    overrides `coefficients`, with `fusible`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if {"modulate", "forward", "biased"} & own.keys() and not {
            "fusible",
            "coefficients",
        } <= own.keys():
            type.__setattr__(cls, "fusible", property(lambda self: False))

    @abstractmethod
    def modulate(self, scores: Tensor) -> Tensor:
        """Element-wise modulated scores, in compute precision (fp32 or wider)."""

    def normalize_modulated(
        self, modulated: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        return masked_softmax(modulated, dim, mask)

    def logits(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        return self.modulate(scores)

    def biased(
        self, scores: Tensor, bias: Tensor, mask: Tensor | None = None, place: str = "after"
    ) -> Tensor:
        if place == "before":
            return super().biased(scores, bias, mask)
        return self(scores, mask=mask, bias=bias)

    def forward(
        self,
        scores: Tensor,
        dim: int = -1,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """As `Normalizer.forward`, also with a `bias` that is added to the modulated scores."""
        x = to_compute_precision(scores)
        check_mask(mask, x.shape)
        lacks = None if self.fusible else c_rows.NO_MODULATOR
        if bias is not None:
            lacks = "it has a bias"
        if not c_rows.usable(x, self, lacks):
            if mask is not None and self._parameters:  # whose gradient would be 0 times inf
                x = x.masked_fill(~mask, 0.0)
            modulated = self.modulate(x)
            if bias is not None:
                modulated = modulated + bias.to(x.dtype)
            return masked_softmax(modulated, dim, mask).to(scores.dtype)
        coefficients = self.coefficients(x.dtype, x.device)
        return c_rows.modulated_softmax(x, coefficients, dim, mask).to(scores.dtype)
