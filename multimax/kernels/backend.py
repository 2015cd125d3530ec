"""Which form of a function runs: the eager definition, or a kernel."""

from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "eager", "c", "triton")

_chosen = "auto"


def check_backend(name: str) -> None:
    """Raise ValueError for a name that is no backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with this backend inside the `with` block, in all threads.

    Args:
        name: "auto" takes the fastest that the device, the shapes and the normalizer allow;
            "eager" is the definition, in plain torch operations; "c" (CPU) and "triton"
            (CUDA) are the attention kernels, for normalizers that are SoftMax of modulated scores.
            A kernel that is asked for by name raises ValueError where it cannot run.
    """
    global _chosen
    check_backend(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def chosen_backend() -> str:
    """The backend of the innermost `use_backend`; "auto" outside of all."""
    return _chosen
