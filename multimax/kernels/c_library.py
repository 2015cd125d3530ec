"""The C kernels in `csrc/`: those that came with the package, else compiled when first needed.

What is compiled is kept on disk. It takes a C compiler (`CC`, else `cc`, `gcc` or `clang`), no
header but C's own, and some seconds for each of fp32 and fp64. Without one, everything runs on
torch operations, and `unavailable()` says why.
"""

import ctypes
import os
import sys
import threading
import warnings
from functools import cache
from typing import Any

import torch

from multimax.kernels import c_build, prebuilt


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


DTYPES = (torch.float32, torch.float64)  # each has a library

_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_STRIDES = ctypes.c_int64 * 3
# The structures of csrc, which explains their fields; they are compared when it is loaded.
Rows: type[ctypes.Structure] = _structure(
    "Rows",
    **dict.fromkeys(("outer", "heads", "queries", "columns"), _INT64),
    mask=_POINTER,
    **dict.fromkeys(("mask_outer", "mask_head", "mask_query", "threads"), _INT64),
)
Target: type[ctypes.Structure] = _structure(
    "Target",
    **dict.fromkeys(("target", "soft", "weight"), _POINTER),
    smoothing=ctypes.c_double,
    **dict.fromkeys(("ignored", "gradient"), _INT64),
)
Attention: type[ctypes.Structure] = _structure(
    "Attention",
    **dict.fromkeys(("batch", "heads", "key_heads", "queries", "keys", "dim", "value_dim"), _INT64),
    **dict.fromkeys(("query", "key", "value", "out", "d_out"), _POINTER),
    **dict.fromkeys(("query_strides", "key_strides", "value_strides"), _STRIDES),
    **dict.fromkeys(("out_strides", "d_out_strides"), _STRIDES),
    **dict.fromkeys(("statistics", "d_query", "d_key", "d_value", "mask"), _POINTER),
    mask_strides=_STRIDES,
    causal=_INT64,
    seed=ctypes.c_uint64,
    **dict.fromkeys(("dropout", "score_scale"), ctypes.c_double),
    **dict.fromkeys(("threads", "order"), _INT64),
    **dict.fromkeys(("coefficients", "sums", "bias"), _POINTER),
    bias_strides=_INT64 * 4,
    bias_before=_INT64,
    d_bias=_POINTER,
    d_bias_strides=_INT64 * 4,
    factor=_POINTER,
    factor_strides=_STRIDES,
    factor_first=_INT64,
    softcap=ctypes.c_double,
    **dict.fromkeys(("d_rows", "d_factor"), _POINTER),
    d_factor_strides=_STRIDES,
    d_logsumexp=_POINTER,
)
STRUCTURES: tuple[type[ctypes.Structure], ...] = (Rows, Target, Attention)

_ROWS, _TARGET, _ATTENTION = map(ctypes.POINTER, STRUCTURES)
SIGNATURES: dict[str, list[Any]] = {
    "softmax_forward": [_ROWS, _INT, *[_POINTER] * 3],
    "softmax_backward": [_ROWS, _INT, *[_POINTER] * 6],
    "threshold_forward": [_ROWS, _INT, *[_POINTER] * 2],
    "threshold_backward": [_ROWS, _INT, *[_POINTER] * 3],
    "kth_largest": [_ROWS, _INT64, *[_POINTER] * 2],
    "attention_forward": [_ATTENTION],
    "attention_backward": [_ATTENTION],
    "cross_entropy": [
        *[_INT64] * 3,
        _INT,
        *[_POINTER] * 2,
        _TARGET,
        *[_POINTER] * 2,
    ],
}


def call(dtype: torch.dtype, function: str, *arguments: object) -> None:
    """Run a function of the kernels; a tensor stands for its address and None for no address.

    Args:
        dtype: fp32 or fp64, that of all tensors among the arguments, which must be contiguous.
        function: one of `SIGNATURES`.
        arguments: as there.

    Raises:
        ValueError: a tensor would be misread.
        MemoryError: there is no memory for its working space.
    """
    if dtype not in DTYPES:
        raise ValueError(f"the kernels compute in float32 and float64, got {dtype}")
    pointers = [_contiguous(a, dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
    library = _library_or_reason(dtype)
    if isinstance(library, str):
        raise RuntimeError(library)
    if getattr(library, function)(*pointers):
        raise MemoryError(f"no memory for the working space of {function}")


def _contiguous(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
    return address(tensor, dtype)


def address(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Where a tensor's data lie; ValueError if not in the memory of the CPU, or not of `dtype`."""
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor is on {tensor.device}, the others are on the CPU")
    if tensor.dtype != dtype:
        raise ValueError(f"a tensor is {tensor.dtype}, the kernel reads {dtype}")
    return tensor.data_ptr()


def check_coefficients(coefficients: torch.Tensor, scores: torch.Tensor) -> None:
    """Raise ValueError for coefficients that the kernels, which take addresses, would misread."""
    check_order(coefficients)
    expected = torch.promote_types(scores.dtype, torch.float32)
    if coefficients.dtype != expected or coefficients.device != scores.device:
        raise ValueError(
            f"coefficients must be {expected} on {scores.device}, as they are asked for, got "
            f"{coefficients.dtype} on {coefficients.device}"
        )


def check_order(coefficients: torch.Tensor) -> None:
    """Raise ValueError for coefficients that are not `[scale, shift, ts, ranges]` of order <= 2."""
    if coefficients.dim() != 1 or coefficients.numel() not in (2, 6, 10):
        raise ValueError(
            "coefficients must be [scale, shift, ts (2N), ranges (2N)] with N = 0, 1 or 2, so of "
            f"2, 6 or 10 entries, got shape {tuple(coefficients.shape)}"
        )


def unavailable(dtype: torch.dtype) -> str | None:
    """Why there are no C kernels for fp32 or fp64, which is also warned of once; None if there are.

    The first call compiles them if need be.
    """
    return _warn_if_unavailable(dtype)


# As torch.compiler.assume_constant_result does, which takes a second to import: torch.compile calls
# the function rather than tracing it.
unavailable._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def _warn_if_unavailable(dtype: torch.dtype) -> str | None:
    reason = _library_or_reason(dtype)
    if isinstance(reason, str):
        warnings.warn(
            f"multimax runs without its compiled CPU kernels for {dtype}: {reason}", stacklevel=3
        )
        return reason
    return None


_lock = threading.Lock()  # two threads that begin at once compile once


def _library_or_reason(dtype: torch.dtype) -> ctypes.CDLL | str:
    with _lock:
        return _load(dtype)


@cache
def _load(dtype: torch.dtype) -> ctypes.CDLL | str:
    library = load_prebuilt(dtype)
    try:
        if library is None:
            path = c_build.find_library(dtype)
            if path is None:
                _announce(dtype)
                path = c_build.compile_library(dtype)
            library = ctypes.CDLL(str(path))
    except (OSError, c_build.NoLibraryError) as error:
        return str(error)
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return _mismatch(library) or library


def load_prebuilt(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels that came with the package; None if there are none for this processor.

    Some that cannot be loaded are reported, and then compiled as if there were none.
    """
    path = prebuilt.find_prebuilt(c_build.precision(dtype))
    if path is None:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # an OpenMP that is not torch's, say
        print(f"multimax cannot load its prebuilt CPU kernels: {error}", file=sys.stderr)
        return None


def _announce(dtype: torch.dtype) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of the processes of this machine, one says it
        print(
            f"multimax compiles its CPU kernels for {dtype}, once on this machine: about 10 s "
            "(beforehand: python -m multimax.kernels)",
            file=sys.stderr,
        )


def _mismatch(library: ctypes.CDLL) -> str | None:
    """A structure that is another one in the library, which would write anywhere; None if none."""
    for structure in STRUCTURES:
        layout = (ctypes.c_int64 * 2)()
        getattr(library, f"layout_of_{structure.__name__}")(layout)
        last, *_ = structure._fields_[-1]
        expected = [ctypes.sizeof(structure), getattr(structure, last).offset]
        if list(layout) != expected:
            return (
                f"structure {structure.__name__} has size and last offset {list(layout)} in csrc, "
                f"but {expected} in c_library.py"
            )
    return None
