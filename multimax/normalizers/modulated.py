"""SoftMax of modulated scores: the modulator of MultiMax, and the form that the kernels accept."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from multimax.kernels import rows
from multimax.normalizers.base import (
    LogitNormalizer,
    check_mask,
    masked_softmax,
    to_compute_precision,
)


def modulate(scores: Tensor, ts: Tensor, ranges: Tensor) -> Tensor:
    """The modulator sigma of MultiMax, element by element.

        sigma(x) = x + sum_{n=1..N} [ (1 - t_bn) max(b_n - x, 0)^n + (t_dn - 1) max(x - d_n, 0)^n ]

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32.
        ts: (2N,), `[1 - t_b1, t_d1 - 1, 1 - t_b2, t_d2 - 1, ...]`; all zeros is the identity.
        ranges: (2N,), `[b_1, d_1, b_2, d_2, ...]`, in units of the scores.

    Returns:
        Modulated scores of the shape of `scores`, in fp32 or wider.

    Raises:
        ValueError: `ts` and `ranges` are not vectors of the same even length.

    Source: Zhou et al., MultiMax, ICML 2024, arXiv 2406.01189 (first and second order).
    """
    if ts.shape != ranges.shape or ts.dim() != 1 or ts.numel() % 2 or not ts.numel():
        raise ValueError(
            "ts and ranges must be vectors of one even length 2N (N = order), "
            f"got shapes {tuple(ts.shape)} and {tuple(ranges.shape)}"
        )
    x = to_compute_precision(scores)
    ts, ranges = ts.to(x.dtype), ranges.to(x.dtype)
    modulated = x
    for n in range(1, ts.numel() // 2 + 1):
        low, high = 2 * n - 2, 2 * n - 1
        below = _power(torch.relu(ranges[low] - x), n)
        above = _power(torch.relu(x - ranges[high]), n)
        modulated = modulated + ts[low] * below + ts[high] * above
    return modulated


def modulate_derivative(scores: Tensor, ts: Tensor, ranges: Tensor) -> Tensor:
    """d sigma / d x at `scores`, in fp32 or wider. Where it is negative, the order of scores flips.

    Arguments, shapes and source are those of `modulate`; at a kink, the derivative of ReLU is 0.
    """
    x = to_compute_precision(scores)
    ts, ranges = ts.to(x.dtype), ranges.to(x.dtype)
    slope = torch.ones_like(x)
    for n in range(1, ts.numel() // 2 + 1):
        low, high = 2 * n - 2, 2 * n - 1
        below, above = ranges[low] - x, x - ranges[high]
        slope = slope - ts[low] * n * _power(below, n - 1) * (below > 0)
        slope = slope + ts[high] * n * _power(above, n - 1) * (above > 0)
    return slope


def _power(base: Tensor, exponent: int) -> Tensor:
    # Repeated multiplication: `**` is `pow`, which autocast moves to fp32 and which is slower.
    if exponent == 0:
        return torch.ones_like(base)
    result = base
    for _ in range(exponent - 1):
        result = result * base
    return result


def modulated_softmax(
    scores: Tensor, coefficients: Tensor, dim: int, mask: Tensor | None
) -> Tensor:
    """`masked_softmax` of the modulated scores: the definition of what the kernels compute.

    Args:
        scores: real, any shape, in compute precision.
        coefficients: (2 + 4 N,), see `ModulatedSoftMax.coefficients`.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, or None.
    """
    scale, shift = coefficients[0], coefficients[1]
    modulated = scale * scores + shift
    if coefficients.numel() > 2:
        modulated = modulate(modulated, *coefficients[2:].chunk(2))
    return masked_softmax(modulated, dim, mask)


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
        if not (self.fusible and rows.usable(x)):
            return masked_softmax(self.modulate(x), dim, mask).to(scores.dtype)
        p = rows.modulated_softmax(
            x, self.coefficients(x.dtype, x.device), dim, mask, modulated_softmax
        )
        return p.to(scores.dtype)
