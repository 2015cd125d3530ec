import csv
import json
import math
import statistics

import pytest

from experiments import modulators, normalizers
from experiments.results import collect, load, paired_difference
from experiments.table1 import TABLE
from experiments.table2 import TABLE as LANGUAGE


def result(experiment="deit_softmax", seed=0, top1=80.0, config_hash="aaaa", split="test"):
    return {
        "experiment": experiment,
        "scale": "small",
        "seed": seed,
        "config_hash": config_hash,
        "config": {"output": {"name": "softmax"}},
        "metrics": {split: {"top1": top1, "examples": 2000}},
        "training_seconds": 90.0,
        "learned_scalars": {"output.ts": [0.1] * 4, "output.ranges": [0.0] * 4},
    }


def store(folder, results):
    for entry in results:
        name = f"{entry['experiment']}/run-{entry['config_hash']}-seed{entry['seed']}"
        path = folder / "small" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entry))


def test_table_has_means_spread_and_paired_differences_and_empty_cells(tmp_path):
    softmax, multimax = [80.0, 82.0, 81.0], [81.0, 82.5, 82.5]
    store(tmp_path, [result(seed=s, top1=v) for s, v in enumerate(softmax)])
    store(tmp_path, [result("deit_multimax", s, v) for s, v in enumerate(multimax)])
    table, caption = TABLE.rows("small", tmp_path)
    by_name = {row["attention"]: row for row in table}
    assert by_name["SoftMax"]["top-1 %"] == "81.00"
    assert by_name["SoftMax"]["minus SoftMax"] == ""
    assert by_name["MultiMax"]["top-1 %"] == "82.00"
    assert by_name["MultiMax"]["sd"] == f"{statistics.stdev(multimax):.2f}"
    assert by_name["MultiMax"]["minus SoftMax"] == "+1.00"
    half = 4.302653 * statistics.stdev([1.0, 0.5, 1.5]) / math.sqrt(3)  # t, 2 degrees of freedom
    assert by_name["MultiMax"]["95 % CI"] == f"±{half:.2f}"
    assert set(by_name["sparsemax"].values()) == {"sparsemax", ""}
    assert "2,000" in caption


def test_a_second_figure_has_its_mean_and_may_be_missing(tmp_path):
    runs = [result("lm_softmax", seed) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        run["metrics"]["test"] |= {"perplexity": 100.0 + seed, "bits_per_byte": 2.0 + seed}
    sparse = result("lm_sparsemax")
    sparse["metrics"]["test"]["smoothed_perplexity"] = 120.0
    store(tmp_path, [*runs, sparse])
    rows = {row["attention"]: row for row in LANGUAGE.rows("small", tmp_path)[0]}
    softmax = rows["SoftMax"]
    figures = (softmax["perplexity"], softmax["sd"], softmax["bits per byte"])
    assert figures == ("100.500", "0.707", "2.500")
    assert (rows["sparsemax"]["seeds"], rows["sparsemax"]["perplexity"]) == ("1", "")


def test_pairs_are_made_by_seed():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0}) is None
    difference = paired_difference({2: 5.0, 0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5, 7: 100.0})
    assert difference == (0.5, 0.0)


def test_one_experiment_with_two_configurations_is_refused(tmp_path):
    store(tmp_path, [result(), result(seed=1, config_hash="bbbb")])
    with pytest.raises(ValueError, match="different configurations"):
        load("small", ["deit_softmax"], tmp_path)


def test_table_files_hold_the_same_cells(tmp_path):
    store(tmp_path / "runs", [result(seed=s, top1=80 + s) for s in range(2)])
    files = TABLE.write("small", tmp_path, tmp_path / "runs")
    with files[2].open() as stream:
        read = list(csv.DictReader(stream))
    assert (read[0]["attention"], read[0]["top-1 %"]) == ("SoftMax", "80.50")
    assert "| SoftMax | softmax | 80.50 |" in files[0].read_text()
    assert r"SoftMax & softmax & 80.50" in files[1].read_text()


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
