"""The loss that belongs to an output normalizer: cross-entropy, or a Fenchel-Young loss."""

from collections.abc import Callable, Sequence
from functools import partial, singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimax.functional import check_device, to_compute_precision
from multimax.kernels.backend import chosen_backend, refuse, triton_obstacle, use_backend
from multimax.kernels.c_rows import NO_MODULATOR, obstacle, usable
from multimax.kernels.linear_loss import (
    Step,
    compute_dtype,
    linear_loss,
    modulated_step,
    reference_step,
    triton_step,
)
from multimax.normalizers import EntMax, LogitNormalizer, Normalizer, entmax
from multimax.normalizers.entmax import check_alpha


def output_loss(
    normalizer: Normalizer,
    scores: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The loss of `scores` under the output normalizer, with the semantics of `F.cross_entropy`.

    Cross-entropy for a normalizer that is SoftMax of some logits, the Fenchel-Young loss for the
    entmax family. Another family registers its own with `row_losses.register`.

    Args:
        normalizer: maps scores (..., C) to probabilities over the C classes.
        scores: (..., C), real; fp16 and bf16 are computed in fp32.
        target: (...) int64 class indices, or (..., C) probabilities that sum to one. It gets no
            gradient.
        label_smoothing: in [0, 1), the share of the target that is spread over all classes.
        ignore_index: rows with this class index count for nothing; only for class indices.
        reduction: "none", "sum", or "mean" over the rows that are not ignored. The mean over no
            rows is NaN, as in torch.

    Returns:
        fp32 or wider; of shape (...) for "none", else a scalar.

    Raises:
        ValueError: an argument has a wrong value, dtype or shape, a class index is out of range
            (checked on the CPU only: elsewhere the check would wait for the device), or the
            normalizer has no loss.
    """
    rows = partial(row_losses, normalizer)
    return _reduced(rows, scores, target, label_smoothing, ignore_index, reduction)


def linear_output_loss(
    normalizer: Normalizer,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`output_loss` of the scores `features weight^T + bias`, which are never held whole.

    A large vocabulary then costs the memory of a chunk of its scores; see
    `multimax.kernels.linear_loss`. Gradients of features, weight, bias and the normalizer's
    parameters are exact. Second derivatives need `with use_backend("eager")`.

    Args:
        normalizer: as in `output_loss`.
        features: (..., dim).
        weight: (C, dim).
        target, label_smoothing, ignore_index, reduction: as in `output_loss`.
        bias: (C,) or None.

    Returns:
        As `output_loss`.

    Raises:
        ValueError: as `output_loss`.
    """
    options = (label_smoothing, ignore_index, reduction)
    to_compute_precision(features.new_empty(0))  # for its check of the dtype
    check_device(features, weight=weight, bias=bias)
    if chosen_backend() == "eager":
        scores = F.linear(features, weight, bias)
        rows = partial(row_losses, normalizer)
        return _reduced(rows, scores, target, label_smoothing, ignore_index, reduction)
    shape = (*features.shape[:-1], weight.size(0))
    _check(features.new_empty(()).expand(shape), target, *options)
    target = target.detach()
    soft = target.is_floating_point()
    flat_target = target.reshape(-1, shape[-1]) if soft else target.reshape(-1)
    step, parameters = _step(normalizer, features, label_smoothing, ignore_index)
    flat = features.reshape(-1, features.size(-1))
    how = "none" if reduction == "none" else "sum"
    losses = linear_loss(step, flat, weight, bias, flat_target, parameters, how)
    if reduction == "none":
        return losses.reshape(shape[:-1])
    if reduction == "sum":
        return losses
    if soft:
        return losses / flat_target.size(0)
    count = (flat_target != ignore_index).sum()
    # The mean of no rows is NaN, as in torch, but its gradients are 0: one batch without a target
    # must not spoil the weights of all processes.
    return (losses / count.clamp_min(1)).where(count > 0, torch.nan)


def _step(
    normalizer: Normalizer, features: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Step, Sequence[Tensor]]:
    """The loss of a chunk of rows, and the parameters that it gives gradients for."""
    backend = chosen_backend()
    kernel = _kernel(backend, normalizer, features)
    if kernel is not None:
        dtype = torch.promote_types(features.dtype, torch.float32)
        coefficients = normalizer.coefficients(dtype, features.device)
        return kernel(coefficients, label_smoothing, ignore_index), [coefficients]

    def losses(scores: Tensor, target: Tensor) -> Tensor:
        rows = partial(row_losses, normalizer)
        with use_backend(backend):  # of the forward pass, in the backward pass too
            return _reduced(rows, scores, target, label_smoothing, ignore_index, "none")

    parameters = [p for p in normalizer.parameters() if p.requires_grad]
    return reference_step(losses, parameters), parameters


def _kernel(
    backend: str, normalizer: Normalizer, features: Tensor
) -> Callable[[Tensor, float, int], Step] | None:
    """What makes the step of a kernel, None for autograd; ValueError if `backend` cannot do it."""
    name = backend
    if backend == "auto":
        name = "triton" if features.device.type == "cuda" else "c"
    if not normalizer.fusible:
        reason = NO_MODULATOR
    elif name == "triton":
        reason = triton_obstacle(features)
    else:
        reason = obstacle(features, compute_dtype(features))
    if reason is None:
        return triton_step if name == "triton" else modulated_step
    # The Fenchel-Young loss has a kernel if its normalizer has one, which is asked for later.
    if backend == "triton" or (backend == "c" and not isinstance(normalizer, EntMax)):
        refuse(backend, f"linear_output_loss of {normalizer}", reason)
    return None


@singledispatch
def row_losses(
    normalizer: Normalizer, scores: Tensor, target: Tensor, label_smoothing: float
) -> Tensor:
    """One loss for each row; dispatches on the class of the normalizer.

    Args:
        normalizer: the output normalizer.
        scores: (rows, C), real.
        target: (rows,) int64 class indices in [0, C), or (rows, C) probabilities.
        label_smoothing: in [0, 1).

    Returns:
        (rows,), fp32 or wider.

    Raises:
        ValueError: no loss is registered for this class.
    """
    name = type(normalizer).__name__
    raise ValueError(
        f"{name} has no loss: derive it from LogitNormalizer, or register one with "
        f"`multimax.losses.row_losses.register({name})`"
    )


@row_losses.register
def _(normalizer: LogitNormalizer, scores, target, label_smoothing):
    return _cross_entropy(normalizer.logits(scores), target, label_smoothing)


@row_losses.register
def _(normalizer: EntMax, scores, target, label_smoothing):
    if normalizer.heads is not None:
        raise ValueError(
            f"EntMax(heads={normalizer.heads}) has one alpha per head, but an output layer has no "
            "heads: use heads=None"
        )
    if normalizer.fixed_alpha == 1:  # the same number as SoftMax, for soft targets too
        return _cross_entropy(to_compute_precision(scores), target, label_smoothing)
    return _fenchel_young(normalizer.alpha, scores, target, label_smoothing)


def fenchel_young_loss(
    scores: Tensor,
    target: Tensor,
    alpha: float | Tensor = 1.5,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The Fenchel-Young loss of alpha-entmax, whose gradient is `entmax(scores) - target`.

        L(z, y) = (p - y) z + H(p) - H(y),     p = entmax(z),
        H(p) = sum_i (p_i - p_i^alpha) / (alpha (alpha - 1))

    It is at least 0, and 0 exactly where p equals y. With alpha = 1 it is cross-entropy less the
    entropy of the target.

    Args:
        scores, target, label_smoothing, ignore_index, reduction: as in `output_loss`.
        alpha: a finite number >= 1; or a tensor of one element > 1, which gets a gradient.

    Returns:
        As `output_loss`.

    Raises:
        ValueError: `alpha` is out of range or has several elements; else as in `output_loss`.

    Source: Blondel et al., Learning with Fenchel-Young Losses, JMLR 2020; Peters et al., Sparse
    Sequence-to-Sequence Models, ACL 2019.
    """
    if not isinstance(alpha, Tensor):
        check_alpha(alpha)
    elif alpha.numel() != 1:
        raise ValueError(f"alpha must have one element, got shape {tuple(alpha.shape)}")
    rows = partial(_fenchel_young, alpha)
    return _reduced(rows, scores, target, label_smoothing, ignore_index, reduction)


def sparsemax_loss(scores: Tensor, target: Tensor, **options: Any) -> Tensor:
    """`fenchel_young_loss` of sparsemax (alpha = 2), with the same options."""
    return fenchel_young_loss(scores, target, 2.0, **options)


def entmax15_loss(scores: Tensor, target: Tensor, **options: Any) -> Tensor:
    """`fenchel_young_loss` of 1.5-entmax, with the same options."""
    return fenchel_young_loss(scores, target, 1.5, **options)


def _reduced(
    rows: Callable[[Tensor, Tensor, float], Tensor],
    scores: Tensor,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    _check(scores, target, label_smoothing, ignore_index, reduction)
    target = target.detach()
    soft = target.is_floating_point()
    shape = scores.shape[:-1]
    ignored = torch.zeros_like(target[..., 0], dtype=torch.bool) if soft else target == ignore_index
    ignored = ignored.reshape(-1)
    flat_scores = scores.reshape(-1, scores.size(-1))
    flat_target = target.reshape(flat_scores.shape if soft else (-1,))
    if not soft:
        flat_target = flat_target.masked_fill(ignored, 0)
    losses = rows(flat_scores, flat_target, label_smoothing).masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses.reshape(shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (~ignored).sum()


def _check(scores, target, label_smoothing, ignore_index, reduction) -> None:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if scores.dim() == 0:
        raise ValueError("scores must have a class dimension, (..., C), got a scalar")
    check_device(scores, target=target)
    if target.is_floating_point():
        if target.shape != scores.shape:
            raise ValueError(
                f"a floating-point target holds probabilities of the shape of scores, "
                f"{tuple(scores.shape)}, got {tuple(target.shape)}: for class indices use .long()"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index={ignore_index} needs class indices as target, got probabilities: "
                "leave the rows out instead"
            )
        return
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64 class indices, got {target.dtype}: use .long()")
    if target.shape != scores.shape[:-1]:
        raise ValueError(
            f"target must have the shape of scores without the class dimension (the last), "
            f"{tuple(scores.shape[:-1])}, got {tuple(target.shape)}"
        )
    if target.device.type == "cpu":
        wrong = target[((target < 0) | (target >= scores.size(-1))) & (target != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"target must be in [0, {scores.size(-1)}) or ignore_index={ignore_index}, "
                f"got {wrong[0].item()}"
            )


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    # It runs on torch operations; the error of a kernel asked for by name is what is wanted.
    usable(logits, "output_loss", "cross-entropy has a kernel in linear_output_loss alone")
    if target.is_floating_point():
        target = target.to(logits.dtype)
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)


def _fenchel_young(
    alpha: float | Tensor, scores: Tensor, target: Tensor, label_smoothing: float
) -> Tensor:
    x = to_compute_precision(scores)
    if isinstance(alpha, Tensor):
        alpha = alpha.reshape(1, 1).to(x.dtype)
    if target.is_floating_point():
        target = target.to(x.dtype)
        if label_smoothing:
            target = (1 - label_smoothing) * target + label_smoothing / x.size(-1)
    return _FenchelYoung.apply(x, entmax(x, alpha), alpha, target, label_smoothing)


class _FenchelYoung(torch.autograd.Function):
    """The loss of (rows, C) scores and their entmax `p`, which must be connected in the graph.

    `p` maximizes the part of the loss that depends on it, so its own gradient is zero, and the
    gradients by the scores and by alpha are the partial ones. They depend on `p`, through which
    the second derivatives flow. The only (rows, C) tensor that is kept is `p`.
    """

    @staticmethod
    def forward(ctx, scores, p, alpha, target, label_smoothing):
        ctx.label_smoothing = label_smoothing
        ctx.fixed_alpha = None if isinstance(alpha, Tensor) else alpha
        ctx.save_for_backward(p, target, *([alpha] if ctx.fixed_alpha is None else []))
        # Differences to the maximum keep their digits; both p and y sum to one.
        scores = scores - scores.amax(-1, keepdim=True)
        expected = (p * scores.where(p > 0, 0.0)).sum(-1)
        observed = _expectation(scores, target, label_smoothing)
        entropy = _entropy(p, alpha).sum(-1)
        entropy_target = _sum_over_target(_entropy, alpha, target, label_smoothing, p)
        return (expected - observed + entropy - entropy_target).clamp_min(0)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        p, target, *saved = ctx.saved_tensors
        grad_scores = grad_alpha = None
        if ctx.needs_input_grad[0]:
            grad_scores = grad.unsqueeze(-1) * _minus_target(p, target, ctx.label_smoothing)
        if ctx.needs_input_grad[2]:
            slope = _entropy_slope(p, saved[0]).sum(-1)
            slope = slope - _sum_over_target(
                _entropy_slope, saved[0], target, ctx.label_smoothing, p
            )
            grad_alpha = (grad * slope).sum().reshape(1, 1)
        return grad_scores, None, grad_alpha, None, None


def _expectation(values: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """The (rows,) mean of `values` (rows, C) under the target; 0 times -inf is 0."""
    if target.is_floating_point():
        return (target * values.where(target > 0, 0.0)).sum(-1)
    observed = values.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if not label_smoothing:
        return observed
    return (1 - label_smoothing) * observed + label_smoothing * values.mean(-1)


def _minus_target(p: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """`p - y` without building the one-hot y."""
    if target.is_floating_point():
        return p - target
    observed = target.unsqueeze(-1)
    residual = p.scatter_add(-1, observed, p.new_full(observed.shape, label_smoothing - 1))
    return residual - label_smoothing / p.size(-1) if label_smoothing else residual


def _sum_over_target(function, alpha, target, label_smoothing, p) -> Tensor:
    """The sum of `function(y_i, alpha)` over the classes: (rows,), or (1,) for class indices."""
    if target.is_floating_point():
        return function(target, alpha).sum(-1)
    rest = label_smoothing / p.size(-1)
    values = function(p.new_tensor([[1 - label_smoothing + rest, rest]]), alpha)
    return values[:, 0] + (p.size(-1) - 1) * values[:, 1]


def _entropy(p: Tensor, alpha: float | Tensor) -> Tensor:
    """Each entry's part of the Tsallis entropy H; `expm1` keeps its digits for alpha near 1."""
    if not isinstance(alpha, Tensor) and alpha == 1:
        return torch.special.entr(p)
    log_p = p.where(p > 0, 1.0).log()
    return -p * torch.expm1((alpha - 1) * log_p) / (alpha * (alpha - 1))


def _entropy_slope(p: Tensor, alpha: Tensor) -> Tensor:
    """d `_entropy` / d alpha."""
    log_p = p.where(p > 0, 1.0).log()
    product = alpha * (alpha - 1)
    power_slope = -p * log_p * torch.exp((alpha - 1) * log_p)  # d(-p^alpha) / d alpha
    return (power_slope - (2 * alpha - 1) * _entropy(p, alpha)) / product
