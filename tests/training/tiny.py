"""Small configurations, and a task of a few numbers, for the tests of training."""

import copy
import json
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hydra import compose, initialize_config_dir
from rich.console import Console
from torch import nn

from multimax import MultiMax
from multimax.files import load_checkpoint
from multimax.options import validate
from multimax.recording import NormalizerRecorder
from multimax.tasks.base import Task
from multimax.training.config import read_config
from multimax.training.run import run
from multimax.training.sections import ScheduleSection
from multimax.training.trainer import InterruptedRunError, Trainer

ROOT = Path(__file__).parents[2]
PLAIN = (
    "model.depth=1",
    "model.embed_dim=16",
    "model.num_heads=2",
    "data.crop_padding=0",
    "data.horizontal_flip=0",
    "data.random_erasing=0",
    "loss.label_smoothing=0",
    "trainer.epochs=null",
    "trainer.updates=4",
    "trainer.batch_size=20",
    "trainer.eval_batch_size=1000",
    "trainer.evaluate_every=2",
    "trainer.log_every=1",
    "schedule.warmup=1",
    "logger.wandb=disabled",
)


def tiny_overrides(folder, *overrides):
    """A command line that trains for a second: two heads, one block, no augmentation."""
    return ["experiment=deit_multimax", *PLAIN, f"output_dir={folder}", *overrides]


def tiny_config(folder, *overrides):
    config = copy.deepcopy(_composed(*tiny_overrides("", *overrides)))
    config.output_dir = str(folder)
    return config


@cache
def _composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def run_quietly(config):
    with open("/dev/null", "w") as nowhere:
        return run(config, Console(file=nowhere))


def only(folder, name):
    """The one file of this name below a folder."""
    (path,) = (p for p in Path(folder).rglob(name) if "previous-" not in str(p))
    return path


def history(folder):
    """What a run logged, without what depends on the clock."""
    entries = [json.loads(line) for line in only(folder, "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        entry.pop("train/rate", None)
    return entries


def state(folder):
    """What a run saved, without what depends on the clock."""
    checkpoint = load_checkpoint(only(folder, "last.pt"))
    checkpoint["position"].pop("seconds")
    return checkpoint


def outcome(folder):
    """What a run resulted in, without what depends on the clock or the folder."""
    result = json.loads(only(folder, "result.json").read_text())
    keys = ("metrics", "best", "normalizers", "learned_scalars", "updates", "parameters", "seed")
    return {key: result[key] for key in keys}


def assert_same(got, expected, place="state"):
    """Equality bit for bit of nested dicts, sequences and tensors."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), place
    elif isinstance(expected, dict):
        assert list(got) == list(expected), place
        for key, value in expected.items():
            assert_same(got[key], value, f"{place}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), place
        for i, pair in enumerate(zip(got, expected, strict=True)):
            assert_same(*pair, f"{place}[{i}]")
    else:
        assert got == expected, place


def schedule(options):
    """`config.schedule` from plain options, or as it is."""
    if isinstance(options, ScheduleSection):
        return options
    return validate(ScheduleSection, options, "schedule.")


class Batches:
    """A train loader over given batches, the same ones in each epoch."""

    def __init__(self, batches):
        self.given = batches

    def __len__(self):
        return len(self.given)

    def batches(self, epoch, start=0):
        return iter(self.given[start:])


class Regression(Task):
    """Fits a line through a MultiMax layer; the batches can differ in size."""

    unit = "rows"
    monitor = "valid/loss"
    higher_is_better = False

    def __init__(self, sizes, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(sum(sizes), 3, generator=generator, dtype=dtype)
        y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=dtype)
        self.train_loader = Batches(list(zip(x.split(sizes), y.split(sizes), strict=True)))
        self.data, self.splits = (x, y), {"valid": len(x)}
        torch.manual_seed(2)
        self.model = nn.Sequential(nn.Linear(3, 4), MultiMax(), nn.Linear(4, 1)).to(dtype)

    @classmethod
    def model_options(cls, config, source):
        raise NotImplementedError("its model is made here")

    def describe(self):
        return {}

    def weight(self, batch):
        return len(batch[0])

    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean()

    def evaluate(self, model, split, reduce):
        return {"loss": self.loss(model, self.data).item()}

    def inspect(self, model):
        with NormalizerRecorder(model) as recorder:
            model(self.data[0])
        return recorder.summary()


class Recorder:
    """A logger that keeps what it is told."""

    def __init__(self):
        self.entries = []

    def resume(self, update, evaluated=True):
        self.entries = [entry for entry in self.entries if entry[0] <= update]

    def log(self, update, metrics):
        self.entries.append((update, metrics))

    def finish(self, summary):
        pass

    def series(self, name):
        return [metrics[name] for _, metrics in self.entries if name in metrics]


def build_trainer(folder, task, *overrides, precision="no"):
    """A trainer with a recorder as its only logger."""
    config = read_config(tiny_config(folder, *overrides))
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    return Trainer(task, config, folder, accelerator, [Recorder()], None)


def interrupted(config, monkeypatch, update):
    """Stop a run after an update, with its state on disk."""
    real = Trainer._update

    def update_and_stop(self, group):
        if self.position.update + 1 == update:
            self._stop.received.add(signal.SIGTERM)
        return real(self, group)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "_update", update_and_stop)
        with pytest.raises(InterruptedRunError, match=f"after update {update}$"):
            run_quietly(config)
