"""What an update of a configuration costs: parameters, FLOPs and memory, counted without data.

The real model runs an update on the meta device, which keeps shapes and no numbers.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from statistics import mean
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import multimax.attention
from multimax.tasks import TASKS, build_task
from multimax.training.config import Config, check_processes
from multimax.training.optimization import build_optimizer

aten = torch.ops.aten
META = torch.device("meta")
IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}  # which torch does not count
BATCHES = 16  # that are drawn: those of some tasks differ


class Cost(NamedTuple):
    """What a run costs.

    Attributes:
        parameters: of the model; tied ones once.
        flops: of an update, forward and backward, of all processes: two for each multiplication of
            a matrix product or convolution, also of those that gradient checkpointing does again.
            Normalizers, norms and other functions of single numbers do not count.
        state: bytes of weights, gradients, optimizer and average of weights.
        eager: bytes that forward and backward of a batch of one process hold at their peak beside
            the state, in fp32, where attention holds its queries x keys matrices.
        fused: the same where attention is a kernel that holds none; None if no kernel can compute
            the attention of this normalizer so.
        units: images, tokens or examples of an update, of all processes.
        updates: of the run.
    """

    parameters: int
    flops: int
    state: int
    eager: int
    fused: int | None
    units: int
    updates: int


def cost_of(config: Config, processes: int = 1) -> Cost:
    """The cost of a run, of which no data needs to be there.

    Args:
        config: of the run.
        processes: that share it, a GPU each.

    Raises:
        ValueError: the processes cannot share a batch, or the data set does not say how large it
            is.
    """
    check_processes(config, processes)
    options, kind = config.trainer, TASKS[config.task.name]
    source = kind.make_data(config, processes)
    with META:
        model = kind.build_model(config, source)
    task = build_task(config, 0, processes, META, (source, model))
    parameters = list(model.parameters())
    optimizer = build_optimizer(model, config.optimizer)
    integers = KnownIntegers()
    with integers:
        batches = list(islice(task.train_loader.batches(0), BATCHES))
    largest = max(batches, key=_size)

    def meter() -> Meter:
        model.zero_grad()
        with Meter(model) as meter, integers:
            task.loss(model, largest).backward()
        return meter

    eager, fused = meter(), None
    optimizer.step()
    weights, state = _bytes(parameters), _bytes(_tensors(list(optimizer.state.values())))
    average = weights + _bytes(model.buffers()) if options.ema_decay is not None else 0
    names = model.named_modules()
    if all(module.fusible for name, module in names if name.endswith("attn.normalizer")):
        with _fused_attention():
            fused = _size(largest) + meter().peak
    shares = options.accumulation * processes
    length = len(task.train_loader) // options.accumulation if options.epochs else 1
    return Cost(
        parameters=sum(parameter.numel() for parameter in parameters),
        # Those of other batches are taken to be in proportion to their sizes.
        flops=round(eager.flops * mean(map(_size, batches)) / _size(largest) * shares),
        state=2 * weights + average + state,
        eager=_size(largest) + eager.peak,
        fused=fused,
        units=round(mean(map(task.weight, batches)) * shares),
        updates=(options.epochs or options.updates or 0) * length,
    )


def _bytes(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _size(batch: Any) -> int:
    return _bytes(_tensors(batch))


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


class Meter(TorchDispatchMode):
    """Counts FLOPs, by torch's own formulas, and bytes, of what runs inside on the meta device.

    The bytes are those of tensors that are made inside and not yet freed; a gradient counts until
    its parameter has it. `torch.utils.flop_counter.FlopCounterMode` leaves out products in place,
    as the output layer has them, and keeps what gradient checkpointing lets go.

    Args:
        model: whose parameters and buffers do not count.

    Attributes:
        flops: so far.
        peak: the largest number of bytes at any time.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops: int = 0
        self.peak: int = 0
        self._now = 0
        own = [*model.parameters(), *model.buffers()]
        self._sizes: dict[int, int] = {id(tensor.untyped_storage()): 0 for tensor in own}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._leave_out)
            for parameter in model.parameters()
        ]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _leave_out(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            key = id(parameter.grad.untyped_storage())
            self._now -= self._sizes.get(key, 0)
            self._sizes[key] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        count = flop_registry.get(IN_PLACE.get(packet, packet))
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def _add(self, storage: Any) -> None:
        key = id(storage)  # of nothing else while it lives
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


class KnownIntegers(TorchDispatchMode):
    """Keeps the values of whole numbers and booleans that come to the meta device.

    Shapes can depend on them: how many words are in a band, or which targets count. Whether it is
    so of other numbers is always answered with no, by which a solver ends after its first step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_meta = any(t.is_meta for t in inputs) or kwargs.get("device") == META
        known = inputs and all(self._known(tensor) for tensor in inputs)
        if not on_meta or not known or func._schema.is_mutable:
            if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
                return False
            if func is aten.index.Tensor:
                args = args[0], self._places(args[1])
            return func(*args, **kwargs)
        args, kwargs = tree_map(self._value, (args, kwargs))
        if kwargs.get("device") == META:
            kwargs = kwargs | {"device": torch.device("cpu")}
        return tree_map(self._remember, func(*args, **kwargs))

    def _known(self, tensor: Tensor) -> bool:
        return tensor in self._values if tensor.is_meta else not tensor.is_floating_point()

    def _value(self, leaf: Any) -> Any:
        return self._values.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf

    def _remember(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copy = torch.empty_like(leaf, device=META)
        if not leaf.is_floating_point():
            self._values[copy] = leaf
        return copy

    def _places(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Indices with the places in the stead of each known mask."""
        places: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool and self._known(index):
                places += map(self._remember, self._value(index).nonzero(as_tuple=True))
            else:
                places.append(index)
        return places


class _FusedAttention(torch.autograd.Function):
    """Attention in the memory of a kernel: it keeps its arguments, its result and a sum per row."""

    @staticmethod
    def forward(ctx, query, key, value, coefficients):
        out = query.new_empty(*query.shape[:-1], value.size(-1))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, coefficients, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(map(torch.empty_like, ctx.saved_tensors[:4]))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as a kernel, of the meta device, which has none."""

    def fused(query: Tensor, key: Tensor, value: Tensor, normalizer: Any, *_: Any) -> Tensor:
        coefficients = normalizer.coefficients(torch.float32, META)
        return _FusedAttention.apply(query, key, value, coefficients)

    with patch.object(multimax.attention, "eager_attention", fused):
        yield
