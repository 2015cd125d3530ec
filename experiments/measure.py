"""What the attention of trained models receives and gives on the test split.

    python -m experiments.measure outputs/small/deit/RUN ...     # into results/scores

For every attention layer of a finished run: a sample of rows of scores before the normalizer, and
the histogram of the probabilities of all rows. Bootstraps draw whole examples, so that the sample
has many of them, and of each a single row for every layer, of a random head and a random query. The
same run gives the same file.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from experiments.results import without_place
from experiments.scores import EDGES, SCORES, LayerScores, Scores, load_scores, save_scores
from multimax.data.loading import derive_seed
from multimax.functional import hidden_entries, to_compute_precision
from multimax.normalizers import Normalizer
from multimax.recording import Normalization, Recorder
from multimax.tasks import build_task
from multimax.tasks.base import Task, inspected_split
from multimax.tasks.language_modeling import LanguageModeling
from multimax.tasks.translation import Translation
from multimax.training.config import Config
from multimax.training.trained import load_finished_run

__all__ = ["load_scores", "measure"]

SAMPLE_SEED = 0
MOST_EXAMPLES = 1024  # in the sample
MOST_SCORES = 90_000  # in the sample: a file has less than 400 kB
IMAGES_AT_ONCE = 50


class Batch(NamedTuple):
    """Some consecutive examples.

    Attributes:
        inputs: of the model; the first dimension of each is the examples.
        queries: (queries,) bool, the positions that count; None where all do.
    """

    inputs: tuple[Tensor, ...]
    queries: Tensor | None = None


class Examples(NamedTuple):
    """The evaluation examples of a task.

    Attributes:
        number: how many there are.
        batches: all of them, in order.
    """

    number: int
    batches: Iterator[Batch]


def _images(task: Task, split: str) -> Examples:
    batches = (
        Batch((part,))
        for images, _ in task.evaluation_batches(split)
        for part in images.split(IMAGES_AT_ONCE)
    )
    return Examples(task.splits[split], batches)


def _blocks(task: Task, split: str) -> Examples:
    """Blocks of text with their context; a query counts where its prediction does."""
    task = cast(LanguageModeling, task)
    padding, step = task.model.padding_index, task.data.block_size - task.data.context_window
    batches = (
        Batch((block,), target[0] != padding)
        for batch in task.evaluation_batches(split)
        for block, target in zip(batch.inputs.split(1), batch.targets.split(1), strict=True)
    )
    return Examples(-(-task.data.sizes[split] // step), batches)


def _sentences(task: Task, split: str) -> Examples:
    """Pairs of sentences, one at a time: what attends from padding would count too."""
    pairs = cast(Translation, task).data.splits[split]
    pair = (pairs.batch([index], task.device) for index in range(len(pairs)))
    return Examples(len(pairs), (Batch((b.source, b.target_in)) for b in pair))


EXAMPLES: dict[str, Callable[[Task, str], Examples]] = {
    "image_classification": _images,
    "language_modeling": _blocks,
    "translation": _sentences,
}


class AttentionRecorder(Recorder):
    """Watches the attention normalizers of a model while it evaluates batches.

    Args:
        model: all normalizers of its attention layers are recorded.
        sampled: indices of the examples of which a row is kept, the first `MOST_EXAMPLES` and as
            many as have `MOST_SCORES` allowed scores together.
    """

    def __init__(self, model: nn.Module, sampled: np.ndarray) -> None:
        super().__init__(model)
        self._modules = {name: of for name, of in self._modules.items() if "attn" in name}
        self._sampled = sampled[:MOST_EXAMPLES]
        self._layers = {name: _Layer(number) for number, name in enumerate(self._modules)}
        self._first, self._queries = 0, None

    def next_batch(self, first: int, queries: Tensor | None) -> None:
        """Say what comes: the index of its first example, and which queries count."""
        self._first, self._queries = first, queries

    def layers(self) -> dict[str, LayerScores]:
        """What was recorded, by module name."""
        sizes = [
            sum(int((layer.kept[example][1] > -torch.inf).sum()) for layer in self._layers.values())
            for example in self._sampled.tolist()
        ]
        number = max(1, np.count_nonzero(np.cumsum(sizes) <= MOST_SCORES))
        fitting = np.sort(self._sampled[:number])
        return {
            name: self._layers[name].result(module, fitting)
            for name, module in self._modules.items()
        }

    def record(self, name: str, seen: Normalization) -> None:
        assert seen.bias is None, "the models of the tasks have no attention bias"
        layer, hidden = self._layers[name], hidden_entries(seen.scores, seen.mask)
        queries = slice(None) if self._queries is None else self._queries
        x, p, hidden = (t[:, :, queries] for t in (seen.scores, seen.probabilities, hidden))
        layer.count(p, hidden)
        for index in range(len(x)):
            if self._first + index in self._sampled:
                rows = x[index].float().masked_fill(hidden[index], -torch.inf)
                layer.keep(self._first + index, rows)


class _Layer:
    """What is recorded of one layer."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.kept: dict[int, tuple[int, Tensor]] = {}  # head and row by example
        self.histogram = torch.zeros(len(EDGES) - 1, dtype=torch.int64)
        self.zeros, self.rows = 0, 0

    def count(self, probabilities: Tensor, hidden: Tensor) -> None:
        """Add (examples, heads, queries, keys) probabilities to the histogram."""
        self.rows += int((~hidden).any(-1).sum())
        p = to_compute_precision(probabilities[~hidden]).clamp_max(1.0)  # rounding exceeds it
        ends = torch.as_tensor(EDGES[1:], dtype=p.dtype, device=p.device)
        positive = p[p > 0]
        bins = torch.bucketize(positive, ends)
        self.histogram += bins.bincount(minlength=len(ends)).cpu()
        self.zeros += p.numel() - positive.numel()

    def keep(self, example: int, scores: Tensor) -> None:
        """Keep one row of (heads, queries, keys) scores."""
        generator = np.random.default_rng(derive_seed(SAMPLE_SEED, self.number, example))
        head, query = generator.integers(scores.shape[:2])
        self.kept[example] = int(head), scores[head, query].cpu()

    def result(self, module: Normalizer, examples: np.ndarray) -> LayerScores:
        """What was counted, and the rows of these examples, as arrays."""
        kept = [self.kept[example] for example in examples.tolist()]
        rows = [row for _, row in kept]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf)
        return LayerScores(
            padded.numpy(),
            examples.astype(np.int32),
            np.array([head for head, _ in kept], dtype=np.int32),
            self.histogram.numpy(),
            self.zeros,
            self.rows,
            {name: p.detach().flatten().tolist() for name, p in module.named_parameters()},
        )


def measure(folder: Path) -> Scores:
    """The attention scores of a finished run, with the weights that its result is of.

    Raises:
        FileNotFoundError, ValueError: as `load_task`.
    """
    config, task = load_task(folder)
    split = inspected_split(task.splits)
    examples = EXAMPLES[config.task.name](task, split)
    layers = _recorded(task.model, examples)
    return Scores(without_place(config.recorded()), split, examples.number, layers)


def load_task(folder: Path) -> tuple[Config, Task]:
    """The configuration and the task of a finished run, with the weights that its result is of.

    Raises:
        FileNotFoundError, ValueError: as `load_finished_run`.
    """
    run, _ = load_finished_run(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run.config, build_task(run.config, 0, 1, device, (run.source, run.model.to(device)))


def _recorded(model: nn.Module, examples: Examples) -> dict[str, LayerScores]:
    order = np.random.default_rng(derive_seed(SAMPLE_SEED)).permutation(examples.number)
    first = 0
    with AttentionRecorder(model, order) as recorder, torch.inference_mode():
        for inputs, queries in examples.batches:
            recorder.next_batch(first, queries)
            model(*inputs)
            first += len(inputs[0])
    if first != examples.number:
        raise RuntimeError(f"measured {first} of {examples.number} examples")
    return recorder.layers()


def file_of(folder: Path, scores: Scores, target: Path = SCORES) -> Path:
    """Where the scores of a run folder belong."""
    config = scores.config
    run = folder.resolve().name
    return target / f"{config['scale']['name']}_{config['name']}_{run}.npz"


def main() -> None:
    """Measure the runs that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    try:
        for folder in parser.parse_args().runs:
            scores = measure(folder)
            path = file_of(folder, scores)
            save_scores(path, scores)
            print(path, flush=True)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
