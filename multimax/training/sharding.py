"""FSDP2: each process holds a part of the weights, their gradients and the optimizer's state.

Layers are gathered one after the other, used, and given back. The scalars of normalizers stay whole
in every process, since layers may share them and they are few.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from multimax.models.transformer_layers import TransformerLayer
from multimax.parameters import normalizer_parameters

GATHERED_ALONE = (Block, TransformerLayer)  # all else is gathered for the whole pass


def shard(model: nn.Module, device: torch.device, averaged: nn.Module | None = None) -> None:
    """Leave each process its part of the weights on its device, in place.

    Layers are shared out one after the other, so that no device has the weights whole.

    Args:
        model: of the same weights in all processes; it can be elsewhere than on the device.
        device: of this process.
        averaged: a copy of the model `without_weights`, which gets the same, likewise sharded.
    """
    for scalar in normalizer_parameters(model):  # sharding moves all else
        scalar.data = scalar.data.to(device)
    networks = [model] if averaged is None else [model, averaged]
    scalars = {scalar for network in networks for scalar in normalizer_parameters(network)}
    modules = zip(*(network.modules() for network in networks), strict=True)
    layers = [each for each in modules if _gathered_alone(each[0])]
    for module, *others in [*layers, networks]:
        for other in others:
            _take_weights(other, module)
        for each in (module, *others):
            fully_shard(each, ignored_params=scalars)


def _gathered_alone(module: nn.Module) -> bool:
    # Keys and values of cross-attention are made outside of its layer.
    return isinstance(module, GATHERED_ALONE) and getattr(module, "encoder_attn", None) is None


def _take_weights(copied: nn.Module, model: nn.Module) -> None:
    """Copy the weights that are not sharded yet."""
    for own, other in zip(copied.parameters(), model.parameters(), strict=True):
        if not isinstance(other, DTensor):
            own.data = other.detach().clone()


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are empty, and get their weights later."""
    empty: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.new_empty(0), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


@contextlib.contextmanager
def no_exchange(model: Any) -> Iterator[None]:
    """Gradients of a sharded model stay those of each process."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean over processes of gradients that are not sharded."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        means: Any = accelerator.reduce(flat, "mean")
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, means.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))


class WholeModel:
    """Makes a plain model of a sharded one, for evaluation, and holds no weights in between.

    Args:
        model: a model that is still to be sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._plain: nn.Module = without_weights(model)

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[nn.Module]:
        """The plain model, in evaluation mode, with the weights and buffers of a sharded one."""
        for own, other in zip(self._plain.parameters(), model.parameters(), strict=True):
            own.data = whole(other.detach())
        for own, other in zip(self._plain.buffers(), model.buffers(), strict=True):
            own.data = other.detach().clone()  # the copy was made before the model was moved
        self._plain.eval()
        try:
            yield self._plain
        finally:
            for own in self._plain.parameters():
                own.data = own.data.new_empty(0)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any, keep: bool) -> Any:
    """The value with whole tensors, on the CPU, in the place of sharded ones.

    All processes must call it. A device has one of the tensors whole at a time.

    Args:
        value: a tensor, or mappings and lists of tensors and others.
        keep: whether this process wants them; else None is in their place.
    """
    if isinstance(value, DTensor):
        tensor = value.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gathered(content, keep) for key, content in value.items()}
    return [gathered(content, keep) for content in value] if isinstance(value, list) else value


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without a word to the others."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_state_of(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of whole tensors, sharded as the model is."""
    own = model.state_dict()
    return {name: _as(own.get(name), tensor) for name, tensor in state.items()}


def as_optimizer_state_of(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> dict[str, Any]:
    """A state dict of an optimizer with whole tensors, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        **state,
        "state": {
            index: {
                name: _as(parameters[index], value) if isinstance(value, Tensor) else value
                for name, value in means.items()
            }
            for index, means in state["state"].items()
            if index < len(parameters)
        },
    }


def _as(reference: Tensor | None, tensor: Tensor) -> Tensor:
    """The tensor, sharded as another one of its shape; every process has it whole."""
    if isinstance(reference, DTensor) and reference.shape == tensor.shape:
        mesh, placements = reference.device_mesh, reference.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return tensor
