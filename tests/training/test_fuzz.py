"""Random values for random settings: each is taken, or refused by name with a remedy.

The number of values is that of the environment variables FUZZ (read only) and FUZZ_RUNS (trained
for two updates too), by default small; FUZZ_SEED chooses others.
"""

import collections
import copy
import functools
import math
import os
import random
from itertools import islice

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tiny import PLAIN, ROOT
from tiny_text import TINY_LANGUAGE_MODEL, TINY_TRANSLATION

from multimax.data.pairs.sources import LibreOfficeHelp
from multimax.options import leaves
from multimax.tasks import build_task
from multimax.training.command_line import explain_bad_overrides
from multimax.training.config import check_processes, config_hash, read_config, run_folder
from multimax.training.trainer import Trainer

VALUES = int(os.environ.get("FUZZ", "600"))
RUNS = int(os.environ.get("FUZZ_RUNS", "15"))
LINES = VALUES // 10
SEED = os.environ.get("FUZZ_SEED", "")
WORDS = [
    "", "abc", "no", "off", "true", "null", "auto", "1", "1e-3", "../../x", "softmax", "entmax",
    "topk", "sgd", "adam", "lion", "cosine", "inverse_sqrt", "best", "last", "bf16", "identity",
    "ä", " ", "${seed}", "a\nb", "0x10", "1_000", "-", "[1]", "{}",
]  # fmt: skip
NUMBERS = [-1, 0, 1, 2, 3, 4, 7, 16, 300, 10**12, 2014, -0.1, 0.0, 1e-8, 0.5, 0.999, 1.0, 1.5, 3.5,
           100.0, 1e-40, 1e30, 1e308, math.nan, math.inf, -math.inf]  # fmt: skip
OTHERS = [
    None, True, False, [], [1], [0.9, 0.99], [0.9, 0.99, 0.999], [4, 8], [8, 4], ["a"], [None], {},
    {"name": "topk"}, {"name": "topk", "k": 2}, {"name": "entmax", "learned": True, "heads": 3},
    {"name": 3}, {"a": {"b": 1}}, {1: 2},
]  # fmt: skip
NORMALIZERS = ["softmax", "topk", "sparsemax", "entmax15", "entmax", "evsoftmax", "multimax"]
TASKS = {
    "deit_multimax": PLAIN,
    "lm_softmax": TINY_LANGUAGE_MODEL,
    "mt_topk": TINY_TRANSLATION,
}  # fmt: skip
# What is not tried in training: it takes minutes, or writes wherever the value says.
NOT_TRAINED = ("trainer.compile", "output_dir", "data.cache", "resume", "logger.wandb", "data.root")
EVALUATED = 30  # longest translations that are


@functools.cache
def composed(experiment, *overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={experiment}", *overrides])
    return OmegaConf.to_container(config, resolve=True)


def with_normalizers(attention, output, experiment, *overrides):
    """As composed with both, which is done once for each normalizer and not for each pair.

    Neither group changes the section of the other: that is another test of this file.
    """
    plain, other = (
        composed(experiment, *overrides, f"attention={name}", f"output={name}")
        for name in (attention, output)
    )
    return plain | {"output": other["output"]}


def draw(generator):
    return copy.deepcopy(generator.choice(generator.choice([WORDS, NUMBERS, NUMBERS, OTHERS])))


def fields_of(plain):
    """Names of all settings and of all sections."""
    fields = [name for name, _, _ in leaves(read_config(plain))]
    return fields + sorted({field.partition(".")[0] for field in fields if "." in field})


def put(content, field, value):
    *sections, name = field.split(".")
    for section in sections:
        if not isinstance(content.get(section), dict):
            return
        content = content[section]
    content[name] = value


def assert_names(said, chosen):
    """The message is one line that names a setting that was changed, or its section."""
    named = any(
        said.startswith((field, field.partition(".")[0]))
        or f" {field.partition('.')[0]}." in said
        or f" {field}" in said
        or field.rpartition(".")[2] in said
        for field in chosen
    )
    assert named, (chosen, said)
    assert "\n" not in said, (chosen, said)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", TASKS)
def test_a_pair_of_normalizers_is_made_of_both(experiment):
    for pair in zip(NORMALIZERS, NORMALIZERS[1:] + NORMALIZERS[:1], strict=True):
        groups = (
            f"{place}={name}" for place, name in zip(("attention", "output"), pair, strict=True)
        )
        assert with_normalizers(*pair, experiment) == composed(experiment, *groups)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", TASKS)
def test_every_value_is_taken_or_refused_by_name(experiment):
    generator = random.Random(experiment + SEED)
    taken = 0
    for _ in range(VALUES):
        pair = generator.choice(NORMALIZERS), generator.choice(NORMALIZERS)
        plain = with_normalizers(*pair, experiment)
        field = generator.choice(fields_of(plain))
        value = draw(generator)
        content = copy.deepcopy(plain)
        put(content, field, value)
        try:
            config = read_config(content)
        except ValueError as error:
            assert_names(str(error), [field])
            continue
        assert len(config_hash(config)) == 8
        folder = run_folder(config)
        assert ".." not in folder.relative_to(config.output_dir).parts, (field, value)
        taken += 1
    assert 0.02 * VALUES < taken < 0.5 * VALUES


@pytest.fixture
def little_text(tmp_path, monkeypatch):
    """Settings for a text of a few lines; of the sentence pairs the first few of each split."""
    splits = ("train", "valid", "test")
    pairs = {split: list(islice(LibreOfficeHelp()._columns(split), 40)) for split in splits}
    monkeypatch.setattr(LibreOfficeHelp, "_columns", lambda self, split: iter(pairs[split]))
    for split in splits:
        lines = [f"{split} {i} is one of {i * i} numbers" for i in range(40)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    return {"root": str(tmp_path), "cache": str(tmp_path / "cache")}


def two_updates(config, folder):
    """Build the task, update twice, and evaluate unless the translations can be long."""
    check_processes(config, 1)
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    task = build_task(config, 0, 1, accelerator.device)
    trainer = Trainer(task, config, folder, accelerator, [], None)
    decoding = getattr(config, "decoding", None)
    if decoding and decoding.max_len_a * 100 + decoding.max_len_b > EVALUATED:
        trainer.evaluate_and_keep_best = lambda: None
    trainer.fit(stop_after=2)
    trainer.evaluate_and_keep_best()
    trainer.inspect()


def assert_says_diverged(said, values):
    assert "optimizer.lr" in said or "NaN" in said, (values, said)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", TASKS)
def test_what_is_taken_trains(experiment, little_text, tmp_path):
    """Or is refused by name before the first update; training may diverge, and then says so."""
    generator = random.Random(experiment + SEED)
    outcomes = collections.Counter()
    while outcomes.total() < RUNS:
        pair = generator.choice(NORMALIZERS), generator.choice(NORMALIZERS)
        plain = with_normalizers(*pair, experiment, *TASKS[experiment])
        content = copy.deepcopy(plain)
        content["data"] |= {key: little_text[key] for key in content["data"].keys() & little_text}
        usable = [field for field in fields_of(plain) if field not in NOT_TRAINED and "." in field]
        chosen = generator.sample(usable, generator.choice([1, 1, 2]))
        values = {field: draw(generator) for field in chosen}
        for field, value in values.items():
            put(content, field, value)
        try:
            config = read_config(content)
        except ValueError:
            continue  # as in the test above
        try:
            two_updates(config, tmp_path)
        except (ValueError, FileNotFoundError) as error:
            assert_names(str(error), chosen)
            outcomes["refused"] += 1
        except FloatingPointError as error:
            assert_says_diverged(str(error), values)
            outcomes["diverged"] += 1
        except Exception as error:
            raise AssertionError((pair, values, type(error), str(error))) from error
        else:
            outcomes["trained"] += 1
    print(experiment, dict(outcomes))
    assert outcomes["trained"] > 0.4 * RUNS


@pytest.mark.slow
def test_every_command_line_composes_or_is_explained():
    generator = random.Random(f"command line{SEED}")
    fields = {experiment: fields_of(composed(experiment)) for experiment in TASKS}
    explained = 0
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for _ in range(LINES):
            experiment = generator.choice(list(TASKS))
            names = [*fields[experiment], "experiment", "debug", "recipe", "nonsense"]
            typed = str(draw(generator)).replace("None", "null").replace("'", "")
            sign = generator.choice(["", "", "", "+", "++", "~"])
            override = f"{sign}{generator.choice(names)}={typed}"
            problem = explain_bad_overrides([f"experiment={experiment}", override])
            if problem is None:
                (parsed,) = OverridesParser.create().parse_overrides([override])
                if not parsed.is_sweep_override():
                    compose("config", overrides=[f"experiment={experiment}", override])
            assert problem != "", override
            explained += problem is not None
    assert 0 < explained < LINES
