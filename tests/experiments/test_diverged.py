"""Runs that diverged are found in the record of their sweep, and recorded without figures."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from experiments.diverged import SAID, collect_diverged
from experiments.results import collect, load
from experiments.selection import run_of, settings_of
from multimax.tasks.base import check_finite
from multimax.training.non_finite import describe_non_finite
from multimax.training.sweep import Job

SETTINGS = ["task=retrieval", "name=retrieval", "attention=softpick", "logger.wandb=disabled"]
NAN = "the loss is nan at update 3; first non-finite: parameter query"


def swept(folder, *jobs):
    """The record of a sweep of jobs (settings, state, said)."""
    lines = [
        json.dumps(asdict(Job([*SETTINGS, f"output_dir={folder}", *own], state, said, None)))
        for own, state, said in jobs
    ]
    (folder / "sweeps" / "today").mkdir(parents=True)
    (folder / "sweeps" / "today" / "jobs.jsonl").write_text("\n".join(lines) + "\n")


def test_only_what_diverged_is_recorded(tmp_path):
    outputs, target = tmp_path / "outputs", tmp_path / "runs"
    swept(
        outputs,
        (["seed=0"], "failed", NAN),
        (["seed=1"], "failed", "optimizer.lr=-1 must be positive"),
        (["seed=2"], "interrupted", ""),
        (["seed=3"], "finished", "test mse 0.1"),
        (["seed=4", "tags=[retrieval,tuning]"], "failed", NAN),
        (["seed=0"], "failed", NAN),  # the sweep was repeated
    )
    (written,) = collect_diverged([outputs], target)
    assert load(target)[written]["diverged"] == NAN
    run = run_of(load(target)[written])
    assert (run.seed, run.diverged, run.figures) == (0, True, {})
    assert run.settings == settings_of(*SETTINGS)


def test_a_run_that_has_a_result_after_all_is_no_failure(tmp_path):
    outputs, target = tmp_path / "outputs", tmp_path / "runs"
    swept(outputs, (["seed=0"], "failed", NAN))
    (path,) = collect_diverged([outputs], target)
    run = outputs / "small" / "retrieval" / path.stem
    run.mkdir(parents=True)
    result = load(target)[path]
    (run / "result.json").write_text(json.dumps({k: result[k] for k in result if k != "diverged"}))
    assert collect([outputs], target) == [path]
    assert collect_diverged([outputs], target) == []
    assert not run_of(load(target)[path]).diverged


def test_it_is_what_training_says():
    broken = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(broken.weight, math.nan)
    for loss in (math.nan, math.inf):
        assert SAID.match(describe_non_finite(SimpleNamespace(model=broken), [], 2, loss))
        with pytest.raises(FloatingPointError, match=SAID):
            check_finite("valid", loss)


def test_a_damaged_record_is_named(tmp_path):
    swept(tmp_path, (["seed=0"], "failed", NAN))
    (tmp_path / "sweeps" / "today" / "jobs.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"jobs\.jsonl is damaged"):
        collect_diverged([tmp_path], tmp_path / "runs")
