"""Random values for random settings: each is taken, or refused by name with a remedy.

The number of values is that of the environment variable FUZZ, by default small.
"""

import copy
import math
import os
import random

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import ROOT

from multimax.options import leaves
from multimax.training.config import config_hash, read_config, run_folder

VALUES = int(os.environ.get("FUZZ", "600"))
WORDS = [
    "",
    "abc",
    "no",
    "off",
    "true",
    "null",
    "auto",
    "1",
    "1e-3",
    "../../x",
    "softmax",
    "ä",
    " ",
]
NUMBERS = [-1, 0, 1, 2, 7, 10**12, 2014, -0.1, 0.0, 0.5, 0.999, 1.0, 1.5, 1e-40, 1e30, math.nan,
           math.inf, -math.inf]  # fmt: skip
OTHERS = [None, True, False, [], [1], [0.9, 0.99], [0.9, 0.99, 0.999], ["a"], {}, {"name": "topk"}]


def composed(experiment):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={experiment}"])
    return OmegaConf.to_container(config, resolve=True)


def put(content, field, value):
    *sections, name = field.split(".")
    for section in sections:
        content = content[section]
    content[name] = value


def outcome_of(content):
    """The configuration, or why there is none; any other error is raised."""
    try:
        return read_config(content), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["deit_multimax", "lm_softmax", "mt_topk"])
def test_every_value_is_taken_or_refused_by_name(experiment):
    generator = random.Random(experiment)
    plain = composed(experiment)
    fields = [name for name, _, _ in leaves(read_config(plain))]
    fields += [field.partition(".")[0] for field in fields if "." in field]  # whole sections
    taken = 0
    for _ in range(VALUES):
        field = generator.choice(fields)
        value = generator.choice(generator.choice([WORDS, NUMBERS, OTHERS]))
        content = copy.deepcopy(plain)
        put(content, field, copy.deepcopy(value))
        config, said = outcome_of(content)
        if config is None:
            section = field.partition(".")[0]
            named = said.startswith((field, section)) or f" {section}." in said
            assert named or f" {field}" in said, (field, value, said)
            assert "\n" not in said, (field, value, said)
            continue
        assert len(config_hash(config)) == 8
        folder = run_folder(config)
        assert ".." not in folder.relative_to(config.output_dir).parts, (field, value)
        taken += 1
    assert 0.02 * VALUES < taken < 0.5 * VALUES
