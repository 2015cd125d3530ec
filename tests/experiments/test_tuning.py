"""The choice of settings: by the mean over seeds of what was run, and as the studies have it."""

import json
import math
from pathlib import Path

import pytest
from retrieval_runs import small_study

from experiments import tuning
from experiments.selection import STUDIES, config_of, study_of
from multimax.training.config import hashed_settings

STUDY = "retrieval"


def finished(folder, cell, index, seed, mse, **changes):
    """A run in a folder, with the configuration that `train.py` would give it."""
    study = study_of(STUDY)
    assert study.tuning
    settings = *study.tried(cell, index), *study.tuning.settings, f"seed={seed}"
    config = config_of(*settings)
    metrics = {"valid": {"mse": mse, "loss": mse, "examples": 1000}}
    result = {
        "schema": 2, "experiment": "retrieval", "task": "retrieval", "scale": "small", "seed": seed,
        "config": config.model_dump(mode="json"), "metrics": metrics, "normalizers": {},
        "learned_scalars": {},
        "best": {"metric": "valid/mse"}, "training_seconds": 1.0, "parameters": 1, "updates": 1,
    } | changes  # fmt: skip
    run = folder / f"{cell}-{index}-{seed}"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps(result))


def test_runs_are_found_by_their_settings_and_the_best_mean_is_chosen(tmp_path):
    study = small_study(("linear-softmax", "mlp-softmax"))  # a cell has nine configurations
    assert study.tuning
    cell = "linear-softmax"
    for index, figures in enumerate([(0.5, 0.5), (0.1, 0.7), (0.45, 0.2), (0.01,)]):
        for seed, mse in zip(study.tuning.seeds, figures, strict=False):
            finished(tmp_path, cell, index, seed, mse)
    figures = tuning.read(study, "small", [tmp_path])
    assert figures[cell][1] == {"1000": 0.1, "1001": 0.7}
    found = tuning.means(study, figures[cell])
    assert found[:3] == pytest.approx([0.5, 0.4, 0.325])
    assert all(map(math.isnan, found[3:]))  # one seed is no choice
    assert tuning.best(study, figures[cell]) == 2
    assert tuning.best(study, figures["mlp-softmax"]) is None
    assert tuning.best(study, [{"1000": 1.0, "1001": 2.0}, {"1000": 2.0, "1001": 1.0}]) == 0
    higher = study_of("max_retrieval")
    assert tuning.best(higher, [{"1000": 1.0, "1001": 2.0}, {"1000": 2.0, "1001": 2.0}]) == 1


@pytest.mark.parametrize("name", [name for name in STUDIES if study_of(name).tuning])
def test_studies_have_what_the_recorded_runs_say(name):
    study = study_of(name)
    file = Path(tuning.FOLDER) / f"{name}.json"
    figures = json.loads(file.read_text()) if file.exists() else {c: [] for c in study.cells}
    assert {name: cell.chosen for name, cell in study.cells.items()} == {
        name: tuning.best(study, of_cell) for name, of_cell in figures.items()
    }


def test_seeds_of_a_study_are_not_those_that_chose_its_settings():
    for name in STUDIES:
        study = study_of(name)
        if study.tuning:
            settings = [hashed_settings(config_of(*study.settings(cell))) for cell in study.cells]
            assert len({json.dumps(one, sort_keys=True) for one in settings}) == len(settings)
