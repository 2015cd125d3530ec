"""Sparsity and multi-modality of families of normalizers, against loops over single rows."""

import math

import numpy as np
import pytest
import torch

from experiments.pareto import (
    FAMILIES,
    GRID,
    LEARNED,
    PATH,
    Rows,
    learned_normalizer,
    named_points,
)
from multimax import MultiMax, softmax

# Scores of three layers' rows, of examples 7, 2 and 9; the last row of a layer is shorter.
INF = -math.inf
LAYERS = [
    ([[2.0, 1.5, -1.0, 0.2], [0.1, 3.0, 2.9, -2.0], [1.0, 0.0, INF, INF]], [7, 2, 7]),
    ([[0.5, 0.4, 0.3, -4.0], [5.0, 1.0, INF, INF]], [2, 9]),
    ([[1.0, INF, INF, INF], [2.0, 2.0, 0.0, INF]], [9, 9]),
]
LEARNED_SCALARS = {"ts": [-0.5, -0.3, 0.1, -0.05], "ranges": [0.2, 0.4, -0.3, 1.0]}


@pytest.fixture(scope="module")
def layers():
    return [
        Rows(torch.tensor(scores, dtype=torch.float64), np.array(examples), LEARNED_SCALARS)
        for scores, examples in LAYERS
    ]


def softmax_of(row, temperature=1.0):
    exponentials = [math.exp((x - max(row)) / temperature) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def of_row(row, p):
    """Definitions 1 and 2 of one row, None where they are not defined."""
    mean, s = sum(row) / len(row), min(softmax_of(row))
    relevant = [max(p) - q for x, q in zip(row, p, strict=True) if mean < x < max(row)]
    small = [math.exp((s - q) / s - 1) for x, q in zip(row, p, strict=True) if x < mean]
    m = 1 - sum(relevant) / len(relevant) if relevant else None
    return sum(small) / len(small) if small else None, m


def by_hand(normalize, examples=None, layer=None):
    """Means of both over the rows of some examples (with repetition) and how many had none."""
    measures, missing = ([], []), [0, 0]
    for number, (rows, owners) in enumerate(LAYERS):
        for scores, owner in zip(rows, owners, strict=True):
            if layer not in (None, number):
                continue
            row = [x for x in scores if x != INF]
            for which, value in enumerate(of_row(row, normalize(row, number))):
                missing[which] += value is None
                times = 1 if examples is None else examples.count(owner)
                measures[which].extend([value] * times if value is not None else [])
    return [sum(of) / len(of) for of in measures], missing


def close(family, index, expected, weights=(1, 1, 1)):
    s, m = family.means(np.array([weights], dtype=float))
    assert [s[0, index], m[0, index]] == pytest.approx(expected, rel=1e-9)


def modulated(row, ts, ranges):
    """The modulator, score by score."""
    return [
        sum(
            ts[2 * n] * max(ranges[2 * n] - x, 0) ** (n + 1)
            + ts[2 * n + 1] * max(x - ranges[2 * n + 1], 0) ** (n + 1)
            for n in range(len(ts) // 2)
        )
        + x
        for x in row
    ]


def test_softmax_over_its_temperature(layers):
    family = FAMILIES["SoftMax"](layers)
    for index in (30, 80, 110):
        t = family.parameters[index]["temperature"]
        expected, missing = by_hand(lambda row, _, t=t: softmax_of(row, t))
        close(family, index, expected)
        assert family.undefined.tolist() == missing
    assert missing == [1, 4]  # one row of one key; four whose others are not above the mean
    (index,) = named_points("SoftMax", family)
    assert family.parameters[index]["temperature"] == pytest.approx(1, rel=1e-12)


def test_examples_are_drawn_with_all_their_rows(layers):
    family = FAMILIES["SoftMax"](layers)
    # In the order of the examples 2, 7, 9.
    expected, _ = by_hand(lambda row, _: softmax_of(row), examples=[2, 2, 2, 9])
    close(family, 80, expected, weights=(3, 0, 1))


def test_a_layer_by_itself(layers):
    family = FAMILIES["SoftMax"](layers)
    parts = family.layers()
    assert len(parts) == 3
    close(parts[0], 80, by_hand(lambda row, _: softmax_of(row), layer=0)[0])
    close(parts[0].point(80), 0, by_hand(lambda row, _: softmax_of(row), layer=0)[0])


def test_topk_keeps_the_largest(layers):
    family = FAMILIES["top-k"](layers)

    def two(row, _):
        least = sorted(row)[-min(2, len(row))]
        kept = softmax_of([x for x in row if x >= least])
        return [kept.pop(0) if x >= least else 0.0 for x in row]

    assert family.parameters[1] == {"k": 2}
    close(family, 1, by_hand(two)[0])


@pytest.mark.slow
def test_entmax_goes_from_softmax_over_sparsemax(layers):
    family = FAMILIES["entmax"](layers)
    close(family, 0, by_hand(lambda row, _: softmax_of(row))[0])
    named = {text: index for index, text in named_points("entmax", family).items()}
    assert [family.parameters[named[text]]["alpha"] for text in ("1.5-entmax", "sparsemax")] == [
        1.5,
        2.0,
    ]

    def projection(row, _):
        """On the simplex, by the support that fits."""
        x = sorted(row, reverse=True)
        k = max(k for k in range(1, len(x) + 1) if 1 + k * x[k - 1] > sum(x[:k]))
        return [max(value - (sum(x[:k]) - 1) / k, 0.0) for value in row]

    close(family, named["sparsemax"], by_hand(projection)[0])


def test_evsoftmax_over_its_floor(layers):
    family = FAMILIES["evidential SoftMax"](layers)

    def truncated(row, floor):
        mean = sum(row) / len(row)
        weights = [
            q * (1 if x >= mean - 1e-12 else floor)
            for x, q in zip(row, softmax_of(row), strict=True)
        ]
        return [w / sum(weights) for w in weights]

    for index in (0, 20):
        floor = family.parameters[index]["floor"]
        close(family, index, by_hand(lambda row, _, f=floor: truncated(row, f))[0])
    s, _ = family.means(np.ones((1, 3)))
    assert s[0, 0] == 1  # all that S looks at is 0


def test_the_path_goes_from_softmax_over_the_learned_scalars(layers):
    family = FAMILIES[PATH](layers)
    close(family, 0, by_hand(lambda row, _: softmax_of(row))[0])
    ts, ranges = LEARNED_SCALARS["ts"], LEARNED_SCALARS["ranges"]
    learned = by_hand(lambda row, _: softmax_of(modulated(row, ts, ranges)))[0]
    close(family, LEARNED, learned)
    double = [2 * t for t in ts]
    (index,) = (i for i, p in enumerate(family.parameters) if p["factor"] == 2)
    close(family, index, by_hand(lambda row, _: softmax_of(modulated(row, double, ranges)))[0])


@pytest.mark.slow
def test_the_grid_has_its_ranges_at_quantiles_of_each_layer(layers):
    family = FAMILIES[GRID](layers)
    assert {"t_b": 1, "t_d": 1} not in [
        {key: p[key] for key in ("t_b", "t_d")} for p in family.parameters
    ]
    assert len({tuple(p.values()) for p in family.parameters}) == len(family.parameters) == 272
    wanted = {"t_b": 3.0, "t_d": 0.25, "quantile_b": 0.25, "quantile_d": 0.75}
    index = family.parameters.index(wanted)
    ranges = [
        np.quantile([x for row in rows for x in row if x != INF], [0.25, 0.75]).tolist()
        for rows, _ in LAYERS
    ]
    expected = by_hand(lambda row, n: softmax_of(modulated(row, [-2.0, -0.75], ranges[n])))[0]
    close(family, index, expected)


@pytest.mark.parametrize("options", [{"order": 1}, {"order": 2}, {"affine": True}, {"order": 3}])
def test_learned_scalars_make_the_same_normalizer(options):
    module = MultiMax(**options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    scalars = {name: p.detach().tolist() for name, p in module.named_parameters()}
    scores = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(learned_normalizer(scalars)(scores), module(scores))
        if options != {"affine": True}:
            same = learned_normalizer(scalars, 0.0)(scores)
            torch.testing.assert_close(same, softmax(scores))


def test_families_do_not_change_what_is_drawn_later(layers):
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    FAMILIES[PATH](layers)
    assert torch.equal(torch.rand(3), first)
