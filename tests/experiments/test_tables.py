import copy
import csv
import functools
import io
import json
import math
import statistics
import sys

import pytest
from hydra import compose, initialize_config_dir

from experiments import modulators, normalizers
from experiments.results import collect, paired_difference, upgrade
from experiments.selection import CONFIGS
from experiments.tables import TABLES, main
from multimax.training.config import read_config

ROOT = CONFIGS.parent


@functools.cache
def composed(*overrides):
    """A configuration as a run records it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return read_config(compose("config", overrides=list(overrides))).recorded()


def result(experiment="deit_softmax", seed=0, top1=80.0, split="test", overrides=()):
    config = composed(f"experiment={experiment}", *overrides)
    return {
        "schema": 2,
        "experiment": experiment,
        "task": config["task"]["name"],
        "scale": "small",
        "seed": seed,
        "config_hash": "aaaa",
        "config": config,
        "metrics": {split: {"top1": top1, "examples": 2000}},
        "training_seconds": 90.0,
        "learned_scalars": {"output.ts": [0.1] * 4, "output.ranges": [0.0] * 4},
    }


def store(folder, results):
    folder.mkdir(exist_ok=True)
    for number, entry in enumerate(results, len(list(folder.iterdir()))):
        (folder / f"any_name_{number}.json").write_text(json.dumps(entry))


def rows(name, source, **options):
    table, caption, notes = TABLES[name].rows("small", source, **options)
    return {row["attention"]: row for row in table}, caption, notes


def test_table_has_means_spread_and_paired_differences_and_empty_cells(tmp_path):
    softmax, multimax = [80.0, 82.0, 81.0], [81.0, 82.5, 82.5]
    store(tmp_path, [result(seed=s, top1=v) for s, v in enumerate(softmax)])
    store(tmp_path, [result("deit_multimax", s, v) for s, v in enumerate(multimax)])
    by_name, caption, notes = rows("table1", tmp_path)
    assert by_name["SoftMax"]["top-1 %"] == "81.00"
    assert by_name["SoftMax"]["minus SoftMax"] == ""
    assert by_name["MultiMax"]["top-1 %"] == "82.00"
    assert by_name["MultiMax"]["sd"] == f"{statistics.stdev(multimax):.2f}"
    assert by_name["MultiMax"]["minus SoftMax"] == "+1.00"
    half = 4.302653 * statistics.stdev([1.0, 0.5, 1.5]) / math.sqrt(3)  # t, 2 degrees of freedom
    assert by_name["MultiMax"]["95 % CI"] == f"±{half:.2f}"
    assert set(by_name["sparsemax"].values()) == {"sparsemax", ""}
    assert "2,000" in caption
    assert notes == []


def test_a_second_metric_has_its_mean_and_may_be_missing(tmp_path):
    runs = [result("lm_softmax", seed) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        run["metrics"]["test"] |= {"perplexity": 100.0 + seed, "bits_per_byte": 2.0 + seed}
    sparse = result("lm_sparsemax")
    sparse["metrics"]["test"]["smoothed_perplexity"] = 120.0
    store(tmp_path, [*runs, sparse])
    by_name, _, _ = rows("table2", tmp_path)
    softmax = by_name["SoftMax"]
    metrics = (softmax["perplexity"], softmax["sd"], softmax["bits per byte"])
    assert metrics == ("100.500", "0.707", "2.500")
    assert (by_name["sparsemax"]["seeds"], by_name["sparsemax"]["perplexity"]) == ("1", "")


def test_a_row_has_the_runs_of_its_configuration_whatever_their_name(tmp_path):
    """A sweep of temperatures is below one name; a run can have any name and folder."""
    sweep = [
        result(seed=s, top1=50.0 + t, overrides=(f"attention.temperature={t}",))
        for s in (0, 1) for t in (0.5, 2, 1)
    ]  # fmt: skip
    renamed = result("deit_multimax", seed=0, top1=70.0)
    renamed["experiment"] = "mine"
    renamed["config"] = renamed["config"] | {"name": "mine", "tags": ["a"], "output_dir": "/b"}
    other_rate = result(seed=2, top1=99.0, overrides=("optimizer.lr=2e-3", "trainer.log_every=7"))
    store(tmp_path, [*sweep, renamed, other_rate])
    by_name, _, notes = rows("table1", tmp_path)
    assert (by_name["SoftMax"]["seeds"], by_name["SoftMax"]["top-1 %"]) == ("2", "51.00")
    assert by_name["MultiMax"]["top-1 %"] == "70.00"
    assert notes == ["deit_softmax: runs with other settings are left out (optimizer.lr)"]
    by_name, _, notes = rows("table1", tmp_path, overrides=("optimizer.lr=0.002",))
    assert (by_name["SoftMax"]["seeds"], by_name["SoftMax"]["top-1 %"]) == ("1", "99.00")
    assert len(notes) == 2


def test_results_of_schema_1_are_those_of_schema_2(tmp_path):
    new = result("mt_softmax") | {"best": {"metric": "valid/bleu", "value": 1.0, "update": 5}}
    old = copy.deepcopy(new) | {"schema": 1}
    del old["config"]["model"]["name"]
    old["best"]["figure"] = old["best"].pop("metric")
    assert upgrade(old) == new == upgrade(new)


def test_a_seed_twice_is_refused(tmp_path):
    store(tmp_path, [result(), result(top1=81.0)])
    with pytest.raises(ValueError, match="seed 0 is recorded twice for deit_softmax"):
        rows("table1", tmp_path)


def test_the_committed_tables_are_those_of_the_committed_runs():
    for name, table in TABLES.items():
        lines, caption, _ = table.rows("small", ROOT / "results" / "runs")
        for suffix, text in table.files(lines, caption).items():
            file = ROOT / "results" / "tables" / f"{name}_small{suffix}"
            assert file.read_text() == text, f"{file} is stale: python -m experiments.tables {name}"
        assert any(line["seeds"] for line in lines)


def test_the_command_names_what_there_is(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables", "table9"])
    with pytest.raises(SystemExit, match="unknown table 'table9'; known: table1, table2, table3"):
        main()


def test_pairs_are_made_by_seed():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0}) is None
    difference = paired_difference({2: 5.0, 0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5, 7: 100.0})
    assert difference == (0.5, 0.0)
    # Neither in the order of the seeds, nor in that of the values, nor as if they were no pairs.
    mean, half = paired_difference({1: 4.0, 0: 1.0, 2: 2.0}, {2: 0.0, 0: 3.0, 1: 1.0, 5: 9.0})
    assert mean == pytest.approx(1.0)
    spread = math.sqrt(((-2 - 1) ** 2 + (3 - 1) ** 2 + (2 - 1) ** 2) / 2)
    assert half == pytest.approx(4.302653 * spread / math.sqrt(3))  # t, 2 degrees of freedom


def test_table_files_hold_the_same_cells(tmp_path):
    store(tmp_path, [result(seed=s, top1=80 + s) for s in range(2)])
    lines, caption, _ = TABLES["table1"].rows("small", tmp_path)
    files = TABLES["table1"].files(lines, caption)
    read = list(csv.DictReader(io.StringIO(files[".csv"])))
    assert (read[0]["attention"], read[0]["top-1 %"]) == ("SoftMax", "80.50")
    assert "| SoftMax | softmax | 80.50 |" in files[".md"]
    assert r"SoftMax & softmax & 80.50" in files[".tex"]


def test_collect_copies_finished_results_but_not_those_set_aside(tmp_path):
    folder = tmp_path / "outputs" / "run-seed0"
    (folder / "previous-1").mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result(top1=85.0)))
    (folder / "previous-1" / "result.json").write_text(json.dumps(result(top1=1.0)))
    (copied,) = collect([tmp_path / "outputs"], tmp_path / "runs")
    assert copied == tmp_path / "runs" / "small" / "deit_softmax" / "run-seed0.json"
    assert json.loads(copied.read_text())["metrics"]["test"]["top1"] == 85.0


@pytest.mark.slow
def test_figures_are_drawn(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result("deit_multimax")))
    lines = [{"update": 1, "train/loss": 2.0}, {"update": 2, "valid/loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert modulators.draw(tmp_path).read_bytes().startswith(b"\x89PNG")
    normalizers.draw(tmp_path / "normalizers.png")
    assert (tmp_path / "normalizers.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_multimax_has_no_modulators_to_draw(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result() | {"learned_scalars": {}}))
    with pytest.raises(ValueError, match="no MultiMax layer"):
        modulators.draw(tmp_path)
