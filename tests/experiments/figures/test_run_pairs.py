"""Which runs are compared: those that the study says, seed by seed, whatever their files are."""

import re

import pytest
from planted import planted, recorded

from experiments.figures.pairs import measured_pairs, pairs_of_task
from experiments.scores import save_scores


def runs(*found):
    """Runs by place, of (study, cell, seed, other settings)."""
    return {
        str(run): (recorded(study, cell, *others) | {"seed": seed}, run)
        for run in found
        for study, cell, seed, *others in [run]
    }


def seeds(task, *found):
    return [(pair.cell, pair.seed) for pair in pairs_of_task(task, runs(*found))]


def test_a_pair_is_of_one_seed():
    found = (
        ("table2", "softmax", 1),
        ("table2", "softmax", 2),
        ("table2", "softmax", 3),
        ("table2", "multimax2-attention", 2),
        ("table2", "multimax2-attention", 1),
        ("table2", "multimax2-attention", 7),
    )
    pairs = pairs_of_task("deit", runs(*found))
    assert [(pair.cell, pair.seed) for pair in pairs] == [
        ("multimax2-attention", 1),
        ("multimax2-attention", 2),
    ]
    assert pairs[0].softmax == ("table2", "softmax", 1)
    assert pairs[0].multimax == ("table2", "multimax2-attention", 1)


@pytest.mark.slow
def test_the_attention_alone_is_preferred():
    both = ("table2", "softmax", 0), ("table2", "multimax2-both", 0)
    assert seeds("deit", *both) == [("multimax2-both", 0)]
    assert seeds("deit", *both, ("table2", "multimax2-attention", 0)) == [
        ("multimax2-attention", 0)
    ]
    # But not of a seed that the baseline lacks.
    assert seeds("deit", *both, ("table2", "multimax2-attention", 4)) == [("multimax2-both", 0)]


@pytest.mark.slow
def test_other_settings_and_normalizers_are_no_pair():
    assert not seeds(
        "deit",
        ("table2", "softmax", 0),
        ("table2", "multimax2-attention", 0, "optimizer.lr=0.01"),
        ("table2", "multimax1-attention", 0),
        ("table2", "sparsemax-attention", 0),
    )
    assert not seeds("lm", ("table2", "softmax", 0), ("table2", "multimax2-attention", 0))


@pytest.mark.slow
def test_measured_pairs_of_every_task(tmp_path):
    for number, (study, cell) in enumerate(
        (study, cell) for study in ("table2", "table4") for cell in ("softmax", "multimax2-both")
    ):
        save_scores(tmp_path / f"{number}.npz", planted(study, cell))
    found = measured_pairs(tmp_path)
    assert {task: len(pairs) for task, pairs in found.items()} == {"deit": 1, "mt": 1}
    assert found["mt"][0].multimax.config["attention"]["name"] == "multimax"
    assert found["mt"][0].softmax.config["attention"]["name"] == "softmax"


@pytest.mark.slow
def test_without_pairs_it_says_what_to_type(tmp_path):
    save_scores(tmp_path / "one.npz", planted("table2", "softmax"))
    with pytest.raises(FileNotFoundError, match=r"train\.py -m study=table2 .*experiments.measure"):
        measured_pairs(tmp_path)


def test_a_run_that_was_measured_twice_is_refused(tmp_path):
    for name in ("one", "other"):
        save_scores(tmp_path / f"{name}.npz", planted("table2", "softmax"))
    with pytest.raises(ValueError, match=re.escape("recorded twice")) as caught:
        measured_pairs(tmp_path)
    assert "one" in str(caught.value)
    assert "other" in str(caught.value)
