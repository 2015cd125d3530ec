"""The logits of a Triton attention, from its scores by the steps before SoftMax, and the way back.

    x = scores, with a bias that comes before the modulation
    x = factor x                                    if `factor_first`
    y = sigma(scale x + shift)
    y = softcap tanh(y / softcap)                   unless `softcap` is None
    logits = factor y                               if there is a factor that is not first

`factor` has a number for each row. It is None where there is none: then, and without a cap, what is
compiled is the modulation alone.
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton compiles these functions from their source; their arguments have no type a checker knows.

import triton
import triton.language as tl

from multimax.kernels.triton_modulation import FLOOR, add_to_sums, fold, modulate, zero_sums


@triton.jit
def tanh(x):
    """tanh, which Triton has for no GPU but by another library for each.

    1 - 2 / (exp(2 x) + 1) cancels near 0. There it is the continued fraction of Lambert (1761),
    x / (1 + x^2 / (3 + x^2 / (5 + ...))) up to 13, which is as exact as fp64 within 0.5.
    """
    square = x * x
    above = 135135.0 + square * (17325.0 + square * (378.0 + square))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.5, x * above / below, tl.where(x < 0.0, -far, far))


@triton.jit
def logits_of(
    scores, factor, c, order: tl.constexpr, factor_first: tl.constexpr, softcap: tl.constexpr
):
    """Logits and, for the way back, (d logit / d y, d y' / d x, x, d logit / d factor).

    y' is sigma, before the cap. What is hidden has the logit -inf, x = 0 and derivatives that are
    finite. Without a cap and a factor after it, the first is the number 1; without any, the last 0.
    """
    by_modulated, by_factor = 1.0, 0.0
    if factor is None and softcap is None:
        logits, slope, scores = modulate(scores, c, order)
    else:
        hidden = scores <= FLOOR  # of what comes in: a factor or a cap could lift it
        first = tl.where(hidden, 0.0, scores)
        scores = tl.where(hidden, float("-inf"), factor * first if factor_first else first)
        low = scores <= FLOOR
        logits, slope, scores = modulate(scores, c, order)
        hidden = logits == float("-inf")
        if softcap is not None:
            hidden = hidden | low
            # inf would count as an ordinary score.
            ratio = tanh(tl.where(logits == float("inf"), float("nan"), logits) / softcap)
            logits = softcap * ratio
            by_modulated = 1.0 - ratio * ratio
        if factor_first:
            by_factor = c[0] * slope * first * by_modulated
        elif factor is not None:
            by_factor = tl.where(hidden, 0.0, logits)
            by_modulated = factor * by_modulated
            logits = factor * logits
        logits = tl.where(hidden, float("-inf"), logits)
    return logits, (by_modulated, slope, scores, by_factor)


@triton.jit
def backward_tile(
    scores, added, tile_mask, logsumexp, delta, gradient, kept, factor, c, order: tl.constexpr,
    factor_first: tl.constexpr, softcap: tl.constexpr,
):  # fmt: skip
    """Of a tile: P, the gradient by the logits, and the derivatives that `logits_of` returns.

    `gradient` is output_gradient value^T, `kept` what dropout multiplies, `added` the bias after
    the modulation, and `tile_mask` None where all may attend. A score that is not allowed may
    overflow when it is modulated: it is replaced before, and what comes of it after.
    """
    if tile_mask is not None:
        scores = tl.where(tile_mask, scores, 0.0)
    logits, derivatives = logits_of(scores, factor, c, order, factor_first, softcap)
    probabilities = tl.exp(logits + added - logsumexp)
    if tile_mask is not None:
        probabilities = tl.where(tile_mask, probabilities, 0.0)
    gradient = probabilities * (gradient * kept - delta)
    if tile_mask is not None:
        gradient = tl.where(tile_mask, gradient, 0.0)
    return probabilities, gradient, derivatives


@triton.jit
def zero_row_sums(
    rows: tl.constexpr,
    dtype: tl.constexpr,
    order: tl.constexpr,
    shifted: tl.constexpr,
    of_factor: tl.constexpr,
):
    """The sums of `zero_sums`, then that for the shift and that for the factor, where wanted."""
    sums = zero_sums((rows, 4), dtype, order)
    if shifted:
        sums += (tl.zeros((rows, 4), dtype),)
    if of_factor:
        sums += (tl.zeros((rows, 4), dtype),)
    return sums


@triton.jit
def add_row_sums(
    sums,
    gradient,
    derivatives,
    c,
    order: tl.constexpr,
    learned: tl.constexpr,
    shifted: tl.constexpr,
    of_factor: tl.constexpr,
):
    """`sums` and what a tile adds to those for the scalars, if `learned`, and for the factor."""
    by_modulated, slope, scores, by_factor = derivatives
    new_sums = sums
    if learned:
        inner = gradient * by_modulated
        new_sums = add_to_sums(sums, inner, scores, slope, c, order)
        if shifted:
            new_sums += (sums[4 * order + 1] + fold(inner),)
    if of_factor:
        last: tl.constexpr = len(sums) - 1
        new_sums = new_sums[:last]
        new_sums += (sums[last] + fold(gradient * by_factor),)
    return new_sums
