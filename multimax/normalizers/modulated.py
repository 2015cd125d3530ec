"""SoftMax of modulated scores: the modulator of MultiMax, and the form that the kernels accept."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from multimax.functional import (
    MASK_FLOOR,
    check_mask,
    check_not_nested,
    masked_log_softmax,
    masked_softmax,
    soft_cap,
    to_compute_precision,
)
from multimax.kernels import c_rows
from multimax.normalizers.base import REFERENCE_LENGTH, LengthScale, LogitNormalizer


class ModulatedSoftMax(LogitNormalizer):
    """SoftMax of scores that are first changed one by one: the form that fused kernels accept.

    The steps, of which each but the last may be missing: length scale "scores", modulation, cap,
    length scale "modulated", bias, SoftMax with a sink. The kernels of attention take them all;
    those of rows and of output layers take the modulation alone.

    A subclass that overrides `modulate`, `logits`, `scaled_by_length`, `forward` or `biased` is not
    fused unless it also overrides `coefficients`, with `fusible`.

    Args:
        length_scale, reference_length: as in `LogitNormalizer`.
        heads: learn one factor of the length scale and one sink for each of this many heads; scores
            must then be of shape (..., heads, queries, keys). None shares them.
        softcap: c > 0 of c tanh(x / c), which keeps what SoftMax sees of the modulated scores
            within (-c, c); None does not. The length scale "modulated" multiplies it.
        sink: the score of an entry that takes its share of the mass and is not returned, so that
            the rest sums to less than one; where it starts if learned. 0, not learned, adds 1 to
            the denominator. None has none.
        learned_sink: train the sink.

    Raises:
        ValueError: an option is out of range.

    Source: of the cap Gemma Team, Gemma 2, 2024, arXiv 2408.00118; of the sink OpenAI, gpt-oss
    model card, 2025, arXiv 2508.10925.
    """

    def __init__(
        self,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
        softcap: float | None = None,
        sink: float | None = None,
        learned_sink: bool = True,
    ) -> None:
        if softcap is not None and not 0 < softcap < math.inf:
            raise ValueError(f"softcap must be a positive number or None, got {softcap!r}")
        if sink is not None and not math.isfinite(sink):
            raise ValueError(f"sink must be a finite number or None, got {sink!r}")
        learned = sink is not None and learned_sink
        super().__init__(length_scale, reference_length, heads, other_heads=learned)
        self.softcap = softcap
        self.sink: nn.Parameter | float | None
        if sink is not None and learned_sink:
            self.sink = nn.Parameter(torch.full((heads or 1,), float(sink)))
        else:
            self.sink = sink

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        changed = own.keys() & {"modulate", "logits", "scaled_by_length", "forward", "biased"}
        if changed and not {"fusible", "coefficients"} <= own.keys():
            type.__setattr__(cls, "fusible", property(lambda self: False))

    @property
    def fusible(self) -> bool:
        return True

    @property
    def has_steps(self) -> bool:
        # Not by `super()`, whose properties torch.compile takes for true, or does not take.
        return not (self.length_scale is None and self.softcap is None and self.sink is None)

    @property
    def sums_to_one(self) -> bool:
        return self.sink is None

    @property
    def modulates_first(self) -> bool:
        return self.length_scale != "scores"

    @abstractmethod
    def modulate(self, scores: Tensor) -> Tensor:
        """Element-wise modulated and capped scores, in compute precision (fp32 or wider)."""

    def _capped(self, modulated: Tensor, scores: Tensor) -> Tensor:
        """The modulated `scores`, capped, but for what is masked, which the cap would lift."""
        if self.softcap is None:
            return modulated
        hidden = (scores <= MASK_FLOOR) | (modulated == -torch.inf)
        return soft_cap(modulated, self.softcap, hidden)

    def sink_score(self, like: Tensor) -> Tensor | None:
        """The score of the sink, broadcastable to scores and in the dtype of `like`; or None."""
        if isinstance(self.sink, Tensor):
            return self._of_heads(self.sink).to(like.dtype)
        return None if self.sink is None else like.new_full((), self.sink)

    def normalize_modulated(
        self, modulated: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        if not self.modulates_first:
            raise ValueError(
                "length_scale='scores' is before the modulation: use length_scale='modulated' "
                "where the scores are masked after it"
            )
        scaled = self.scaled_by_length(modulated, dim, mask, -torch.inf)
        return masked_softmax(scaled, dim, mask, self.sink_score(scaled))

    def logits(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """What SoftMax is taken of (fp32 or wider), -inf where a length scale is and masks."""
        x = to_compute_precision(scores)
        if self.length_scale is None:
            return self.modulate(x)
        if self.length_scale == "scores":
            return self.modulate(self.scaled_by_length(x, dim, mask))
        modulated = self.modulate(x.masked_fill(x <= MASK_FLOOR, -torch.inf))
        return self.scaled_by_length(modulated, dim, mask, -torch.inf)

    def log_probabilities(
        self, scores: Tensor, dim: int = -1, mask: Tensor | None = None
    ) -> Tensor:
        check_not_nested(scores)
        check_mask(mask, scores.shape)
        logits = self.logits(scores, dim, mask)
        return masked_log_softmax(logits, dim, mask, self.sink_score(logits))

    def biased(
        self, scores: Tensor, bias: Tensor, mask: Tensor | None = None, place: str = "after"
    ) -> Tensor:
        """As `Normalizer.biased`; a bias "after" the modulation is after the length scale too."""
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
        lacks = c_rows.NO_MODULATOR if self.has_steps or not self.fusible else None
        if bias is not None:
            lacks = "it has a bias"
        if not c_rows.usable(x, self, lacks):
            if mask is not None and self._parameters:  # whose gradient would be 0 times inf
                x = x.masked_fill(~mask, 0.0)
            logits = self.logits(x, dim, mask)
            if bias is not None:
                logits = logits + bias.to(x.dtype)
            return masked_softmax(logits, dim, mask, self.sink_score(logits)).to(scores.dtype)
        coefficients = self.coefficients(x.dtype, x.device)
        return c_rows.modulated_softmax(x, coefficients, dim, mask).to(scores.dtype)

    def extra_repr(self) -> str:
        cap = "" if self.softcap is None else f"softcap={self.softcap:g}"
        sink = "" if self.sink is None else f"sink={self.sink}"
        if isinstance(self.sink, Tensor):
            sink = "sink=learned"
        return ", ".join(filter(None, [super().extra_repr(), cap, sink]))
