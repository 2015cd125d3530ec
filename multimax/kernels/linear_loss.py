"""Linear layer and loss in one function, some rows at a time: the scores are never held whole.

A chunk of rows goes through the linear layer, its loss and its gradient before the next one starts,
so that the scores of a large vocabulary take the memory of one chunk.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimax.kernels import c_library
from multimax.kernels.c_rows import order_of

LEAST_ROWS = 128  # of a chunk: the gradient of the weight is read and written once per chunk
LEAST_SCORES = 2**22  # of a chunk, 16 MiB in fp32
LEAST_SCORES_ON_A_GPU = 2**28  # its caches hold no chunk: 512 MiB in half precision

# (scores as the product has them, target, row weights or None, whether gradients are wanted) ->
# losses (rows,) and, if they are, gradients of the sum of weight * loss by the scores (may be in
# their place) and parameters.
Step = Callable[..., tuple[Tensor, Tensor | None, Sequence[Tensor | None]]]


class HiddenClasses:
    """Which classes of a row are forbidden, for some rows at a time.

    Args:
        class_mask: bool, broadcastable to `shape`, True where a class is allowed.
        shape: of the scores, (..., classes).
    """

    def __init__(self, class_mask: Tensor, shape: Sequence[int]) -> None:
        self._allowed = class_mask.expand(shape)
        self._rows = math.prod(shape[:-1])

    def of_rows(self, part: slice = slice(None)) -> Tensor:
        """(rows of the part, classes) bool, without a copy of other rows."""
        *leading, classes = self._allowed.shape
        if self._rows == 0:
            return self._allowed.new_empty(0, classes)
        if not any(self._allowed.stride()[:-1]):  # the same for all
            return (~self._allowed[(0,) * len(leading)]).expand(self._rows, -1)[part]
        if len(leading) == 1:
            return ~self._allowed[part]
        rows = torch.arange(self._rows, device=self._allowed.device)[part]
        return ~self._allowed[torch.unravel_index(rows, leading)]


def linear_loss(
    step: Step,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    parameters: Sequence[Tensor],
    reduction: str,
    hidden: HiddenClasses | None = None,
) -> Tensor:
    """Losses of `features weight^T + bias`.

    Args:
        step: the loss of some rows, with its gradients.
        features: (rows, dim).
        weight: (classes, dim).
        bias: (classes,) or None.
        target: (rows,) or (rows, classes); handed to `step` a chunk at a time.
        parameters: of the loss, which `step` gives gradients for; at most 1-D.
        reduction: "sum", whose gradients are computed in the forward pass, or "none", for which the
            backward pass computes the scores again.
        hidden: classes whose scores become -inf, without a gradient; None if there are none.

    Returns:
        (rows,) or a scalar, fp32 or wider.
    """
    at_once = reduction == "sum" and torch.is_grad_enabled()
    apply: Any = _LinearLoss.apply
    if torch.compiler.is_compiling():  # a wrapper for all calls would take a second to import
        apply = torch.compiler.disable(apply)
    losses = apply(step, at_once, hidden, features, weight, bias, target, *parameters)
    return losses.sum() if reduction == "sum" and not at_once else losses


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step, at_once, hidden, *tensors):
        ctx.dtype = _product_dtype(tensors[0])
        ctx.step, ctx.at_once, ctx.hidden = step, at_once, hidden
        ctx.save_for_backward(*tensors)
        losses, ctx.grads = _run(ctx, tensors, None, at_once)
        return losses.sum() if at_once else losses

    @staticmethod
    def backward(ctx, grad) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph=True, which would get no graph
            raise RuntimeError(
                "second derivatives of linear_output_loss need `with use_backend('eager')` around "
                "the loss, or output_loss of the whole scores"
            )
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # or a second backward pass through the same graph
            _, grads = _run(ctx, ctx.saved_tensors, None if ctx.at_once else grad, True)
        if ctx.at_once:
            grads = [g if g is None else g.mul_(grad) for g in grads or []]
        cast = [
            g if g is None else g.to(tensor.dtype)
            for g, tensor in zip(grads or [], ctx.saved_tensors, strict=True)
        ]
        return None, None, None, *cast


def compute_dtype(features: Tensor) -> torch.dtype:
    """The dtype of the scores and losses: fp32 or wider."""
    return torch.promote_types(_product_dtype(features), torch.float32)


def _product_dtype(features: Tensor) -> torch.dtype:
    """The dtype of the products with the weight: autocast's, or that of the features."""
    device = features.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else features.dtype


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _run(
    ctx: Any, tensors: Sequence[Tensor], row_weight: Tensor | None, gradient: bool
) -> tuple[Tensor, list[Tensor | None] | None]:
    """Losses of all rows and, if wanted, gradients of `tensors` where they need one.

    The gradient of a row is at most 1 in size before it is weighted, so that fp16 can hold it; sums
    over rows are made in fp32 or wider.
    """
    features, weight, bias, target, *_ = tensors
    dtype = torch.promote_types(ctx.dtype, torch.float32)
    with _without_autocast(features.device):
        x, w = features.to(ctx.dtype), weight.to(ctx.dtype)
        b = bias if bias is None else bias.to(ctx.dtype)
        losses = torch.empty(x.size(0), dtype=dtype, device=x.device)
        totals = None
        if gradient:
            totals = [
                torch.zeros_like(tensor, dtype=dtype) if needed else None
                for tensor, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True)
            ]
        least = LEAST_SCORES_ON_A_GPU if x.is_cuda else LEAST_SCORES
        size = max(LEAST_ROWS, least // max(w.size(0), 1))
        for start in range(0, x.size(0), size):
            part = slice(start, start + size)
            scores = F.linear(x[part], w, b)
            hidden = None if ctx.hidden is None else ctx.hidden.of_rows(part)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            weights = None if row_weight is None else row_weight[part].to(dtype)
            losses[part], d, of_parameters = ctx.step(scores, target[part], weights, gradient)
            if totals is not None and d is not None:
                if hidden is not None:
                    d.masked_fill_(hidden, 0.0)
                _accumulate(totals, part, x[part], w, d.to(ctx.dtype), of_parameters)
            del scores, d
    return losses, totals


def _accumulate(
    totals: list[Tensor | None],
    part: slice,
    x: Tensor,
    weight: Tensor,
    d: Tensor,
    of_parameters: Sequence[Tensor | None],
) -> None:
    of_x, of_weight, of_bias, _, *rest = totals
    if of_x is not None:
        of_x[part] = d @ weight
    if of_weight is not None and of_weight.dtype == d.dtype:
        of_weight.addmm_(d.t(), x)
    elif of_weight is not None:
        of_weight += d.t() @ x
    if of_bias is not None:
        of_bias += d.sum(0, dtype=of_bias.dtype)
    for total, grad in zip(rest, of_parameters, strict=True):
        if total is not None and grad is not None:
            total += grad


def _wide(scores: Tensor) -> Tensor:
    """In fp32 or wider."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def modulated_step(coefficients: Tensor, label_smoothing: float, ignore_index: int) -> Step:
    """Cross-entropy of modulated scores by the C kernels; its parameter is `coefficients`.

    Args:
        coefficients: (2 + 4 N,), `[scale, shift, ts, ranges]`, on the CPU.
        label_smoothing: in [0, 1).
        ignore_index: the class of rows that count for nothing.
    """
    c_library.check_order(coefficients)
    c = coefficients.detach()

    def step(scores: Tensor, target: Tensor, weight: Tensor | None, gradient: bool) -> Any:
        scores = _wide(scores)
        losses = scores.new_empty(scores.size(0))
        sums = torch.zeros(c.shape, dtype=torch.float64)
        of_scores = c.to(scores.dtype)
        soft = target.is_floating_point()
        target = (target.to(scores.dtype) if soft else target).contiguous().resolve_neg()
        description = c_library.Target(
            smoothing=label_smoothing, ignored=ignore_index, gradient=gradient
        )
        of_target = c_library.address(target, scores.dtype if soft else torch.int64)
        setattr(description, "soft" if soft else "target", of_target)
        if weight is not None:
            weight = weight.contiguous()
            description.weight = c_library.address(weight, scores.dtype)
        shape = (*scores.shape, torch.get_num_threads())
        arguments = (order_of(c), of_scores, scores, description, losses)
        into = c_library.address(sums, torch.float64) if gradient else None
        c_library.call(scores.dtype, "cross_entropy", *shape, *arguments, into)
        return losses, scores if gradient else None, [sums]

    return step


def triton_step(coefficients: Tensor, label_smoothing: float, ignore_index: int) -> Step:
    """`modulated_step` for CUDA."""
    from multimax.kernels.triton_output import modulated_cross_entropy_  # not everyone has Triton

    c = coefficients.detach()

    def step(scores: Tensor, target: Tensor, weight: Tensor | None, gradient: bool) -> Any:
        losses, of_coefficients = modulated_cross_entropy_(
            scores, target, c, weight, label_smoothing, ignore_index, gradient
        )
        return losses, scores if gradient else None, [of_coefficients]

    return step


def reference_step(
    row_losses: Callable[[Tensor, Tensor], Tensor], parameters: Sequence[Tensor]
) -> Step:
    """Any loss, differentiated by autograd.

    Args:
        row_losses: from scores (rows, classes) and their target to losses (rows,).
        parameters: leaves of its graph.
    """

    def step(scores: Tensor, target: Tensor, weight: Tensor | None, gradient: bool) -> Any:
        scores = _wide(scores)
        if not gradient:
            return row_losses(scores, target), None, []
        with torch.enable_grad():
            scores.requires_grad_()
            losses = row_losses(scores, target)
            upstream = torch.ones_like(losses) if weight is None else weight
            grads = torch.autograd.grad(losses, [scores, *parameters], upstream, allow_unused=True)
        return losses.detach(), grads[0], grads[1:]

    return step
