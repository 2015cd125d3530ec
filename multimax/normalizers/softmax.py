"""SoftMax with a fixed or learned temperature."""

import math

import torch
from torch import Tensor, nn

from multimax.functional import (
    check_mask,
    hidden_entries,
    masked_softmax,
    to_compute_precision,
)
from multimax.kernels import c_rows
from multimax.normalizers.base import REFERENCE_LENGTH, LengthScale
from multimax.normalizers.modulated import ModulatedSoftMax

# Scores up to 3e8 stay in fp32 when they are divided by the least one.
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-30, 1e30


def softmax(
    scores: Tensor, dim: int = -1, mask: Tensor | None = None, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """SoftMax of `scores / temperature`.

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, True where mass is allowed.
        temperature: > 0; a tensor must broadcast to `scores`. High is uniform, low is one-hot.

    Returns:
        Probabilities of the shape and dtype of `scores`: 0 where masked, all zeros for an
        all-masked row.

    Raises:
        ValueError: `temperature` is a number that is not positive, or `mask` is not boolean.
    """
    scaled = _scale(scores, temperature)
    check_mask(mask, scores.shape)
    # It runs on torch operations; the error of a kernel asked for by name is what is wanted.
    c_rows.usable(scores, "softmax", "the function has no kernel, the module SoftMax has one")
    return masked_softmax(scaled, dim, mask).to(scores.dtype)


def _scale(scores: Tensor, temperature: float | Tensor) -> Tensor:
    scores_compute = to_compute_precision(scores)
    if isinstance(temperature, Tensor):
        hidden = hidden_entries(scores_compute, None)
        temperature = temperature.to(scores_compute.dtype)
        # 0 in the place of -inf, whose product with a gradient of 0 is NaN.
        scaled = scores_compute.masked_fill(hidden, 0.0) / temperature
        # The score itself has a gradient where -inf is the target, as with a fixed temperature.
        return torch.where(hidden, scores_compute / temperature.detach(), scaled)
    _check_temperature(temperature)
    return scores_compute if temperature == 1 else scores_compute / temperature


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")


class SoftMax(ModulatedSoftMax):
    """SoftMax of `scores / temperature`.

    Args:
        temperature: in [1e-30, 1e30], the temperature, or where it starts when learned.
        learned: train the temperature (stored as its logarithm, so that it stays positive).
        length_scale, reference_length, heads, softcap, sink, learned_sink: as in
            `ModulatedSoftMax`.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        learned: bool = False,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
        softcap: float | None = None,
        sink: float | None = None,
        learned_sink: bool = True,
    ) -> None:
        super().__init__(length_scale, reference_length, heads, softcap, sink, learned_sink)
        _check_temperature(temperature)
        if not LEAST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE:
            raise ValueError(
                f"temperature must be in [{LEAST_TEMPERATURE:g}, {LARGEST_TEMPERATURE:g}], got "
                f"{temperature}: scores divided by it leave fp32"
            )
        self.fixed_temperature: float | None = None if learned else float(temperature)
        if learned:
            self.log_temperature: nn.Parameter = nn.Parameter(torch.tensor([math.log(temperature)]))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a float if fixed, a tensor of shape (1,) if learned."""
        if self.fixed_temperature is not None:
            return self.fixed_temperature
        return self.log_temperature.exp()

    @property
    def fusible(self) -> bool:  # repeated, since what overrides `modulate` must say it
        return True

    def coefficients(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.fixed_temperature is None:
            scale = torch.exp(-self.log_temperature.to(device, dtype))
            return torch.cat([scale, torch.zeros_like(scale)])
        coefficients = torch.zeros(2, dtype=dtype, device=device)
        coefficients[0].fill_(1 / self.fixed_temperature)  # without a copy from the host
        return coefficients

    def modulate(self, scores: Tensor) -> Tensor:
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.squeeze(0)  # of no dimension, as the scores may be
        return self._capped(_scale(scores, temperature), scores)

    def extra_repr(self) -> str:
        fixed = self.fixed_temperature
        shown = "temperature=learned" if fixed is None else f"temperature={fixed:g}"
        return ", ".join(filter(None, [shown, super().extra_repr()]))
