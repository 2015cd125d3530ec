"""Finished runs of all tasks that train for two updates, for the tests of what reads them."""

from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from rich.console import Console

from multimax.data.pairs.sources import LibreOfficeHelp
from multimax.training.run import run

ROOT = Path(__file__).parents[1]
TEXT = "the cat sat on the mat\nthe dog ate the hat of the cat\n\n"
DEIT = [
    "experiment=deit_multimax", "debug=two_updates", "model.depth=2", "model.embed_dim=16",
    "model.num_heads=2", "trainer.batch_size=20",
]  # fmt: skip
LM = [
    "experiment=lm_multimax", "debug=two_updates", "model.depth=1", "model.embed_dim=16",
    "model.ffn_dim=16", "model.num_heads=2", "data=text_files", "data.vocabulary_size=270",
    "data.block_size=16", "data.context_window=6", "trainer.batch_size=4",
]  # fmt: skip
MT = [
    "experiment=mt_multimax", "debug=two_updates", "model.encoder_depth=1", "model.decoder_depth=1",
    "model.embed_dim=16", "model.ffn_dim=16", "model.num_heads=2", "data.vocabulary_size=300",
    "trainer.batch_size=256", "decoding.beam=2", "decoding.max_len_a=0", "decoding.max_len_b=4",
]  # fmt: skip


def settings_of(name, folder):
    """What `train.py` takes for a run of a task whose data is below a folder."""
    return {
        "deit": DEIT,
        "lm": [*LM, f"data.root={folder}", f"data.cache={folder}"],
        "mt": [*MT, f"data.cache={folder}"],
    }[name]


def train(folder, overrides):
    """The folder of a run, which is below another one."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("config", [*overrides, f"output_dir={folder}/out"])
    with open("/dev/null", "w") as nowhere:
        run(config, Console(file=nowhere))
    AcceleratorState._reset_state()
    (result,) = (folder / "out").rglob("result.json")
    return result.parent


def write_text(folder, **times):
    """A text data set, with so many repetitions of a text in each split."""
    for split, number in ({"train": 30, "valid": 4, "test": 5} | times).items():
        (folder / f"{split}.txt").write_text(TEXT * number)


@contextmanager
def fewer_pairs():
    """The embedded sentence pairs are 60 in each split."""
    columns = LibreOfficeHelp._columns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LibreOfficeHelp, "_columns", lambda self, split: islice(columns(self, split), 60)
        )
        yield


@pytest.fixture(scope="module")
def few_pairs():
    """Of the embedded sentence pairs, 60 of each split."""
    with fewer_pairs():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run for each of deit, lm and mt."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("deit", "lm", "mt")}
    write_text(folders["lm"])
    with fewer_pairs():
        return {name: train(folder, settings_of(name, folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def runs(trained, few_pairs):
    """The same, with the data that they were trained on."""
    return trained
