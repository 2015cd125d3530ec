"""Attention, the output layer and a step of DeiT-small on a GPU, next to what torch has for each.

python -m benchmarks.gpu attention                     # 6 heads of 64, bf16, up to 8,192 tokens
python -m benchmarks.gpu attention --causal --tokens 512 2048
python -m benchmarks.gpu output                        # 8,192 tokens of 512, V up to 267,744
python -m benchmarks.gpu deit                          # 224 px, batch 256, bf16 autocast

Times are those of the GPU, between events around each phase: it is given a pause to wait in while
the host queues all work of a round. The host's time is a column of its own.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.gpu_workloads import (
    ATTENTION,
    DEIT,
    OUTPUT,
    attention_workload,
    deit_workload,
    output_workload,
)
from benchmarks.report import (
    Row,
    draw_lines,
    print_table,
    ratios,
    save_figure,
    write_csv,
)
from benchmarks.timing import Workload, quantiles
from multimax.training.result import environment

MIB = 2**20
TOKENS = (196, 512, 1024, 2048, 4096, 8192)
VOCABULARIES = (1_000, 50_000, 267_744)
PAUSE = 20_000_000  # cycles, about 10 ms: the host needs less to queue a round
COLUMNS = {
    "provider": "provider",
    "forward_ms": "forward, ms",
    "backward_ms": "backward, ms",
    "step_ms": "both, ms",
    "step_range": "p20 - p80",
    "step_ratio": "ratio",
    "forward_ratio": "forward, ratio",
    "host_ms": "host, ms",
    "held_mib": "held, MiB",
    "peak_mib": "peak, MiB",
}


def time_round(workload: Workload, cuda: bool) -> dict[str, float]:
    """Seconds of each phase, of all as "step", and of the host."""
    workload.drop_gradients()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(PAUSE)
    marks = [_mark(cuda)]
    started, value = time.perf_counter(), None
    for call in workload.phases.values():
        value = call(value)
        marks.append(_mark(cuda))
    host = time.perf_counter() - started
    if cuda:
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    else:
        seconds = [b - a for a, b in pairwise(marks)]
    workload.drop_gradients()
    phases = dict(zip(workload.phases, seconds, strict=True))
    return phases | {"step": sum(seconds), "host": host}


def _mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def gpu_memory(workload: Workload, cuda: bool) -> Row:
    """MiB that a step adds to what is allocated: held after the forward pass, and at most."""
    if not cuda:
        return {}
    workload.drop_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = workload.phases["forward"](None)
    held = torch.cuda.memory_allocated() - before
    workload.phases["backward"](value)
    peak = torch.cuda.max_memory_allocated() - before
    workload.drop_gradients()
    return {"held_mib": held / MIB, "peak_mib": peak / MIB}


def measure(
    build: Callable[..., Workload],
    providers: Sequence[str],
    options: Row,
    device: str,
    rounds: int,
) -> list[Row]:
    """A row for each provider; one that fails, by lack of memory say, has no numbers."""
    cuda, made, rows = torch.device(device).type == "cuda", {}, {}
    for name in providers:
        rows[name] = {**options, "provider": name, "rounds": 0, "failed": ""}
        try:
            made[name] = build(name, **options, device=device)
            for _ in range(3):  # compiles
                time_round(made[name], cuda)
            rows[name] |= gpu_memory(made[name], cuda)
        except Exception as error:  # too little memory, or what a compiler does not take
            made.pop(name, None)
            rows[name]["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in made}
    names = list(made)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for phase, value in time_round(made[name], cuda).items():
                seconds[name].setdefault(phase, []).append(value)
    for name, found in seconds.items():
        rows[name] |= quantiles(found) | {"rounds": rounds}
    table = [rows[name] for name in providers]
    return [row | ratios(row, table[0]) for row in table]


def context(device: str) -> Row:
    """What a reader needs to repeat and to compare a measurement."""
    facts = environment()
    cuda = torch.device(device).type == "cuda"
    capability = torch.cuda.get_device_capability() if cuda else ()
    versions = {"torch": torch.__version__, "timm": metadata.version("timm")}
    if cuda:
        versions |= {"cuda": torch.version.cuda, "triton": metadata.version("triton")}
    return {
        "dtype": "bfloat16",
        "device": facts["hardware"]["device"],
        "capability": ".".join(map(str, capability)),
        "python": facts["versions"]["python"],
        **versions,
        "commit": facts["commit"],
    }


def draw_attention(rows: Sequence[Row]) -> Figure:
    """Time as multiple of the baseline's, and memory, over the tokens."""
    return _draw(rows, "tokens", "tokens, at the same number of queries in a batch")


def draw_output(rows: Sequence[Row]) -> Figure:
    """The same over the vocabulary."""
    return _draw(rows, "vocabulary", "classes or words")


def _draw(rows: Sequence[Row], key: str, label: str) -> Figure:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    time_axes, memory = figure.subplots(1, 2)
    draw_lines(time_axes, rows, key, lambda row: row.get("step_ratio"))
    baseline = rows[0]["provider"]
    time_axes.set(title="forward + backward", ylabel=f"time, multiple of {baseline}")
    draw_lines(memory, rows, key, lambda row: row.get("peak_mib"))
    memory.set(title="peak memory, gradients included", ylabel="MiB")
    for axes in (time_axes, memory):
        axes.set_xlabel(label)
    figure.legend(*time_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def shapes(arguments: argparse.Namespace) -> tuple[list[Row], Callable[..., Workload], Any]:
    """Options of each measurement, the function that builds it, and the one that draws all."""
    if arguments.what == "attention":
        options = [
            {"tokens": n, "batch": max(1, arguments.queries // n), "causal": arguments.causal}
            for n in arguments.tokens
        ]
        return options, attention_workload, draw_attention
    if arguments.what == "output":
        options = [{"vocabulary": v, "tokens": arguments.rows} for v in arguments.vocabularies]
        return options, output_workload, draw_output
    keys = ("batch", "image_size", "depth")
    return [{key: getattr(arguments, key) for key in keys}], deit_workload, None


def main(command: Sequence[str] | None = None) -> None:
    """Measure, print and write `gpu_<what>.csv` and its figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    providers = {"attention": ATTENTION, "output": OUTPUT, "deit": DEIT}
    parser.add_argument("what", choices=providers)
    parser.add_argument("--providers", nargs="+", choices={*ATTENTION, *OUTPUT, *DEIT})
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--queries", type=int, default=16_384, help="of a batch, in each head")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--rows", type=int, default=8192, help="tokens of the output layer")
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args(command)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu measures the host")
    names = arguments.providers or providers[arguments.what]
    options, build, draw = shapes(arguments)
    name = f"gpu_{arguments.what}" + ("_causal" if arguments.causal else "")
    table = arguments.results / "benchmarks" / f"{name}.csv"
    rows: list[Row] = []
    for shape in options:
        measured = measure(build, names, shape, arguments.device, arguments.rounds)
        title = ", ".join(f"{key}={value}" for key, value in shape.items())
        print_table(f"{arguments.what}, {title}, bf16", measured, COLUMNS)
        print(
            *(f"{row['provider']}: {row['failed']}\n" for row in measured if row["failed"]), sep=""
        )
        rows += measured
        write_csv(table, rows, context(arguments.device))  # a GPU is not always there for the rest
    print(table)
    if draw:
        picture = arguments.results / "figures" / f"benchmark_{name}.png"
        save_figure(draw(rows), picture)
        print(picture)


if __name__ == "__main__":
    main()
