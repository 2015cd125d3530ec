"""Time of every normalizer, forward and backward, next to torch.softmax and the entmax package.

python -m benchmarks.normalizers                       # 8 x 6 x 196 x 196, one thread
python -m benchmarks.normalizers --shape 16 50000 --threads 2
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entmax as entmax_package
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import quantiles, time_interleaved
from multimax import build_normalizer, registered_normalizers
from multimax.training.result import environment

RESULTS = Path("results/benchmarks")


def providers(scores: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Everything that is timed, by name."""
    keep = max(1, scores.size(-1) // 2)
    ours = {
        f"multimax/{name}": build_normalizer(name, **({"k": keep} if name == "topk" else {}))
        for name in registered_normalizers()
    }
    peers: dict[str, Any] = {
        "torch.softmax": lambda x: torch.softmax(x, -1),
        "entmax/sparsemax": lambda x: entmax_package.sparsemax(x, dim=-1),
        "entmax/sparsemax k=100": lambda x: entmax_package.sparsemax(x, dim=-1, k=100),
        "entmax/entmax15": lambda x: entmax_package.entmax15(x, dim=-1),
        "entmax/entmax15 k=100": lambda x: entmax_package.entmax15(x, dim=-1, k=100),
        "entmax/entmax_bisect": lambda x: entmax_package.entmax_bisect(x, 1.5),
    }
    return peers | ours


def measure(shape: list[int], threads: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each provider, with the ratio of its median to that of torch.softmax."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    scores = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(shape)

    def step(normalize: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            scores.grad = None
            normalize(scores).backward(upstream)

        return call

    steps = {name: step(normalize) for name, normalize in providers(scores).items()}
    seconds = time_interleaved(steps, rounds)
    rows: list[dict[str, Any]] = [
        {"provider": name, **quantiles(times)} for name, times in seconds.items()
    ]
    softmax = rows[0]["median_ms"]
    return [row | {"to_softmax": row["median_ms"] / softmax} for row in rows]


def main() -> None:
    """Measure, print and write `results/benchmarks/normalizers_<shape>.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", type=int, nargs="+", default=[8, 6, 196, 196])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rows = measure(arguments.shape, arguments.threads, arguments.rounds)

    size = "x".join(map(str, arguments.shape))
    facts = environment()
    table = Table(title=f"forward + backward, fp32, {size}, {arguments.threads} thread(s)")
    for column in ("provider", "median ms", "p20", "p80", "x torch.softmax"):
        table.add_column(column, justify="left" if column == "provider" else "right")
    for row in rows:
        numbers = (row["median_ms"], row["p20_ms"], row["p80_ms"], row["to_softmax"])
        table.add_row(row["provider"], *(f"{number:.2f}" for number in numbers))
    Console().print(table)

    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"normalizers_{size}.csv"
    context = {
        "shape": size,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "entmax": getattr(entmax_package, "__version__", ""),
        "device": facts["hardware"]["device"],
        "commit": facts["commit"],
    }
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0], *context])
        writer.writeheader()
        writer.writerows(row | context for row in rows)
    print(path)


if __name__ == "__main__":
    main()
