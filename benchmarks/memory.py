"""Memory of one provider, measured in a process of its own.

python -m benchmarks.memory benchmarks.attention '{"provider": "MultiMax", "options": {...}, ...}'
"""

import importlib
import json
import os
import re
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import INFERENCE, Workload

MIB = 2**20
OUT_OF_MEMORY = 3  # the exit status of a process that was refused memory
# The allocator gives freed blocks back at once, so that the size of the process is what it holds.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(
    module: str,
    provider: str,
    options: dict[str, Any],
    warmup: dict[str, Any] | None,
    threads: int,
) -> dict[str, float] | None:
    """Memory of a step of `module.workloads([provider], **options)[provider]`.

    Args:
        module: the benchmark.
        provider: one of its providers.
        options: the shape to measure.
        warmup: a small shape, which is run first: it loads and compiles what the provider needs.
            None runs the shape itself, where what is compiled depends on it.
        threads: of torch.

    Returns:
        `activation_mib`, see `activation_bytes`; and `peak_mib`, the growth of the process from
        before the step (model and inputs are there) to its highest point, gradients included.
        None if there is not enough memory.

    Raises:
        RuntimeError: the process failed for another reason.
    """
    task = {"provider": provider, "options": options, "warmup": warmup, "threads": threads}
    command = [sys.executable, "-m", "benchmarks.memory", module, json.dumps(task)]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | ALLOCATOR | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == OUT_OF_MEMORY:
        return None
    if done.returncode:
        raise RuntimeError(f"memory of {provider} in {module}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class _Saved:
    """What autograd holds in the place of a saved tensor, so that one sees when it lets go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def activation_bytes(forward: Callable[[], Any], leaves: Sequence[Tensor]) -> int:
    """Bytes of the storages that autograd holds between forward and backward, but for `leaves`.

    What a function keeps in another way than `save_for_backward` is not seen.
    """
    saved: list[weakref.ref[_Saved]] = []

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor)
        saved.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = forward()
    held = [holder.tensor.untyped_storage() for ref in saved if (holder := ref())]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in held}
    del result
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    return sum(size for address, size in sizes.items() if address not in known)


def main(arguments: Sequence[str]) -> None:
    """Measure in this process what the command line describes, and print it as JSON."""
    module, task = importlib.import_module(arguments[0]), json.loads(arguments[1])
    torch.set_num_threads(task["threads"])
    provider, small = task["provider"], task["warmup"]
    workload = module.workloads([provider], **task["options"])[provider]
    limit_to_free_memory()
    try:
        _warm_up(workload if small is None else module.workloads([provider], **small)[provider])
        peak = _peak_growth(workload)
        held = activation_bytes(lambda: next(iter(workload.phases.values()))(None), workload.leaves)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        raise SystemExit(OUT_OF_MEMORY) from error
    print(json.dumps({"activation_mib": held / MIB, "peak_mib": peak / MIB}))


def limit_to_free_memory() -> None:
    """Refuse this process more memory than is free now, before the system ends some process."""
    facts = Path("/proc/meminfo").read_text()
    free = 1024 * int(re.findall(r"MemAvailable:\s+(\d+)", facts)[0])
    held = 1024 * int(re.findall(r"VmData:\s+(\d+)", _status())[0])
    resource.setrlimit(resource.RLIMIT_DATA, (held + free, held + free))


def _peak_growth(workload: Workload) -> int:
    """Bytes from before a step to its highest point; Linux keeps the account."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest point so far is where it is now
    before = _resident("VmRSS")
    _run(workload)
    return _resident("VmHWM") - before


def _warm_up(workload: Workload) -> None:
    for _ in range(3):  # TorchScript optimizes after two calls
        _run(workload)


def _run(workload: Workload) -> None:
    value: Any = None
    for phase, call in workload.phases.items():
        if phase != INFERENCE:
            value = call(value)
    workload.drop_gradients()


def _resident(field: str) -> int:
    return 1024 * int(re.findall(rf"{field}:\s+(\d+)", _status())[0])


def _status() -> str:
    return Path("/proc/self/status").read_text()


if __name__ == "__main__":
    main(sys.argv[1:])
