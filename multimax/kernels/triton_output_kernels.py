"""The Triton kernel of `multimax.kernels.triton_output`: one program for each row of scores.

    z = sigma(scale scores + shift)      y = (1 - smoothing) target + smoothing / classes
    loss = sum(y) logsumexp(z) - sum(y z)        d loss / d z = sum(y) softmax(z) - y

The logsumexp is taken in one pass (Milakov and Gimelshein, Online normalizer calculation for
softmax, 2018); a second pass computes z anew and leaves the gradient in the place of the scores.

A matrix is a tuple (pointer, row stride, column stride), a vector a tuple (pointer, stride).
"""

# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false
# Triton compiles these functions from their source; their arguments have no type a checker knows.

import triton
import triton.language as tl

from multimax.kernels.triton_modulation import (
    add_to_sums,
    load_coefficients,
    modulate,
    store_coefficient_gradient,
    zero_sums,
)


@triton.jit
def _places(matrix, row, start, block: tl.constexpr):
    """Pointers to a part of a row; what grows with the whole matrix is int64."""
    first = matrix[0] + row * matrix[1] + tl.cast(start, tl.int64) * matrix[2]
    return first + tl.arange(0, block) * matrix[2]


@triton.jit
def _smoothed_target(
    target, row, label, start, classes, smoothing, block: tl.constexpr, dtype: tl.constexpr
):
    """y of a part of a row; `label` is None where the target holds probabilities."""
    columns = start + tl.arange(0, block)
    inside = columns < classes
    if label is None:
        y = tl.load(_places(target, row, start, block), mask=inside, other=0.0).to(dtype)
    else:
        y = tl.where(columns == label, 1.0, 0.0).to(dtype)
    if smoothing is not None:
        share = tl.cast(smoothing, dtype)
        y = (1.0 - share) * y + share / classes
    return tl.where(inside, y, 0.0)


@triton.jit
def cross_entropy_row(
    scores,
    target,
    weight,
    coefficients,
    losses,
    coefficient_gradient,
    classes,
    ignore_index,
    smoothing,
    order: tl.constexpr,
    soft: tl.constexpr,
    block: tl.constexpr,
):
    """The loss of a row and, unless `coefficient_gradient` is None, its gradients.

    An ignored row is not read, and a label that is no class gives NaN.
    """
    dtype: tl.constexpr = coefficients.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    c = load_coefficients(coefficients, order)
    label = None
    end = classes
    if not soft:
        label = tl.load(target[0] + row * target[1])
        end = tl.where(label == ignore_index, 0, classes)

    maximum = tl.full((), float("-inf"), dtype)
    total = tl.zeros((), dtype)
    mass = tl.zeros((block,), dtype)
    observed = tl.zeros((block,), dtype)
    forbidden = tl.zeros((block,), dtype)
    for start in range(0, end, block):
        inside = start + tl.arange(0, block) < end
        x = tl.load(_places(scores, row, start, block), mask=inside, other=0.0).to(dtype)
        z, _, _ = modulate(x, c, order)
        z = tl.where(inside, z, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(z, 0))
        # As long as all scores are -inf, so is the maximum, and -inf - -inf is NaN.
        anchor = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - anchor) + tl.sum(tl.exp(z - anchor), 0)
        maximum = new_maximum
        y = _smoothed_target(target, row, label, start, classes, smoothing, block, dtype)
        mass += y
        observed += tl.where(y == 0.0, 0.0, y * z)
        forbidden += tl.where(z == float("-inf"), y, 0.0)

    mass = tl.sum(mass, 0)
    if not soft:
        mass = tl.where((label >= 0) & (label < classes), 1.0, float("nan")).to(dtype)
    # The difference to the maximum first: it keeps the digits of a small loss.
    loss = mass * tl.log(total) + (mass * maximum - tl.sum(observed, 0))
    tl.store(losses + row, tl.where(end > 0, loss, 0.0))

    if coefficient_gradient is not None:
        logsumexp = maximum + tl.log(total)
        factor = 1.0
        if weight is not None:
            factor = tl.load(weight[0] + row * weight[1]).to(dtype)
        sums = zero_sums((block,), dtype, order)
        for start in range(0, classes, block):
            inside = start + tl.arange(0, block) < end
            places = _places(scores, row, start, block)
            x = tl.load(places, mask=inside, other=0.0).to(dtype)
            z, slope, x = modulate(x, c, order)
            y = _smoothed_target(target, row, label, start, classes, smoothing, block, dtype)
            gradient = factor * (mass * tl.exp(z - logsumexp) - y)
            if order >= 1:  # where the loss is infinite, a hidden class has one
                gradient = tl.where(z == float("-inf"), 0.0, gradient)
            gradient = tl.where(inside, gradient, 0.0)
            sums = add_to_sums(sums, gradient, x, slope, c, order)
            result = (c[0] * gradient * slope).to(scores[0].dtype.element_ty)
            tl.store(places, result, mask=start + tl.arange(0, block) < classes)
        share = row * (2 + 4 * order)
        # Without that of hidden classes, the gradient of a row does not add up to 0.
        residual = factor * tl.sum(forbidden, 0)
        store_coefficient_gradient(coefficient_gradient + share, sums, residual, c, order)
