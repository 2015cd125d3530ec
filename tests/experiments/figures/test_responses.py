"""The figure of learned modulators: which layers are in it, and that its curves are theirs."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from planted import SCALARS, planted, recorded

from experiments.figures import responses
from experiments.figures.responses import UNMEASURED, measured_layers, place_of, recorded_layers
from experiments.modulators import colors_of, modulators
from experiments.results import load
from experiments.scores import save_scores
from experiments.selection import study_of

BLOCKS = ("blocks.0.attn.normalizer", "blocks.1.attn.normalizer")
ONE, OTHER = ([-0.5, -0.25], [1.0, 2.0]), ([0.5, 0.75], [0.0, -1.0])


def sigma(x, ts, ranges):
    """The modulator of the first order, by hand: the two pieces do not meet."""
    (low, high), (b, d) = ts, ranges
    return np.where(x < b, x + low * (b - x), x) + np.where(x > d, high * (x - d), 0)


def learned(layers):
    """The learned scalars of a result, by layer."""
    return {
        f"{name}.{key}": values
        for name, of in layers.items()
        for key, values in zip(("ts", "ranges"), of, strict=True)
    }


def store(folder, study, cell, layers, seed=0, others=()):
    """A recorded run with these modulators."""
    config = recorded(study, cell, *others) | {"seed": seed}
    result = {
        "schema": 2,
        "experiment": "any",
        "task": config["task"]["name"],
        "scale": "small",
        "seed": seed,
        "config": config,
        "metrics": {"test": {"top1": 80.0, "examples": 10}},
        "normalizers": {},
        "training_seconds": 1.0,
        "learned_scalars": learned(layers),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"run{len(list(folder.iterdir()))}.json").write_text(json.dumps(result))


@pytest.fixture
def runs(tmp_path):
    """Two seeds with MultiMax in the attention, one run with it everywhere, and others."""
    folder = tmp_path / "runs"
    attention = dict.fromkeys(BLOCKS, ONE)
    store(folder, "table2", "multimax1-attention", attention, seed=0)
    store(folder, "table2", "multimax1-attention", attention | {BLOCKS[1]: OTHER}, seed=3)
    store(folder, "table2", "multimax1-both", attention | {"output": OTHER})
    store(folder, "table2", "softmax", {})
    changed = ["optimizer.lr=0.5"]  # no run of the table
    store(folder, "table2", "multimax1-attention", {BLOCKS[0]: OTHER}, others=changed)
    return folder


@pytest.fixture
def shown(monkeypatch):
    """The figures by name, in the place of their files."""
    figures = {}

    def save(figure, folder, name):
        figures[name] = figure
        return [folder / name]

    monkeypatch.setattr(responses, "save", save)
    yield figures
    for figure in figures.values():
        plt.close(figure)


def panel(figure, title):
    (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
    return axes


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.slow
def test_layers_are_those_of_the_runs_of_the_study(runs):
    found = recorded_layers(study_of("table2"), load(runs))
    assert sorted((of.layer, of.everywhere, of.seed) for of in found) == [
        ("blocks.0.attn", False, 0),
        ("blocks.0.attn", False, 3),
        ("blocks.0.attn", True, 0),
        ("blocks.1.attn", False, 0),
        ("blocks.1.attn", False, 3),
        ("blocks.1.attn", True, 0),
        ("output", True, 0),
    ]
    (of,) = (of for of in found if (of.layer, of.seed) == ("blocks.1.attn", 3))
    assert (of.ts.tolist(), of.ranges.tolist()) == OTHER
    assert of.panel == (1, "attention")


@pytest.mark.slow
def test_thin_lines_are_seeds_and_thick_ones_their_mean(runs, tmp_path, shown):
    responses.draw(tmp_path, runs, tmp_path / "nothing")
    assert list(shown) == ["responses_deit"]
    axes = panel(shown["responses_deit"], "attention, order 1")
    identity, *lines = axes.lines
    assert identity.get_linestyle() == "--"
    x = np.asarray(identity.get_xdata())
    assert (x[0], x[-1]) == UNMEASURED
    np.testing.assert_array_equal(x, identity.get_ydata())
    one, other = sigma(x, *ONE), sigma(x, *OTHER)
    solid = [(one, 0.7), (one, 0.7), (one, 2), (one, 0.7), (other, 0.7), ((one + other) / 2, 2)]
    both = [(one, 2), (one, 2)]
    for line, (curve, width) in zip(lines, solid + both, strict=True):
        np.testing.assert_allclose(line.get_ydata(), curve, atol=1e-5)
        assert line.get_linewidth() == width
    assert {line.get_linestyle() for line in lines[:6]} == {"-"}
    assert {line.get_linestyle() for line in lines[6:]} == {"-."}
    colors = [tuple(line.get_color()) for line in lines]
    assert colors == [colors[0]] * 3 + [colors[3]] * 3 + [colors[0], colors[3]]
    assert colors[0] != colors[3]
    assert legend(axes) == ["block 0", "block 1", "here only (seeds: 2)",
                            "at both places (seeds: 1)"]  # fmt: skip
    output = panel(shown["responses_deit"], "output layer, order 1")
    np.testing.assert_allclose(output.lines[1].get_ydata(), other, atol=1e-5)
    assert output.lines[1].get_color() == "tab:red"
    assert shown["responses_deit"].get_suptitle() == "DeiT: learned modulators, seed 0, 3"


@pytest.mark.slow
def test_scores_are_drawn_below_the_layers_that_received_them(runs, tmp_path, shown):
    two = dict.fromkeys(BLOCKS, (SCALARS["ts"], SCALARS["ranges"]))
    store(runs, "table2", "multimax2-attention", two)
    measured = planted("table2", "multimax2-attention", shift=1.5)
    first = measured.layers[BLOCKS[0]].scores
    first[0, :3] = -np.inf  # masked
    save_scores(tmp_path / "scores" / "one.npz", measured)
    save_scores(tmp_path / "scores" / "other.npz", planted("table2", "softmax"))
    responses.draw(tmp_path, runs, tmp_path / "scores")
    figure = shown["responses_deit"]
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["attention, order 1", "output layer, order 1", "", "",
                      "attention, order 2", "output layer, order 2", "", ""]  # fmt: skip
    pooled = np.concatenate([layer.scores.ravel() for layer in measured.layers.values()])
    expected = np.quantile(pooled[np.isfinite(pooled)], [0.001, 0.999])
    for title in ("attention, order 1", "attention, order 2"):
        x = panel(figure, title).lines[0].get_xdata()
        np.testing.assert_allclose([x[0], x[-1]], expected, rtol=1e-5)
    histogram = figure.axes[6]
    assert [text.get_text() for text in histogram.texts] == [
        "where 957 scores of test examples lay"
    ]
    values, edges, _ = histogram.patches[0].get_data()
    counts = np.histogram(first[np.isfinite(first)], edges)[0]
    np.testing.assert_allclose(values, counts / counts.sum())
    assert histogram.patches[0].get_edgecolor() == pytest.approx(
        tuple(panel(figure, "attention, order 2").lines[1].get_color())
    )
    assert not any(figure.axes[index].axison for index in (2, 3, 7))
    assert legend(panel(figure, "attention, order 2"))[-1] == "here only (seeds: 1)"
    (text,) = panel(figure, "output layer, order 2").texts
    assert text.get_text() == "no run"


@pytest.mark.slow
def test_only_layers_with_multimax_have_measured_scores():
    scores = {cell: planted("table2", cell) for cell in ("softmax", "multimax2-both")}
    found = measured_layers(study_of("table2"), scores)
    assert [(of.layer, of.everywhere) for of in found] == [
        ("blocks.0.attn", True),
        ("blocks.1.attn", True),
    ]
    assert [of.panel for of in found] == [(2, "attention")] * 2


def test_places():
    layers = {
        "blocks.3.attn": "attention",
        "encoder.layers.0.self_attn": "self-attention of the encoder",
        "decoder.layers.0.self_attn": "self-attention of the decoder",
        "decoder.layers.0.encoder_attn": "cross-attention",
        "decoder.output_projection": "output layer",
        "output": "output layer",
    }
    assert {layer: place_of(layer) for layer in layers} == layers


def test_the_output_layer_of_every_model_is_red():
    scalars = learned(dict.fromkeys(("blocks.0.attn.normalizer", "output"), ONE))
    scalars |= learned({"decoder.output_projection.normalizer": ONE})
    colors = colors_of(modulators(scalars))
    assert colors["output"] == colors["decoder.output_projection"] == "tab:red"
    assert list(colors) == ["blocks.0.attn", "output", "decoder.output_projection"]
    assert not isinstance(colors["blocks.0.attn"], str)


@pytest.mark.slow
def test_without_a_run_there_is_an_error_and_no_file(tmp_path):
    store(tmp_path / "runs", "table2", "softmax", {})
    with pytest.raises(FileNotFoundError, match=r"runs has no run with MultiMax: python train\.py"):
        responses.draw(tmp_path / "figures", tmp_path / "runs", tmp_path / "scores")
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
def test_it_is_drawn(runs, tmp_path):
    png, pdf = responses.draw(tmp_path / "figures", runs, tmp_path / "scores")
    assert (png.name, pdf.name) == ("responses_deit.png", "responses_deit.pdf")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert pdf.read_bytes().startswith(b"%PDF")
