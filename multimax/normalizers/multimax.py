"""MultiMax: SoftMax of scores with a learned piece-wise modulation."""

import math

import torch
from torch import Tensor, nn

from multimax.functional import (
    MASK_FLOOR,
    affine,
    check_mask,
    masked_softmax,
    modulate,
    modulate_derivative,
    to_compute_precision,
)
from multimax.kernels import c_rows
from multimax.normalizers.base import REFERENCE_LENGTH, LengthScale
from multimax.normalizers.modulated import ModulatedSoftMax

HIGHEST_ORDER = 8  # the powers of higher ones leave fp32


def multimax(
    scores: Tensor, ts: Tensor, ranges: Tensor, dim: int = -1, mask: Tensor | None = None
) -> Tensor:
    """SoftMax of the modulated scores: `softmax(sigma(scores))`, masked after the modulation.

    Args:
        scores: real, any shape; fp16 and bf16 are computed in fp32.
        ts: (2N,), see `modulate`.
        ranges: (2N,), see `modulate`.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, True where mass is allowed.

    Returns:
        Probabilities of the shape and dtype of `scores`: 0 where masked, all zeros for an
        all-masked row.

    Raises:
        ValueError: `ts` or `ranges` has a wrong shape, or `mask` is not boolean.

    Source: Zhou et al., MultiMax, ICML 2024, arXiv 2406.01189.
    """
    x = to_compute_precision(scores)
    check_mask(mask, x.shape)
    fits = ts.shape == ranges.shape and ts.numel() in (2, 4) and ts.dim() == 1
    if c_rows.usable(x, "multimax", None if fits else c_rows.NO_MODULATOR):
        coefficients = torch.cat([_identity(ts), ts, ranges]).to(x.dtype)
        return c_rows.modulated_softmax(x, coefficients, dim, mask).to(scores.dtype)
    if mask is not None:  # the gradients of the scalars would be 0 times inf
        x = x.masked_fill(~mask, 0.0)
    return masked_softmax(modulate(x, ts, ranges), dim, mask).to(scores.dtype)


def _identity(like: Tensor) -> Tensor:
    """Scale 1 and shift 0, made without a copy from the host."""
    return (torch.arange(2, device=like.device) == 0).to(like.dtype)


class MultiMax(ModulatedSoftMax):
    """SoftMax with learned modulated scores; small scores are pushed down, large ones evened out.

    Use it wherever `torch.softmax` is used: `MultiMax()(scores, mask=mask)`. One module serves all
    heads of a layer. Parameter names and layout are those of the official checkpoints.

    Args:
        order: N of the modulator, up to 8; 2 is the paper's (8 scalars).
        init: "paper" draws `ts` and `ranges` from a normal of standard deviation 0.02, truncated;
            "identity" starts `ts` at 0, which is plain SoftMax: use it inside a pretrained model.
            "separated" starts with the low range ending at 0, the high one beginning at 1, and both
            falling away from each other: ts of -0.1 for order 1, -0.01 for order 2, and so on.
        affine: also learn a scale and a shift of the scores, sigma(scale x + shift), as the first-
            order variant "V2" of the official code does.
        score_scale: a factor c that the scores come with and that acts after the modulation
            instead, c sigma(x / c): 1 / sqrt(head_dim) modulates the dot products of attention
            before they are scaled. The kernels compute it too.
        length_scale, reference_length, heads, softcap, sink, learned_sink: as in
            `ModulatedSoftMax`. The heads share the modulator.

    Raises:
        ValueError: `order` is not a positive integer, `init` is unknown, `score_scale` is not a
            positive number, or an option of `ModulatedSoftMax` is out of range.
    """

    def __init__(
        self,
        order: int = 2,
        init: str = "paper",
        affine: bool = False,
        score_scale: float = 1.0,
        length_scale: LengthScale | None = None,
        reference_length: int = REFERENCE_LENGTH,
        heads: int | None = None,
        softcap: float | None = None,
        sink: float | None = None,
        learned_sink: bool = True,
    ) -> None:
        super().__init__(length_scale, reference_length, heads, softcap, sink, learned_sink)
        if not isinstance(order, int) or not 1 <= order <= HIGHEST_ORDER:
            raise ValueError(f"order must be an integer in [1, {HIGHEST_ORDER}], got {order!r}")
        if init not in ("paper", "identity", "separated"):
            raise ValueError(f"init must be 'paper', 'identity' or 'separated', got {init!r}")
        if not 0 < score_scale < math.inf:
            raise ValueError(f"score_scale must be a positive number, got {score_scale!r}")
        self.init = init
        self.score_scale = score_scale
        self.ts: nn.Parameter = nn.Parameter(torch.empty(2 * order))
        self.ranges: nn.Parameter = nn.Parameter(torch.empty(2 * order))
        self.affine = affine
        if affine:
            self.scale: nn.Parameter = nn.Parameter(torch.empty(1))
            self.shift: nn.Parameter = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the scalars of the modulator anew, as `init` says."""
        nn.init.trunc_normal_(self.ranges, std=0.02)
        if self.init == "paper":
            nn.init.trunc_normal_(self.ts, std=0.02)
        elif self.init == "identity":
            nn.init.zeros_(self.ts)
        else:
            with torch.no_grad():
                for n in range(self.order):
                    self.ts[2 * n : 2 * n + 2].fill_(-(0.1 ** (n + 1)))
                    self.ranges[2 * n : 2 * n + 2].copy_(torch.arange(2))
        if self.affine:
            nn.init.ones_(self.scale)
            nn.init.zeros_(self.shift)

    @property
    def order(self) -> int:
        return self.ts.numel() // 2

    @property
    def t_b(self) -> Tensor:
        """(N,), t_b of the paper by order; above 1 pushes scores below `b` further down."""
        return 1 - self.ts[0::2]

    @property
    def t_d(self) -> Tensor:
        """(N,), t_d of the paper by order; below 1 evens out scores above `d`."""
        return 1 + self.ts[1::2]

    @property
    def b(self) -> Tensor:
        """(N,), upper ends of the low range by order, in units of what sigma is applied to."""
        return self.ranges[0::2]

    @property
    def d(self) -> Tensor:
        """(N,), lower ends of the high range by order, in units of what sigma is applied to."""
        return self.ranges[1::2]

    def _transform(self, scores: Tensor) -> Tensor:
        if not self.affine:
            return scores
        x = to_compute_precision(scores)
        hidden = x <= MASK_FLOOR  # of what comes in: the scale could lift it
        # Of no dimension, as the scores may be.
        scale, shift = self.scale.squeeze(0).to(x.dtype), self.shift.squeeze(0).to(x.dtype)
        z = affine(x, scale, shift * self.score_scale, hidden)
        return z.masked_fill(hidden, -torch.inf)

    def _modulator(self) -> tuple[Tensor, Tensor]:
        """`ts` and `ranges` in units of the scores as they come."""
        if self.score_scale == 1:
            return self.ts, self.ranges
        # c sigma(x / c) = x + sum_n c^(1 - n) [ts_n max(c b_n - x, 0)^n + ...]
        pairs = to_compute_precision(self.ts).split(2)
        ts = [pair * self.score_scale**-n for n, pair in enumerate(pairs)]
        return torch.cat(ts), to_compute_precision(self.ranges) * self.score_scale

    @property
    def fusible(self) -> bool:
        return self.order <= c_rows.MOST_ORDER

    def coefficients(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.affine:
            scale, shift = self.scale, self.shift * self.score_scale
        else:  # numbers from the host would make it wait for the GPU
            scale, shift = self.ts.new_ones(1), self.ts.new_zeros(1)
        return torch.cat([scale, shift, *self._modulator()]).to(device, dtype)

    def modulate(self, scores: Tensor) -> Tensor:
        return self._capped(modulate(self._transform(scores), *self._modulator()), scores)

    def derivative(self, scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """d sigma / d score, in fp32 or wider; negative where the order of scores flips.

        It is taken at the scores that the modulator sees, without the factor of a length scale and
        the slope of a cap, which are positive.

        Args:
            scores: real, any shape.
            dim: the dimension that sums to one, and
            mask: bool or None; both for the number of entries of a length scale "scores" alone.
        """
        x = to_compute_precision(scores)
        if self.length_scale == "scores":
            x = self.scaled_by_length(x, dim, mask)
        slope = modulate_derivative(self._transform(x), *self._modulator())
        return slope * self.scale.to(slope.dtype) if self.affine else slope

    def extra_repr(self) -> str:
        shown = f"order={self.order}, init={self.init!r}" + (", affine=True" if self.affine else "")
        if self.score_scale != 1:
            shown += f", score_scale={self.score_scale:.4g}"
        return ", ".join(filter(None, [shown, super().extra_repr()]))
