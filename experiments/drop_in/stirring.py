"""Random weights that make a difference."""

import torch
from torch import nn


def stirred(model: nn.Module) -> nn.Module:
    """The model with weights that make a difference, as those of a trained one.

    Heads start at zero, layer scales at 1e-5, and weights of 0.02 make scores that are all alike.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.std() < 1e-3:
                parameter += torch.randn_like(parameter) / 10
            if parameter.dim() >= 2:
                inputs = parameter[0].numel()
                parameter *= max(1.0, (inputs**-0.5 / parameter.std()).item())
    return model
