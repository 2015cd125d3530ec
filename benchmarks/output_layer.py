"""Time and memory of the output layer and its loss, over the size of the vocabulary.

python -m benchmarks.output_layer                      # 2,048 tokens of 512, V up to 267,744
python -m benchmarks.output_layer --vocabularies 1000 10000 --tokens 512

The gradients of our `linear_output_loss` and of the chunked loss of torch are computed in the
forward pass: compare the sum of both passes. A provider that needs more memory than is free has
0 rounds and no numbers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.report import Row, arguments_of, draw_lines, finish, measure, print_table
from benchmarks.timing import Workload
from multimax.kernels.backend import use_backend
from multimax.losses import linear_output_loss
from multimax.normalizers import build_normalizer

VOCABULARIES = (1_000, 10_000, 50_000, 267_744)
DIM = 512
WARMUP = {"vocabulary": 16, "tokens": 4}
CHUNKED = "F.linear_cross_entropy, chunked"
NORMALIZERS = {
    "SoftMax": "softmax",
    "MultiMax": "multimax",
    "MultiMax, eager": "multimax",
    "sparsemax": "sparsemax",
    "sparsemax, eager": "sparsemax",
    "1.5-entmax": "entmax15",
    "1.5-entmax, eager": "entmax15",
}
PROVIDERS = (
    "F.linear, F.cross_entropy",
    *([CHUNKED] if hasattr(F, "linear_cross_entropy") else []),
    *NORMALIZERS,
)
COLUMNS = {
    "provider": "provider",
    "forward_ms": "forward, ms",
    "backward_ms": "backward, ms",
    "step_ms": "both, ms",
    "step_range": "p20 - p80",
    "step_ratio": "ratio",
    "peak_mib": "peak, MiB",
}


def workloads(providers: Sequence[str], vocabulary: int, tokens: int) -> dict[str, Workload]:
    """Loss of (tokens, 512) features and its gradients, by provider."""
    torch.manual_seed(0)
    features = torch.randn(tokens, DIM, requires_grad=True)
    weight = (torch.randn(vocabulary, DIM) / DIM**0.5).requires_grad_()
    target = torch.randint(vocabulary, (tokens,))
    made = {}
    for name in providers:
        torch.manual_seed(0)  # the same MultiMax everywhere
        loss, parameters = _build(name)

        def forward(_: Any, loss: Callable[..., Tensor] = loss) -> Tensor:
            return loss(features, weight, target)

        phases = {"forward": forward, "backward": lambda value: value.backward()}
        made[name] = Workload(phases, [features, weight, target, *parameters])
    return made


def _build(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """`(features, weight, target) -> mean loss`, and its parameters."""
    if name == PROVIDERS[0]:
        return lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target), []
    if name == CHUNKED:
        chunked = torch.nn.LinearCrossEntropyOptions()
        return partial(F.linear_cross_entropy, options=chunked), []
    normalizer = build_normalizer(NORMALIZERS[name])
    backend = "eager" if name.endswith("eager") else "auto"

    def loss(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with use_backend(backend):
            return linear_output_loss(normalizer, features, weight, target)

    return loss, list(normalizer.parameters())


def draw(rows: Sequence[Row]) -> Figure:
    """Time as multiple of the baseline's, and peak memory, over the vocabulary."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    draw_lines(time, rows, "vocabulary", lambda row: row.get("step_ratio"))
    time.set(title="time of loss and gradients", ylabel=f"multiple of {rows[0]['provider']}")
    draw_lines(memory, rows, "vocabulary", lambda row: row.get("peak_mib"))
    memory.set(title="peak growth of the process, gradients included", ylabel="MiB")
    for axes in (time, memory):
        axes.set_xlabel("classes or words")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def main(command: Sequence[str] | None = None) -> None:
    """Measure, print and write `output_layer.csv` and its figure."""
    parser = arguments_of(__doc__, PROVIDERS, rounds=11)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args(command)
    rows: list[Row] = []
    for vocabulary in arguments.vocabularies:
        options = {"vocabulary": vocabulary, "tokens": arguments.tokens}
        measured = measure(workloads, options, WARMUP, arguments, warmup_rounds=1)
        for row in measured:
            row.pop("activation_mib", None)  # would lack the gradients that a forward pass keeps
        shape = f"{arguments.tokens:,} tokens x {DIM}, {vocabulary:,} classes"
        print_table(f"{shape}, fp32, {arguments.threads} thread(s)", measured, COLUMNS)
        rows += measured
        finish("output_layer", rows, arguments.threads, arguments.results, draw)


if __name__ == "__main__":
    main()
