"""Time and memory of every normalizer next to torch.softmax and the entmax package.

python -m benchmarks.normalizers                       # rows of 196 to 267,744, one thread
python -m benchmarks.normalizers --shapes 8x6x196x196 16x50000 --threads 2
"""

from collections.abc import Callable, Sequence
from typing import Any

import entmax as entmax_package
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from benchmarks.formulations import official_multimax, script
from benchmarks.report import (
    BLUE,
    GREY,
    ORANGE,
    Row,
    arguments_of,
    finish,
    measure,
    print_table,
)
from benchmarks.timing import Workload
from multimax import build_normalizer
from multimax.kernels.backend import use_backend

SHAPES = ("8x6x196x196", "2x1024x1024", "16x50000", "8x267744")
WARMUP = {"shape": "2x8"}
# The least that memory allows: sums with as many reads and writes as each needs at least.
STREAMS = ("streams of torch.softmax", "streams of MultiMax")
PROVIDERS = (
    "torch.softmax",
    *STREAMS,
    "SoftMax",
    "MultiMax",
    "MultiMax, eager",
    "MultiMax, official",
    "MultiMax, official, TorchScript",
    "top-k",
    "evidential SoftMax",
    "sparsemax",
    "entmax package: sparsemax",
    "entmax package: sparsemax, k = 100",
    "1.5-entmax",
    "entmax package: 1.5-entmax",
    "entmax package: 1.5-entmax, k = 100",
)
OURS = {
    "SoftMax": "softmax",
    "MultiMax": "multimax",
    "MultiMax, eager": "multimax",
    "top-k": "topk",
    "evidential SoftMax": "evsoftmax",
    "sparsemax": "sparsemax",
    "1.5-entmax": "entmax15",
}
COLUMNS = {
    "provider": "provider",
    "forward_ms": "forward, ms",
    "backward_ms": "backward, ms",
    "step_ms": "both, ms",
    "step_range": "p20 - p80",
    "step_ratio": "ratio",
    "activation_scores": "held, x scores",
    "peak_mib": "peak, MiB",
}


def workloads(providers: Sequence[str], shape: str) -> dict[str, Workload]:
    """Forward and backward pass over scores of a shape such as "16x50000", by provider."""
    torch.manual_seed(0)
    scores = torch.randn([int(size) for size in shape.split("x")], requires_grad=True)
    upstream = torch.randn(scores.shape)
    made = {}
    for name in providers:
        if name in STREAMS:
            made[name] = _streams(name, scores.detach(), upstream)
            continue
        torch.manual_seed(0)  # the same MultiMax everywhere
        normalize, parameters = _build(name, scores.size(-1))

        def forward(_: Any, normalize: Callable[[Tensor], Tensor] = normalize) -> Tensor:
            return normalize(scores)

        phases = {"forward": forward, "backward": lambda p: p.backward(upstream)}
        made[name] = Workload(phases, [scores, upstream, *parameters])
    return made


def _streams(name: str, scores: Tensor, upstream: Tensor) -> Workload:
    """Forward from x to p, backward from p and dL/dp to dL/dx; MultiMax reads x there, too."""

    def backward(p: Tensor) -> Tensor:
        if name == STREAMS[0]:
            return torch.add(p, upstream)
        return torch.addcmul(scores, p, upstream)

    return Workload({"forward": lambda _: torch.add(scores, 1), "backward": backward}, [])


def _build(name: str, length: int) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """A normalizer of the last dimension, and its parameters."""
    if name == "torch.softmax":
        return lambda x: torch.softmax(x, -1), []
    if name.startswith("entmax package"):
        peer = entmax_package.sparsemax if "sparsemax" in name else entmax_package.entmax15
        options = {"k": 100} if name.endswith("100") else {}
        return lambda x: peer(x, dim=-1, **options), []
    if name.startswith("MultiMax, official"):
        ts, ranges = build_normalizer("multimax").parameters()
        function = script(official_multimax) if name.endswith("Script") else official_multimax
        return lambda x: function(x, ts, ranges), [ts, ranges]
    options = {"k": max(1, length // 2)} if name == "top-k" else {}
    normalizer = build_normalizer(OURS[name], **options)
    parameters: list[Tensor] = list(normalizer.parameters())
    return (_eager(normalizer) if name.endswith("eager") else normalizer), parameters


def _eager(normalizer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def normalize(scores: Tensor) -> Tensor:
        with use_backend("eager"):
            return normalizer(scores)

    return normalize


def draw(rows: Sequence[Row]) -> Figure:
    """Time as multiple of the baseline's, a panel for each shape; and memory for the last shape."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(3.6 + 2.3 * (len(shapes) + 1), 5), layout="constrained")
    *panels, memory = figure.subplots(1, len(shapes) + 1, sharey=True)
    of_shape: list[Row] = []
    for axes, shape in zip(panels, shapes, strict=True):
        of_shape = [row for row in rows if row["shape"] == shape]
        _draw_bars(axes, of_shape, "step_ratio")
        lengths = " x ".join(f"{int(size):,}" for size in shape.split("x"))
        axes.set(title=f"forward + backward\n{lengths}", xscale="log")
        axes.set_xlabel(f"time, multiple of\n{rows[0]['provider']}")
        axes.xaxis.set_major_formatter("{x:g}")
    for axes in panels:
        axes.set_xlim(0.2, 4 * max(row.get("step_ratio", 1) for row in rows))
    _draw_bars(memory, of_shape, "activation_scores")
    memory.set_title("memory held for backward,\nbesides the scores")
    memory.set_xlabel("multiple of the size\nof the scores")
    panels[0].invert_yaxis()
    kinds = {"MultiMax": ORANGE, "other functions of this library": BLUE}
    kinds["torch, entmax package, official formulation"] = GREY
    handles = [Patch(color=color, label=label) for label, color in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _draw_bars(axes: Axes, rows: Sequence[Row], key: str) -> None:
    names = [row["provider"] for row in rows]
    colors = [BLUE if name in OURS else GREY for name in names]
    colors = [ORANGE if name == "MultiMax" else c for name, c in zip(names, colors, strict=True)]
    bars = axes.barh(names, [row.get(key, float("nan")) for row in rows], color=colors)
    axes.bar_label(bars, fmt="%.2g", padding=2, fontsize=8)
    axes.margins(x=0.25)
    axes.grid(axis="x", alpha=0.3)


def main(command: Sequence[str] | None = None) -> None:
    """Measure, print and write `normalizers.csv` and its figure."""
    parser = arguments_of(__doc__, PROVIDERS, rounds=25)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="such as 16x50000")
    arguments = parser.parse_args(command)
    rows: list[Row] = []
    for shape in arguments.shapes:
        measured = measure(workloads, {"shape": shape}, WARMUP, arguments)
        elements = torch.Size(int(size) for size in shape.split("x")).numel()
        for row in measured:
            if "activation_mib" in row:
                row["activation_scores"] = row["activation_mib"] * 2**20 / (4 * elements)
        print_table(f"{shape}, fp32, {arguments.threads} thread(s)", measured, COLUMNS)
        rows += measured
        finish("normalizers", rows, arguments.threads, arguments.results, draw)


if __name__ == "__main__":
    main()
