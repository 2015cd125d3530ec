"""The trainer's own cost: its updates next to a bare loop of PyTorch, in turn in one process.

python -m benchmarks.trainer
python -m benchmarks.trainer --experiments lm_multimax --updates 50

Both have the same model, batches and optimizer at small scale. The bare loop takes a batch, makes
the loss and the gradients, clips them where the recipe does, and steps; it logs and checks nothing.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

from benchmarks.report import Row, context, print_table, write_csv
from benchmarks.timing import settle_allocator
from multimax.tasks import build_task
from multimax.training.config import Config, read_config
from multimax.training.evaluation import build_accelerator
from multimax.training.loggers import METRICS, JsonLinesLogger, ProgressDisplay
from multimax.training.optimization import build_optimizer
from multimax.training.random_state import seed_everything
from multimax.training.trainer import Trainer

EXPERIMENTS = ("deit_multimax", "lm_multimax", "mt_multimax")
COLUMNS = {
    "experiment": "experiment",
    "bare_ms": "bare loop, ms",
    "trainer_ms": "trainer, ms",
    "ratio": "ratio",
    "ratio_p20": "p20",
    "ratio_p80": "p80",
    "rounds": "rounds",
}


def config_of(*overrides: str) -> Config:
    """The configuration of a command line of `train.py`."""
    configs = str(Path(__file__).parents[1] / "configs")
    with initialize_config_dir(configs, version_base="1.3"):
        return read_config(compose("config", overrides=list(overrides)))


class Bare:
    """A loop that does nothing but train."""

    def __init__(self, config: Config) -> None:
        self.task = build_task(config, 0, 1, torch.device("cpu"))
        self.optimizer = build_optimizer(self.task.model, config.optimizer)
        self.clip_norm = config.trainer.clip_norm

    def train(self, updates: int, epoch: int) -> None:
        """So many updates from the beginning of an epoch."""
        seed_everything(0, epoch, 0)
        task, parameters = self.task, list(self.task.model.parameters())
        task.model.train()
        for batch in islice(task.train_loader.batches(epoch, 0), updates):
            self.optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
            self.optimizer.step()


class Ours:
    """The trainer with its files and its display, without evaluations and checkpoints."""

    def __init__(self, config: Config, folder: Path) -> None:
        task = build_task(config, 0, 1, torch.device("cpu"))
        display = ProgressDisplay(Console(file=(folder / "shown").open("w")), task.unit)
        loggers = [JsonLinesLogger(folder / METRICS)]
        accelerator = build_accelerator(config)
        self.trainer = Trainer(task, config, folder, accelerator, list(loggers), display)

    def train(self, updates: int, epoch: int) -> None:
        """So many updates from the beginning of an epoch."""
        position = self.trainer.position
        position.epoch, position.epoch_update = epoch, 0
        self.trainer._run_epoch(position.update + updates)


def measure(experiment: str, updates: int, rounds: int) -> Row:
    """Medians of one update, and of the ratio of the rounds."""
    length = ("trainer.epochs=null", "trainer.updates=1000000", "trainer.evaluate_every=1000000")
    config = config_of(f"experiment={experiment}", "logger.wandb=disabled", *length)
    seconds: dict[str, list[float]] = {"bare": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        loops = {"bare": Bare(config), "trainer": Ours(config, Path(folder))}
        for epoch in range(rounds + 1):
            for name in list(loops)[:: 1 if epoch % 2 else -1]:
                started = time.perf_counter()
                loops[name].train(updates, epoch)
                if epoch:  # the first round warms up
                    seconds[name].append((time.perf_counter() - started) / updates)
    ratios = np.divide(seconds["trainer"], seconds["bare"])
    low, middle, high = np.quantile(ratios, [0.2, 0.5, 0.8])
    return {
        "experiment": experiment,
        **{f"{name}_ms": 1000 * float(np.median(times)) for name, times in seconds.items()},
        **{"ratio": float(middle), "ratio_p20": float(low), "ratio_p80": float(high)},
        "rounds": rounds,
        "updates": updates,
    }


def main(command: Sequence[str] | None = None) -> None:
    """Measure, print and write `trainer.csv`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--updates", type=int, default=25, help="in a round, of each loop")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder to write to")
    arguments = parser.parse_args(command)
    torch.set_num_threads(arguments.threads)
    settle_allocator()
    path = arguments.results / "benchmarks" / "trainer.csv"
    rows: list[Row] = []
    for experiment in arguments.experiments:
        rows.append(measure(experiment, arguments.updates, arguments.rounds))
        write_csv(path, rows, context(arguments.threads))
    print_table("An update of the trainer next to a bare loop", rows, COLUMNS)
    print(path)


if __name__ == "__main__":
    main()
