"""Watching what passes through the normalizers of a model."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from multimax.functional import to_compute_precision
from multimax.metrics import (
    decreasing,
    entropy,
    mean_of_defined,
    multi_modality,
    row_mean,
    softmax_reference,
    sparsity,
    support_size,
    uniform_reference,
)
from multimax.normalizers import MultiMax, Normalizer


@dataclass(frozen=True)
class Normalization:
    """One call of a normalizer.

    Args:
        probabilities: what it returned.
        scores, dim, mask: its arguments, see `Normalizer.forward`.
        bias: what it added to its modulated scores, None for nothing.
    """

    probabilities: Tensor
    scores: Tensor
    dim: int = -1
    mask: Tensor | None = None
    bias: Tensor | None = None


class Recorder(ABC):
    """Watches what passes through the normalizers of a model, inside a `with` block.

    Args:
        model: all `Normalizer` modules in it (or itself) are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {n: m for n, m in model.named_modules() if isinstance(m, Normalizer)}
        self._handles = []

    @abstractmethod
    def record(self, name: str, seen: Normalization) -> None:
        """Take what the normalizer `name` was given, and made of it."""

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

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module, args, kwargs, probabilities):
            with torch.no_grad():
                self.record(name, Normalization(probabilities, *args, **kwargs))

        return hook


class NormalizerRecorder(Recorder):
    """Measures every normalizer of a model on what passes through it, in evaluation.

        with NormalizerRecorder(model) as recorder, torch.no_grad():
            model(batch)
        recorder.summary()["blocks.0.attn.normalizer"]["entropy"]

    It sees calls of the normalizer modules only: not those that a loss or a fused kernel replaces.
    The threshold of sparsity and multi-modality is the mean of the row's allowed scores, the
    reference of sparsity `softmax_reference` of the same scores, as in the paper; a bias of the
    attention counts as part of the scores. That of "uniform_sparsity" is `uniform_reference`:
    compare layers and models by this one. Each batch costs several passes over the scores and a
    device synchronization, so record a few batches.

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
        defined, are left out); for MultiMax "decreasing_share" (values are allowed scores); and
        where rows need not sum to one, "mass", their sum, of whose shares entropy then is. A module
        that was not called has NaN with count 0.
        """
        result = {}
        for name, module in self._modules.items():
            result[name] = {}
            for measure in _measures(module):
                count = self._counts[name][measure]
                mean = self._totals[name][measure] / count if count else math.nan
                result[name] |= {measure: mean, f"{measure}_count": count}
        return result

    def pool(self, add: Callable[[Tensor], Tensor]) -> None:
        """Count in what other processes recorded, so that all have the same summary.

        Args:
            add: the sum over all processes of a (measures, 2) fp64 tensor, such as an all-reduce.
        """
        keys = [(name, m) for name, module in self._modules.items() for m in _measures(module)]
        own = [(self._totals[name][m], self._counts[name][m]) for name, m in keys]
        pooled = add(torch.tensor(own, dtype=torch.float64)).tolist()
        for (name, measure), (total, count) in zip(keys, pooled, strict=True):
            self._totals[name][measure], self._counts[name][measure] = total, round(count)

    def record(self, name: str, seen: Normalization) -> None:
        module = self._modules[name]
        ranked = seen.scores if seen.bias is None else seen.scores + seen.bias
        measures = _measure(seen.probabilities, ranked, seen.dim, seen.mask, module.sums_to_one)
        if isinstance(module, MultiMax):
            measures["decreasing_share"] = decreasing(module, seen.scores, seen.mask, seen.dim)
        for measure, values in measures.items():
            mean, count = mean_of_defined(values)
            self._totals[name][measure] += mean * count if count else 0.0
            self._counts[name][measure] += count


def _measures(module: Normalizer) -> list[str]:
    names = ["entropy", "support_size", "sparsity", "uniform_sparsity", "multi_modality"]
    names += [] if module.sums_to_one else ["mass"]
    return [*names, "decreasing_share"] if isinstance(module, MultiMax) else names


def _measure(probabilities, scores, dim, mask, sums_to_one) -> dict[str, Tensor]:
    """The values of each measure that every normalizer has; NaN where there is none."""
    threshold = row_mean(scores, dim, mask)
    own, uniform = (
        sparsity(probabilities, scores, threshold, reference(scores, dim, mask), dim, mask)
        for reference in (softmax_reference, uniform_reference)
    )
    empty = threshold.squeeze(dim).isnan()
    mass = {}
    shares = probabilities
    if not sums_to_one:
        total = to_compute_precision(probabilities).sum(dim, keepdim=True)
        shares = probabilities / total  # NaN where there is none
        mass = {"mass": total.squeeze(dim).masked_fill(empty, math.nan)}
    return {
        **mass,
        "entropy": entropy(shares, dim).masked_fill(empty, math.nan),
        "support_size": support_size(probabilities, dim).float().masked_fill(empty, math.nan),
        "sparsity": own,
        "uniform_sparsity": uniform,
        "multi_modality": multi_modality(probabilities, scores, threshold, dim, mask),
    }
