"""A training step with `multimax.monitor` against one without: time and memory, on the CPU.

python -m benchmarks.monitoring                   # a small vision transformer and language model
python -m benchmarks.monitoring --models vision

Steps whose pass is measured, and steps whose pass is only counted, are timed apart; the last column
is the mean of 99 counted and one measured, as `every=100` has them.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import Row, arguments_of, context, measure, print_table, write_csv
from benchmarks.timing import Workload
from multimax.models.transformer import LanguageModel
from multimax.models.vision import build_vision_transformer
from multimax.monitoring import monitor

# What the monitor does in each step, as `every`.
PROVIDERS = {"no monitor": None, "counted": 10**9, "measured": 1}
MODELS = ("vision", "language")
EVERY = 100
COLUMNS = {
    "model": "model",
    "provider": "step",
    "step_ms": "ms",
    "step_range": "p20 - p80",
    "step_ratio": "ratio",
    "activation_mib": "held, MiB",
    "peak_mib": "peak, MiB",
    "every_100_ratio": "every=100, ratio",
}


def vision() -> tuple[nn.Module, Callable[[], Tensor]]:
    """DeiT-tiny of four blocks and the loss of 8 random images of 112 x 112."""
    model = build_vision_transformer(
        "deit_tiny_patch16_224",
        attention={"name": "multimax"},
        output={"name": "softmax"},
        num_classes=10,
        image_size=112,
        depth=4,
    )
    images, target = torch.randn(8, 3, 112, 112), torch.randint(10, (8,))
    return model, lambda: F.cross_entropy(model(images), target)


def language() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A Transformer of four layers and its loss on 4 random texts of 128 words."""
    model = LanguageModel(
        vocabulary_size=1000,
        padding_index=0,
        embed_dim=128,
        ffn_dim=512,
        depth=4,
        num_heads=4,
        attention={"name": "multimax"},
        output={"name": "softmax"},
    )
    words = torch.randint(1, 1000, (4, 129))

    def loss() -> Tensor:
        return model.output.loss(model(words[:, :-1]), words[:, 1:])

    return model, loss


def workloads(providers: Sequence[str], model: str) -> dict[str, Workload]:
    """A training step by what the monitor does in it."""
    made = {}
    for name in providers:
        torch.manual_seed(0)
        module, loss = {"vision": vision, "language": language}[model]()
        module.train()
        if PROVIDERS[name] is not None:
            monitor(module, every=PROVIDERS[name], log=lambda values, step: None)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
        phases = {
            "forward": lambda _, loss=loss: loss(),
            "backward": lambda value: value.backward(),
            "optimizer": lambda _, optimizer=optimizer: optimizer.step(),
        }
        made[name] = Workload(phases, list(module.parameters()))
    return made


def with_mean(rows: Sequence[Row]) -> list[Row]:
    """Rows of one model, the last with the ratio of the mean step to that without a monitor."""
    none, counted, measured = (row["step_ms"] for row in rows)
    mean = ((EVERY - 1) * counted + measured) / EVERY
    return [*rows[:-1], rows[-1] | {"every_100_ratio": mean / none}]


def main(command: Sequence[str] | None = None) -> None:
    """Measure, print and write `monitoring.csv`."""
    parser = arguments_of(__doc__, list(PROVIDERS), rounds=101)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    arguments = parser.parse_args(command)
    arguments.providers = list(PROVIDERS)
    path = arguments.results / "benchmarks" / "monitoring.csv"
    rows: list[Row] = []
    for model in arguments.models:
        rows += with_mean(measure(workloads, {"model": model}, None, arguments))
        write_csv(path, rows, context(arguments.threads))
    print_table(f"Training step, fp32, {arguments.threads} thread(s)", rows, COLUMNS)
    print(path)


if __name__ == "__main__":
    main()
