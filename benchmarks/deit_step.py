"""Time and memory of a training step of DeiT-small next to timm's own, which uses torch's SDPA.

python -m benchmarks.deit_step                         # 12 blocks, 224 px, batch 8
python -m benchmarks.deit_step --compile               # all models through torch.compile
python -m benchmarks.deit_step --depth 3 --batch 2
"""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.formulations import official_attention, script
from benchmarks.report import (
    BLUE,
    GREEN,
    SKY,
    YELLOW,
    Row,
    arguments_of,
    finish,
    measure,
    print_table,
)
from benchmarks.timing import Workload
from multimax.kernels.backend import use_backend
from multimax.losses import output_loss
from multimax.models.vision import NormalizedAttention, build_vision_transformer

ARCHITECTURE = "deit_small_patch16_224"
CLASSES = 1000
PROVIDERS = (
    "timm",
    "SoftMax",
    "MultiMax",
    "MultiMax, also in the output",
    "MultiMax, eager",
    "MultiMax, official",
    "MultiMax, official, TorchScript",
)
PARTS = {"forward": SKY, "backward": BLUE, "optimizer": YELLOW}
COLUMNS = {
    "provider": "provider",
    "forward_ms": "forward, ms",
    "backward_ms": "backward, ms",
    "optimizer_ms": "AdamW, ms",
    "step_ms": "step, ms",
    "step_range": "p20 - p80",
    "step_ratio": "ratio",
    "activation_mib": "held, MiB",
    "peak_mib": "peak, MiB",
}


class OfficialAttention(NormalizedAttention):
    """timm's self-attention with MultiMax as the official code computes it."""

    normalizer_options = {"name": "multimax"}  # noqa: RUF012
    attend: Callable[..., Tensor] = staticmethod(official_attention)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        ts, ranges = self.normalizer.ts, self.normalizer.ranges
        heads = self.attend(query, key, value, ts, ranges, is_causal)
        return self.proj(heads.transpose(1, 2).flatten(2))


def build(name: str, image_size: int, depth: int) -> nn.Module:
    """The model of a provider; all start from the same weights."""
    torch.manual_seed(0)
    if name in ("SoftMax", "MultiMax", "MultiMax, also in the output", "MultiMax, eager"):
        return build_vision_transformer(
            ARCHITECTURE,
            attention={"name": "softmax" if name == "SoftMax" else "multimax"},
            output={"name": "multimax" if name.endswith("output") else "softmax"},
            num_classes=CLASSES,
            image_size=image_size,
            depth=depth,
        )
    options: dict[str, Any] = {}
    if name.startswith("MultiMax, official"):
        scripted = {"attend": staticmethod(script(official_attention))}
        bound = scripted if name.endswith("Script") else {}
        options["attn_layer"] = type("Attention", (OfficialAttention,), bound)
    return timm.create_model(  # as `build_vision_transformer` does
        ARCHITECTURE,
        num_classes=CLASSES,
        img_size=image_size,
        depth=depth,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        qkv_bias=False,
        **options,
    )


def workloads(
    providers: Sequence[str], batch: int, image_size: int, depth: int, compiled: bool
) -> dict[str, Workload]:
    """A training step on random images, by provider."""
    torch.manual_seed(1)
    images = torch.randn(batch, 3, image_size, image_size)
    target = torch.randint(CLASSES, (batch,))
    made = {}
    for name in providers:
        model = build(name, image_size, depth).train()
        parameters = list(model.parameters())
        loss = _loss(model, torch.compile(model) if compiled else model, images, target)
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05)
        backend = "eager" if name.endswith("eager") else "auto"
        phases = {
            "forward": _with_backend(backend, loss),
            "backward": lambda value: value.backward(),
            "optimizer": lambda _, optimizer=optimizer: optimizer.step(),
        }
        made[name] = Workload(phases, [*parameters, images, target])
    return made


def _loss(
    model: nn.Module, call: Callable[..., Tensor], images: Tensor, target: Tensor
) -> Callable[[], Tensor]:
    output = getattr(model, "output", None)
    if isinstance(output, nn.Module):
        return lambda: output_loss(output, call(images), target)  # pyright: ignore
    return lambda: F.cross_entropy(call(images), target)


def _with_backend(name: str, loss: Callable[[], Tensor]) -> Callable[[Any], Tensor]:
    def forward(_: Any) -> Tensor:
        with use_backend(name):
            return loss()

    return forward


def draw(rows: Sequence[Row]) -> Figure:
    """Seconds of the parts of a step, one after the other, and memory."""
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(rows)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = [row for row in rows if row["rounds"]]
    names = [row["provider"] for row in rows]
    left, bars = [0.0] * len(rows), BarContainer([])
    for part, color in PARTS.items():
        seconds = [row[f"{part}_ms"] / 1e3 for row in rows]
        bars = time.barh(names, seconds, left=left, label=part, color=color)
        left = [start + value for start, value in zip(left, seconds, strict=True)]
    time.bar_label(bars, [f"x {row['step_ratio']:.2f}" for row in rows], padding=3, fontsize=9)
    time.set(title=f"training step (multiple of {names[0]})", xlabel="seconds")
    held = memory.barh(names, [row["activation_mib"] for row in rows], color=GREEN)
    memory.bar_label(held, fmt="{:,.0f}", padding=3, fontsize=9)
    memory.set(title="memory held for backward", xlabel="MiB")
    time.invert_yaxis()
    for axes in (time, memory):
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main(command: Sequence[str] | None = None) -> None:
    """Measure, print and write `deit_step.csv` and its figure."""
    parser = arguments_of(__doc__, PROVIDERS, rounds=11)
    parser.set_defaults(seconds=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    parser.add_argument("--compile", action="store_true", help="all but TorchScript")
    arguments = parser.parse_args(command)
    if arguments.compile:
        arguments.providers = [n for n in arguments.providers if not n.endswith("TorchScript")]
    options = {key: getattr(arguments, key) for key in ("batch", "image_size", "depth")}
    options["compiled"] = arguments.compile
    rows = measure(workloads, options, None, arguments)
    shape = ", ".join(f"{key}={value}" for key, value in options.items())
    print_table(f"DeiT-small, {shape}, fp32, {arguments.threads} thread(s)", rows, COLUMNS)
    name = "deit_step_compiled" if arguments.compile else "deit_step"
    finish(name, rows, arguments.threads, arguments.results, draw)


if __name__ == "__main__":
    main()
