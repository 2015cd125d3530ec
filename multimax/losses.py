"""The loss that belongs to an output normalizer: cross-entropy, or a Fenchel-Young loss."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimax.functional import (
    check_device,
    check_mask,
    check_not_nested,
    exporting,
    function_transforms_active,
    to_compute_precision,
    values_known,
)
from multimax.kernels.backend import chosen_backend, refuse, triton_obstacle, use_backend
from multimax.kernels.c_rows import NO_MODULATOR, obstacle
from multimax.kernels.linear_loss import (
    HiddenClasses,
    Step,
    compute_dtype,
    linear_loss,
    modulated_step,
    reference_step,
    triton_step,
)
from multimax.normalizers import EntMax, LogitNormalizer, Normalizer
from multimax.normalizers.base import check_has_loss
from multimax.normalizers.entmax import check_alpha, check_least_alpha, excess_of
from multimax.normalizers.fenchel_young import fenchel_young_rows


def output_loss(
    normalizer: Normalizer,
    scores: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_mask: Tensor | None = None,
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
        class_mask: bool, broadcastable to (..., C), True where a class is allowed. The scores of
            the others become -inf: they get no probability and no gradient.

    Returns:
        fp32 or wider; of shape (...) for "none", else a scalar. As in torch, a row's loss is inf
        where a forbidden class, masked or with a score of -inf, is the target or gets a part of the
        label smoothing, which goes to all C classes; and NaN where all classes are forbidden. A
        probability of 0 in the target of a forbidden class counts for nothing.

    Raises:
        ValueError: an argument has a wrong value, dtype or shape, a class index is out of range
            (checked on the CPU only, where the check does not wait, and not in torch.compile,
            torch.export and torch.func), or the normalizer has no loss.
    """
    rows = partial(row_losses, normalizer)
    options = (label_smoothing, ignore_index, reduction)
    return _reduced(rows, scores, target, *options, class_mask)


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
    class_mask: Tensor | None = None,
) -> Tensor:
    """`output_loss` of the scores `features weight^T + bias`, which are never held whole.

    A large vocabulary then costs the memory of a chunk of its scores; see
    `multimax.kernels.linear_loss`. Gradients of features, weight, bias and the normalizer's
    parameters are exact. Second derivatives need `with use_backend("eager")`. In torch.func and
    torch.export it is `output_loss` of the whole scores.

    Args:
        normalizer: as in `output_loss`.
        features: (..., dim).
        weight: (C, dim).
        target, label_smoothing, ignore_index, reduction, class_mask: as in `output_loss`. The mask
            is never expanded.
        bias: (C,) or None.

    Returns:
        As `output_loss`.

    Raises:
        ValueError: as `output_loss`.
        RuntimeError: in a backward pass with `create_graph=True`.
    """
    options = (label_smoothing, ignore_index, reduction)
    check_not_nested(features)
    if features.dim() == 0:
        raise ValueError("features must have a dimension, (..., dim), got a scalar")
    to_compute_precision(features.new_empty(0))  # for its check of the dtype
    check_device(features, weight=weight, bias=bias)
    backend = chosen_backend()
    if function_transforms_active() or exporting():
        if backend not in ("auto", "eager"):
            reason = "function transforms and torch.export need torch operations"
            refuse(backend, "linear_output_loss", reason)
        backend = "eager"
    if backend == "eager":
        scores = F.linear(features, weight, bias)
        rows = partial(row_losses, normalizer)
        return _reduced(rows, scores, target, *options, class_mask)
    shape = (*features.shape[:-1], weight.size(0))
    _check(features.new_empty(()).expand(shape), target, *options, class_mask)
    target = target.detach()
    soft = target.is_floating_point()
    flat_target = target.reshape(-1, shape[-1]) if soft else target.reshape(-1)
    step, parameters = _step(normalizer, features, label_smoothing, ignore_index)
    flat = features.reshape(-1, features.size(-1))
    how = "none" if reduction == "none" else "sum"
    hidden = None
    if class_mask is not None:
        hidden = HiddenClasses(class_mask, shape)
    losses = linear_loss(step, flat, weight, bias, flat_target, parameters, how, hidden)
    if reduction == "none":
        return losses.reshape(shape[:-1])
    if reduction == "sum":
        return losses
    if soft and flat_target.size(0):
        return losses / flat_target.size(0)
    count = flat_target.new_zeros(()) if soft else (flat_target != ignore_index).sum()
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
            return _reduced(rows, scores, target, label_smoothing, ignore_index, "none", None)

    parameters = [p for p in normalizer.parameters() if p.requires_grad]
    return reference_step(losses, parameters), parameters


def _kernel(
    backend: str, normalizer: Normalizer, features: Tensor
) -> Callable[[Tensor, float, int], Step] | None:
    """What makes the step of a kernel, None for autograd; ValueError if `backend` cannot do it."""
    name = backend
    if backend == "auto":
        name = "triton" if features.device.type == "cuda" else "c"
    if normalizer.has_steps or not normalizer.fusible:
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


class RowLosses:
    """One loss for each row, by a function that is registered for the class of the normalizer.

    As `functools.singledispatch`, which torch.compile cannot trace.
    """

    def __init__(self) -> None:
        self._functions: dict[type, Callable[..., Tensor]] = {}

    def register(
        self, kind: type[Normalizer], function: Callable[..., Tensor] | None = None
    ) -> Any:
        """Register a function with the arguments and the result of a call; also a decorator."""
        if function is None:
            return partial(self.register, kind)
        self._functions[kind] = function
        return function

    def __call__(
        self, normalizer: Normalizer, scores: Tensor, target: Tensor, label_smoothing: float
    ) -> Tensor:
        """The losses.

        Args:
            normalizer: the output normalizer.
            scores: (rows, C), real.
            target: (rows,) int64 class indices in [0, C), or (rows, C) probabilities.
            label_smoothing: in [0, 1).

        Returns:
            (rows,), fp32 or wider.

        Raises:
            ValueError: no loss is registered for this class, its weights do not sum to one, or it
                has scalars of heads.
        """
        check_has_loss(normalizer)
        for kind in type(normalizer).__mro__:
            if kind in self._functions:
                return self._functions[kind](normalizer, scores, target, label_smoothing)
        name = type(normalizer).__name__
        raise ValueError(
            f"{name} has no loss: derive it from LogitNormalizer, or register one with "
            f"`multimax.losses.row_losses.register({name})`"
        )


row_losses = RowLosses()


@row_losses.register(LogitNormalizer)
def _(normalizer: LogitNormalizer, scores, target, label_smoothing):
    return _cross_entropy(normalizer.logits(scores), target, label_smoothing)


@row_losses.register(EntMax)
def _(normalizer: EntMax, scores, target, label_smoothing):
    scores = normalizer.scaled(scores)
    if normalizer.fixed_alpha == 1:  # the same number as SoftMax, for soft targets too
        return _cross_entropy(scores, target, label_smoothing)
    return fenchel_young_rows(normalizer.excess, scores, target, label_smoothing)


def fenchel_young_loss(
    scores: Tensor,
    target: Tensor,
    alpha: float | Tensor = 1.5,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_mask: Tensor | None = None,
) -> Tensor:
    """The Fenchel-Young loss of alpha-entmax, whose gradient is `entmax(scores) - target`.

        L(z, y) = (p - y) z + H(p) - H(y),     p = entmax(z),
        H(p) = sum_i (p_i - p_i^alpha) / (alpha (alpha - 1))

    It is at least 0, and 0 exactly where p equals y. With alpha = 1 it is cross-entropy less the
    entropy of the target.

    Args:
        scores, target, label_smoothing, ignore_index, reduction, class_mask: as in `output_loss`.
        alpha: a finite number >= 1; or a tensor of one element >= 1, which gets a gradient.

    Returns:
        As `output_loss`.

    Raises:
        ValueError: `alpha` is out of range or has several elements; else as in `output_loss`.

    Source: Blondel et al., Learning with Fenchel-Young Losses, JMLR 2020; Peters et al., Sparse
    Sequence-to-Sequence Models, ACL 2019.
    """
    check_not_nested(scores)
    if not isinstance(alpha, Tensor):
        check_alpha(alpha)
        excess = alpha - 1
    elif alpha.numel() != 1:
        raise ValueError(f"alpha must have one element, got shape {tuple(alpha.shape)}")
    else:
        check_least_alpha(alpha)
        excess = excess_of(alpha, alpha - 1, to_compute_precision(scores.new_empty(())).dtype)
    rows = partial(fenchel_young_rows, excess)
    options = (label_smoothing, ignore_index, reduction)
    return _reduced(rows, scores, target, *options, class_mask)


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
    class_mask: Tensor | None,
) -> Tensor:
    _check(scores, target, label_smoothing, ignore_index, reduction, class_mask)
    target = target.detach()
    soft = target.is_floating_point()
    shape = scores.shape[:-1]
    ignored = torch.zeros_like(target[..., 0], dtype=torch.bool) if soft else target == ignore_index
    ignored = ignored.reshape(-1)
    flat_scores = scores.reshape(-1, scores.size(-1))
    flat_target = target.reshape(flat_scores.shape if soft else (-1,))
    if not soft:
        flat_target = flat_target.masked_fill(ignored, 0)
    if class_mask is not None:
        hidden = HiddenClasses(class_mask, scores.shape).of_rows()
        flat_scores = flat_scores.masked_fill(hidden, -torch.inf)
    losses = rows(flat_scores, flat_target, label_smoothing).masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses.reshape(shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (~ignored).sum()


def _check(scores, target, label_smoothing, ignore_index, reduction, class_mask) -> None:
    check_not_nested(scores, target)
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if scores.dim() == 0:
        raise ValueError("scores must have a class dimension, (..., C), got a scalar")
    check_device(scores, target=target, class_mask=class_mask)
    check_mask(class_mask, scores.shape, "class_mask")
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
    if values_known(target):
        wrong = target[((target < 0) | (target >= scores.size(-1))) & (target != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"target must be in [0, {scores.size(-1)}) or ignore_index={ignore_index}, "
                f"got {wrong[0].item()}"
            )


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    losses = partial(F.cross_entropy, reduction="none", label_smoothing=label_smoothing)
    if not target.is_floating_point():
        return losses(logits, target)
    target = target.to(logits.dtype)
    if label_smoothing or values_known(logits):
        result = losses(logits, target)
        if label_smoothing or not result.isnan().any():
            return result
    # Where a forbidden class has the probability 0, torch takes 0 times -inf, which is NaN.
    log_p = logits.log_softmax(-1)
    return -(target * log_p.masked_fill(target == 0, 0.0)).sum(-1)
