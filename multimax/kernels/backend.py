"""Which form of a function runs: the eager definition, or a kernel."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import Tensor

from multimax.functional import exporting, function_transforms_active

BACKENDS = ("auto", "eager", "c", "triton")
TRITON_INSTALLED = find_spec("triton") is not None  # here, since torch.compile cannot look
# torch.compile follows a ContextVar, and compiles again when it has changed: 2.14 does, 2.11 not.
READS_CONTEXT_VARIABLES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)

# The open `use_backend` blocks of this thread or asyncio task, each with an identity of its own:
# they may close in another order than the reverse of that in which they were opened.
_open: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("multimax_backend", default=())
# That of a block inside a function that torch.compile traces, which can read a ContextVar but not
# set it. It lives in the trace alone.
_traced: str | None = None


def check_backend(name: str) -> None:
    """Raise ValueError for a name that is no backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with this backend inside the `with` block, in its own thread or asyncio task.

    Args:
        name: "auto" takes the fastest that the device, the shapes and the normalizer allow;
            "eager" is the definition, in plain torch operations; "c" are the kernels for the CPU:
            attention and the output layer with SoftMax of scores with a modulator of order <= 2,
            and the normalizers but for other orders and for entmax of other alphas than 1.5 and 2,
            with a length scale, a cap or a sink attention alone; "triton" are those for CUDA: the
            same attention and output layer, no normalizer. A kernel that is asked for by name
            raises ValueError where it cannot run; `logits`, `log_probabilities`, cross-entropy in
            `output_loss` and metrics have but one form.
    """
    global _traced
    check_backend(name)
    if torch.compiler.is_dynamo_compiling():
        before, _traced = _traced, name
        try:
            yield
        finally:
            _traced = before
        return
    block = (object(), name)
    _open.set((*_open.get(), block))
    try:
        yield
    finally:
        _open.set(tuple(other for other in _open.get() if other is not block))


def chosen_backend() -> str:
    """The backend of the `use_backend` block that was opened last; "auto" outside of all."""
    if _traced is not None:
        return _traced
    if not READS_CONTEXT_VARIABLES and torch.compiler.is_dynamo_compiling():
        return _backend_when_compiled()
    return _opened_last()


def _opened_last() -> str:
    blocks = _open.get()
    return blocks[-1][1] if blocks else "auto"


def _backend_when_compiled() -> str:
    """Compiled code keeps the choice for good, and does not notice another one."""
    return _opened_last()


# `torch.compiler.assume_constant_result`, which would import the compiler.
_backend_when_compiled._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def refuse(name: str, what: Any, reason: str) -> NoReturn:
    """Raise ValueError that says why a backend, asked for by name, cannot compute something."""
    raise ValueError(f"backend {name!r} cannot compute {what}: {reason}")


def graph_obstacle() -> str | None:
    """Why what runs now cannot be a kernel, of whatever tensors; None if it can."""
    if exporting():
        return "exported programs hold torch operations alone"
    if function_transforms_active():
        return "function transforms such as vmap need torch operations"
    return None


def triton_obstacle(tensor: Tensor) -> str | None:
    """Why the Triton kernels cannot work on a tensor; None if they can."""
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device}, it runs on CUDA"
    if not TRITON_INSTALLED:
        return "Triton is not installed: pip install triton"
    return graph_obstacle()
