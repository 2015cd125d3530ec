"""The figures of measured scores: what they show, of which runs, and what they refuse."""

import json
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from planted import NAMES, planted

from experiments.figures import __main__ as command
from experiments.figures import pareto, saving
from experiments.figures import scores as histograms
from experiments.scores import EDGES, save_scores


def saved(folder, *studies):
    """Measured runs; those with MultiMax have larger scores and probabilities."""
    for study in studies:
        for cell, shift in (("softmax", 0.0), ("multimax2-attention", 1.0)):
            save_scores(folder / f"small_{study}_{cell}.npz", planted(study, cell, shift=shift))
    return folder


@pytest.fixture
def source(tmp_path):
    """Measured runs of DeiT."""
    return saved(tmp_path / "results" / "scores", "table2")


@pytest.fixture
def shown(monkeypatch):
    """The figures that are saved, which stay open."""
    figures = []

    def save(figure, folder, name, *_):
        figures.append((name, figure))
        return [folder / name]

    monkeypatch.setattr(histograms, "save", save)
    monkeypatch.setattr(pareto, "save", save)
    yield figures
    for _, figure in figures:
        plt.close(figure)


def texts(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.slow
def test_histograms_of_every_layer(source, tmp_path, shown):
    histograms.draw(tmp_path, saved(source, *NAMES))
    assert [name for name, _ in shown] == ["scores_deit", "scores_lm", "scores_mt"]
    titles = [[axes.get_title() for axes in figure.axes] for _, figure in shown]
    assert titles[0] == ["block 0", "block 1"]
    assert titles[1] == ["decoder 0, self-attention"]
    assert titles[2][:5] == [
        *(f"encoder {n}, self-attention" for n in range(3)),
        "decoder 0, self-attention",
        "decoder 0, cross-attention",
    ]
    # Of 5,030 (and 100 more) probabilities 30 are 0, 2,900 up to 10^-3 and 500 above 10^-1.
    assert texts(shown[0][1].axes[0]) == [
        f"≤ 0.001: {2930 / 50.30:.1f} %     > 0.1: {500 / 50.30:.1f} %",
        f"≤ 0.001: {2930 / 51.30:.1f} %     > 0.1: {600 / 51.30:.1f} %",
    ]
    assert "seed 0, 20 test examples" in shown[0][1].get_suptitle()


def test_the_bars_are_all_probabilities():
    layer = planted("table2", "softmax").layers["blocks.0.attn.normalizer"]
    edges, shares = histograms.shown_shares(layer)
    assert shares.sum() == pytest.approx(1)
    assert edges[0] == pytest.approx(1e-7)
    assert len(edges) == len(shares) + 1
    below = 30 + layer.histogram[EDGES[1:] < 1.4e-7].sum()  # and the bin that begins at 1e-7
    assert shares[0] == pytest.approx(below / 5030)


@pytest.mark.slow
def test_the_front_and_its_numbers(source, tmp_path, shown):
    folder = tmp_path / "results" / "figures"
    written = pareto.draw(folder, source)
    assert [name for name, _ in shown] == ["pareto_deit"]
    assert written[-1] == tmp_path / "results" / "pareto.json"
    found = json.loads(written[-1].read_text())
    assert list(found) == ["deit"]
    deit = found["deit"]
    assert (deit["cell"], deit["seeds"]) == ("multimax2-attention", [0])
    assert list(deit["scores_of"]) == ["SoftMax", "MultiMax"]
    for axes, numbers in zip(shown[0][1].axes, deit["scores_of"].values(), strict=True):
        assert (numbers["examples"], numbers["rows"]) == (20, 80)
        front = [(p["sparsity"], p["multi_modality"]) for p in numbers["front"]]
        line = next(line for line in axes.lines if line.get_label() == "front of all")
        np.testing.assert_allclose(line.get_xydata(), front)
        learned = numbers["comparisons"][0]
        of = learned["difference_by_layer"]
        said = f"{of['value']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]"
        assert f"learned against SoftMax: {said}" in texts(axes)[-1].splitlines()
    assert {p["normalizer"] for p in numbers["points"]} == {
        "SoftMax",
        "entmax",
        "evidential SoftMax",
    }


@pytest.mark.slow
def test_all_seeds_are_in_the_front(source, tmp_path, shown):
    for cell in ("softmax", "multimax2-attention"):
        save_scores(source / f"again_{cell}.npz", planted("table2", cell, seed=3))
    found = json.loads(pareto.draw(tmp_path / "figures", source)[-1].read_text())["deit"]
    assert found["seeds"] == [0, 3]
    numbers = found["scores_of"]["SoftMax"]
    assert (numbers["examples"], numbers["rows"]) == (20, 160)  # the same test examples
    assert "seed 0, 3" in shown[0][1].get_suptitle()


@pytest.mark.slow
def test_the_learned_scalars_are_those_of_the_run_with_multimax(source):
    layers = pareto.layers_of(pareto.measured_pairs(source)["deit"])
    assert [rows.learned for rows in layers["SoftMax"]] == [
        rows.learned for rows in layers["MultiMax"]
    ]
    means = [np.mean([rows.scores.mean() for rows in of]) for of in layers.values()]
    assert means[1] - means[0] == pytest.approx(1, abs=0.01)  # as planted


def typed(monkeypatch, *names):
    monkeypatch.setattr(sys, "argv", ["figures", *names])
    command.main()


@pytest.mark.slow
def test_the_command_writes_the_same_files_each_time(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / "figures"
    typed(monkeypatch, "scores", "pareto")
    files = ["results/figures/scores_deit.png", "results/figures/scores_deit.pdf",
             "results/figures/pareto_deit.png", "results/figures/pareto_deit.pdf",
             "results/pareto.json"]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == files
    first = {file: (tmp_path / file).read_bytes() for file in files}
    assert first[files[0]].startswith(b"\x89PNG")
    assert first[files[1]].startswith(b"%PDF")
    typed(monkeypatch, "scores", "pareto")
    assert {file: (tmp_path / file).read_bytes() for file in files} == first
    assert len(list(folder.iterdir())) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nonsense"], "unknown figure 'nonsense'"),
        (["scores"], "results/scores has no run with SoftMax"),
        (["pareto"], "results/scores has no run with SoftMax"),
        (["maps"], "outputs/small/deit has no finished run"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch, names, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        typed(monkeypatch, *names)
    assert not list(tmp_path.iterdir())


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    figure, _ = plt.subplots()
    (path,) = saving.save(figure, tmp_path, "old", [".png"])
    before = path.read_bytes()
    figure, axes = plt.subplots()
    axes.set_title("$\\unknown$")  # fails when it is drawn
    with pytest.raises(ValueError, match="unknown"):
        saving.save(figure, tmp_path, "old", [".png"])
    plt.close(figure)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
