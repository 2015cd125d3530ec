"""Interquartile means, probabilities of improvement and stuck runs, against other computations."""

import itertools

import numpy as np
import pytest
from retrieval_runs import made_up, small_study
from scipy import stats

from experiments import retrieval
from experiments.comparison import cells_of
from experiments.selection import run_of


def test_the_interquartile_mean_is_that_of_the_middle_half():
    assert retrieval.interquartile_mean(np.array([9.0, -50, 1, 2, 3, 4, 100, 0])) == 2.5
    values = np.random.default_rng(1).normal(size=20)
    assert retrieval.interquartile_mean(values) == pytest.approx(np.sort(values)[5:15].mean())


def test_its_interval_is_that_of_the_percentile_bootstrap():
    values = np.random.default_rng(2).normal(size=20)
    mean, low, high = retrieval.interquartile_mean_with_interval(values)
    expected = stats.bootstrap(
        (values,), retrieval.interquartile_mean, method="percentile", rng=5
    ).confidence_interval
    assert mean == retrieval.interquartile_mean(values)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert retrieval.interquartile_mean_with_interval(values) == (mean, low, high)


def test_the_probability_of_improvement_is_the_share_of_pairs():
    assert retrieval.probability_of_improvement([1, 2], [2, 3])[0] == 3.5 / 4
    ours, theirs = np.random.default_rng(3).normal(size=(2, 15))
    share = retrieval.probability_of_improvement(ours, theirs)[0]
    assert share == pytest.approx(stats.mannwhitneyu(theirs, ours).statistic / 225)


def test_its_interval_is_over_resamples_of_both():
    ours, theirs = [1.0, 3.0, 4.0], [2.0, 3.0, 5.0]
    resamples = [
        np.mean([(a < b) + 0.5 * (a == b) for a in first for b in second])
        for first in itertools.product(ours, repeat=3)
        for second in itertools.product(theirs, repeat=3)
    ]
    found = retrieval.probability_of_improvement(ours, theirs)[1:]
    assert found == pytest.approx(np.quantile(resamples, [0.025, 0.975]), abs=0.06)
    assert retrieval.probability_of_improvement([1.0, 1.5], [2.0, 3.0]) == (1, 1, 1)


@pytest.fixture(scope="module")
def cells():
    study = small_study()
    errors = {
        "linear-softmax": [0.2, 0.3, 0.25, 0.2],
        "linear-multimax2": [0.001, 0.0099, 0.011, 0.5],
        "linear-sparsemax": [],
    }
    found = [
        made_up(study, cell, seed, error, [2 * error])
        for cell, of in errors.items()
        for seed, error in enumerate(of)
    ]
    found.append(made_up(study, "linear-multimax2", 4, 0.5, diverged="the loss is nan"))
    return cells_of(study, "small", [run_of(of, str(i)) for i, of in enumerate(found)])


def test_stuck_runs_have_more_than_ten_times_the_error_of_the_best(cells):
    assert retrieval.seeds_of(cells, "linear-multimax2").stuck == {2, 3, 4}
    assert retrieval.seeds_of(cells, "linear-softmax").stuck == set()
    assert retrieval.seeds_of(cells, "linear-sparsemax") == ({}, set())


def test_the_table_has_a_row_for_each_cell_with_runs(cells):
    softmax, multimax = retrieval.table_of(cells).rows
    assert softmax["better than SoftMax"] == softmax["better than sparsemax"] == ""
    assert multimax["better than SoftMax"].startswith("0.60 [")  # 3 of 5 are below all others
    counts = {key: multimax[key] for key in ("seeds", "stuck", "diverged")}
    assert counts == {"seeds": "5", "stuck": "3", "diverged": "1"}
    assert [multimax[key] for key in ("best", "median", "worst")] == ["0.00100", "0.0110", "1.00"]
    assert multimax["mean"] == "0.304"
    # Of five values the smallest and the largest are cut off.
    middle = stats.gmean([0.0099, 0.011, 0.5])
    assert multimax["error, interquartile"].startswith(f"{middle:#.3g} [")
    middle = stats.gmean([2 * 0.0099, 2 * 0.011, 1.0])
    assert multimax["n = 256, interquartile"].startswith(f"{middle:#.3g} [")


def test_the_command_needs_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["retrieval"])
    monkeypatch.setattr(retrieval, "study_of", lambda name: small_study(("linear-softmax",)))
    with pytest.raises(SystemExit, match=r"error: there is no run of the study: python train\.py"):
        retrieval.main()
