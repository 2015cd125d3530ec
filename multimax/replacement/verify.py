"""Showing that a replacement changes what it should, and nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from multimax.normalizers import Normalizer
from multimax.replacement import routes


@dataclass(frozen=True)
class Verification:
    """How a model with another normalizer differs from itself with SoftMax; printed, a few lines.

    Args:
        evaluation: the largest difference of an output in evaluation mode, as a share of the
            largest output.
        training: the same in training mode without dropout; None if the model is random there.
        called: how many of the attention layers used their normalizer.
        normalizers: how many layers have one.
        gradients: the largest gradient of each normalizer's scalars, by name; 0 where none arrives.
    """

    evaluation: float
    training: float | None
    called: int
    normalizers: int
    gradients: dict[str, float]

    def __str__(self) -> str:
        random = "not comparable, the model is random there"
        training = random if self.training is None else f"{self.training:.2g}"
        learning = sum(gradient > 0 for gradient in self.gradients.values())
        return "\n".join(
            [
                f"largest difference in evaluation: {self.evaluation:.2g} of the largest output",
                f"largest difference in training:   {training}",
                f"attention normalizers in use: {self.called} of {self.normalizers}, "
                f"with a gradient: {learning} of {len(self.gradients)} that learn",
            ]
        )


def verify_replacement(model: nn.Module, *args: Any, **kwargs: Any) -> Verification:
    """Compare a model of `replace_softmax` with itself before the replacement, on one batch.

    With `init="identity"` the differences are rounding errors, about 1e-6 in fp32, until the
    scalars have been trained. A query that may attend to nothing (padding on the left, or a mask of
    both sides) gets zeros here; eager attention of transformers gives it the mean of all values, so
    compare on a batch without such queries. The model, its gradients and its mode stay as they are.

    Args:
        model: with replacements.
        args: what the model is called with.
        kwargs: likewise.

    Raises:
        ValueError: the model has no replacement, or its outputs have no floating-point tensor.
    """
    normalizers = {n: m for n, m in model.named_modules() if isinstance(m, Normalizer)}
    if not any(map(routes.is_replaced, model.modules())):
        raise ValueError(
            f"{type(model).__name__} has no replacement to verify: call replace_softmax first"
        )

    def outputs() -> list[Tensor]:
        leaves = tree_leaves(model(*args, **kwargs))
        found = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        if not found:
            raise ValueError("the model returns no floating-point tensor: nothing to compare")
        return found

    layers = {name for name, module in model.named_modules() if hasattr(module, "bias_place")}
    attending = {n: m for n, m in normalizers.items() if n.rpartition(".")[0] in layers}
    with without_dropout(model, training=False), _calls(attending) as called:
        with torch.no_grad():
            evaluation = _difference(model, outputs)
        gradients = _gradients(outputs(), normalizers)
    with without_dropout(model, training=True), torch.no_grad():
        random = _largest(outputs(), outputs()) > 0
        training = None if random else _difference(model, outputs)
    return Verification(evaluation, training, len(called), len(attending), gradients)


def _difference(model: nn.Module, outputs: Callable[[], list[Tensor]]) -> float:
    """The largest difference to the model with SoftMax, as a share of the largest output."""
    own = outputs()
    with routes.suspended(model):
        expected = outputs()
    scale = max(t.nan_to_num(0, 0, 0).abs().max().item() for t in expected if t.numel())
    return _largest(own, expected) / (scale or 1.0)


def _largest(first: list[Tensor], second: list[Tensor]) -> float:
    """Of what `second` has a number for; infinite where `first` has none there."""
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        skipped = (a == b) | b.isnan()  # also infinities, and rows in which all keys are masked
        difference = (a.double() - b.double()).abs().masked_fill(skipped, 0.0)
        largest = max(largest, difference.nan_to_num(torch.inf, torch.inf).max().item())
    return largest


def _gradients(outputs: list[Tensor], normalizers: dict[str, Normalizer]) -> dict[str, float]:
    """The largest gradient of each normalizer's scalars, of the sum of squared outputs."""
    loss = sum((output.float() ** 2).sum() for output in outputs if output.requires_grad)
    learning = {name: list(m.parameters()) for name, m in normalizers.items()}
    learning = {name: own for name, own in learning.items() if own}
    scalars = [p for own in learning.values() for p in own if p.requires_grad]
    if not isinstance(loss, Tensor) or not scalars:
        return dict.fromkeys(learning, 0.0)
    found = torch.autograd.grad(loss, scalars, allow_unused=True)
    sizes = [0.0 if gradient is None else gradient.abs().max().item() for gradient in found]
    by_scalar = dict(zip(scalars, sizes, strict=True))
    return {name: max(by_scalar.get(p, 0.0) for p in own) for name, own in learning.items()}


@contextmanager
def without_dropout(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in a mode, without dropout."""
    modes = {module: module.training for module in model.modules()}
    rates = [
        (module, name, value)
        for module in modes
        for name, value in vars(module).items()
        if isinstance(value, float) and _is_rate(module, name)
    ]
    model.train(training)
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, name, value in rates:
            setattr(module, name, value)


def _is_rate(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a rate of dropout or of layers that are skipped."""
    dropping = isinstance(module, nn.modules.dropout._DropoutNd)
    return "drop" in name or (
        name == "p" and (dropping or type(module).__name__ == "StochasticDepth")
    )


@contextmanager
def _calls(normalizers: dict[str, Normalizer]) -> Iterator[set[str]]:
    """The names of those that are called inside the block (hooks keep fused kernels away)."""
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in normalizers.items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
