"""Measures of a distribution and of a modulator: Definitions 1 and 2, entropy, support size.

All are computed in fp32 or wider, one value for each row along `dim`. Scores of -inf have no row
mean: pass a mask instead.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from multimax.functional import check_mask, masked_softmax, to_compute_precision
from multimax.normalizers import MultiMax, Normalizer


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
    return p.where(mask, 1.0).amin(dim, keepdim=True)


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
    """Entropy in nats, with 0 log 0 = 0."""
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
    health["decreasing_share"] = mean_of_defined(_decreasing(module, scores, mask))[0]
    return health


class Recorder(ABC):
    """Watches what passes through the normalizers of a model, inside a `with` block.

    Args:
        model: all `Normalizer` modules in it (or itself) are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {n: m for n, m in model.named_modules() if isinstance(m, Normalizer)}
        self._handles = []

    @abstractmethod
    def record(
        self,
        name: str,
        probabilities: Tensor,
        scores: Tensor,
        dim: int,
        mask: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        """Take what the normalizer `name` was given, and made of it.

        `bias` is what it added to its modulated scores, None for nothing.
        """

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            hook = self._hook(name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str):
        def hook(module, args, kwargs, probabilities):
            with torch.no_grad():
                self.record(name, probabilities, *_arguments(*args, **kwargs))

        return hook


class NormalizerRecorder(Recorder):
    """Measures every normalizer of a model on what passes through it, in evaluation.

        with NormalizerRecorder(model) as recorder, torch.no_grad():
            model(batch)
        recorder.summary()["blocks.0.attn.normalizer"]["entropy"]

    It sees calls of the normalizer modules only: not those that a loss or a fused kernel replaces.
    The threshold of sparsity and multi-modality is the mean of the row's allowed scores, the
    reference of sparsity `softmax_reference` of the same scores, as in the paper; a bias of the
    attention counts as part of the scores. That of
    "uniform_sparsity" is `uniform_reference`: compare layers and models by this one. Each batch
    costs several passes over the scores and a device synchronization, so record a few batches.

    Args:
        model: all `Normalizer` modules in it (or itself) are recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._totals = {n: defaultdict(float) for n in self._modules}
        self._counts = {n: defaultdict(int) for n in self._modules}

    def summary(self) -> dict[str, dict[str, float]]:
        """By module name: the mean of each measure and, as `<measure>_count`, of how many values.

        The measures are "entropy", "support_size", "sparsity", "uniform_sparsity",
        "multi_modality" (values are rows; all-masked rows, and rows for which a measure is not
        defined, are left out) and, for MultiMax, "decreasing_share" (values are allowed scores). A
        module that was not called has NaN with count 0.
        """
        result = {}
        for name, module in self._modules.items():
            result[name] = {}
            for measure in _measures(module):
                count = self._counts[name][measure]
                mean = self._totals[name][measure] / count if count else math.nan
                result[name] |= {measure: mean, f"{measure}_count": count}
        return result

    def record(
        self,
        name: str,
        probabilities: Tensor,
        scores: Tensor,
        dim: int,
        mask: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        module = self._modules[name]
        ranked = scores if bias is None else scores + bias
        measures = _measure(probabilities, ranked, dim, mask)
        if isinstance(module, MultiMax):
            measures["decreasing_share"] = _decreasing(module, scores, mask)
        for measure, values in measures.items():
            mean, count = mean_of_defined(values)
            self._totals[name][measure] += mean * count if count else 0.0
            self._counts[name][measure] += count


def _arguments(
    scores: Tensor, dim: int = -1, mask: Tensor | None = None, bias: Tensor | None = None
):
    """The arguments of `Normalizer.forward`, however they were passed."""
    return scores, dim, mask, bias


def _measures(module: Normalizer) -> list[str]:
    names = ["entropy", "support_size", "sparsity", "uniform_sparsity", "multi_modality"]
    return [*names, "decreasing_share"] if isinstance(module, MultiMax) else names


def _measure(probabilities, scores, dim, mask) -> dict[str, Tensor]:
    """The values of each measure that every normalizer has; NaN where there is none."""
    threshold = row_mean(scores, dim, mask)
    own, uniform = (
        sparsity(probabilities, scores, threshold, reference(scores, dim, mask), dim, mask)
        for reference in (softmax_reference, uniform_reference)
    )
    empty = threshold.squeeze(dim).isnan()
    return {
        "entropy": entropy(probabilities, dim).masked_fill(empty, math.nan),
        "support_size": support_size(probabilities, dim).float().masked_fill(empty, math.nan),
        "sparsity": own,
        "uniform_sparsity": uniform,
        "multi_modality": multi_modality(probabilities, scores, threshold, dim, mask),
    }


def _decreasing(module: MultiMax, scores: Tensor, mask: Tensor | None) -> Tensor:
    """1 where the modulator decreases, 0 where not, NaN where masked."""
    _, x, mask = _prepare(scores, scores, mask)
    with torch.no_grad():
        return (module.derivative(x) < 0).to(x.dtype).masked_fill(~mask, math.nan)


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
