"""SoftMax of modulated scores, sparsemax and 1.5-entmax on the CPU, by the C kernels.

The definitions are in `multimax.functional` and, of the thresholds, in `multimax.normalizers`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multimax import functional
from multimax.kernels import c_library
from multimax.kernels.backend import chosen_backend, graph_obstacle, refuse

MOST_ORDER = 2  # of the modulator
NO_MODULATOR = f"it is no SoftMax of scores with a modulator of order <= {MOST_ORDER} alone"


def usable(scores: Tensor, what: Any, lacks: str | None = None) -> bool:
    """Whether the C kernels compute `what` of `scores`, which are in compute precision.

    Args:
        scores: any shape.
        what: is to be computed, for the error.
        lacks: why no C kernel computes it; None if one does.

    Raises:
        ValueError: a backend is asked for by name that cannot compute it.
    """
    name = chosen_backend()
    if name == "eager":
        return False
    reason = lacks or obstacle(scores)
    if name == "triton":
        reason = "its kernels are attention and linear_output_loss"
    if reason and name != "auto":
        refuse(name, what, reason)
    return reason is None


def obstacle(tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why the C kernels cannot work on a floating-point tensor; None if they can.

    Args:
        tensor: one of those that they would work on.
        dtype: in which they would compute; None is fp32, or that of `tensor` if it is wider.
    """
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}, it runs on the CPU"
    if tensor.numel() == 0 or tensor.dim() == 0:
        return "there is nothing to compute"
    unavailable = graph_obstacle()
    if unavailable:
        return unavailable
    return c_library.unavailable(dtype or torch.promote_types(tensor.dtype, torch.float32))


def modulated_softmax(
    scores: Tensor, coefficients: Tensor, dim: int, mask: Tensor | None
) -> Tensor:
    """`multimax.functional.modulated_softmax`; saves the scores and the result.

    Args:
        scores: any shape, in compute precision.
        coefficients: (2 + 4 N,), `[scale, shift, ts, ranges]`, N = 0, 1 or 2; dtype of `scores`.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, or None.
    """
    c_library.check_coefficients(coefficients, scores)
    x, row_mask = _rows_last(scores, dim, mask)
    p = _ModulatedSoftMax.apply(x, coefficients, row_mask)
    return p if x is scores else p.movedim(-1, dim).contiguous()


def threshold(scores: Tensor, squared: bool, dim: int, mask: Tensor | None) -> Tensor:
    """1.5-entmax if `squared`, else sparsemax, which saves the result alone.

    Args:
        scores: any shape, in compute precision.
        squared: which of the two.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, or None.
    """
    x, row_mask = _rows_last(scores, dim, mask)
    p = _Threshold.apply(x, squared, row_mask)
    return p if x is scores else p.movedim(-1, dim).contiguous()


def kth_largest(scores: Tensor, k: int, dim: int, mask: Tensor | None) -> Tensor:
    """The k-th largest of the scores along `dim`, which stays as a dimension of size 1.

    Args:
        scores: any shape, in compute precision; there is no gradient.
        k: from 1 to the size of `dim`.
        dim: the dimension of a row.
        mask: bool, broadcastable to `scores`, or None; the others count as -inf.
    """
    x, row_mask = _rows_last(scores.detach(), dim, mask)
    return torch.ops.multimax.kth_largest(x, k, row_mask).unsqueeze(dim)


class _ModulatedSoftMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, coefficients, mask):
        p = torch.ops.multimax.softmax_forward(x, coefficients, mask)
        # The backward pass of SoftMax with a fixed temperature needs no scores.
        ctx.keeps_scores = order_of(coefficients) > 0 or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if ctx.keeps_scores else p, coefficients, p, mask)
        return p

    @staticmethod
    def backward(ctx, grad) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, coefficients, p, mask = ctx.saved_tensors
        if torch.is_grad_enabled() and not ctx.keeps_scores:
            mean = (p * grad).sum(-1, keepdim=True)
            grad = coefficients[0] * p * (grad - mean)
            return grad.masked_fill(mean.isnan() & (p == 0), 0.0), None, None
        if torch.is_grad_enabled():
            definition = functional.modulated_softmax(x, coefficients, -1, mask)
            return *differentiable_gradients(definition, [x, coefficients], grad), None
        learned = ctx.needs_input_grad[1]
        grads = torch.ops.multimax.softmax_backward(
            x, coefficients, mask, p, grad.contiguous(), learned
        )
        return *grads, None


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, squared, mask):
        p = torch.ops.multimax.threshold_forward(x, squared, mask)
        ctx.save_for_backward(p)
        ctx.squared = squared
        ctx.set_materialize_grads(False)  # the Fenchel-Young loss sends none in its first backward
        return p

    @staticmethod
    def backward(ctx, grad) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad is None:
            return None, None, None
        (p,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the same in operations that can be differentiated again
            support = p.detach().where(~(p > 0), 1.0)  # 1, 0 or NaN
            weight = p.where(p > 0, 1.0).sqrt() * support if ctx.squared else support
            total = weight.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
            mean = (weight * grad).sum(-1, keepdim=True) / total
            grad = weight * (grad - mean)
            return grad.masked_fill(mean.isnan() & (p == 0), 0.0), None, None
        grad_scores = torch.ops.multimax.threshold_backward(p, ctx.squared, grad.contiguous())
        return grad_scores, None, None


def differentiable_gradients(
    output: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, of the inputs that need one."""
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [None if t is None or not t.requires_grad else next(found) for t in inputs]


def _rows_last(scores: Tensor, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Contiguous scores with the rows in the last dimension, and the mask, broadcast to them."""
    if mask is not None:
        functional.check_device(scores, mask=mask)
        mask = mask.expand(scores.shape).movedim(dim, -1)
    if dim in (-1, scores.dim() - 1) and scores.is_contiguous():
        return scores, mask
    return scores.movedim(dim, -1).contiguous(), mask


def _four_dimensions(shape: torch.Size, mask: Tensor | None) -> tuple[list[int], Tensor | None]:
    """(outer, heads, queries, columns) of rows of any shape, and their mask in that shape."""
    shape4 = [1] * (4 - len(shape)) + list(shape)
    if len(shape) > 4:
        shape4 = [shape[:-3].numel(), *shape[-3:]]
    if mask is None:
        return shape4, None
    return shape4, contiguous_rows(mask).reshape(shape4)


def contiguous_rows(mask: Tensor) -> Tensor:
    """The same mask with stride 1 in the last dimension; others that are broadcast stay so."""
    if mask.stride(-1) == 1 or mask.size(-1) == 1:
        return mask
    kept = [slice(0, 1) if mask.stride(d) == 0 else slice(None) for d in range(mask.dim() - 1)]
    return mask[(*kept, slice(None))].contiguous().expand(mask.shape)


def _describe(shape: torch.Size, mask: Tensor | None) -> Any:
    """The rows of a contiguous tensor, for the kernels; holds on to the mask."""
    (outer, heads, queries, columns), mask = _four_dimensions(shape, mask)
    rows = c_library.Rows(
        outer=outer, heads=heads, queries=queries, columns=columns, threads=torch.get_num_threads()
    )
    if mask is not None:
        rows.mask, rows.held = c_library.address(mask, torch.bool), mask
        rows.mask_outer, rows.mask_head, rows.mask_query, _ = mask.stride()
    return rows


@torch.library.custom_op("multimax::softmax_forward", mutates_args=())
def _softmax_forward(x: Tensor, coefficients: Tensor, mask: Tensor | None) -> Tensor:
    c_library.check_order(coefficients)
    p = torch.empty_like(x)
    order = order_of(coefficients)
    rows = _describe(x.shape, mask)
    c_library.call(x.dtype, "softmax_forward", rows, order, coefficients, x, p)
    return p


@_softmax_forward.register_fake
def _(x, coefficients, mask):
    return torch.empty_like(x)


@torch.library.custom_op("multimax::softmax_backward", mutates_args=())
def _softmax_backward(
    x: Tensor, coefficients: Tensor, mask: Tensor | None, p: Tensor, grad: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    c_library.check_order(coefficients)
    check_shape(x.shape, p, grad)
    dx = torch.empty_like(x)
    sums = torch.zeros(coefficients.shape, dtype=torch.float64)
    rows = _describe(x.shape, mask)
    order, into = order_of(coefficients), c_library.address(sums, sums.dtype) if learned else None
    c_library.call(x.dtype, "softmax_backward", rows, order, coefficients, x, p, grad, dx, into)
    return dx, sums.to(x.dtype)


@_softmax_backward.register_fake
def _(x, coefficients, mask, p, grad, learned):
    return torch.empty_like(x), torch.empty_like(coefficients)


@torch.library.custom_op("multimax::threshold_forward", mutates_args=())
def _threshold_forward(x: Tensor, squared: bool, mask: Tensor | None) -> Tensor:
    p = torch.empty_like(x)
    c_library.call(x.dtype, "threshold_forward", _describe(x.shape, mask), squared, x, p)
    return p


@_threshold_forward.register_fake
def _(x, squared, mask):
    return torch.empty_like(x)


@torch.library.custom_op("multimax::threshold_backward", mutates_args=())
def _threshold_backward(p: Tensor, squared: bool, grad: Tensor) -> Tensor:
    check_shape(p.shape, grad)
    dx = torch.empty_like(p)
    rows = _describe(p.shape, None)
    c_library.call(p.dtype, "threshold_backward", rows, squared, p, grad, dx)
    return dx


@_threshold_backward.register_fake
def _(p, squared, grad):
    return torch.empty_like(p)


@torch.library.custom_op("multimax::kth_largest", mutates_args=())
def _kth_largest(x: Tensor, k: int, mask: Tensor | None) -> Tensor:
    if not 1 <= k <= x.size(-1):
        raise ValueError(f"k must be in [1, {x.size(-1)}], got {k}")
    kth = x.new_empty(x.shape[:-1])
    c_library.call(x.dtype, "kth_largest", _describe(x.shape, mask), k, x, kth)
    return kth


@_kth_largest.register_fake
def _(x, k, mask):
    return x.new_empty(x.shape[:-1])


def check_shape(shape: Sequence[int], *tensors: Tensor) -> None:
    """Raise ValueError for tensors of another shape, beyond which a kernel would read or write."""
    for tensor in tensors:
        if tensor.shape != tuple(shape):
            raise ValueError(f"a tensor is of shape {tuple(tensor.shape)}, not {tuple(shape)}")


def order_of(coefficients: Tensor) -> int:
    """N of `[scale, shift, ts (2 N), ranges (2 N)]`."""
    return (coefficients.numel() - 2) // 4
