"""The learned scalars of normalizers among the parameters of a model."""

from typing import Any

from torch import nn

from multimax.normalizers import Normalizer


def normalizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scalars of all normalizers below `model`, also those that layers share once."""
    modules = (module for module in model.modules() if isinstance(module, Normalizer))
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


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
        whose norm theirs can exceed by far. Parameters that need no gradient
        are left out.
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
