"""What is measured of tiny trained models, against what their weights say by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from tiny_runs import DEIT, LM, MT, few_pairs, train, write_text

from experiments import measure as command
from experiments.measure import load_scores, load_task, measure
from experiments.scores import EDGES

pytestmark = pytest.mark.slow

__all__ = ["few_pairs"]


@pytest.fixture(scope="module")
def deit(tmp_path_factory):
    return train(tmp_path_factory.mktemp("deit"), DEIT)


@pytest.fixture(scope="module")
def measured(deit):
    return measure(deit)


def first_block(task):
    """Scores of the first attention, (examples, heads, queries, keys), and its normalizer."""
    model = task.model
    images = torch.cat([images for images, _ in task.eval_loaders["test"]])
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        attention = model.blocks[0].attn
        qkv = attention.qkv(model.blocks[0].norm1(tokens)).double()
        query, key, _ = qkv.view(len(images), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return query @ key.transpose(-1, -2) / 8**0.5, attention.normalizer


def test_sampled_rows_are_those_of_their_example_and_head(deit, measured):
    scores, _ = first_block(load_task(deit)[1])
    layer = measured.layers["blocks.0.attn.normalizer"]
    assert layer.scores.dtype == np.float32
    assert len(layer.scores) == 1024
    for row, example, head in zip(layer.scores, layer.examples, layer.heads, strict=True):
        distance = (scores[example, head] - torch.from_numpy(row)).abs().amax(-1)
        assert distance.min() < 1e-5
    queries = [
        (scores[e, h] - torch.from_numpy(row)).abs().amax(-1).argmin().item()
        for row, e, h in zip(layer.scores, layer.examples, layer.heads, strict=True)
    ]
    # Examples are all different, in order; heads and queries are drawn evenly.
    assert (np.diff(layer.examples) > 0).all()
    assert abs(layer.heads.mean() - 0.5) < 4 * 0.5 / 1024**0.5
    counts = np.bincount(queries, minlength=16)
    assert ((counts - 64) ** 2 / 64).sum() < 37.7  # chi-squared with 15 freedoms, p = 0.001


def test_the_histogram_is_of_all_rows(deit, measured):
    scores, normalizer = first_block(load_task(deit)[1])
    with torch.no_grad():
        p = normalizer.double()(scores).flatten().numpy()
    layer = measured.layers["blocks.0.attn.normalizer"]
    assert (layer.rows, layer.probabilities) == (2000 * 2 * 16, p.size)
    expected = np.histogram(p, EDGES)[0]
    # fp32 moves a few over an edge.
    assert np.abs(layer.histogram - expected).sum() < 1e-4 * p.size
    assert layer.share_above(0.1) == pytest.approx((p > 0.1).mean(), abs=1e-4)
    assert layer.share_up_to(1e-3) == pytest.approx((p <= 1e-3).mean(), abs=1e-4)


def test_what_a_run_learned_and_was_told_is_there(deit, measured):
    result = json.loads((deit / "result.json").read_text())
    # But for where it was, which is nothing of the run.
    assert measured.config == result["config"] | {"output_dir": "outputs"}
    assert (measured.split, measured.split_examples, measured.seed) == ("test", 2000, 0)
    assert list(measured.layers) == ["blocks.0.attn.normalizer", "blocks.1.attn.normalizer"]
    for name, layer in measured.layers.items():
        for key, values in layer.scalars.items():
            assert values == pytest.approx(result["learned_scalars"][f"{name}.{key}"], abs=0)
        assert list(layer.scalars) == ["ts", "ranges"]


def test_layers_draw_rows_of_their_own(measured):
    first, second = measured.layers.values()
    np.testing.assert_array_equal(first.examples, second.examples)
    assert 0.4 < (first.heads == second.heads).mean() < 0.6


def test_exact_zeros_are_counted(tmp_path):
    scores = measure(train(tmp_path, [*DEIT, "attention=topk", "attention.k=3"]))
    for layer in scores.layers.values():
        assert layer.zeros == 13 * layer.rows  # of 16
        assert layer.histogram.sum() == 3 * layer.rows


def test_a_language_model_counts_each_token_once(tmp_path):
    write_text(tmp_path)
    folder = train(tmp_path, [*LM, f"data.root={tmp_path}", f"data.cache={tmp_path}"])
    task = load_task(folder)[1]
    tokens = task.splits["test"]
    scores = measure(folder)
    blocks = -(-tokens // 10)
    assert scores.split_examples == blocks
    assert tokens % 10  # the last block is shorter
    (layer,) = scores.layers.values()
    assert layer.rows == 2 * tokens
    # Query i of a block sees its own and all earlier tokens; the first block has no context.
    keys = [min(i, 10) + 6 * (start > 0) for start in range(0, tokens, 10) for i in
            range(1, min(10, tokens - start) + 1)]  # fmt: skip
    assert layer.probabilities == 2 * sum(keys)
    allowed = (layer.scores > -np.inf).sum(1)
    assert len(allowed) == blocks
    assert (allowed >= np.where(layer.examples > 0, 7, 1)).all()
    for row, count in zip(layer.scores, allowed, strict=True):  # hidden keys are the last ones
        assert (row[count:] == -np.inf).all()


def test_translations_have_three_kinds_of_attention(few_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "MOST_SCORES", 20_000)
    folder = train(tmp_path, [*MT, f"data.cache={tmp_path}"])
    pairs = load_task(folder)[1].data.splits["test"]
    source, target = pairs.source.lengths, pairs.target.lengths
    layers = measure(folder).layers
    expected = {
        "encoder.layers.0.self_attn.normalizer": (source.sum(), (source * source).sum()),
        "decoder.layers.0.self_attn.normalizer": (target.sum(), (target * (target + 1) // 2).sum()),
        "decoder.layers.0.encoder_attn.normalizer": (target.sum(), (source * target).sum()),
    }
    assert {name: (of.rows, of.probabilities) for name, of in layers.items()} == {
        name: (2 * rows, 2 * entries) for name, (rows, entries) in expected.items()
    }
    encoder = layers["encoder.layers.0.self_attn.normalizer"]
    allowed = (encoder.scores > -np.inf).sum(1)
    np.testing.assert_array_equal(allowed, source[encoder.examples])
    assert len(encoder.examples) == len(pairs)


def test_as_many_examples_as_fit(monkeypatch, deit):
    monkeypatch.setattr(command, "MOST_SCORES", 100 * 2 * 16 + 31)
    assert [len(layer.examples) for layer in measure(deit).layers.values()] == [100, 100]
    monkeypatch.setattr(command, "MOST_SCORES", 1)
    assert [len(layer.examples) for layer in measure(deit).layers.values()] == [1, 1]


def typed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["measure", *map(str, arguments)])
    command.main()


def test_the_command_writes_the_same_file_each_time(deit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed(monkeypatch, deit)
    (path,) = (tmp_path / "results" / "scores").iterdir()
    assert path.name == f"small_debug_{deit.name}.npz"
    assert capsys.readouterr().out == f"results/scores/{path.name}\n"
    first = path.read_bytes()
    assert len(first) < 400_000
    typed(monkeypatch, deit)
    assert path.read_bytes() == first
    assert list(load_scores()) == [path.stem]


@pytest.fixture
def copy(deit, tmp_path):
    """The run folder, to be damaged."""
    folder = tmp_path / deit.name
    folder.mkdir()
    for file in deit.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "result.json").unlink(), "there is no .*result.json: give the folder of a"),
        (lambda f: (f / "result.json").write_text("{"), r"result\.json is damaged"),
        (lambda f: (f / "result.json").write_text("[]"), r"result\.json is damaged"),
        (lambda f: (f / "config.yaml").unlink(), r"there is no .*config\.yaml"),
        (lambda f: (f / "last.pt").unlink(), r"no checkpoint at .*last\.pt"),
        (
            lambda f: (f / "last.pt").write_bytes((f / "last.pt").read_bytes()[:-5000]),
            r"last\.pt cannot be read",
        ),
        (lambda f: edit(f / "config.yaml", "crop_padding: 1", "crop_padding: 0"), "settings of"),
        (lambda f: edit(f / "config.yaml", "depth: 2", "depth: 3"), "settings of"),
        (lambda f: edit(f / "result.json", '"data": "', '"data": "0'), "data of .* are not those"),
        (lambda f: edit(f / "result.json", "image_class", "other_class"), "was trained for"),
    ],
)
def test_unfinished_and_damaged_runs_are_refused(copy, monkeypatch, damage, said):
    damage(copy)
    monkeypatch.chdir(copy.parent)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        typed(monkeypatch, copy)
    assert not (copy.parent / "results").exists()
