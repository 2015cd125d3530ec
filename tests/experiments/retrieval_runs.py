"""Made-up results of the study of retrieval, of the form that its runs have."""

import functools

import numpy as np

from experiments.selection import config_of, study_of

SCALARS = {"attn.normalizer.ts": [-1.0, -0.2, -0.1, -0.1],
           "attn.normalizer.ranges": [0.5, 1.0, 0.0, 1.5]}  # fmt: skip


@functools.cache
def whole_study():
    return study_of("retrieval")


def small_study(cells=("linear-softmax", "linear-sparsemax", "linear-multimax2"), **changes):
    """The study with some of its cells and without claims."""
    study = whole_study()
    kept = {name: study.cells[name] for name in cells}
    return study.model_copy(update={"cells": kept, "claims": (), **changes})


def made_up(study, cell, seed, error, others=(), diverged=None):
    """A result with this error at n = 64; `others` are those of the other columns, in order."""
    config = config_of(*study.settings(cell), "scale=small")
    names = [figure.removeprefix("test/") for figure in study.columns.values()]
    test = dict(zip(names, [error, *others, *[error] * len(names)], strict=False))
    updates = range(50, 1050, 50)
    curve = [{"update": u, "train/loss": max(error, float(np.exp(-u / 60)))} for u in updates]
    scalars = {key: [v + 0.05 * seed for v in of] for key, of in SCALARS.items()}
    result = {
        "schema": 2, "experiment": "retrieval", "task": config.task.name, "scale": "small",
        "seed": seed, "config": config.recorded() | {"seed": seed},
        "metrics": {"test": {**test, "mse": error, "loss": error, "examples": 1000}},
        "normalizers": {}, "learned_scalars": scalars if "multimax" in cell else {},
        "training_seconds": 8.0, "curve": curve,
    }  # fmt: skip
    if diverged:
        result |= {"metrics": {}, "learned_scalars": {}, "diverged": diverged}
        del result["training_seconds"], result["curve"]
    return result


def drawn(study, seeds, generator):
    """Results of all cells: each has an error of its own, and some runs get stuck."""
    for cell in study.cells:
        level = 10 ** generator.uniform(-3, -0.3)
        slope = generator.uniform(0, 0.5)
        for seed in seeds:
            error = level * 10 ** generator.normal(0, 0.1)
            if generator.random() < 0.1:
                error = min(1.0, 30 * error)
            growth = [4.0**slope, 16.0**slope, 64.0**slope, 3, 1.5, 1.3, 2]
            yield made_up(study, cell, seed, error, [min(1.2, error * g) for g in growth])
