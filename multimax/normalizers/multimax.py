"""MultiMax: SoftMax of scores with a learned piece-wise modulation."""

import torch
from torch import Tensor, nn

from multimax.normalizers.base import (
    ModulatedSoftMax,
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
    check_mask(mask)
    return masked_softmax(modulate(scores, ts, ranges), dim, mask).to(scores.dtype)


class MultiMax(ModulatedSoftMax):
    """SoftMax with learned modulated scores; small scores are pushed down, large ones evened out.

    Use it wherever `torch.softmax` is used: `MultiMax()(scores, mask=mask)`. One module serves all
    heads of a layer. Parameter names and layout are those of the official checkpoints.

    Args:
        order: N of the modulator; 2 is the paper's (8 scalars).
        init: "paper" draws `ts` and `ranges` from a normal of standard deviation 0.02, truncated;
            "identity" starts `ts` at 0, which is plain SoftMax: use it inside a pretrained model.
        affine: also learn a scale and a shift of the scores, sigma(scale x + shift), as the first-
            order variant "V2" of the official code does.

    Raises:
        ValueError: `order` is not a positive integer or `init` is unknown.
    """

    def __init__(self, order: int = 2, init: str = "paper", affine: bool = False) -> None:
        super().__init__()
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"order must be an integer >= 1, got {order!r}")
        if init not in ("paper", "identity"):
            raise ValueError(f"init must be 'paper' or 'identity', got {init!r}")
        self.init = init
        self.ts = nn.Parameter(torch.empty(2 * order))
        self.ranges = nn.Parameter(torch.empty(2 * order))
        self.affine = affine
        if affine:
            self.scale = nn.Parameter(torch.empty(1))
            self.shift = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the scalars anew, as `init` says."""
        nn.init.trunc_normal_(self.ranges, std=0.02)
        if self.init == "paper":
            nn.init.trunc_normal_(self.ts, std=0.02)
        else:
            nn.init.zeros_(self.ts)
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
        """(N,), upper ends of the low range by order, in units of the scores."""
        return self.ranges[0::2]

    @property
    def d(self) -> Tensor:
        """(N,), lower ends of the high range by order, in units of the scores."""
        return self.ranges[1::2]

    def _transform(self, scores: Tensor) -> Tensor:
        if not self.affine:
            return scores
        x = to_compute_precision(scores)
        return self.scale.to(x.dtype) * x + self.shift.to(x.dtype)

    def modulate(self, scores: Tensor) -> Tensor:
        return modulate(self._transform(scores), self.ts, self.ranges)

    def derivative(self, scores: Tensor) -> Tensor:
        """d sigma / d score, in fp32 or wider; negative where the order of scores flips."""
        slope = modulate_derivative(self._transform(scores), self.ts, self.ranges)
        return slope * self.scale.to(slope.dtype) if self.affine else slope

    def extra_repr(self) -> str:
        return f"order={self.order}, init={self.init!r}" + (", affine=True" if self.affine else "")
