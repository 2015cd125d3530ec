"""The figure of the propositions and its numbers, on planted scores."""

import json

import numpy as np
import pytest
import torch
from planted import planted

from experiments.figures import propositions
from experiments.propositions import QUANTILES, T_B, T_D, quantiles, region
from experiments.scores import save_scores


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The numbers of the figure of a planted pair of runs, and the files."""
    few = {propositions.DRAWN_AT_RANDOM: torch.randn(5, 4, dtype=torch.float64)}
    monkeypatch.setattr(propositions, "random_scores", lambda: few)
    source = tmp_path / "results" / "scores"
    for cell in ("softmax", "multimax2-attention"):
        save_scores(source / f"small_{cell}.npz", planted("table2", cell))
    files = propositions.draw(tmp_path / "results" / "figures", source)
    assert [file.name for file in files] == [
        "propositions.png",
        "propositions.pdf",
        "propositions.json",
        "propositions.md",
    ]
    assert {file.parent.name for file in files[2:]} == {"results"}
    assert files[0].read_bytes()[:4] == b"\x89PNG"
    lines = files[3].read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == [
        f"| {propositions.DRAWN_AT_RANDOM}",
        "| DeiT, trained with SoftMax",
    ]
    return json.loads(files[2].read_text())


@pytest.mark.slow
def test_numbers_are_of_the_pooled_scores(drawn):
    layers = planted("table2", "softmax").layers.values()
    pooled = torch.from_numpy(np.concatenate([layer.scores for layer in layers])).double()
    found = drawn["proposition_2"]
    name = "DeiT, trained with SoftMax"
    shares = np.array(found["share_with_both"][name])
    assert shares.shape == (len(QUANTILES), len(T_B), len(T_D))
    expected = region(pooled, *quantiles(pooled, QUANTILES[1]), T_B[2:3], T_D[4:5])[0][0]
    assert shares[1, 2, 4] == pytest.approx(expected.both / expected.rows, abs=1e-4)
    assert found["rows"][name] == expected.rows == 80 - expected.undefined
    assert drawn["proposition_1"][name][0]["rows_with_s"] == 80


@pytest.mark.slow
def test_learned_scalars_are_counted_by_layer(drawn):
    (of_layers,) = drawn["learned"].values()
    assert list(of_layers) == ["blocks.0.attn.normalizer", "blocks.1.attn.normalizer"]
    for counts in of_layers.values():
        # t_b = 2 and t_d = 0.5, with b at the mean of the scores: most rows gain both.
        assert counts["rows"] >= 35
        assert counts["both"] > 0.5 * counts["rows"]
        assert counts["both"] <= min(counts["sparser"], counts["more_multi_modal"])
