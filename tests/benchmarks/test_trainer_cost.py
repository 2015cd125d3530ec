"""The benchmark of the trainer: both loops make the same updates."""

import pytest
import torch

from benchmarks import trainer
from benchmarks.trainer import config_of

pytestmark = pytest.mark.slow
SMALL = (
    "experiment=deit_multimax", "model.depth=1", "model.embed_dim=16", "model.num_heads=2",
    "data.crop_padding=0", "data.horizontal_flip=0", "data.random_erasing=0", "schedule.warmup=0",
    "loss.label_smoothing=0", "trainer.epochs=null", "trainer.updates=4", "trainer.batch_size=20",
    "trainer.evaluate_every=4", "logger.wandb=disabled",
)  # fmt: skip


def test_both_train_the_same_model(tmp_path, monkeypatch):
    config = config_of(*SMALL)
    torch.manual_seed(0)
    bare = trainer.Bare(config)
    torch.manual_seed(0)
    ours = trainer.Ours(config, tmp_path)
    monkeypatch.setattr(type(ours.trainer.learning_rate), "set", lambda *_: None)  # bare has none
    for loop in (bare, ours):
        loop.train(2, epoch=1)
    state = ours.trainer.task.model.state_dict()
    torch.testing.assert_close(bare.task.model.state_dict(), state, rtol=1e-5, atol=1e-6)


def test_the_command_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "config_of", lambda *_: config_of(*SMALL))
    options = ["--experiments", "deit_multimax", "--updates", "1", "--rounds", "2"]
    trainer.main([*options, "--results", str(tmp_path)])
    written = (tmp_path / "benchmarks" / "trainer.csv").read_text()
    assert written.startswith("experiment,bare_ms,trainer_ms,ratio")
    assert "deit_multimax" in capsys.readouterr().out
