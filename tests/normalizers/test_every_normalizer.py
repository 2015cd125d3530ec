"""What every registered normalizer promises; a new one is covered as soon as it is registered."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from multimax import LogitNormalizer, Normalizer
from multimax.functional import MASK_FLOOR

# Dyadic numbers: sums and shifts of them are exact, so that ties and means do not move.
dyadic_rows = st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=1, max_size=9)


def check_gradients(check, module, scores, mask):
    """`check` the gradient of the scores and of every parameter, in float64."""
    module = copy.deepcopy(module).double()
    names, parameters = (
        zip(*module.named_parameters(), strict=True) if module._parameters else ((), ())
    )

    def function(scores, *values):
        state = dict(zip(names, values, strict=True))
        return functional_call(module, state, (scores,), {"mask": mask})

    scores = scores.double().requires_grad_()
    values = [p.detach().clone().requires_grad_() for p in parameters]
    return check(function, (scores, *values))


def test_is_a_distribution(distribution, scores):
    probabilities = distribution(scores)
    assert probabilities.shape == scores.shape
    assert (probabilities >= 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dim", range(-4, 4))
def test_any_dim(normalizer, scores, mask, dim, masked):
    mask = mask.expand_as(scores) if masked else None
    moved = None if mask is None else mask.movedim(dim, -1)
    expected = normalizer(scores.movedim(dim, -1), mask=moved).movedim(-1, dim)
    torch.testing.assert_close(normalizer(scores, dim, mask), expected, atol=1e-6, rtol=1e-5)


# Half precision is computed in fp32, so that only the rounding of the result is left: at most
# eps / 2 of a probability. fp32 sums and exponentials are good to some 1e-6, and so is fp64 here,
# because the scalars of the modules are fp32.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float16, 2**-11 + 2e-6),
        (torch.bfloat16, 2**-8 + 2e-6),
        (torch.float32, 2e-6),
        (torch.float64, 2e-6),
    ],
)
def test_keeps_the_dtype_and_is_precise(normalizer, scores, dtype, tolerance):
    scores = scores.to(dtype)
    expected = copy.deepcopy(normalizer).double()(scores.double())
    probabilities = normalizer(scores)
    assert probabilities.dtype == dtype
    torch.testing.assert_close(probabilities.double(), expected, atol=tolerance, rtol=0)


def test_masked_entries_get_exactly_zero_and_do_not_matter(normalizer, scores, mask):
    probabilities = normalizer(scores, mask=mask)
    assert (probabilities[~mask.expand_as(scores)] == 0).all()
    for garbage in (-1e4, 1e4):
        filled = scores.masked_fill(~mask, garbage)
        assert torch.equal(normalizer(filled, mask=mask), probabilities)


def test_a_mask_is_the_same_as_leaving_entries_out(normalizer, scores, mask):
    probabilities = normalizer(scores, mask=mask)
    mask = mask.expand_as(scores)
    rows = mask.any(-1).nonzero().tolist()
    assert len(rows) > 20
    for row in map(tuple, rows):
        alone = normalizer(scores[row][mask[row]])
        torch.testing.assert_close(probabilities[row][mask[row]], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_all_masked_rows_are_zeros_with_zero_gradients(normalizer, scores, mask, dtype):
    scores = scores.to(dtype).requires_grad_()
    mask = mask.expand_as(scores)
    probabilities = normalizer(scores, mask=mask)
    (probabilities * torch.randn_like(probabilities)).sum().backward()
    empty = ~mask.any(-1)
    assert empty.any()
    assert (probabilities[empty] == 0).all()
    assert (scores.grad[empty] == 0).all()
    assert (scores.grad[~mask] == 0).all()
    assert all(p.grad.isfinite().all() for p in (scores, *normalizer.parameters()))


def test_everything_masked(normalizer, scores):
    scores.requires_grad_()
    probabilities = normalizer(scores, mask=torch.tensor(False))
    probabilities.sum().backward()
    assert (probabilities == 0).all()
    assert all((p.grad == 0).all() for p in (scores, *normalizer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_a_mask_that_is_not_boolean_is_an_error(normalizer, scores, mask, dtype):
    with pytest.raises(ValueError, match=f"mask must be boolean.*{dtype}"):
        normalizer(scores, mask=mask.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_scores_that_are_not_real_are_an_error(normalizer, dtype):
    with pytest.raises(ValueError, match=f"scores must be float16, .*{dtype}"):
        normalizer(torch.ones(3, dtype=dtype))


def test_permutation_equivariance(normalizer, scores, mask):
    order = torch.randperm(7)
    permuted = normalizer(scores[..., order], mask=mask[..., order])
    expected = normalizer(scores, mask=mask)[..., order]
    torch.testing.assert_close(permuted, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradients(normalizer, scores, mask, check, masked):
    # Two queries of one head: with seeded scores, no entry is within 1e-4 of a kink.
    assert check_gradients(check, normalizer, scores[0, 0, :2], mask[0, 0, :2] if masked else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(normalizer, scores, mask, dtype):
    results = []
    for enabled in (False, True):
        x = scores.to(dtype).requires_grad_()
        normalizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            probabilities = normalizer(x, mask=mask)
        probabilities.square().sum().backward()
        results.append([probabilities, x.grad, *(p.grad for p in normalizer.parameters())])
    for plain, autocast in zip(*results, strict=True):
        assert autocast.dtype == plain.dtype
        torch.testing.assert_close(autocast, plain)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_round_trips(normalizer, scores, way):
    expected = normalizer(scores)
    if way == "state_dict":
        twin = copy.deepcopy(normalizer)
        for parameter in twin.parameters():
            parameter.data.fill_(0.7)
        twin.load_state_dict(normalizer.state_dict(), strict=True)
    else:
        twin = (
            copy.deepcopy(normalizer)
            if way == "deepcopy"
            else pickle.loads(pickle.dumps(normalizer))
        )
    assert torch.equal(twin(scores), expected)
    assert repr(twin) == repr(normalizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_log_probabilities(normalizer, scores, mask, masked, dim, dtype):
    scores, given = scores.to(dtype), mask if masked else None
    log_p = normalizer.log_probabilities(scores, dim, given)
    p = normalizer(scores.float(), dim, given)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp(), p)
    assert torch.equal(log_p == -math.inf, p == 0)


def test_log_probabilities_of_a_mask_that_is_not_boolean(normalizer, scores, mask):
    with pytest.raises(ValueError, match="mask must be boolean"):
        normalizer.log_probabilities(scores, mask=mask.float())


def test_sparse_is_to_give_exact_zeros_in_evaluation(normalizer):
    """Of a dense normalizer, also the logarithm of what underflows is finite."""
    log_p = normalizer.eval().log_probabilities(100 * torch.randn(4, 300))
    assert (log_p == -math.inf).any() == normalizer.sparse


def test_logits_of_what_is_dense_are_those_of_the_distribution(normalizer, scores):
    if not normalizer.sparse:
        p = normalizer(scores)
        shares = p / p.sum(-1, keepdim=True)
        torch.testing.assert_close(normalizer.logits(scores).softmax(-1), shares)


def test_a_new_normalizer_of_logits_is_dense(scores):
    class Halved(LogitNormalizer):
        def logits(self, scores, dim=-1, mask=None):
            return scores / 2

        def forward(self, scores, dim=-1, mask=None):
            return (scores / 2).softmax(dim)

    class Any(Normalizer):
        def forward(self, scores, dim=-1, mask=None):
            return scores.softmax(dim)

    assert not Halved().sparse
    assert torch.equal(Halved().log_probabilities(scores, 1), (scores / 2).log_softmax(1))
    assert Any().sparse
    assert torch.equal(Any().log_probabilities(scores), scores.softmax(-1).log())


def test_modulation_may_precede_the_mask(normalizer, scores, mask):
    modulated = normalizer.modulate(scores)
    assert modulated.shape == scores.shape
    torch.testing.assert_close(normalizer.modulate(scores[0]), modulated[0])
    if normalizer.modulates_first:
        p = normalizer.normalize_modulated(modulated, mask=mask)
        torch.testing.assert_close(p, normalizer(scores, mask=mask))
    else:
        with pytest.raises(ValueError, match="use length_scale='modulated' where the scores are"):
            normalizer.normalize_modulated(modulated, mask=mask)


def test_no_rows(normalizer):
    assert normalizer(torch.ones(0, 5)).shape == (0, 5)


def test_a_single_entry_gets_everything(distribution):
    scores = torch.tensor([[-300.0], [0.0], [7.0]], requires_grad=True)
    probabilities = distribution(scores)
    probabilities.sum().backward()
    assert (probabilities == 1).all()
    assert (scores.grad == 0).all()


def test_ties_share(distribution):
    torch.testing.assert_close(distribution(torch.full((2, 8), 3.0)), torch.full((2, 8), 0.125))


def test_only_weights_do_not_sum_to_one(normalizer, scores):
    sums = normalizer(scores).sum(-1)
    assert torch.allclose(sums, torch.ones(2, 3, 4)) == normalizer.sums_to_one


@pytest.mark.parametrize("largest", [300.0, 1e4, 6e4])
def test_huge_half_precision_scores(normalizer, largest):
    scores = torch.tensor([[0.0, 1.0, largest, -largest], [largest, 1.0, 0.0, 2.0]])
    scores = scores.half().requires_grad_()
    probabilities = normalizer(scores)
    probabilities[:, 0].sum().backward()
    if normalizer.sums_to_one:
        total = probabilities.float().sum(-1)
        torch.testing.assert_close(total, torch.ones(2), atol=1e-3, rtol=0)
    assert all(p.grad.isfinite().all() for p in (scores, *normalizer.parameters()))


def test_half_precision_is_computed_in_fp32(normalizer):
    """Around 300 the spacing of bf16 is 2, and the square of a score overflows fp16."""
    scores = (torch.randn(50, 9) + 300).bfloat16()
    for dtype in (torch.float16, torch.bfloat16):
        x = scores.to(dtype)
        assert torch.equal(normalizer(x), normalizer(x.float()).to(dtype))


def test_no_score_is_too_low_for_the_mask(distribution, mask):
    """Scores just above the floor at which a modulator takes them for masked."""
    probabilities = distribution(torch.full((2, 3, 4, 7), MASK_FLOOR + 1), mask=mask)
    expected = mask / mask.sum(-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(probabilities, expected.expand(2, 3, 4, 7))


def test_shifted_scores_keep_their_digits(order_preserving):
    """For entmax of the entmax package, such scores give NaN."""
    scores = torch.randn(50, 9) + 300
    expected = copy.deepcopy(order_preserving).double()(scores.double())
    # fp32 scores around 300 are 3e-5 apart; a temperature of 0.5 doubles that.
    torch.testing.assert_close(order_preserving(scores).double(), expected, atol=6e-5, rtol=0)


def test_scores_of_minus_infinity_get_exactly_zero(normalizer, scores):
    scores[..., 2] = -math.inf
    scores.requires_grad_()
    probabilities = normalizer(scores)
    probabilities[..., 0].sum().backward()
    assert (probabilities[..., 2] == 0).all()
    if normalizer.sums_to_one:
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 4))
    assert (scores.grad[..., 2] == 0).all()
    assert scores.grad.isfinite().all()


@pytest.mark.slow
@given(row=dyadic_rows)
def test_a_larger_score_never_gets_less(order_preserving, row):
    scores = torch.tensor(row, dtype=torch.float64).sort().values
    probabilities = order_preserving(scores)
    assert (probabilities.diff() >= -1e-12).all()  # exponentials of equal numbers may round apart


@pytest.mark.slow
@given(row=dyadic_rows, shift=st.integers(-800, 800).map(lambda n: n / 8))
def test_a_shift_of_all_scores_changes_nothing(order_preserving, row, shift):
    scores = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(
        order_preserving(scores + shift), order_preserving(scores), atol=1e-12, rtol=0
    )
