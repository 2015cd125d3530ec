"""The learned scalars of normalizers among the parameters of a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multimax.normalizers import Normalizer


def normalizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scalars of all normalizers below `model`, also those that layers share once."""
    modules = (module for module in model.modules() if isinstance(module, Normalizer))
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def learned_scalars(model: nn.Module) -> dict[str, list[float]]:
    """The trained values of every normalizer, by parameter name; of shared ones the first name."""
    ids = {id(parameter) for parameter in normalizer_parameters(model)}
    return {
        name: parameter.detach().float().flatten().tolist()
        for name, parameter in model.named_parameters()
        if id(parameter) in ids
    }


def named_scalars(learned: Mapping[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """Learned scalars by layer, as the papers name them.

    Args:
        learned: of `learned_scalars`.

    Returns:
        Of MultiMax t_b, t_d, b and d, each with a value for every order; of SoftMax temperature; of
        entmax alpha; of a length scale s, of adaptive-scalable entmax delta, beta and gamma; each
        with a value for every head that has its own. Other scalars as they are.
    """
    named: dict[str, dict[str, list[float]]] = {}
    for parameter, values in learned.items():
        path, _, name = parameter.rpartition(".")
        layer = named.setdefault(path.removesuffix("normalizer").rstrip("."), {})
        v = torch.tensor(values, dtype=torch.float64)
        as_named = {
            "ts": lambda v: {"t_b": 1 - v[0::2], "t_d": 1 + v[1::2]},
            "ranges": lambda v: {"b": v[0::2], "d": v[1::2]},
            "log_temperature": lambda v: {"temperature": v.exp()},
            "log_length_factor": lambda v: {"s": v.exp()},
            "log_delta": lambda v: {"delta": v.exp()},
            "log_beta": lambda v: {"beta": v.exp()},
            "alpha_logit": lambda v: {"alpha": 1 + v.sigmoid()},
        }.get(name, lambda v, name=name: {name: v})
        layer |= {key: found.tolist() for key, found in as_named(v).items()}
    return named


def flat_scalars(learned: Mapping[str, list[float]]) -> dict[str, float]:
    """`named_scalars` under one level of names, such as "learned/blocks.0.attn/t_b_1"."""
    flat = {}
    for layer, scalars in named_scalars(learned).items():
        for name, values in scalars.items():
            for number, value in enumerate(values, 1):
                end = f"_{number}" if len(values) > 1 else ""
                flat[f"learned/{layer or 'model'}/{name}{end}"] = value
    return flat


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, **scalars: Any
) -> list[dict[str, Any]]:
    """Groups for an optimizer of torch: scalars of normalizers, like biases, do not decay.

        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.05), lr=1e-4)

    Args:
        model: of any library.
        weight_decay: of the parameters with two dimensions or more; biases, gains of normalization
            layers and scalars have none.
        scalars: options of the group of the scalars, such as `lr`.

    Returns:
        Up to three groups "decayed", "not_decayed" and "scalars", under these names as "name". The
        scalars are a group of their own so that their gradients can be clipped apart from others,
        whose norm theirs can exceed by far (`clip_gradients`). Parameters that need no gradient are
        left out.
    """
    own = normalizer_parameters(model)
    ids = {id(parameter) for parameter in own}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups = [
        {"name": "decayed", "params": [p for p in others if p.dim() >= 2]}
        | {"weight_decay": weight_decay},
        {"name": "not_decayed", "params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        {"name": "scalars", "params": [p for p in own if p.requires_grad], "weight_decay": 0.0}
        | scalars,
    ]
    return [group for group in groups if group["params"]]


class GradientClipping:
    """Clips the gradient norm of the weights and of the normalizers' scalars apart from each other.

    The few scalars of an output layer collect a gradient from every score, so that their norm grows
    with the square root of the vocabulary; within one global norm they would shrink every other
    gradient of the model.
    """

    def __init__(self, model: nn.Module, max_norm: float | None) -> None:
        scalars = normalizer_parameters(model)
        scalar_ids = {id(parameter) for parameter in scalars}
        weights = [parameter for parameter in model.parameters() if id(parameter) not in scalar_ids]
        self.groups: list[list[nn.Parameter]] = [group for group in (weights, scalars) if group]
        self.max_norm = max_norm

    def norms(self) -> list[Tensor]:
        """Norms of the gradients as they are: of the weights, then of the scalars if any."""
        norms: list[Any] = [
            torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            for group in self.groups
        ]
        # Of a model that processes share out (FSDP2), each has the norm of its part.
        return [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]

    def clip(self, norms: list[Tensor]) -> None:
        """Scale the gradients, of which `norms` are the norms, down to the maximum in place."""
        if self.max_norm is not None:
            for group, norm in zip(self.groups, norms, strict=True):
                torch.nn.utils.clip_grads_with_norm_(group, self.max_norm, norm)


def clip_gradients(model: nn.Module, max_norm: float) -> list[Tensor]:
    """Clip the gradients of the weights and of the normalizers' scalars apart, in place.

    Args:
        model: after the backward pass.
        max_norm: of each of the two groups, positive.

    Returns:
        The norms before: of the weights, then of the scalars, where there are any.

    Raises:
        ValueError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm!r}")
    clipping = GradientClipping(model, max_norm)
    norms = clipping.norms()
    clipping.clip(norms)
    return norms
