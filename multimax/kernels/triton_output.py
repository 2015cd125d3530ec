"""Cross-entropy of modulated logits in Triton, whose gradient takes the place of the scores.

Compared with the eager function in Triton's interpreter and on an H200, where it was timed
(`benchmarks.gpu`); compiled for GPUs of capability 8.0, 10.0 and 12.0, but not run on them.
"""

import torch
import triton
from torch import Tensor

from multimax.kernels.triton_modulation import check_device, compute_dtype, order_of
from multimax.kernels.triton_output_kernels import cross_entropy_row

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def modulated_cross_entropy_(
    scores: Tensor,
    target: Tensor,
    coefficients: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    want_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The loss of each row, and both gradients of `(weight * losses).sum()`, in one go.

    The loss of `multimax.losses.output_loss` with MultiMax of order 1 or 2 or with SoftMax, for an
    output layer that computes its scores a chunk of rows at a time. It is no differentiable
    function: with `want_gradient`, `scores` is overwritten by its own gradient.

    Args:
        scores: (rows, classes), on a GPU, of any strides; fp16, bf16, fp32 or fp64. The maths is
            in fp32 or wider, but the gradient is rounded to this dtype: in fp16, let `weight` hold
            the factor that scales the loss.
        target: (rows,) int64 classes, or (rows, classes) floating-point probabilities.
        coefficients: (2 + 4N,) `[c0, c1, ts (2N), ranges (2N)]` of order N = 0, 1 or 2; the logits
            are sigma(c0 scores + c1), as in `multimax.kernels.triton_attention`.
        weight: (rows,), the gradient of what is minimized by the losses; None is ones.
        label_smoothing: in [0, 1), the share of the target that is spread over all classes.
        ignore_index: rows of this class have the loss 0 and zero gradients; they are not read.
        want_gradient: False leaves `scores` alone.

    Returns:
        The losses, (rows,) in fp32 (fp64 for fp64 scores), not weighted; NaN for a target that is
        no class. And the gradient of the coefficients in their dtype, the same bits in every run,
        or None.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or `scores` is part of a
            graph that would not know that it is overwritten.
    """
    _check(scores, target, weight, label_smoothing)
    order = order_of(coefficients, scores.device)
    c = coefficients.detach().to(compute_dtype(scores.dtype))
    rows, classes = scores.shape
    losses = c.new_empty(rows)
    parts = c.new_empty(rows, c.numel()) if want_gradient else None
    block = min(2048, max(16, triton.next_power_of_2(classes)))
    with torch.cuda.device_of(scores):
        cross_entropy_row[(rows,)](
            scores=(scores, *scores.stride()),
            target=(target, *target.stride()),
            weight=None if weight is None else (weight, *weight.stride()),
            coefficients=c,
            losses=losses,
            coefficient_gradient=parts,
            classes=classes,
            ignore_index=ignore_index,
            smoothing=label_smoothing or None,
            order=order,
            soft=target.is_floating_point(),
            block=block,
            num_warps=8 if block > 1024 else 4,  # pyright: ignore[reportCallIssue]
        )
    if parts is None:
        return losses, None
    return losses, parts.sum(0, dtype=torch.float64).to(coefficients.dtype)


def _check(scores: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> None:
    check_device("scores", scores)
    if scores.dim() != 2 or scores.size(1) == 0 or scores.dtype not in DTYPES:
        raise ValueError(
            f"scores must be (rows, classes) and real floating-point, got shape "
            f"{tuple(scores.shape)} in {scores.dtype}: use .flatten(0, -2)"
        )
    if scores.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "scores requires a gradient, but would be overwritten behind autograd: call under "
            "torch.no_grad(), in an autograd function of yours"
        )
    soft = target.is_floating_point()
    if target.shape != (scores.shape if soft else scores.shape[:1]):
        raise ValueError(
            f"target must be ({scores.size(0)},) int64 classes or {tuple(scores.shape)} "
            f"probabilities, got shape {tuple(target.shape)} in {target.dtype}"
        )
    if not soft and target.dtype != torch.int64:
        raise ValueError(f"target must be int64 class indices, got {target.dtype}: use .long()")
    if weight is not None and (weight.shape != scores.shape[:1] or not weight.is_floating_point()):
        raise ValueError(
            f"weight must be ({scores.size(0)},) floating-point, one for each row, got shape "
            f"{tuple(weight.shape)} in {weight.dtype}"
        )
    for name, tensor in {"target": target, "weight": weight}.items():
        if tensor is not None and tensor.device != scores.device:
            raise ValueError(
                f"{name} must be on the device of scores, {scores.device}, got {tensor.device}: "
                f"use .to({str(scores.device)!r})"
            )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
