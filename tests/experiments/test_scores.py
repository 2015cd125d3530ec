"""The files of measured scores: what is written comes back, and what is damaged is refused."""

import re

import numpy as np
import pytest

from experiments.scores import EDGES, LayerScores, Scores, load_scores, save_scores


def layer(rows=3, histogram=None, zeros=0, **others):
    histogram = np.zeros(len(EDGES) - 1, np.int64) if histogram is None else histogram
    scores = np.linspace(-3, 3, rows * 4, dtype=np.float32).reshape(rows, 4)
    scores[0, 2:] = -np.inf
    examples = np.arange(rows, dtype=np.int32)
    return LayerScores(scores, examples, examples % 2, histogram, zeros, rows, **others)


def scores(*layers, seed=3):
    return Scores({"seed": seed}, "test", 50, {f"attn.{i}": of for i, of in enumerate(layers)})


def test_what_is_saved_is_loaded(tmp_path):
    saved = scores(layer(scalars={"ts": [0.1, -0.2]}, zeros=4), layer(5))
    save_scores(tmp_path / "small_deit_run.npz", saved)
    (tmp_path / "something.txt").write_text("else")
    (name, loaded), *more = load_scores(tmp_path).items()
    assert name == "small_deit_run"
    assert not more
    assert (loaded.seed, loaded.split, loaded.split_examples) == (3, "test", 50)
    assert list(loaded.layers) == ["attn.0", "attn.1"]
    for one, other in zip(loaded.layers.values(), saved.layers.values(), strict=True):
        for key in ("scores", "examples", "heads", "histogram"):
            np.testing.assert_array_equal(getattr(one, key), getattr(other, key))
        assert (one.zeros, one.rows, one.scalars) == (other.zeros, other.rows, other.scalars)


def test_the_same_scores_are_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        save_scores(tmp_path / f"{name}.npz", scores(layer()))
    save_scores(tmp_path / "another.npz", scores(layer(), seed=4))
    one, other, another = (
        (tmp_path / f"{name}.npz").read_bytes() for name in ("one", "other", "another")
    )
    assert one == other != another


def test_shares_of_probabilities():
    # 2 zeros, 3 in (0, 1e-9], 10 in (10^-3.125, 1e-3], 20 in (1e-3, 10^-2.875], 5 in (10^-1, ...].
    ends = np.log10(EDGES[1:])
    counts = {-9: 3, -3: 10, -2.875: 20, -0.875: 5}
    histogram = sum(n * np.isclose(ends, end).astype(np.int64) for end, n in counts.items())
    found = layer(histogram=histogram, zeros=2)
    assert found.probabilities == 40
    assert found.share_up_to(1e-3) == pytest.approx(15 / 40)
    assert found.share_above(0.1) == pytest.approx(5 / 40)
    with pytest.raises(ValueError, match=r"0\.2 is no edge"):
        found.share_above(0.2)


def test_edges_have_the_powers_of_ten():
    assert (np.diff(EDGES) > 0).all()
    assert EDGES[0] == 0
    assert EDGES[-1] == 1
    for power in range(-9, 1):
        assert np.isclose(EDGES, 10.0**power, rtol=1e-12, atol=0).sum() == 1


def rewritten(path, **arrays):
    with np.load(path) as content:
        arrays = dict(content) | arrays
    np.savez_compressed(path, **arrays)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "zip"),
        (lambda path: path.write_bytes(b""), ""),
        (lambda path: path.write_bytes(b"x" * 500), "pickle"),
        (lambda path: rewritten(path, about=np.frombuffer(b'{"schema": 0}', np.uint8)), "version"),
        (lambda path: rewritten(path, edges=EDGES * 2), "version"),
        (lambda path: rewritten(path, about=np.frombuffer(b"{", np.uint8)), "Expecting"),
        (lambda path: rewritten(path, examples_0=np.zeros(2, np.int32)), r"examples of attn\.0"),
        (lambda path: rewritten(path, scores_0=np.zeros((3, 4))), r"scores of attn\.0 are float64"),
        (lambda path: rewritten(path, scores_0=np.array([None])), "allow_pickle"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, damage, said):
    path = tmp_path / "small_deit_run.npz"
    save_scores(path, scores(layer()))
    damage(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged.*{said}.*measure"):
        load_scores(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "small_deit_run.npz"
    save_scores(path, scores(layer(40)))
    content = bytearray(path.read_bytes())
    content[content.index(b"scores_0.npy") + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        load_scores(tmp_path)


def test_no_folder_has_no_scores(tmp_path):
    assert load_scores(tmp_path / "none") == {}


def test_numbers_that_are_not_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_scores(tmp_path / "run.npz", scores(layer(scalars={"ts": [float("nan")]})))
    assert not list(tmp_path.iterdir())
