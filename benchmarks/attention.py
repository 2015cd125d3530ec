"""Time and memory of attention next to torch's scaled_dot_product_attention, over the sequence.

python -m benchmarks.attention                         # 49 to 4,096 tokens, 6 heads of 64
python -m benchmarks.attention --causal --tokens 512 1024
python -m benchmarks.attention --dtype bfloat16 --providers SDPA SoftMax MultiMax
python -m benchmarks.attention --steps                 # length scale, cap and sink beside plain
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.formulations import official_attention, script
from benchmarks.report import (
    Row,
    arguments_of,
    context,
    draw_lines,
    finish,
    measure,
    print_table,
    write_csv,
)
from benchmarks.timing import INFERENCE, Workload, quantiles, time_phases
from multimax.attention import attention
from multimax.normalizers import build_normalizer

TOKENS = (49, 196, 512, 1024, 2048, 4096)
HEADS, HEAD_DIM = 6, 64  # of DeiT-small
SCORES = 2_000_000  # of a batch, for sequences that are short enough
PROVIDERS = (
    "SDPA",
    "SoftMax",
    "SoftMax, eager",
    "MultiMax",
    "MultiMax, eager",
    "MultiMax, official",
    "MultiMax, official, TorchScript",
)
# Options of SoftMax and MultiMax by what follows their name and " + ".
STEPS: dict[str, dict[str, Any]] = {
    "": {},
    "scores x log n": {"length_scale": "scores"},
    "modulated x log n": {"length_scale": "modulated"},
    "cap": {"softcap": 20.0},
    "sink": {"sink": 0.0},
    "log n, cap, sink": {"length_scale": "modulated", "softcap": 20.0, "sink": 0.0},
}
STEP_SHAPES = ((8, 6, 197), (1, 8, 1024))  # batch, heads, tokens
STEP_COLUMNS = {
    "provider": "provider",
    "step_ms": "training, ms",
    "step_range": "p20 - p80",
    "plain_ratio": "x plain",
    "eager_ratio": "x eager",
}
COLUMNS = {
    "provider": "provider",
    "forward_ms": "forward, ms",
    "backward_ms": "backward, ms",
    "step_ms": "training, ms",
    "step_range": "p20 - p80",
    "step_ratio": "ratio",
    "inference_ms": "inference, ms",
    "inference_ratio": "ratio",
    "activation_mib": "held, MiB",
    "peak_mib": "peak, MiB",
}


def workloads(
    providers: Sequence[str],
    tokens: int,
    batch: int,
    causal: bool,
    heads: int = HEADS,
    dtype: str = "float32",
) -> dict[str, Workload]:
    """Training and inference over (batch, heads, tokens, head_dim) tensors, by provider."""
    torch.manual_seed(0)
    shape = (batch, heads, tokens, HEAD_DIM)
    kind = getattr(torch, dtype)
    inputs = [torch.randn(shape).to(kind).requires_grad_() for _ in range(3)]
    upstream = torch.randn(shape).to(kind)
    made = {}
    for name in providers:
        torch.manual_seed(0)  # the same MultiMax everywhere
        attend, parameters = _build(name, causal)

        def forward(_: Any, attend: Callable[..., Tensor] = attend) -> Tensor:
            return attend(*inputs)

        def infer(_: Any, attend: Callable[..., Tensor] = attend) -> Tensor:
            with torch.no_grad():
                return attend(*inputs)

        def backward(out: Tensor) -> None:
            out.backward(upstream)

        phases = {"forward": forward, "backward": backward, INFERENCE: infer}
        made[name] = Workload(phases, [*inputs, upstream, *parameters])
    return made


def _build(name: str, causal: bool) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """`(query, key, value) -> out`, and its parameters."""
    if name == "SDPA":
        return partial(F.scaled_dot_product_attention, is_causal=causal), []
    kind = "softmax" if name.startswith("SoftMax") else "multimax"
    steps = name.removesuffix(", eager").partition(" + ")[2]
    normalizer = build_normalizer(kind, **STEPS[steps])
    parameters: list[Tensor] = list(normalizer.parameters())
    if "official" in name:
        function = script(official_attention) if name.endswith("Script") else official_attention
        ts, ranges = parameters
        return lambda q, k, v: function(q, k, v, ts, ranges, causal), parameters
    backend = "eager" if name.endswith("eager") else "auto"
    return partial(attention, normalizer=normalizer, causal=causal, backend=backend), parameters


def batch_size(tokens: int) -> int:
    """Sequences of a batch: about as many scores for every length, and at least one sequence."""
    return max(1, SCORES // (HEADS * tokens**2))


def measure_steps(
    batch: int, heads: int, tokens: int, causal: bool, rounds: int, seconds: float
) -> list[Row]:
    """A row for each kind and each of `STEPS`: median times of a training step, without inference.

    `plain_ratio` is to the kernel without steps, `eager_ratio` to the same in torch operations.
    """
    forms = itertools.product(("SoftMax", "MultiMax"), STEPS, ("", ", eager"))
    names = [f"{kind} + {steps}".removesuffix(" + ") + how for kind, steps, how in forms]
    made = workloads(names, tokens, batch, causal, heads)
    for name, workload in made.items():
        training = {phase: workload.phases[phase] for phase in ("forward", "backward")}
        made[name] = Workload(training, workload.leaves)
    found = {name: quantiles(times) for name, times in time_phases(made, rounds, seconds).items()}
    shape = {"batch": batch, "heads": heads, "tokens": tokens, "causal": causal}
    rows = []
    for name in names:
        step, plain = found[name]["step_ms"], found[name.split(" + ")[0].split(",")[0]]["step_ms"]
        ratios = {"plain_ratio": step / plain}
        if not name.endswith("eager"):
            ratios["eager_ratio"] = step / found[f"{name}, eager"]["step_ms"]
        rows.append({**shape, "provider": name, **found[name], **ratios})
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    """Time as multiple of the baseline's and memory of one sequence, over the tokens."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    panels = {
        "step_ratio": "training: forward + backward",
        "inference_ratio": "inference",
        "activation_mib": "memory held between forward and backward",
        "peak_mib": "peak growth of the process in training",
    }
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        draw_lines(axes, rows, "tokens", partial(_value, key))
        unit = (
            "MiB per sequence"
            if key.endswith("mib")
            else f"time, multiple of {rows[0]['provider']}"
        )
        axes.set(title=title, xlabel="tokens", ylabel=unit)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    return figure


def _value(key: str, row: Row) -> float | None:
    """As measured, but the memory of one sequence."""
    return row[key] / row["batch"] if key.endswith("mib") and key in row else row.get(key)


def main(command: Sequence[str] | None = None) -> None:
    """Measure, print and write `attention.csv` and its figure."""
    parser = arguments_of(__doc__, PROVIDERS, rounds=25)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", action="store_true", help="of SoftMax and MultiMax alone")
    arguments = parser.parse_args(command)
    causal, dtype, rows = arguments.causal, arguments.dtype, []
    if arguments.steps:
        return _compare_steps(arguments)
    shared = {"causal": causal, "dtype": dtype}
    name = "attention_bf16" if dtype == "bfloat16" else "attention"
    name = f"{name}_causal" if causal else name
    for tokens in arguments.tokens:
        warmup = {"tokens": 4, "batch": 1, **shared}
        options = {"tokens": tokens, "batch": batch_size(tokens), **shared}
        measured = measure(workloads, options, warmup, arguments)
        title = (
            f"{options['batch']} x {HEADS} heads x {tokens} tokens x {HEAD_DIM}, causal={causal}"
        )
        print_table(f"{title}, {dtype}, {arguments.threads} thread(s)", measured, COLUMNS)
        rows += measured
        finish(name, rows, arguments.threads, arguments.results, draw, dtype)


def _compare_steps(arguments: argparse.Namespace) -> None:
    causal, rows = arguments.causal, []
    name = "attention_steps_causal" if causal else "attention_steps"
    path = arguments.results / "benchmarks" / f"{name}.csv"
    torch.set_num_threads(arguments.threads)
    for shape in STEP_SHAPES:
        measured = measure_steps(*shape, causal, arguments.rounds, arguments.seconds)
        title = "{} x {} heads x {} tokens x {}, causal={}".format(*shape, HEAD_DIM, causal)
        print_table(f"{title}, fp32, {arguments.threads} thread(s)", measured, STEP_COLUMNS)
        rows += measured
        write_csv(path, rows, context(arguments.threads))
    print(path)


if __name__ == "__main__":
    main()
