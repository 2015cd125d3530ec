"""The modulator of MultiMax inside Triton kernels, and the gradients of its scalars.

The scalars are a tuple `c = (scale, shift, *ts, *ranges)` of 2 + 4 N numbers; the order N is 0
(SoftMax with a temperature), 1 or 2. A score s becomes sigma(scale * s + shift), with the sigma of
`multimax.functional.modulate`.

The gradients of the scalars are sums over all scores. A program keeps one vector for each in
`sums` (but for the shift, whose gradient follows from the others) and writes its own row at the
end; the rows are added up outside. So two runs give the same bits, which atomic additions do not.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# Triton compiles these functions from their source; their arguments have no type a checker knows.

import torch
import triton
import triton.language as tl
from torch import Tensor

from multimax.functional import MASK_FLOOR

FLOOR = tl.constexpr(MASK_FLOOR)
ORDERS = {2 + 4 * order: order for order in range(3)}


def order_of(coefficients: Tensor, device: torch.device) -> int:
    """The order N of `[scale, shift, ts (2N), ranges (2N)]`.

    Raises:
        ValueError: it is not a floating-point vector of 2, 6 or 10 entries on `device`.
    """
    if coefficients.dim() != 1 or coefficients.numel() not in ORDERS:
        raise ValueError(
            "coefficients must be a vector [scale, shift, ts (2N), ranges (2N)] with N = 0, 1 or "
            f"2, so of 2, 6 or 10 entries, got shape {tuple(coefficients.shape)}: a higher order "
            "needs the eager multimax.attention or multimax.losses"
        )
    if not coefficients.is_floating_point() or coefficients.device != device:
        raise ValueError(
            f"coefficients must be floating-point and on {device}, got {coefficients.dtype} on "
            f"{coefficients.device}: use .to({str(device)!r}, torch.float32)"
        )
    return ORDERS[coefficients.numel()]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, probabilities and sums: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_device(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor on the CPU, unless Triton's interpreter runs the kernels."""
    if tensor.device.type == "cpu" and isinstance(load_coefficients, triton.JITFunction):
        raise ValueError(
            f"{name} is on the CPU, where Triton has no compiler: move it to a GPU, use the eager "
            "function, or set TRITON_INTERPRET=1 before the first import of triton"
        )


@triton.jit
def load_coefficients(pointer, order: tl.constexpr):
    """The tuple `c`."""
    c = (tl.load(pointer), tl.load(pointer + 1))
    for i in tl.static_range(4 * order):
        c += (tl.load(pointer + 2 + i),)
    return c


@triton.jit
def beyond_ranges(x, c, n: tl.constexpr, order: tl.constexpr):
    """max(b_n - x, 0) and max(x - d_n, 0)."""
    below = tl.maximum(c[2 * order + 2 * n] - x, 0.0)
    above = tl.maximum(x - c[2 * order + 2 * n + 1], 0.0)
    return below, above


@triton.jit
def modulate(scores, c, order: tl.constexpr):
    """sigma(x) and its derivative by x, at x = scale * scores + shift, and the scores.

    What is hidden has sigma -inf and the score 0, whose products with a gradient of 0 are 0.
    """
    if order >= 1:
        # inf would count as hidden under a negative scale.
        scores = tl.where(scores == float("inf"), float("nan"), scores)
        hidden = (scores <= FLOOR) | (c[0] * scores + c[1] <= FLOOR)
    else:
        hidden = scores == float("-inf")
    scores = tl.where(hidden, 0.0, scores)
    x = c[0] * scores + c[1]
    modulated = x
    slope = tl.full(scores.shape, 1.0, scores.dtype)
    if order >= 1:
        below, above = beyond_ranges(x, c, 1, order)
        modulated += c[2] * below + c[3] * above
        slope += tl.where(above > 0, c[3], 0.0) - tl.where(below > 0, c[2], 0.0)
    if order >= 2:
        below, above = beyond_ranges(x, c, 2, order)
        modulated += c[4] * (below * below) + c[5] * (above * above)
        slope += 2.0 * (c[5] * above - c[4] * below)
    return tl.where(hidden, float("-inf"), modulated), slope, scores


@triton.jit
def zero_sums(shape, dtype: tl.constexpr, order: tl.constexpr):
    """1 + 4 N tensors of zeros: (columns,), or (rows, 4) for the sums of tiles."""
    sums = (tl.zeros(shape, dtype),)
    for _ in tl.static_range(4 * order):
        sums += (tl.zeros(shape, dtype),)
    return sums


@triton.jit
def fold(term):
    """A tile (rows, columns) as (rows, 4) sums of its columns; a vector as it is.

    In the result of a matrix product on tensor cores, four threads share a row, each with two of
    every eight columns. So this takes no exchange between threads, which is left to the end.
    """
    if len(term.shape) == 1:
        return term
    else:
        split = tl.reshape(term, (term.shape[0], term.shape[1] // 8, 4, 2))
        return tl.sum(tl.sum(split, 3), 1)


@triton.jit
def add_to_sums(sums, gradient, scores, slope, c, order: tl.constexpr):
    """`sums` and what these scores add; `gradient` is the one by their modulated values."""
    x = c[0] * scores + c[1]
    new_sums = (sums[0] + fold(gradient * slope * scores),)
    if order >= 1:
        below, above = beyond_ranges(x, c, 1, order)
        new_sums += (sums[1] + fold(gradient * below),)
        new_sums += (sums[2] + fold(gradient * above),)
        new_sums += (sums[3] + fold(tl.where(below > 0, gradient, 0.0)),)
        new_sums += (sums[4] + fold(tl.where(above > 0, gradient, 0.0)),)
    if order >= 2:
        below, above = beyond_ranges(x, c, 2, order)
        new_sums += (sums[5] + fold(gradient * (below * below)),)
        new_sums += (sums[6] + fold(gradient * (above * above)),)
        new_sums += (sums[7] + fold(gradient * below),)
        new_sums += (sums[8] + fold(gradient * above),)
    return new_sums


@triton.jit
def centred(sums, means, residual):
    """Sums of rows, less what is in them because a row of gradients adds up to `residual`, not 0.

    `means` are the sums with the probabilities in the place of the gradients.
    """
    residual = tl.sum(residual, 1)
    new_sums = (tl.sum(sums[0], 1) - residual * tl.sum(means[0], 1),)
    for i in tl.static_range(1, len(sums)):
        new_sums += (tl.sum(sums[i], 1) - residual * tl.sum(means[i], 1),)
    return new_sums


@triton.jit
def store_coefficient_gradient(pointer, sums, residual, c, order: tl.constexpr):
    """Write the 2 + 4 N entries of this program.

    To shift x is to shift all ranges the other way, and all logits by the same number. The gradient
    of the shift is therefore minus the sum of theirs, and `residual`, to which the gradients of the
    logits add up: 0, as SoftMax is the same when all its logits grow alike.
    """
    tl.store(pointer, tl.sum(sums[0]))
    shift = residual
    for n in tl.static_range(1, order + 1):
        low = n * c[2 * n] * tl.sum(sums[4 * n - 1])
        high = -n * c[2 * n + 1] * tl.sum(sums[4 * n])
        tl.store(pointer + 2 * n, tl.sum(sums[4 * n - 3]))
        tl.store(pointer + 2 * n + 1, tl.sum(sums[4 * n - 2]))
        tl.store(pointer + 2 * order + 2 * n, low)
        tl.store(pointer + 2 * order + 2 * n + 1, high)
        shift -= low + high
    tl.store(pointer + 1, shift)
