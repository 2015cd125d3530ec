"""`trainer.dry_run`: full-size updates without data, measured, with nothing written."""

import math
from pathlib import Path

import pytest
from accelerate import PartialState
from rich.console import Console
from tiny import tiny_config
from tiny_runs import LM, MT
from two_processes import in_two_processes, needs_fork

from experiments.selection import config_of
from multimax.training import dry_run
from multimax.training.config import config_hash, read_config
from multimax.training.run import run
from multimax.training.sweep import main_metric

# No data is there: none of these has a data.root.
DEIT = (
    "experiment=deit_multimax", "scale=paper", "trainer.precision=no", "model.depth=1",
    "model.embed_dim=16", "model.num_heads=2", "model.patch_size=16", "data.image_size=32",
    "trainer.batch_size=8", "trainer.eval_batch_size=6", "trainer.accumulation=2",
)  # fmt: skip
WORDS = (
    "experiment=lm_multimax", "scale=paper", "trainer.precision=no", "model.depth=1",
    "model.embed_dim=8", "model.ffn_dim=8", "model.num_heads=2", "data.block_size=64",
    "data.context_window=60", "trainer.batch_size=4", "trainer.eval_batch_size=1",
)  # fmt: skip
RETRIEVAL = "experiment=retrieval_multimax", "trainer.batch_size=4", "trainer.eval_batch_size=50"
CASES = {
    "deit": (DEIT, 8, 300 * (1_281_167 // 8)),
    "words": ((*WORDS, "trainer.accumulation=4"), 4 * 64, 50_000),
    "text": (LM, 4 * 16, 2),
    "pairs": (MT, None, 2),
    "retrieval": (RETRIEVAL, 4, 1000),
}


def dry(*settings):
    """What a dry run reports, and what it prints."""
    config = config_of(*settings, "trainer.dry_run=true", "logger.wandb=disabled")
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    return run(config, console), console.export_text()


@pytest.mark.parametrize("name", CASES)
def test_two_updates_are_measured_without_data_and_nothing_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, units, updates = CASES[name]
    settings = [s for s in settings if not s.startswith("data.root")]
    report, said = dry(*settings, *(["data.root=nowhere"] if name == "text" else []))
    assert len(report["seconds_per_update"]) == 2
    assert all(0 < seconds < 60 for seconds in report["seconds_per_update"])
    last = report["seconds_per_update"][1]
    assert report["updates"] == updates
    assert report["training_seconds"] == pytest.approx(last * updates)
    if units:
        assert report["units_per_update"] == units
    else:  # tokens of the target in a batch of up to 256, with padding
        assert 100 < report["units_per_update"] <= 256
    assert report["units_per_second"] == pytest.approx(report["units_per_update"] / last)
    assert report["evaluation_seconds"] > 0
    assert report["peak_memory_mib"]["host"] > 50
    assert f"{updates:,} updates take about" in said
    assert list(Path().iterdir()) == []
    assert main_metric(report).startswith("about ")


def test_the_updates_are_those_of_the_configuration(monkeypatch):
    groups, averaged = [], []

    class Trainer(dry_run.Trainer):
        def _update(self, group):
            groups.append([tuple(images.shape) for images, _ in group])
            metrics = super()._update(group)
            averaged.append(self.ema is not None)
            assert math.isfinite(metrics["train/loss"])
            return metrics

        def evaluate(self, split):
            metrics = super().evaluate(split)
            assert (split, self.task.splits[split]) == ("valid", 6)
            assert "ema_loss" in metrics
            return metrics

    monkeypatch.setattr(dry_run, "Trainer", Trainer)
    dry(*DEIT)
    assert groups == 2 * [2 * [(4, 3, 32, 32)]]
    assert averaged == [True, True]


@needs_fork
def test_two_processes_share_the_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work():
        PartialState._reset_state()  # of an earlier test, in one process
        return dry(*DEIT)

    first, second = in_two_processes(work)
    assert first[0] == second[0]  # the largest of both
    assert first[0]["units_per_update"] == 8
    assert "2 x cpu" in first[1]
    assert second[1] == ""


def test_it_is_no_part_of_the_hash_and_half_precision_needs_a_gpu(tmp_path):
    config = tiny_config(tmp_path)
    assert config_hash(read_config(config)) == config_hash(
        read_config(tiny_config(tmp_path, "trainer.dry_run=true"))
    )
    with pytest.raises(ValueError, match="fp16 needs a CUDA device: use bf16 or no on a CPU"):
        dry("experiment=deit_softmax", "trainer.precision=fp16")
    with pytest.raises(ValueError, match=r"type trainer\.updates=|give the length"):
        dry("experiment=deit_softmax", "data=timm")
