"""Normalizers in float64 and the coefficients that describe them to a Triton kernel."""

import torch

from multimax import MultiMax, SoftMax

NORMALIZERS = {
    "softmax": lambda: SoftMax(temperature=0.6, learned=True),
    "multimax-1": lambda: MultiMax(1, affine=True),
    "multimax-2": lambda: MultiMax(2, affine=True),
}


def build(name):
    """The normalizer, see `moved_apart`."""
    return moved_apart(NORMALIZERS[name]())


def moved_apart(module):
    """A normalizer in float64 with its scalars moved apart, so that no two gradients are alike."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def coefficients(normalizer, device):
    """`[scale, shift, ts, ranges]`, differentiable by the parameters of the normalizer."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    if isinstance(normalizer, SoftMax):
        return torch.cat([one / normalizer.temperature, zero]).to(device)
    affine = (normalizer.scale, normalizer.shift) if normalizer.affine else (one, zero)
    return torch.cat([*affine, normalizer.ts, normalizer.ranges]).to(device)
