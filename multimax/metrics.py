"""Measures of a distribution and of a modulator: Definitions 1 and 2, entropy, support size.

All are computed in fp32 or wider, one value for each row along `dim`. Scores of -inf have no row
mean: pass a mask instead.
"""

import math

import torch
from torch import Tensor

from multimax.functional import check_mask, masked_softmax, to_compute_precision
from multimax.normalizers import MultiMax


def multi_modality(
    probabilities: Tensor,
    scores: Tensor,
    threshold: float | Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """How close the probabilities of the relevant scores are to the largest one.

        M = 1 - (1/N) sum (p_max - p_n)     over the N entries with threshold < x_n < x_max

    p_max is the largest probability of the row. "The largest" can also be read as the probability
    at x_max, which is the same unless a modulator that is not monotonic gives another entry more.
    There, that reading has negative differences and M > 1; this one keeps M in [0, 1].

    Args:
        probabilities: normalized `scores`.
        scores: what was normalized, of the shape of `probabilities`; x_max is their maximum.
        threshold: a number or a tensor that broadcasts to `scores`, such as `row_mean(scores)`.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, True for the entries that count.

    Returns:
        In [0, 1], the shape of `scores` without `dim`; 1 is most multi-modal, NaN where N = 0.

    Raises:
        ValueError: `mask` is not boolean, or the shapes differ.

    Source: Zhou et al., MultiMax, ICML 2024, Definition 1.
    """
    p, x, mask = _prepare(probabilities, scores, mask)
    if x.dim() and not x.size(dim):  # of no entry torch has no largest one
        return _mean(p, mask, dim)
    largest_score = x.where(mask, -math.inf).amax(dim, keepdim=True)
    largest = p.where(mask, 0.0).amax(dim, keepdim=True)
    relevant = mask & (x > threshold) & (x < largest_score)
    return 1 - _mean(largest - p, relevant, dim)


def sparsity(
    probabilities: Tensor,
    scores: Tensor,
    threshold: float | Tensor,
    reference: float | Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
) -> Tensor:
    """How close to zero the probabilities of the irrelevant scores are.

        S = (1/L) sum exp((s - p_l) / s - 1)     over the L entries with x_l < threshold

    Two normalizers can only be compared with the same reference s.

    Args:
        probabilities: normalized `scores`.
        scores: what was normalized, of the shape of `probabilities`.
        threshold: a number or a tensor that broadcasts to `scores`, such as `row_mean(scores)`.
        reference: s >= 0, a number or a tensor that broadcasts to `scores`; the paper's is
            `softmax_reference(scores)`.
        dim: the dimension that sums to one.
        mask: bool, broadcastable to `scores`, True for the entries that count.

    Returns:
        In [0, 1], the shape of `scores` without `dim`; 1 is exactly sparse, NaN where L = 0.

    Raises:
        ValueError: `mask` is not boolean, or the shapes differ.

    Source: Zhou et al., MultiMax, ICML 2024, Definition 2.
    """
    p, x, mask = _prepare(probabilities, scores, mask)
    # A reference that underflows to 0 still tells exact zeros (1) from all else (0).
    reference = torch.as_tensor(reference, dtype=p.dtype, device=p.device)
    closeness = torch.exp(-p / reference.clamp_min(torch.finfo(p.dtype).tiny))
    return _mean(closeness, mask & (x < threshold), dim)


def mean_of_defined(values: Tensor) -> tuple[float, int]:
    """The mean of the values that are not NaN (NaN if there are none), and how many they are."""
    values = values.detach().cpu().double()
    defined = values[~values.isnan()]
    return defined.mean().item(), defined.numel()


def softmax_reference(scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """The smallest SoftMax probability of each row (temperature 1): the s of `sparsity`.

    Args:
        scores: real, any shape.
        dim: the dimension that SoftMax sums over; it is kept with size 1.
        mask: bool, broadcastable to `scores`, True for the entries that count.

    Raises:
        ValueError: `mask` is not boolean.
    """
    check_mask(mask)
    p, _, mask = _prepare(masked_softmax(to_compute_precision(scores), dim, mask), scores, mask)
    allowed = p.where(mask, 1.0)
    if allowed.dim() and not allowed.size(dim):  # of no entry torch has no smallest one
        return allowed.sum(dim, keepdim=True) + 1
    return allowed.amin(dim, keepdim=True)


def uniform_reference(scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """A tenth of the uniform probability of each row: an s of `sparsity` that no model changes.

    `softmax_reference` depends on the scores, so that it can only compare normalizers of the same
    scores; with this one, models that make scores of their own can be compared too.

    Args:
        scores, dim, mask: as in `softmax_reference`. A row without allowed entries has inf.
    """
    _, _, mask = _prepare(scores, scores, mask)
    return 0.1 / mask.sum(dim, keepdim=True)


def row_mean(scores: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """The mean of each row's allowed scores, a threshold; `dim` is kept with size 1."""
    _, x, mask = _prepare(scores, scores, mask)
    return _mean(x, mask, dim).unsqueeze(dim)


def entropy(probabilities: Tensor, dim: int = -1) -> Tensor:
    """Entropy in nats, with 0 log 0 = 0; of weights that do not sum to one divide them first."""
    return torch.special.entr(to_compute_precision(probabilities)).sum(dim)


def support_size(probabilities: Tensor, dim: int = -1) -> Tensor:
    """The number of entries above 0, int64."""
    return (probabilities > 0).sum(dim)


def top_k_mass(probabilities: Tensor, k: int, dim: int = -1) -> Tensor:
    """The sum of the k largest probabilities; all of them if the row is shorter.

    Raises:
        ValueError: `k` is less than 1.
    """
    if k < 1:
        raise ValueError(f"k must be an integer >= 1, got {k!r}")
    p = to_compute_precision(probabilities)
    return p.topk(min(k, p.size(dim)), dim).values.sum(dim)


def modulator_health(
    module: MultiMax, scores: Tensor, mask: Tensor | None = None
) -> dict[str, float]:
    """The learned scalars under the paper's names, and how much of the order they flip.

    Args:
        module: the modulator.
        scores: real, any shape.
        mask: bool, broadcastable to `scores`, True for the entries that count.

    Returns:
        "t_b1", "t_d1", "b1", "d1", "t_b2", ...; "scale" and "shift" of an affine module; and
        "decreasing_share", the share of (allowed) scores at which a larger score gets less.

    Raises:
        ValueError: `mask` is not boolean.
    """
    scalars = {"t_b": module.t_b, "t_d": module.t_d, "b": module.b, "d": module.d}
    health = {
        f"{name}{n + 1}": values[n].item()
        for n in range(module.order)
        for name, values in scalars.items()
    }
    if module.affine:
        health |= {"scale": module.scale.item(), "shift": module.shift.item()}
    health["decreasing_share"] = mean_of_defined(decreasing(module, scores, mask))[0]
    return health


def decreasing(module: MultiMax, scores: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
    """1 where the modulator decreases, 0 where not, NaN where masked."""
    _, x, mask = _prepare(scores, scores, mask)
    with torch.no_grad():
        return (module.derivative(x, dim, mask) < 0).to(x.dtype).masked_fill(~mask, math.nan)


def _prepare(probabilities: Tensor, scores: Tensor, mask: Tensor | None):
    """Both in compute precision, and the mask as a tensor of their shape."""
    check_mask(mask)
    if probabilities.shape != scores.shape:
        raise ValueError(
            f"probabilities and scores must have one shape, got {tuple(probabilities.shape)} and "
            f"{tuple(scores.shape)}"
        )
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=scores.device)
    p, x = to_compute_precision(probabilities), to_compute_precision(scores)
    return p, x, mask.expand(scores.shape)


def _mean(values: Tensor, selected: Tensor, dim: int) -> Tensor:
    """The mean of the selected values; NaN where none is."""
    return values.where(selected, 0.0).sum(dim) / selected.sum(dim)
