"""What normalizers can reach, against closed forms and a search by brute force."""

import csv
import json

import numpy as np
import pytest
import torch
from retrieval_runs import small_study
from torch.testing import assert_close

from experiments import reachable
from experiments.reachable import Weights, draw, total_variation
from experiments.selection import CONFIGS
from multimax.data.synthetic.base import Setting

RESULTS = CONFIGS.parent / "results"


@pytest.fixture(scope="module")
def sets():
    return draw(reachable.FITTED, 40, 3)


def variation(weights, sets):
    with torch.no_grad():
        return total_variation(weights(sets.relevance), sets.target)


def test_sets_are_those_of_the_task(sets):
    marked = sets.target > 0
    assert_close(sets.target.sum(1), torch.ones(40, dtype=torch.float64))
    assert (marked.sum(1) == 4).all()
    assert sets.relevance[marked].min() >= 0.7 - 1e-6
    assert sets.relevance[~marked].max() <= 0.3 + 1e-6
    assert not torch.equal(sets.relevance, draw(reachable.FITTED, 40, 4).relevance)


def test_total_variation():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0, 0]]), torch.tensor([[0.5, 0.0, 0.5], [0, 1, 0]])
    assert total_variation(p, q).tolist() == [0.5, 1.0]


def test_softmax_reaches_what_the_best_of_many_scales_does(sets):
    r, target = sets.relevance.numpy(), sets.target.numpy()

    def at(scale):
        p = np.exp(scale * r)
        return 0.5 * np.abs(p / p.sum(1, keepdims=True) - target).sum(1).mean()

    found, weights = reachable.fit({"name": "softmax"}, sets)
    best = min(at(scale) for scale in np.linspace(1, 12, 1101))
    assert best - 1e-4 < found <= best
    assert weights.line[0].item() > 1


def test_sparsemax_is_linear_inside_the_marked_items_once_it_leaves_out_the_others(sets):
    """With a (mean - largest other) >= 1 / k it has the marked items alone, and then p = 1 / k +
    a (r - mean), so that equal weights need equal relevances."""
    marked = sets.target > 0
    inside = sets.relevance[marked].view(40, 4)
    mean = inside.mean(1, keepdim=True)
    largest = sets.relevance.masked_fill(marked, -1).amax(1, keepdim=True)
    scale = 0.25 / (mean - largest).min().item()
    expected = 0.5 * scale * (inside - mean).abs().sum(1)
    assert_close(variation(Weights({"name": "sparsemax"}, scale, 0.0), sets), expected)
    assert (variation(Weights({"name": "sparsemax"}, 0.8 * scale, 0.0), sets) > 0).all()
    equal = sets._replace(relevance=marked.double())
    assert variation(Weights({"name": "sparsemax"}, 0.3, 0.0), equal).max() < 1e-12
    assert variation(Weights({"name": "sparsemax"}, 0.2, 0.0), equal).min() > 0.1


def test_top_k_with_k_marked_items_is_softmax_inside_them(sets):
    inside = sets.relevance[sets.target > 0].view(40, 4)
    expected = total_variation((3.0 * inside).softmax(1), torch.full_like(inside, 0.25))
    assert_close(variation(Weights({"name": "topk", "k": 4}, 3.0, 0.0), sets), expected)
    assert_close(
        variation(Weights({"name": "topk", "k": 2}, 1e-9, 0.0), sets),
        torch.full((40,), 0.5, dtype=torch.float64),
    )


def test_a_modulator_that_is_flat_above_d_leaves_only_what_leaks_below_b(sets):
    """With t_d = 0 all scores above d are one: the rest is a softmax of two groups."""
    weights = Weights({"name": "multimax", "order": 1}, 1.0, 0.0)
    with torch.no_grad():
        weights.normalizer.ts.copy_(torch.tensor([-9.0, -1.0]))
        weights.normalizer.ranges.copy_(torch.tensor([0.5, 0.5]))
    leak = torch.where(sets.target > 0, 0.0, (10 * (sets.relevance - 0.5)).exp()).sum(1)
    assert_close(variation(weights, sets), leak / (leak + 4))


def test_the_fit_finds_that_modulator_and_keeps_it_elsewhere(sets):
    found, weights = reachable.fit({"name": "multimax", "order": 1}, sets)
    assert found < 1e-3
    assert variation(weights, draw(Setting(64, 16), 40, 5)).mean() < 1e-3


def test_weights_that_need_not_sum_to_one_are_divided_by_their_mean_sum(sets):
    weights = Weights({"name": "sigmoid"}, 300.0, 0.5)  # 1 for marked items, 0 for others
    assert variation(weights, sets).max() < 1e-6
    weights.keep_divisor(sets.relevance)
    assert weights.divisor == pytest.approx(4)
    sixteen = draw(Setting(64, 16), 10, 6)  # 16 weights of 1 / 4 in the place of 1 / 16
    assert_close(
        variation(weights, sixteen), torch.full((10,), 1.5, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_a_normalizer_has_a_row_whatever_its_keys_and_its_start():
    study = small_study(
        ("linear-softmax", "linear-topk", "linear-multimax2", "linear-multimax2-separated",
         "mlp-softmax", "mlp-multimax2-separated")
    )  # fmt: skip
    found = reachable.families(study)
    assert {label: cells for label, (cells, _) in found.items()} == {
        "SoftMax": ["linear-softmax", "mlp-softmax"],
        "top-k": ["linear-topk"],
        "MultiMax, order 2": ["linear-multimax2", "linear-multimax2-separated",
                              "mlp-multimax2-separated"],
    }  # fmt: skip
    assert [options["k"] for options in found["top-k"][1]] == [2, 4, 8]
    assert len(found["SoftMax"][1]) == 1  # a temperature is a scale of the scores


def test_the_committed_table_is_what_is_computed():
    content = json.loads((RESULTS / "reachable.json").read_text())
    with (RESULTS / "tables" / "reachable.csv").open() as stream:
        rows = {row["normalizer"]: row for row in csv.DictReader(stream)}
    assert list(rows) == list(content)
    for label, of in content.items():
        for name in reachable.SETTINGS:
            assert rows[label][name] == f"{of[name]:.3f}"
    computed = reachable.reach("SoftMax", [], [{"name": "softmax"}]).variation
    assert computed == pytest.approx(
        {name: content["SoftMax"][name] for name in reachable.SETTINGS}, abs=1e-6
    )
