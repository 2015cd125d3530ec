import copy
import csv
import functools
import io
import json
import math
import statistics
import sys

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from scipy import stats

from experiments import modulators
from experiments.comparison import cells_of
from experiments.figures.tables import forest
from experiments.rendering import FILES, in_readme
from experiments.results import collect, load, upgrade
from experiments.selection import CONFIGS, run_of, study_of
from experiments.statistics import holm, paired_difference
from experiments.tables import TABLES, build, main
from multimax.training.config import read_config

ROOT = CONFIGS.parent


@functools.cache
def composed(*overrides):
    """A configuration as a run records it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return read_config(compose("config", overrides=list(overrides))).recorded()


def result(experiment="deit_softmax", seed=0, top1=80.0, split="test", overrides=()):
    config = composed(f"experiment={experiment}", *overrides) | {"seed": seed}
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
        "normalizers": {
            "blocks.0.attn.normalizer": {"uniform_sparsity": 0.25, "multi_modality": 0.5},
            "blocks.1.attn.normalizer": {"uniform_sparsity": 0.35, "multi_modality": 0.7},
            "output": {"uniform_sparsity": 0.9, "multi_modality": 0.9},
        },
        "learned_scalars": {"output.ts": [0.1] * 4, "output.ranges": [0.0] * 4},
    }


def store(folder, results):
    folder.mkdir(exist_ok=True)
    for number, entry in enumerate(results, len(list(folder.iterdir()))):
        (folder / f"any_name_{number}.json").write_text(json.dumps(entry))


def table_of(name, source, *overrides):
    runs = [run_of(entry, str(file)) for file, entry in load(source).items()]
    return build(study_of(name), "small", runs, overrides)


def by_cell(name, source, *overrides):
    table = table_of(name, source, *overrides)
    return dict(zip(study_of(name).cells, table.rows, strict=True)), table


@pytest.mark.slow
def test_table_has_means_spread_and_paired_differences_and_empty_cells(tmp_path):
    softmax, multimax = [80.0, 82.0, 81.0], [81.0, 82.5, 82.5]
    store(tmp_path, [result(seed=s, top1=v) for s, v in enumerate(softmax)])
    store(tmp_path, [result("deit_multimax", s, v) for s, v in enumerate(multimax)])
    rows, table = by_cell("table2", tmp_path)
    assert rows["softmax"] == {
        "attention": "SoftMax", "output": "SoftMax", "top-1 %": "81.00", "sd": "1.00",
        "seeds": "3", "n": "2,000", "difference": "", "95 % CI": "", "S": "0.30", "M": "0.60",
    }  # fmt: skip
    ours = rows["multimax2-both"]
    assert ours["attention"] == ours["output"] == "MultiMax, order 2"
    assert (ours["top-1 %"], ours["sd"]) == ("82.00", f"{statistics.stdev(multimax):.2f}")
    assert ours["difference"] == "+1.00"
    half = 4.302653 * statistics.stdev([1.0, 0.5, 1.5]) / math.sqrt(3)  # t, 2 degrees of freedom
    assert ours["95 % CI"] == f"±{half:.2f}"
    assert set(rows["sparsemax-both"].values()) == {"sparsemax", ""}
    assert table.caption.endswith("in both, at small scale")
    assert (table.notes, table.runs) == ([], 6)
    error = 0.5 / math.sqrt(3)
    smallest = paired_difference({s: s for s in range(3)}, dict.fromkeys(range(3), 0)).smallest(
        0.99
    )
    smallest *= error / (1 / math.sqrt(3))  # five claims
    assert table.remarks[1] == (
        "MultiMax of order 2 in attention and output layer beats SoftMax: **underpowered** at this "
        f"scale (top-1 % +1.00 ± {half:.2f}, 3 pairs; such a comparison, corrected for all claims, "
        f"sees {smallest:.2f} in 80 % of cases)."
    )
    assert table.remarks[2].endswith("beats SoftMax: not run (fewer than two pairs).")


@pytest.mark.slow
def test_a_star_is_for_what_holm_leaves(tmp_path):
    """p of the rows: 0.00015, 0.03 and 0.03; Holm leaves the first alone."""
    seeds = range(5)
    store(tmp_path, [result(seed=s, top1=80.0 + s) for s in seeds])
    spread = {"deit_topk": (0.9, 1.0, 1.1, 1.2, 0.8), "deit_evsoftmax": (2.0, 0.2, 1.5, 0.3, 1.0)}
    spread["deit_entmax15"] = spread["deit_evsoftmax"]
    for name, gains in spread.items():
        store(tmp_path, [result(name, s, 80.0 + s + gains[s]) for s in seeds])
    rows, _ = by_cell("table2", tmp_path)
    p = stats.ttest_1samp(spread["deit_evsoftmax"], 0).pvalue
    assert 0.025 < p < 0.05
    assert rows["topk-attention"]["difference"] == "+1.00*"
    assert rows["evsoftmax-attention"]["difference"] == "+1.00"


@pytest.mark.slow
def test_rows_without_a_run_count_for_holm_too(tmp_path):
    """Else a star could go when the other rows are run."""
    store(tmp_path, [result(seed=s, top1=80.0) for s in range(5)])
    gains = (1.5, 0.5, 1.0, 1.8, 0.7)
    store(tmp_path, [result("deit_topk", s, 80.0 + gain) for s, gain in enumerate(gains)])
    assert 0.05 / 18 < stats.ttest_1samp(gains, 0).pvalue < 0.05
    rows, _ = by_cell("table2", tmp_path)
    assert rows["topk-attention"]["difference"] == "+1.10"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((1.0, 1.1, 0.9), "confirmed"),
        ((-1.0, -1.1, -0.9), "refuted"),
        ((1, -1, 0.5), "underpowered"),
    ],
)
def test_claims_get_a_verdict(tmp_path, gains, verdict):
    store(tmp_path, [result(seed=s, top1=80.0) for s in range(3)])
    ours = [result("deit_multimax", s, 80.0 + gain) for s, gain in enumerate(gains)]
    store(tmp_path, ours)
    assert f"**{verdict}**" in table_of("table2", tmp_path).remarks[1]


@pytest.mark.slow
def test_a_claim_can_be_that_something_is_lower(tmp_path):
    def run(temperature, seed):
        entry = result(seed=seed, overrides=(f"attention.temperature={temperature}",))
        for row in entry["normalizers"].values():
            row["uniform_sparsity"] = 1 / temperature + 0.01 * seed
        return entry

    store(tmp_path, [run(t, seed) for t in (0.5, 1, 2) for seed in range(3)])
    said = table_of("table1", tmp_path).remarks
    lower = "Temperature 2 makes attention less sparse than 1: **confirmed** at this scale (S -0.50"
    assert any(remark.startswith(lower) for remark in said)
    assert any("0.5 makes attention sparser than 1: **confirmed**" in remark for remark in said)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.slow
def test_a_second_metric_has_its_mean_and_may_be_missing(tmp_path):
    runs = [result("lm_softmax", seed) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        run["metrics"]["test"] |= {"perplexity": 100.0 + seed, "bits_per_byte": 2.0 + seed}
    sparse = result("lm_softmax", overrides=("output=sparsemax",))
    sparse["metrics"]["test"]["smoothed_perplexity"] = 120.0
    store(tmp_path, [*runs, sparse])
    rows, _ = by_cell("table3", tmp_path)
    softmax, sparse = rows["softmax"], rows["sparsemax-output"]
    metrics = (softmax["perplexity"], softmax["sd"], softmax["bits per byte"])
    assert metrics == ("100.500", "0.707", "2.500")
    assert (sparse["seeds"], sparse["perplexity"]) == ("1", "")
    assert sparse["smoothed perplexity"] == "120.000"


@pytest.mark.slow
def test_rows_without_the_main_figure_are_compared_by_another(tmp_path):
    def run(seed, gain, *overrides, **metrics):
        entry = result("lm_softmax", seed, overrides=overrides)
        entry["metrics"]["test"] |= {"smoothed_perplexity": 120.0 + seed + gain, **metrics}
        return entry

    store(tmp_path, [run(s, 0, perplexity=100.0 + s) for s in range(3)])
    gains = (-1.0, -1.5, -2.0)
    store(tmp_path, [run(s, gain, "output=sparsemax") for s, gain in enumerate(gains)])
    rows, table = by_cell("table3", tmp_path)
    softmax, sparse = rows["softmax"], rows["sparsemax-output"]
    assert (softmax["perplexity"], softmax["smoothed perplexity"]) == ("101.000", "121.000")
    assert (softmax["sd"], sparse["perplexity"], sparse["sd"]) == ("1.000", "", "0.500")
    assert sparse["difference"] == "-1.500"
    assert (
        "Rows without perplexity have sd, difference and interval of smoothed" in table.remarks[0]
    )
    figure = forest(cells_of(study_of("table3"), "small", map(run_of, load(tmp_path).values())))
    assert figure.axes[0].get_xlabel().startswith("perplexity or smoothed perplexity, difference")


def test_notes_are_not_about_other_cells_of_the_study():
    """Neither for settings that were chosen, nor for those that are added by a plus."""
    for name in ("retrieval", "ablation"):
        runs = [run_of(entry) for entry in load(ROOT / "results" / "runs" / "small").values()]
        study = study_of(name)
        own = {"model.keys", "optimizer.decay_scalars"}
        assert not [note for note in build(study, "small", runs).notes if own & set(_names(note))]


def _names(note):
    return note.partition("(")[2].rstrip(")").split(", ")


@pytest.mark.slow
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
    rows, table = by_cell("table1", tmp_path)
    assert [rows[f"average-{t}"]["top-1 %"] for t in ("0.5", "1", "2", "10")] == [
        "50.50", "51.00", "52.00", "",
    ]  # fmt: skip
    assert "average-1: runs with other settings are left out" in "".join(table.notes)
    assert "optimizer.lr" in "".join(table.notes)
    rows, _ = by_cell("table1", tmp_path, "optimizer.lr=0.002")
    assert (rows["average-1"]["seeds"], rows["average-1"]["top-1 %"]) == ("1", "99.00")
    rows, table = by_cell("table2", tmp_path)
    assert rows["multimax2-both"]["top-1 %"] == "70.00"


def test_results_of_schema_1_are_those_of_schema_2(tmp_path):
    new = result("mt_softmax") | {"best": {"metric": "valid/bleu", "value": 1.0, "update": 5}}
    old = copy.deepcopy(new) | {"schema": 1}
    del old["config"]["model"]["name"]
    old["best"]["figure"] = old["best"].pop("metric")
    assert upgrade(old) == new == upgrade(new)


def test_a_seed_twice_is_refused(tmp_path):
    store(tmp_path, [result(), result(top1=81.0)])
    with pytest.raises(ValueError, match=r"seed 0 is recorded twice .*any_name_1.*any_name_0"):
        table_of("table2", tmp_path)


@pytest.mark.slow
def test_the_committed_tables_are_those_of_the_committed_runs():
    runs = [run_of(entry, str(file)) for file, entry in load(ROOT / "results" / "runs").items()]
    readme = (ROOT / "README.md").read_text()
    for name in TABLES:
        table = build(study_of(name), "small", runs)
        if not table.runs:
            assert not list((ROOT / "results" / "tables").glob(f"{table.name}.*"))
            continue
        for suffix, form in FILES.items():
            file = ROOT / "results" / "tables" / f"{table.name}{suffix}"
            stale = f"{file} is stale: python -m experiments.tables {name} --readme"
            assert file.read_text() == form(table), stale
        assert f"<!-- {table.name} -->" in readme
        assert in_readme(readme, table) == readme, f"README.md is stale: as for {file}"


def test_the_command_names_what_there_is(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables", "table9"])
    with pytest.raises(
        SystemExit,
        match=r"unknown table 'table9'; known: ablation, .*table1, table2, table3, table4",
    ):
        main()


@pytest.mark.parametrize(("pairs", "confidence"), [(3, 0.95), (5, 0.99), (20, 0.99)])
def test_what_a_comparison_can_see_is_seen_in_80_percent_of_cases(pairs, confidence):
    values = np.random.default_rng(pairs).normal(size=pairs)
    found = paired_difference(dict(enumerate(values)), dict.fromkeys(range(pairs), 0.0))
    drawn = np.random.default_rng(1).normal(
        found.smallest(confidence), found.error * math.sqrt(pairs), (40_000, pairs)
    )
    seen = np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 1 - confidence)
    assert seen == pytest.approx(0.8, abs=0.01)  # five standard errors


def test_pairs_are_made_by_seed():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0}) is None
    found = paired_difference({2: 5.0, 0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5, 7: 100.0})
    assert (found.mean, found.half_width, found.p_value, found.pairs) == (0.5, 0.0, 0.0, 2)
    # Neither in the order of the seeds, nor in that of the values, nor as if they were no pairs.
    found = paired_difference({1: 4.0, 0: 1.0, 2: 2.0}, {2: 0.0, 0: 3.0, 1: 1.0, 5: 9.0})
    assert found.mean == pytest.approx(1.0)
    spread = math.sqrt(((-2 - 1) ** 2 + (3 - 1) ** 2 + (2 - 1) ** 2) / 2)
    assert found.half_width == pytest.approx(4.302653 * spread / math.sqrt(3))  # t, 2 degrees
    same = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (same.mean, same.p_value) == (0.0, 1.0)


def test_the_interval_is_that_of_a_paired_t_test():
    values, base = {s: v for s, v in enumerate((3.0, 4.5, 4.0, 6.0))}, dict(enumerate((1, 4, 3, 4)))
    found = paired_difference(values, base)
    expected = stats.ttest_rel(list(values.values()), list(base.values()))
    assert found.p_value == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high)
    )


def test_runs_on_different_devices_are_named(tmp_path):
    def on(device, seed):
        return result(seed=seed) | {"hardware": {"device": device}}

    store(tmp_path, [on("EPYC", 1), on("EPYC", 3)])
    assert "Runs on" not in table_of("table2", tmp_path).remarks[0]
    store(tmp_path, [on("H100", 0)])
    assert "Runs on EPYC (seed 1, 3); H100 (seed 0)." in table_of("table2", tmp_path).remarks[0]


def test_table_files_hold_the_same_cells(tmp_path):
    store(tmp_path, [result(seed=s, top1=80 + s) for s in range(2)])
    table = table_of("table2", tmp_path)
    files = {suffix: form(table) for suffix, form in FILES.items()}
    read = list(csv.DictReader(io.StringIO(files[".csv"])))
    assert read == table.rows
    assert "| SoftMax | SoftMax | 80.50 |" in files[".md"]
    assert r"SoftMax & SoftMax & 80.50" in files[".tex"]
    assert r"\begin{tabular}{llrrrrrrrr}" in files[".tex"]


@pytest.mark.slow
def test_the_log_of_the_author_stands_beside_the_paper_scale_only(tmp_path):
    options = ("scale=paper", "data.root=/a")
    store(tmp_path, [result(overrides=options, split="valid")])
    runs = [run_of(entry) for entry in load(tmp_path).values()]
    table = build(study_of("table2"), "paper", runs, ["data.root=/b"])
    assert table.columns[-2:] == ["author's run log (one run), not the paper", "paper"]
    assert [row[table.columns[-2]] for row in table.rows[:2]] == ["80.35", ""]
    assert {row["paper"] for row in table.rows} == {""}
    assert table.rows[0]["top-1 %"] == "80.00"  # ImageNet has a valid split only
    assert "author" not in "".join(table_of("table2", tmp_path).columns)


def test_collect_copies_finished_results_but_not_those_set_aside(tmp_path):
    folder = tmp_path / "outputs" / "run-seed0"
    (folder / "previous-1").mkdir(parents=True)
    place = f"output_dir={tmp_path}"
    (folder / "result.json").write_text(json.dumps(result(top1=85.0, overrides=[place])))
    (folder / "previous-1" / "result.json").write_text(json.dumps(result(top1=1.0)))
    (copied,) = collect([tmp_path / "outputs"], tmp_path / "runs")
    assert copied == tmp_path / "runs" / "small" / "deit_softmax" / "run-seed0.json"
    assert json.loads(copied.read_text())["metrics"]["test"]["top1"] == 85.0
    assert str(tmp_path) not in copied.read_text()


@pytest.mark.slow
def test_what_a_run_learned_is_drawn(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result("deit_multimax")))
    lines = [{"update": 1, "train/loss": 2.0}, {"update": 2, "valid/loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert modulators.draw(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_multimax_has_no_modulators_to_draw(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result() | {"learned_scalars": {}}))
    with pytest.raises(ValueError, match="no MultiMax layer"):
        modulators.draw(tmp_path)
