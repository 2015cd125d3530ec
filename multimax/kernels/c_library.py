"""The C kernels in `csrc/`: compiled when they are first needed, then kept on disk.

They need a C compiler (`CC`, else `cc`, `gcc` or `clang`) and no header but C's own; it takes some
seconds. Without one, everything runs on torch operations, and `unavailable()` says why.
"""

import atexit
import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from multimax.files import digest, user_cache, write_atomically

# Whatever speeds up loops without changing how infinities and NaN are treated.
FLAGS = ["-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
# What a compiler may not know is left out, in this order. OpenMP is that of torch, in its process.
OPTIONAL = (["-march=native", "-fopenmp"], ["-march=native"], [])


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


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
    dropout=ctypes.c_double,
    **dict.fromkeys(("threads", "order"), _INT64),
    **dict.fromkeys(("coefficients", "sums"), _POINTER),
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

    Raises:
        MemoryError: there is no memory for its working space.
    """
    pointers = [address(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    library = _library_or_reason(dtype)
    if isinstance(library, str):
        raise RuntimeError(library)
    if getattr(library, function)(*pointers):
        raise MemoryError(f"no memory for the working space of {function}")


def address(tensor: torch.Tensor) -> int:
    """Where a tensor's data lie; ValueError if that is not in the memory of the CPU."""
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor is on {tensor.device}, the others are on the CPU")
    return tensor.data_ptr()


def check_coefficients(coefficients: torch.Tensor, scores: torch.Tensor) -> None:
    """Raise ValueError for coefficients that the kernels, which take addresses, would misread."""
    expected = torch.promote_types(scores.dtype, torch.float32)
    if coefficients.dtype != expected or coefficients.device != scores.device:
        raise ValueError(
            f"coefficients must be {expected} on {scores.device}, as they are asked for, got "
            f"{coefficients.dtype} on {coefficients.device}"
        )


def unavailable() -> str | None:
    """Why there are no C kernels, which is also warned of once; None if there are.

    The first call compiles them if need be.
    """
    return _warn_if_unavailable()


# As torch.compiler.assume_constant_result does, which takes a second to import: torch.compile calls
# the function rather than tracing it.
unavailable._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@cache
def _warn_if_unavailable() -> str | None:
    reason = _library_or_reason(torch.float32)
    if isinstance(reason, str):
        warnings.warn(f"multimax runs without its compiled CPU kernels: {reason}", stacklevel=3)
        return reason
    return None


@cache
def _library_or_reason(dtype: torch.dtype) -> ctypes.CDLL | str:
    compiler = _compiler()
    if compiler is None:
        wanted = os.environ.get("CC")
        missing = f"CC is {wanted!r}, which is not" if wanted else "no C compiler was"
        return f"{missing} found; install gcc or clang, or set CC"
    try:
        library = ctypes.CDLL(str(_compile(compiler, dtype)))
    except (OSError, subprocess.SubprocessError) as error:
        details = getattr(error, "stderr", None) or str(error)
        return f"{shlex.join(compiler)} failed: {details.strip()[-500:]}"
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return _mismatch(library) or library


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


def _compiler() -> list[str] | None:
    """Its command, which may have arguments, as in CC="ccache gcc"."""
    wanted = os.environ.get("CC")
    if wanted:
        command = shlex.split(wanted)
        return command if shutil.which(command[0]) else None
    return next(([path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def _compile(compiler: list[str], dtype: torch.dtype) -> Path:
    """The shared library of this compiler, processor and source, compiled unless it is kept."""
    sources = {
        path.name: path.read_bytes()
        for path in sorted(
            (resources.files("multimax.kernels") / "csrc").iterdir(), key=lambda path: path.name
        )
        if path.name.endswith((".c", ".h"))
    }
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    described = [version.stdout, repr((compiler, FLAGS, OPTIONAL, _processor()))]
    key = digest(b"\0".join([*sources.values(), *(text.encode() for text in described)]))
    name = f"kernels-{'double' if dtype == torch.float64 else 'float'}-{key}"
    # A name ends with the digest of its content: loading half a file would end the process.
    for kept in _cache().glob(f"{name}-*.so"):
        if kept.stem == f"{name}-{digest(kept.read_bytes())}":
            return kept
    with tempfile.TemporaryDirectory() as folder:
        for file, content in sources.items():
            (Path(folder) / file).write_bytes(content)
        units = [str(Path(folder) / file) for file in sources if file.endswith(".c")]
        macros = ["-DDOUBLE"] if dtype == torch.float64 else []
        built = Path(folder) / "kernels.so"
        _run_compiler(compiler, [*macros, *units, "-o", str(built), "-lm"])
        content = built.read_bytes()
    library = _cache() / f"{name}-{digest(content)}.so"
    remedy = "The kernels cannot be kept there: set XDG_CACHE_HOME to another folder"
    write_atomically(library, lambda stream: stream.write(content), remedy, several_writers=True)
    return library


def _run_compiler(compiler: list[str], arguments: list[str]) -> None:
    for index, optional in enumerate(OPTIONAL):
        command = [*compiler, *FLAGS, *optional, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            return
        if index == len(OPTIONAL) - 1:
            done.check_returncode()


@cache
def _cache() -> Path:
    """~/.cache/multimax, or a folder of this process where that cannot be written."""
    try:
        path = user_cache()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        folder = Path(tempfile.mkdtemp(prefix="multimax-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


def _processor() -> str:
    """What the code may be compiled for; home directories are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((s for s in lines if s.startswith(("flags", "Features"))), "")
