import copy
import math

import pytest
import torch
from torch import nn

from multimax import (
    MultiMax,
    NormalizerRecorder,
    SoftMax,
    SparseMax,
    entropy,
    mean_of_defined,
    modulator_health,
    multi_modality,
    row_mean,
    softmax,
    softmax_reference,
    sparsemax,
    sparsity,
    support_size,
    top_k_mass,
    uniform_reference,
)
from multimax.attention import attention

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
X = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)


def slow_multi_modality(p, x, threshold):
    terms = [max(p) - p_n for p_n, x_n in zip(p, x, strict=True) if threshold < x_n < max(x)]
    return 1 - sum(terms) / len(terms) if terms else math.nan


def slow_sparsity(p, x, threshold, s):
    below = [p_l for p_l, x_l in zip(p, x, strict=True) if x_l < threshold]
    return sum(math.exp((s - p_l) / s - 1) for p_l in below) / len(below) if below else math.nan


def test_by_hand():
    assert multi_modality(P, X, 0.5).item() == pytest.approx(1 - (0.2 + 0.35) / 2)
    assert multi_modality(P, X, 1.0).item() == pytest.approx(1 - 0.2)  # strictly above
    expected = (math.exp(-1.5) + math.exp(-0.5)) / 2
    assert sparsity(P, X, 1.5, 0.1).item() == pytest.approx(expected)
    assert sparsity(P, X, 1.0, 0.1).item() == pytest.approx(math.exp(-0.5))  # strictly below


def test_the_largest_probability_need_not_be_that_of_the_largest_score():
    module = MultiMax().double()
    with torch.no_grad():
        module.ts.copy_(torch.tensor([0.0, -2.0, 0.0, 0.0]))
        module.ranges.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    scores = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    p = module(scores)
    at_largest_score, largest, smallest = p.tolist()  # 0.09, 0.67, 0.24
    assert at_largest_score < smallest < largest
    assert multi_modality(p, scores, 0.5).item() == 1  # of the entry at 1, which has the most
    expected = 1 - (0 + largest - smallest) / 2
    assert multi_modality(p, scores, -1.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("threshold", ["number", "row mean"])
def test_by_the_definitions_with_masks(scores, mask, threshold):
    mask = mask.expand_as(scores)
    p = softmax(scores, mask=mask)
    s = softmax_reference(scores / 2, mask=mask)
    eps = torch.tensor(0.3) if threshold == "number" else row_mean(scores, mask=mask)
    results = multi_modality(p, scores, eps, mask=mask), sparsity(p, scores, eps, s, mask=mask)
    assert results[0].isnan().any()
    assert results[1].isnan().any()
    for row in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        i = tuple(row)
        if not mask[i].any():
            assert results[0][i].isnan()
            assert results[1][i].isnan()
            continue
        p_row, x_row = p[i][mask[i]].tolist(), scores[i][mask[i]].tolist()
        eps_row = eps.expand(2, 3, 4, 1)[i].item()
        expected = slow_multi_modality(p_row, x_row, eps_row)
        assert results[0][i].item() == pytest.approx(expected, abs=1e-6, nan_ok=True)
        expected = slow_sparsity(p_row, x_row, eps_row, s[i].item())
        assert results[1][i].item() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_rows_without_a_value():
    assert multi_modality(P, X, 2.0).isnan()  # nothing above the threshold but the maximum
    assert multi_modality(P[:1], X[:1], -9.0).isnan()
    assert sparsity(P, X, 0.0, 0.1).isnan()
    nothing = torch.tensor(False)
    assert multi_modality(P, X, 0.5, mask=nothing).isnan()
    assert sparsity(P, X, 1.5, 0.1, mask=nothing).isnan()
    assert row_mean(X, mask=nothing).isnan().all()


def test_entries_that_tie_with_the_maximum_do_not_count():
    p, x = torch.tensor([0.4, 0.4, 0.2]), torch.tensor([2.0, 2.0, 1.0])
    assert multi_modality(p, x, 0.0).item() == pytest.approx(0.8)


def test_the_largest_probability_counts_where_the_order_is_flipped():
    p, x = torch.tensor([0.3, 0.6, 0.1]), torch.tensor([2.0, 1.0, -1.0])
    assert multi_modality(p, x, 0.0).item() == pytest.approx(1.0)


def test_sparsity_limits():
    assert sparsity(torch.zeros(3), torch.zeros(3), 1.0, 0.1) == 1  # exactly sparse
    own = P.amin()
    assert sparsity(P, X, 0.5, own).item() == pytest.approx(math.exp(-1))  # says nothing
    # A reference that underflowed: zeros are still sparse, and nothing else is.
    assert sparsity(torch.tensor([0.0, 0.5]), torch.zeros(2), 1.0, 0.0) == 0.5


@pytest.mark.parametrize("dim", range(-4, 4))
def test_any_dim(scores, mask, dim):
    mask = mask.expand_as(scores)
    p = softmax(scores, dim, mask)
    moved = [t.movedim(dim, -1) for t in (p, scores)]
    kwargs, moved_kwargs = {"dim": dim, "mask": mask}, {"mask": mask.movedim(dim, -1)}
    pairs = [
        (multi_modality(p, scores, 0.0, **kwargs), multi_modality(*moved, 0.0, **moved_kwargs)),
        (sparsity(p, scores, 0.0, 0.1, **kwargs), sparsity(*moved, 0.0, 0.1, **moved_kwargs)),
        (entropy(p, dim), entropy(moved[0])),
        (support_size(p, dim), support_size(moved[0])),
        (top_k_mass(p, 2, dim), top_k_mass(moved[0], 2)),
        *[
            (f(scores, **kwargs), f(moved[1], **moved_kwargs).movedim(-1, dim))
            for f in (row_mean, softmax_reference)
        ],
    ]
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, equal_nan=True)


def test_softmax_reference_is_the_smallest_allowed_probability():
    mask = torch.tensor([True, True, True, False])
    expected = 1 / (1 + math.e + math.e**2)
    assert softmax_reference(X, mask=mask).tolist() == [pytest.approx(expected)]
    assert softmax_reference(X).item() == pytest.approx(softmax(X).amin().item())


def test_row_mean_is_over_allowed_scores():
    assert row_mean(X, mask=X > 0).tolist() == [2.0]


def test_entropy_support_and_mass():
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(entropy(p), torch.tensor([math.log(2), 0.0, math.log(4)]))
    assert support_size(p).tolist() == [2, 1, 4]
    assert top_k_mass(p, 1).tolist() == [0.5, 1.0, 0.25]
    assert top_k_mass(p, 3).tolist() == [1.0, 1.0, 0.75]
    assert top_k_mass(p, 9).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="k must be an integer >= 1, got 0"):
        top_k_mass(p, 0)


def test_mean_of_defined():
    values = torch.tensor([[1.0, math.nan], [4.0, math.nan]])
    assert mean_of_defined(values) == (2.5, 2)
    mean, count = mean_of_defined(torch.tensor([math.nan]))
    assert math.isnan(mean)
    assert count == 0
    # In float64: the sum 2^24 + 1 does not exist in fp32.
    assert mean_of_defined(torch.tensor([2.0**24, 1.0]))[0] == (2**24 + 1) / 2


def test_half_precision_is_computed_in_fp32(scores):
    x = scores.bfloat16()
    p = softmax(x)
    for function in (lambda p, x: multi_modality(p, x, 0.0), lambda p, x: sparsity(p, x, 0.0, 0.1)):
        assert torch.equal(
            function(p, x).nan_to_num(2), function(p.float(), x.float()).nan_to_num(2)
        )
    assert torch.equal(entropy(p), entropy(p.float()))
    assert softmax_reference(x).dtype == torch.float32


def test_bad_input():
    with pytest.raises(ValueError, match=r"must have one shape, got \(3,\) and \(4,\)"):
        multi_modality(P[1:], X, 0.0)
    for function in (row_mean, softmax_reference):
        with pytest.raises(ValueError, match="mask must be boolean"):
            function(X, mask=torch.ones(4))


def test_modulator_health_has_the_names_of_the_paper():
    module = MultiMax(order=2, affine=True)
    module.ts.data = torch.tensor([-0.5, -0.25, 0.5, 0.125])
    module.ranges.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    health = modulator_health(module, torch.zeros(3))
    assert health.pop("decreasing_share") == 1.0  # slope 1 + 0.5 - 2 * 0.5 * 3 < 0
    paper = {"t_b1": 1.5, "t_d1": 0.75, "b1": 1.0, "d1": 2.0}
    paper |= {"t_b2": 0.5, "t_d2": 1.125, "b2": 3.0, "d2": 4.0}
    assert health == paper | {"scale": 1.0, "shift": 0.0}


def test_modulator_health_counts_allowed_decreasing_scores():
    module = MultiMax(order=2, init="identity")
    module.ts.data[2] = 0.25  # slope 1 - 0.5 relu(r2 - x), negative below r2 - 2
    module.ranges.data.zero_()
    scores = torch.tensor([-5.0, -3.0, -1.0, 1.0])
    assert modulator_health(module, scores)["decreasing_share"] == 0.5
    mask = torch.tensor([True, False, True, True])
    assert modulator_health(module, scores, mask)["decreasing_share"] == pytest.approx(1 / 3)
    assert math.isnan(modulator_health(module, scores, mask=scores > 9)["decreasing_share"])


class Model(nn.Module):
    """Normalizers that are called in three ways, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.softmax, self.sparsemax, self.unused = SoftMax(), SparseMax(), SoftMax()
        self.inner = nn.ModuleDict({"multimax": MultiMax()})
        nn.init.constant_(self.inner["multimax"].ts, 0.4)

    def forward(self, scores, mask):
        self.softmax(scores)
        self.sparsemax(scores, 1, mask)
        return self.inner["multimax"](scores=scores, mask=mask, dim=-1)


def uniform(mask, scores, dim):
    allowed = scores.size(dim) if mask is None else mask.sum(dim, keepdim=True)
    return 1 / (10 * allowed)


def test_uniform_reference_is_that_of_the_allowed_entries():
    scores, mask = torch.randn(2, 5), torch.tensor([[True] * 5, [True, True, False, False, False]])
    torch.testing.assert_close(uniform_reference(scores), torch.full((2, 1), 0.02))
    torch.testing.assert_close(uniform_reference(scores, -1, mask), torch.tensor([[0.02], [0.05]]))
    larger = uniform_reference(100 * scores, mask=mask)
    assert torch.equal(larger, uniform_reference(scores, mask=mask))


def test_recorder_accumulates_over_batches(scores, mask):
    model, mask = Model(), mask.expand_as(scores)
    with NormalizerRecorder(model) as recorder:
        for batch in range(2):
            output = model(scores[batch], mask[batch])
    summary = recorder.summary()
    assert list(summary) == ["softmax", "sparsemax", "unused", "inner.multimax"]
    assert torch.equal(output, model(scores[1], mask[1]))
    cases = {
        "softmax": (softmax(scores), -1, None),
        "sparsemax": (sparsemax(scores, 2, mask), 2, mask),
        "inner.multimax": (model.inner["multimax"](scores, mask=mask), -1, mask),
    }
    for name, (p, dim, mask) in cases.items():
        eps, s = row_mean(scores, dim, mask), softmax_reference(scores, dim, mask)
        left_out = torch.zeros_like(eps.squeeze(dim), dtype=torch.bool)
        if mask is not None:
            left_out = ~mask.any(dim)
        expected = {
            "entropy": entropy(p, dim).masked_fill(left_out, math.nan),
            "support_size": support_size(p, dim).double().masked_fill(left_out, math.nan),
            "sparsity": sparsity(p, scores, eps, s, dim, mask),
            "uniform_sparsity": sparsity(p, scores, eps, uniform(mask, scores, dim), dim, mask),
            "multi_modality": multi_modality(p, scores, eps, dim, mask),
        }
        for measure, values in expected.items():
            mean, count = mean_of_defined(values)
            assert summary[name][measure] == pytest.approx(mean, abs=1e-6)
            assert summary[name][f"{measure}_count"] == count
        assert summary[name]["entropy_count"] == (~left_out).sum()
    assert summary["inner.multimax"]["entropy_count"] < summary["softmax"]["entropy_count"]
    falls = model.inner["multimax"].derivative(scores)[mask] < 0
    assert 0 < falls.sum() < falls.numel()
    health = summary["inner.multimax"]
    assert health["decreasing_share"] == pytest.approx(falls.double().mean().item())
    assert health["decreasing_share_count"] == mask.sum()
    assert "decreasing_share" not in summary["softmax"]
    assert math.isnan(summary["unused"]["entropy"])
    assert summary["unused"]["entropy_count"] == 0


def test_recorder_in_attention_of_any_normalizer(normalizer):
    query, key, value = torch.randn(3, 2, 5, 8)
    with NormalizerRecorder(normalizer) as recorder:
        attention(query, key, value, normalizer, causal=True)
    (name,) = recorder.summary()
    assert name == ""
    measures = recorder.summary()[name]
    some = not normalizer.sums_to_one and 0 < measures["entropy_count"] < 10  # rows have weight
    assert measures["support_size_count"] == 10
    assert measures["entropy_count"] == 10 or some
    assert 0 < measures["support_size"] <= 3


@pytest.mark.parametrize("error", [False, True])
def test_recorder_leaves_the_model_as_it_was(scores, mask, error):
    model = Model()
    before = copy.deepcopy(recorded := NormalizerRecorder(model)).summary()
    try:
        with recorded:
            assert all(m._forward_hooks for m in model.modules() if isinstance(m, SoftMax))
            if error:
                raise KeyError
    except KeyError:
        pass
    model(scores, mask)
    assert not any(m._forward_hooks for m in model.modules())
    assert str(recorded.summary()) == str(before)


def test_only_entries_that_count_are_the_largest():
    mask = torch.tensor([False, True, True, True])
    assert multi_modality(P, X, 0.5, mask=mask).item() == pytest.approx(1 - 0.15)


def test_numbers_have_the_digits_of_the_probabilities():
    assert sparsity(P, X, 0.5, 0.1).item() == pytest.approx(math.exp(-0.5), rel=1e-14)
    assert sparsity(P[:2] * 0, X[:2], 9.0, 0.0) == 1


def test_a_flat_modulator_does_not_decrease():
    module = MultiMax(order=1, init="identity", affine=True)
    torch.nn.init.zeros_(module.ranges)
    torch.nn.init.constant_(module.ts[1:].detach(), -1.0)  # t_d = 0
    health = modulator_health(module, torch.tensor([1.0, 2.0, -1.0]))
    assert health["decreasing_share"] == 0
    assert all(type(value) is float for value in health.values())


@pytest.mark.parametrize("measure", [multi_modality, sparsity])
def test_measures_are_of_the_last_dimension(scores, measure):
    options = (0.0, 0.1) if measure is sparsity else (0.0,)
    p = softmax(scores)
    torch.testing.assert_close(
        measure(p, scores, *options), measure(p, scores, *options, dim=-1), equal_nan=True
    )
    for function in (row_mean, softmax_reference, entropy, support_size):
        assert torch.equal(function(scores), function(scores, -1))
    assert torch.equal(top_k_mass(p, 2), top_k_mass(p, 2, -1))
