"""Runs of studies as they are recorded, and scores that were planted for them."""

import functools

import numpy as np

from experiments.scores import EDGES, LayerScores, Scores
from experiments.selection import _composed, study_of
from multimax.training.config import read_config

SCALARS = {"ts": [-1.0, -0.5, 0.0, 0.0], "ranges": [0.0, 0.5, 0.0, 0.0]}
NAMES = {
    "table2": ["blocks.0.attn.normalizer", "blocks.1.attn.normalizer"],
    "table3": ["decoder.layers.0.self_attn.normalizer"],
    "table4": [
        "encoder.layers.0.self_attn.normalizer",
        "encoder.layers.1.self_attn.normalizer",
        "encoder.layers.2.self_attn.normalizer",
        "decoder.layers.0.self_attn.normalizer",
        "decoder.layers.0.encoder_attn.normalizer",
    ],
}


@functools.cache
def recorded(study, cell, *others):
    """The configuration of a cell of a study, as its runs record it."""
    settings = study_of(study).settings(cell)
    return read_config(_composed(*settings, "logger.wandb=disabled", *others)).recorded()


def planted(study, cell, seed=0, others=(), shift=0.0, layers=None):
    """Measured scores of a run: of each layer 40 rows of 12 keys, of 20 examples."""
    generator = np.random.default_rng(seed)
    histogram = np.zeros(len(EDGES) - 1, np.int64)
    histogram[20:70] = 100
    histogram[-1] = round(100 * shift)
    found = {
        name: LayerScores(
            generator.normal(shift, 2, (40, 12)).astype(np.float32),
            np.repeat(np.arange(20, dtype=np.int32), 2),
            np.tile(np.arange(2, dtype=np.int32), 20),
            histogram,
            30,
            100,
            SCALARS if "multimax" in cell and "output" not in cell else {},
        )
        for name in layers or NAMES[study]
    }
    return Scores(recorded(study, cell, *others) | {"seed": seed}, "test", 20, found)
