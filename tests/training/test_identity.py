"""A run belongs to its data and to its first weights; another one does not go on from it."""

import gzip
import shutil
import struct

import numpy as np
import pytest
import torch
from tiny import assert_same, interrupted, only, outcome, run_quietly, state, tiny_config

from multimax.data.images import build_image_data
from multimax.data.pairs import build_pair_source
from multimax.data.text import build_text_source
from multimax.files import load_checkpoint
from multimax.tasks import data_fingerprint
from multimax.training.config import config_hash, read_config

NAMES = ("ts", "ranges")
# The weights stay as they are.
STILL = ("optimizer.lr=1e-20", "schedule.warmup_lr=0", "schedule.min_lr=0")


def write_images(root, seed=0, count=120):
    """Fashion-MNIST's four files, with noise."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for begin, size in (("train", count), ("t10k", 40)):
        pixels = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        images = struct.pack(">4I", 0x803, size, 28, 28) + pixels.tobytes()
        labels = struct.pack(">2I", 0x801, size) + bytes(i % 10 for i in range(size))
        (root / f"{begin}-images-idx3-ubyte").write_bytes(images)
        (root / f"{begin}-labels-idx1-ubyte").write_bytes(labels)
    return root


@pytest.fixture
def config(tmp_path):
    """Composes a run on files that `write_images` made."""

    def make(root, *overrides):
        data = "data=fashion_mnist", f"data.root={root}", "data.valid_size=40"
        return tiny_config(tmp_path / "out", *data, *overrides)

    return make


@pytest.mark.slow
def test_a_result_of_other_data_is_not_shown(tmp_path, config):
    one, other = write_images(tmp_path / "one"), write_images(tmp_path / "other", seed=1)
    first = run_quietly(config(one))
    assert first["inputs"] == {"data": data_fingerprint(read_config(config(one))), "weights": None}
    with pytest.raises(ValueError, match=r"result\.json is of other data .*resume=never keeps it"):
        run_quietly(config(other))
    with pytest.raises(FileNotFoundError, match=r"neither .*nowhere"):
        run_quietly(config(tmp_path / "nowhere"))
    assert run_quietly(config(one)) == first
    one.rename(tmp_path / "moved")
    assert run_quietly(config(tmp_path / "moved")) == first
    second = run_quietly(config(other, "resume=never"))
    assert second["inputs"] != first["inputs"]
    assert second["config_hash"] == first["config_hash"]


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data(tmp_path, config, monkeypatch):
    one, other = write_images(tmp_path / "one"), write_images(tmp_path / "other", seed=1)
    interrupted(config(one), monkeypatch, 3)
    checkpoint, recorded = only(tmp_path, "last.pt"), only(tmp_path, "config.yaml").read_text()
    for resume in ("auto", str(checkpoint)):
        with pytest.raises(ValueError, match=r"last\.pt is of other data .*weights="):
            run_quietly(config(other, f"resume={resume}"))
        assert only(tmp_path, "config.yaml").read_text() == recorded
    one.rename(tmp_path / "moved")
    result = run_quietly(config(tmp_path / "moved"))
    assert (result["updates"], result["origin"]) == (4, None)


FINGERPRINTS = {
    "images": lambda root: build_image_data("fashion_mnist", root=root, valid_size=10),
    "folders": lambda root: build_image_data("timm", root=root / "folders", num_workers=0),
    "text": lambda root: build_text_source(
        "text_files", root=root, vocabulary_size=300, block_size=8, context_window=0
    ),
    "pairs": lambda root: build_pair_source("iwslt14", root=str(root)),
}


def write_everything(root):
    write_images(root)
    for split in ("train", "valid", "test"):
        (root / f"{split}.txt").write_text(f"some words of {split}\n" * 9)
        (root / f"{split}.de").write_text("ein satz\n")
        (root / f"{split}.en").write_text("a sentence\n")
    for split in ("train", "val"):
        for label in "ab":
            (root / "folders" / split / label).mkdir(parents=True)
            (root / "folders" / split / label / "1.png").write_bytes(b"12345")
    return root


CHANGES = {
    "images": ("t10k-images-idx3-ubyte", lambda old: old[:-1] + bytes([old[-1] ^ 1])),
    "folders": ("folders/val/b/1.png", lambda old: old + b"6"),
    "text": ("test.txt", lambda old: old.replace(b"words", b"worms", 1)),
    "pairs": ("valid.de", lambda old: b"ein setz\n"),
}


@pytest.mark.parametrize("kind", FINGERPRINTS)
def test_a_fingerprint_is_of_the_content_alone(tmp_path, kind):
    make, (name, change) = FINGERPRINTS[kind], CHANGES[kind]
    root = write_everything(tmp_path / "root")
    before = make(root).fingerprint
    assert len(before) == 16
    root.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", root)
    assert make(root).fingerprint == make(tmp_path / "moved").fingerprint == before
    (root / name).write_bytes(change((root / name).read_bytes()))
    assert make(root).fingerprint != before


def test_zipped_text_is_the_same_data(tmp_path):
    root = write_everything(tmp_path / "root")
    before = FINGERPRINTS["text"](root).fingerprint
    content = (root / "valid.txt").read_bytes()
    (root / "valid.txt").unlink()
    (root / "valid.txt.gz").write_bytes(gzip.compress(content))
    assert FINGERPRINTS["text"](root).fingerprint == before


def test_a_renamed_image_is_other_data(tmp_path):
    root = write_everything(tmp_path / "root")
    before = FINGERPRINTS["folders"](root).fingerprint
    (root / "folders" / "train" / "a" / "1.png").rename(root / "folders" / "train" / "a" / "2.png")
    assert FINGERPRINTS["folders"](root).fingerprint != before


@pytest.mark.parametrize(
    ("one", "other"),
    [("attention.temperature=1", "attention.temperature=1.0"), ("loss.mixup=0", "loss.mixup=0.0")],
)
def test_spelling_does_not_make_another_run(tmp_path, one, other):
    configs = [read_config(tiny_config(tmp_path, "attention=softmax", o)) for o in (one, other)]
    assert config_hash(configs[0]) == config_hash(configs[1])


@pytest.mark.slow
def test_begin_with_weights(tmp_path):
    """The weights of a run, in a run of its own; not its optimizer, and not its position."""
    run_quietly(tiny_config(tmp_path / "one", "optimizer.lr=1e-2"))
    best = only(tmp_path / "one", "best.pt")
    options = f"weights={best}", *STILL
    result = run_quietly(tiny_config(tmp_path / "two", *options))
    assert_same(state(tmp_path / "two")["model"], load_checkpoint(best)["model"])
    assert (result["updates"], result["origin"]) == (4, f"weights of {best}")
    assert result["config"]["weights"] == str(best)
    fresh = run_quietly(tiny_config(tmp_path / "two", *options[1:]))
    assert fresh["config_hash"] != result["config_hash"]
    assert run_quietly(tiny_config(tmp_path / "two", *options)) == result
    shutil.copy(only(tmp_path / "one", "last.pt"), best)
    with pytest.raises(ValueError, match=r"result\.json began with other weights"):
        run_quietly(tiny_config(tmp_path / "two", *options))


@pytest.mark.slow
def test_a_run_that_began_with_weights_resumes(tmp_path, monkeypatch):
    run_quietly(tiny_config(tmp_path / "one", "optimizer.lr=1e-2"))
    option = f"weights={only(tmp_path / 'one', 'best.pt')}"
    whole = run_quietly(tiny_config(tmp_path / "whole", option))
    interrupted(tiny_config(tmp_path / "parts", option), monkeypatch, 3)
    parts = run_quietly(tiny_config(tmp_path / "parts", option))
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert parts["origin"] == whole["origin"]


@pytest.mark.slow
def test_softmax_goes_on_with_multimax(tmp_path):
    """Only scalars of normalizers may be missing: they begin as configured."""
    softmax = "attention=softmax", "output=softmax"
    run_quietly(tiny_config(tmp_path / "one", *softmax))
    weights = only(tmp_path / "one", "best.pt")
    identity = "attention.init=identity", "output.init=identity"
    result = run_quietly(tiny_config(tmp_path / "two", f"weights={weights}", *STILL, *identity))
    assert result["origin"] == f"weights of {weights}; 4 normalizer scalars as configured"
    expected = run_quietly(tiny_config(tmp_path / "three", f"weights={weights}", *softmax, *STILL))
    assert result["metrics"]["test"]["loss"] == pytest.approx(
        expected["metrics"]["test"]["loss"], rel=1e-5
    )
    multimax = only(tmp_path / "two", "last.pt")
    with pytest.raises(ValueError, match=r"weights=.* 4 are not known here .*use the model and"):
        run_quietly(tiny_config(tmp_path / "four", f"weights={multimax}", *softmax))


@pytest.mark.slow
def test_layers_that_share_their_scalars_begin_with_weights(tmp_path):
    """Of SoftMax, of layers that share too, but not of layers with scalars of their own."""
    shared = "model.depth=2", "attention.shared=true"
    run_quietly(tiny_config(tmp_path / "softmax", "model.depth=2", "attention=softmax"))
    weights = only(tmp_path / "softmax", "last.pt")
    result = run_quietly(tiny_config(tmp_path / "one", *shared, f"weights={weights}"))
    assert result["origin"] == f"weights of {weights}; 4 normalizer scalars as configured"
    names = list(result["learned_scalars"])
    assert names == [f"{m}.{n}" for m in ("blocks.0.attn.normalizer", "output") for n in NAMES]
    assert {"blocks.0.attn.normalizer", "blocks.1.attn.normalizer"} < set(result["normalizers"])
    weights = only(tmp_path / "one", "last.pt")
    run_quietly(tiny_config(tmp_path / "two", *shared, *STILL, f"weights={weights}"))
    assert_same(state(tmp_path / "two")["model"], load_checkpoint(weights)["model"])
    apart = run_quietly(tiny_config(tmp_path / "three", "model.depth=2", f"weights={weights}"))
    assert apart["parameters"] == result["parameters"] + 8
    weights = only(tmp_path / "three", "last.pt")
    with pytest.raises(ValueError, match=r"weights=.* other scalars in blocks\.1\.attn\."):
        run_quietly(tiny_config(tmp_path / "four", *shared, f"weights={weights}"))


@pytest.mark.slow
def test_official_and_converted_checkpoints_begin_a_run(tmp_path):
    from argparse import Namespace

    from multimax.models.official_names import to_official_state_dict
    from multimax.tasks import build_task

    config = read_config(tiny_config(tmp_path / "one"))
    model = build_task(config, 0, 1, torch.device("cpu")).model
    official = {"model": to_official_state_dict(model), "args": Namespace(lr=1), "epoch": 3}
    converted = {"class": "X", "options": {}, "model": model.state_dict()}
    for name, content in (("official.pth", official), ("converted.pt", converted)):
        torch.save(content, tmp_path / name)
        options = f"weights={tmp_path / name}", *STILL
        run_quietly(tiny_config(tmp_path / name[:-4], *options))
        trained = dict(state(tmp_path / name[:-4])["model"])
        torch.testing.assert_close(trained, dict(model.state_dict()), rtol=0, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (None, (), r"weights=.*w\.pt must be a checkpoint file: there is none"),
        ([1, 2], (), r"w\.pt holds a list, which is no checkpoint: give another one"),
        ({"a": 1}, (), r"weights=.*w\.pt holds no weights"),
        ({"a": torch.ones(2)}, (), r"weights=.* weights are missing there .* 1 are not known here"),
        ({"a": torch.ones(2)}, ("resume=x.pt",), r"weights=.* and resume=x\.pt .*give one of them"),
    ],
)
def test_what_cannot_begin_a_run(tmp_path, content, overrides, message):
    path = tmp_path / "w.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_quietly(tiny_config(tmp_path / "out", f"weights={path}", *overrides))
    assert not list(tmp_path.rglob("last.pt"))
