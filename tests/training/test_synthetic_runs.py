"""Runs on drawn data: interrupted ones go on as if they had not been, over epochs too."""

import json

import pytest
from hydra import compose, initialize_config_dir
from tiny import ROOT, assert_same, history, interrupted, only, outcome, run_quietly, state

from multimax import evaluate
from multimax.hub import PublishedModel

SETTINGS = (
    "trainer.updates=8", "trainer.evaluate_every=3", "trainer.log_every=1", "trainer.batch_size=4",
    "trainer.accumulation=2", "schedule.warmup=1", "data.valid_size=60", "data.test_size=60",
    "logger.wandb=disabled",
)  # fmt: skip
OWN = {
    "retrieval_multimax": ("data.test_lengths=[64,80]",),
    "max_retrieval_multimax": ("data.test_lengths=[16,20]",),
    "recall_multimax": (
        "data.vocabulary_size=64", "data.settings=[[32,2],[48,3]]", "model.embed_dim=16",
        "model.dropout=0.1",
    ),
    "mqmtar_multimax": ("data.test_lengths=[64,80]", "model.embed_dim=16"),
    "sort_multimax": ("data.test_lengths=[16,20]", "model.embed_dim=16"),
}  # fmt: skip


def composed(experiment, folder):
    settings = [f"experiment={experiment}", *SETTINGS, *OWN[experiment], f"output_dir={folder}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", settings)


@pytest.mark.parametrize("experiment", OWN)
def test_interrupted_run_equals_an_undisturbed_one(tmp_path, monkeypatch, experiment):
    monkeypatch.setattr("multimax.data.synthetic.base.EPOCH", 6)  # 3 updates
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_quietly(composed(experiment, whole))
    for update in (2, 5):
        interrupted(composed(experiment, parts), monkeypatch, update)
    run_quietly(composed(experiment, parts))
    assert_same(state(parts), state(whole))
    assert history(parts) == history(whole)
    assert outcome(parts) == outcome(whole)


def test_a_run_is_evaluated_again_but_not_published(tmp_path):
    result = run_quietly(composed("retrieval_multimax", tmp_path))
    folder = only(tmp_path, "result.json").parent
    evaluate.main([str(folder), "--json", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["metrics"] == result["metrics"]
    assert again["data"] == again["trained_on"]
    with pytest.raises(ValueError, match="was trained for retrieval, a synthetic task: publish"):
        PublishedModel.from_run(folder)
