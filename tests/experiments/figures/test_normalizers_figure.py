"""What each normalizer makes of ten scores, against values worked out by hand."""

import math

import pytest

from experiments.figures import normalizers

X = [3.0, 2.8, 2.5, 0.6, 0.4, 0.2, 0.0, -0.2, -0.5, -0.8]


def softmax(scores):
    exponentials = [math.exp(x) for x in scores]
    return [e / sum(exponentials) for e in exponentials]


def test_columns():
    # sigma with t_b = 4 below b = 1 and t_d = 0.2 above d = 2.
    pushed = [2 + 0.2 * (x - 2) if x > 2 else 1 - 4 * (1 - x) for x in X]
    mean = sum(X) / len(X)
    # The support of sparsemax is the three largest scores: its threshold is their mean less 1 / 3.
    threshold = (sum(X[:3]) - 1) / 3
    expected = {
        "SoftMax": softmax(X),
        "SoftMax, t = 0.5": softmax([2 * x for x in X]),
        "SoftMax, t = 2": softmax([x / 2 for x in X]),
        "top-k, k = 3": softmax(X[:3]) + [0.0] * 7,
        "evidential SoftMax": softmax([x if x >= mean else -math.inf for x in X]),
        "sparsemax": [max(x - threshold, 0) for x in X],
        "MultiMax\n$t_b$=4, $t_d$=0.2, b=1, d=2": softmax(pushed),
    }
    columns = normalizers.columns()
    for title, values in expected.items():
        assert columns[title].tolist() == pytest.approx(values, abs=1e-6), title
    entmax = columns["1.5-entmax"]
    # (x / 2 - tau)^2 where positive: differences of square roots are those of x / 2.
    assert (entmax[0].sqrt() - entmax[2].sqrt()).item() == pytest.approx(0.25, abs=1e-5)
    assert entmax.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_it_is_drawn(tmp_path):
    (path,) = normalizers.draw(tmp_path / "figures")
    assert path.name == "normalizers.png"
    assert path.read_bytes().startswith(b"\x89PNG")
