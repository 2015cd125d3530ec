"""Whether MultiMax is the more efficient: normalizers of the same scores, compared in numbers.

The paper claims a higher Pareto efficiency: more multi-modality at the same sparsity. Intervals are
percentiles of a bootstrap over examples.
"""

from typing import Any, NamedTuple

import numpy as np

from experiments.pareto import GRID, LEARNED, PATH, Family, named_points

REPLICATES = 2000
BOOTSTRAP_SEED = 0
CONFIDENCE = 0.95
RIVALS = ("SoftMax", "entmax")
MEASURES = ("sparsity", "multi_modality")
DIGITS = 5


def resampled(examples: int) -> np.ndarray:
    """(1 + replicates, examples): the examples as they are, then how often each was drawn."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = generator.multinomial(examples, np.full(examples, 1 / examples), REPLICATES)
    return np.concatenate([np.ones((1, examples)), drawn])


def best_at(sparsity: np.ndarray, s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """The largest multi-modality of a curve where it is at least so sparse, interpolated.

    Args:
        sparsity: (replicates,), what is asked for.
        s, m: (replicates, points), sparsity and multi-modality along the curve.

    Returns:
        (replicates,); NaN where the curve is nowhere so sparse.
    """
    wanted = sparsity[:, None]
    reached = np.where(s >= wanted, m, -np.inf).max(1)
    left, right = s[:, :-1], s[:, 1:]
    crosses = (left - wanted) * (right - wanted) < 0
    share = (wanted - left) / np.where(crosses, right - left, 1.0)
    between = m[:, :-1] + share * (m[:, 1:] - m[:, :-1])
    best = np.maximum(reached, np.where(crosses, between, -np.inf).max(1))
    return np.where(np.isfinite(best), best, np.nan)


def area(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """(replicates,): the hypervolume of (replicates, points), of which (0, 0) is the worst."""
    order = np.argsort(-s, axis=1, kind="stable")
    s, m = np.take_along_axis(s, order, 1), np.take_along_axis(m, order, 1)
    widths = s - np.concatenate([s[:, 1:], np.zeros((len(s), 1))], 1)
    return (np.maximum.accumulate(m, 1) * widths).sum(1)


def front(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Indices of the (points,) that no other exceeds in one and reaches in the other, by s."""
    order = np.lexsort((-m, -s))
    largest = np.maximum.accumulate(np.concatenate([[-np.inf], m[order][:-1]]))
    return order[m[order] > largest][::-1]


class Interval(NamedTuple):
    """An estimate with its bootstrap percentile interval (95 %)."""

    value: float
    low: float
    high: float


def interval(values: np.ndarray) -> Interval | None:
    """Of (1 + replicates,), the estimate first; None where it is not defined in all of them."""
    if np.isnan(values).any():
        return None
    low, high = np.quantile(values[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values[0]), float(low), float(high))


def outcome(families: dict[str, Family]) -> dict[str, Any]:
    """Points, areas and comparisons on the scores of one kind of model, as JSON."""
    any_family = next(iter(families.values()))
    weights = resampled(any_family.examples)
    means = {name: family.means(weights) for name, family in families.items()}
    areas = {name: area(*of) for name, of in means.items()}
    points = {name: np.stack([s[0], m[0]], 1) for name, (s, m) in means.items()}
    return {
        "examples": any_family.examples,
        "rows": int(any_family.rows[0].sum() + any_family.undefined[0]),
        "rows_without_sparsity": int(any_family.undefined[0]),
        "rows_without_multi_modality": int(any_family.undefined[1]),
        "points": [
            _point(name, families[name], index, points[name])
            for name in families
            for index in named_points(name, families[name])
        ],
        "front": [
            _point(name, families[name], index, points[name])
            for name, index in front_of_all(points)
        ],
        "comparisons": comparisons(families),
        "better_than_softmax_in_both": better_in_both(families, means),
        "areas": {name: _as_json(interval(of)) for name, of in areas.items() if name != PATH},
        "area_differences": {
            rival: _as_json(interval(areas[GRID] - areas[rival])) for rival in RIVALS
        },
    }


def front_of_all(points: dict[str, np.ndarray]) -> list[tuple[str, int]]:
    """Family and index of the points that no other dominates, by sparsity."""
    places = [(name, index) for name, of in points.items() for index in range(len(of))]
    return [places[place] for place in front(*np.concatenate(list(points.values())).T)]


def _point(name: str, family: Family, index: int, points: np.ndarray) -> dict[str, Any]:
    s, m = (round(value, DIGITS) for value in points[index].tolist())
    parameters = _rounded(family.parameters[index])
    return {"normalizer": name, **parameters, "sparsity": s, "multi_modality": m}


def better_in_both(
    families: dict[str, Family], means: dict[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, int]:
    """Of the grid with t_b > 1 and t_d < 1, the points sparser and more multi-modal than SoftMax.

    SoftMax of temperature 1, that is: what the paper claims of all of them.
    """
    claimed = [p["t_b"] > 1 and p["t_d"] < 1 for p in families[GRID].parameters]
    softmax = next(iter(named_points("SoftMax", families["SoftMax"])))
    better = np.logical_and.reduce(
        [of[0] > base[0, softmax] for of, base in zip(means[GRID], means["SoftMax"], strict=True)]
    )
    return {"points": sum(claimed), "better": int(better[claimed].sum())}


def comparisons(families: dict[str, Family]) -> list[dict[str, Any]]:
    """Multi-modality of MultiMax minus that of another curve at the same sparsity.

    (a) of the learned scalars, on all examples; (b) of the point of the grid that does best against
    SoftMax on every second example, on the others, so that the choice does not flatter it.

    At the same sparsity, or at a larger one where all of a curve is sparser: that of entmax begins
    with SoftMax of temperature 1. "over_softmax" are the differences to this one point.

    "difference" is that of the means over all layers, where the other normalizer has one parameter
    for all of them; "difference_by_layer" is the mean over layers of the difference in each, where
    it has the parameter of that layer's sparsity: what MultiMax gains by having scalars of its own
    for each layer is not in it.
    """
    examples = families[GRID].examples
    every = np.arange(examples)
    chosen = _best_of_grid(families, every[::2])
    softmax = families["SoftMax"].point(next(iter(named_points("SoftMax", families["SoftMax"]))))
    cases = (
        ("learned", families[PATH].point(LEARNED), every),
        ("best of the grid", families[GRID].point(chosen), every[1::2]),
    )
    found = []
    for name, point, among in cases:
        weights = np.zeros((REPLICATES + 1, examples))
        weights[:, among] = resampled(len(among))
        of_point = dict(zip(MEASURES, point.means(weights), strict=True))
        base = dict(zip(MEASURES, softmax.means(weights), strict=True))
        facts = {
            "multimax": name,
            **_rounded(point.parameters[0]),
            "examples": len(among),
            **{key: _as_json(interval(of[:, 0])) for key, of in of_point.items()},
            "over_softmax": {
                key: _as_json(interval((of - base[key])[:, 0])) for key, of in of_point.items()
            },
        }
        for rival in RIVALS:
            curve = families[rival]
            by_layer = [
                difference(layer, of_layer, weights)
                for layer, of_layer in zip(point.layers(), curve.layers(), strict=True)
            ]
            differences = {
                "difference": _as_json(interval(difference(point, curve, weights))),
                "difference_by_layer": _as_json(interval(np.mean(by_layer, 0))),
            }
            found.append({**facts, "against": rival, **differences})
    return found


def difference(point: Family, curve: Family, weights: np.ndarray) -> np.ndarray:
    """(replicates,): multi-modality of a point minus that of a curve at the same sparsity."""
    s, m = (of[:, 0] for of in point.means(weights))
    return m - best_at(s, *curve.means(weights))


def _best_of_grid(families: dict[str, Family], among: np.ndarray) -> int:
    weights = np.zeros((1, families[GRID].examples))
    weights[:, among] = 1
    s, m = (of[0] for of in families[GRID].means(weights))
    curve = [np.repeat(of, len(s), 0) for of in families["SoftMax"].means(weights)]
    return int(np.nanargmax(m - best_at(s, *curve)))


def _rounded(parameters: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.{DIGITS}g}") for name, value in parameters.items()}


def _as_json(found: Interval | None) -> dict[str, float] | None:
    return found and {name: round(value, DIGITS) for name, value in found._asdict().items()}
