"""Losses over a part of the classes: by `class_mask`, or by scores of -inf."""

import math

import pytest
import torch
import torch.nn.functional as F

from multimax import (
    EntMax,
    MultiMax,
    SoftMax,
    SparseMax,
    entmax15_loss,
    fenchel_young_loss,
    linear_output_loss,
    output_loss,
    sparsemax_loss,
    use_backend,
)
from multimax.kernels import linear_loss

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
SHAPES = [(), (6,), (1, 6), (2, 1, 6), (1, 3, 6), (2, 3, 6), (2, 3, 1)]


@pytest.fixture
def normalizer(distribution):
    """Only what sums to one has a loss."""
    return distribution


@pytest.fixture(autouse=True, params=["auto", "eager"])
def _backend(request):
    with use_backend(request.param):
        yield


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of 2 rows."""
    monkeypatch.setattr(linear_loss, "LEAST_ROWS", 2)
    monkeypatch.setattr(linear_loss, "LEAST_SCORES", 1)


def of_scores(normalizer, scores, target, bias=None, **options):
    return output_loss(normalizer, scores if bias is None else scores + bias, target, **options)


def of_features(normalizer, scores, target, bias=None, **options):
    """`scores` are the features of a linear layer that is the identity."""
    weight = torch.eye(scores.size(-1), dtype=scores.dtype)
    return linear_output_loss(normalizer, scores, weight, target, bias, **options)


@pytest.fixture(params=[of_scores, of_features])
def loss(request):
    return request.param


def with_gradients(loss, normalizer, scores, target, **options):
    """The losses, and the gradients of scores and scalars for an uneven dL/dloss."""
    scores = scores.detach().clone().requires_grad_()
    losses = loss(normalizer, scores, target, **options)
    upstream = torch.linspace(0.5, 2, max(losses.numel(), 1), dtype=losses.dtype)
    wanted = [scores, *normalizer.parameters()]
    gradients = torch.autograd.grad(losses, wanted, upstream.reshape(losses.shape))
    return losses.detach(), *gradients


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("way", ["class_mask", "bias"])
def test_a_forbidden_class_is_as_one_left_out(normalizer, loss, class_scores, targets, kind, way):
    normalizer = normalizer.double()
    allowed = torch.tensor([True, True, False, True, False, True])
    if kind == "hard":
        target = targets["hard"] % 4
        wide = torch.tensor([0, 1, 3, 5])[target]
    else:
        target = targets["soft"][:, allowed].softmax(-1)
        wide = torch.zeros(5, 6, dtype=torch.float64)
        wide[:, allowed] = target
    bias = torch.zeros(6, dtype=torch.float64).masked_fill(~allowed, -math.inf)
    options = {"class_mask": allowed} if way == "class_mask" else {"bias": bias}
    options["reduction"] = "none"
    got = with_gradients(loss, normalizer, class_scores, wide, **options)
    wanted = with_gradients(
        of_scores, normalizer, class_scores[:, allowed], target, reduction="none"
    )
    losses, gradient, *scalars = got
    torch.testing.assert_close(losses, wanted[0], **CLOSE)
    torch.testing.assert_close(gradient[:, allowed], wanted[1], **CLOSE)
    torch.testing.assert_close(scalars, list(wanted[2:]), **CLOSE)
    assert (gradient[:, ~allowed] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_mask_is_broadcast(loss, shape, reduction, kind):
    scores = torch.randn(2, 3, 6, dtype=torch.float64)
    mask = torch.rand(shape) < 0.6
    if shape and shape[-1] > 1:
        mask[..., :2] = True
    target = torch.randint(2, (2, 3))
    target[0, 1] = -100
    if kind == "soft":
        target = F.one_hot(target.clamp_min(0), 6).double()
    for normalizer in (SoftMax(), MultiMax().double(), SparseMax()):
        options = {"reduction": reduction}
        got = with_gradients(loss, normalizer, scores, target, class_mask=mask, **options)
        with use_backend("eager"):
            wanted = with_gradients(
                of_scores, normalizer, scores, target, class_mask=mask.expand(2, 3, 6), **options
            )
        torch.testing.assert_close(got, wanted, **CLOSE, equal_nan=True)


def test_a_mask_is_never_expanded():
    for shape in SHAPES[:5]:
        mask = torch.rand(shape) < 0.5
        hidden = linear_loss.HiddenClasses(mask, (2, 3, 6))
        parts = torch.cat([hidden.of_rows(slice(i, i + 2)) for i in range(0, 6, 2)])
        assert torch.equal(parts, ~mask.expand(2, 3, 6).reshape(6, 6))
        kept = [t for t in vars(hidden).values() if isinstance(t, torch.Tensor)]
        assert all(t.untyped_storage().nbytes() == mask.numel() for t in kept)
    shared = linear_loss.HiddenClasses(torch.ones(6) > 0, (1000, 6)).of_rows()
    assert shared.shape == (1000, 6)
    assert shared.untyped_storage().nbytes() == 6


def test_all_classes_forbidden_is_nan(normalizer, loss, class_scores, targets):
    normalizer = normalizer.double()
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2] = False
    for target in (targets["hard"], targets["one-hot"], targets["soft"]):
        got = with_gradients(
            loss, normalizer, class_scores, target, class_mask=mask, reduction="none"
        )
        expected = loss(normalizer, class_scores, target, reduction="none")
        assert got[0].isnan().tolist() == [False, False, True, False, False]
        torch.testing.assert_close(got[0][mask[:, 0]], expected[mask[:, 0]], **CLOSE)
        assert (got[1][2] == 0).all()
        assert got[1].isfinite().all()


def test_ignored_rows_may_be_forbidden(normalizer, loss, class_scores, targets):
    """Their loss of NaN, times 0, reaches no gradient."""
    normalizer, target = normalizer.double(), targets["hard"].clone()
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[2], target[2] = False, -100
    kept = torch.tensor([0, 1, 3, 4])
    options = {"reduction": "sum"}
    got = with_gradients(loss, normalizer, class_scores, target, class_mask=mask, **options)
    wanted = with_gradients(of_scores, normalizer, class_scores[kept], target[kept], **options)
    torch.testing.assert_close(got[0], wanted[0], **CLOSE)
    torch.testing.assert_close(got[1][kept], wanted[1], **CLOSE)
    torch.testing.assert_close(got[2:], wanted[2:], **CLOSE)
    assert (got[1][2] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["hard", "mixup"])
def test_a_forbidden_target_is_inf_with_finite_gradients(
    normalizer, loss, class_scores, targets, kind, label_smoothing
):
    normalizer, target = normalizer.double(), targets[kind]
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[1, targets["hard"][1]] = False
    options = {"class_mask": mask, "reduction": "none", "label_smoothing": label_smoothing}
    got = with_gradients(loss, normalizer, class_scores, target, **options)
    assert got[0].isinf().tolist() == [False, True, False, False, False]
    assert got[0][1] > 0
    assert all(gradient.isfinite().all() for gradient in got[1:])
    assert (got[1][~mask] == 0).all()
    with use_backend("eager"):
        wanted = with_gradients(of_scores, normalizer, class_scores, target, **options)
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["hard", "soft", "mixup"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_where_the_loss_is_inf_or_nan_it_is_that_of_torch(
    loss, class_scores, targets, kind, label_smoothing
):
    """But for a probability of 0 in the target, whose product with -inf is NaN in torch."""
    scores = class_scores.clone()
    scores[0, 3] = scores[1, targets["hard"][1]] = scores[2] = -math.inf
    scores[3, 0], scores[4, 1] = math.nan, math.inf
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    expected = F.cross_entropy(scores, targets[kind], **options)
    if loss is of_features:  # whose product would make NaN of -inf
        mask = scores != -math.inf
        got = loss(SoftMax(), scores.where(mask, 0.0), targets[kind], class_mask=mask, **options)
    else:
        got = loss(SoftMax(), scores, targets[kind], **options)
    same = ~expected.isnan() if kind == "mixup" else torch.ones(5, dtype=torch.bool)
    torch.testing.assert_close(got[same], expected[same], equal_nan=True)
    assert got[2:].isnan().all()


@pytest.mark.parametrize("kind", ["hard", "one-hot"])
def test_function_transforms_agree(normalizer, class_scores, targets, kind):
    normalizer = normalizer.double()
    mask = targets["one-hot"].bool()
    mask[:, :3] = True

    def mean(scores):
        return output_loss(normalizer, scores, targets[kind], class_mask=mask)

    with use_backend("auto"):
        gradient, value = torch.func.grad_and_value(mean)(class_scores)
    class_scores.requires_grad_()
    expected = mean(class_scores)
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, class_scores)[0], **CLOSE)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_no_rows(loss, shape):
    features, target = torch.randn(*shape, 6), torch.zeros(shape, dtype=torch.int64)
    for of_mask in ((6,), (1, 6), (*shape, 6)):
        mask = torch.ones(of_mask, dtype=torch.bool)
        losses = loss(SoftMax(), features, target, class_mask=mask, reduction="none")
        assert losses.shape == shape
        assert loss(SoftMax(), features, target, class_mask=mask, reduction="sum") == 0


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_fenchel_young_losses_take_it(class_scores, targets, kind):
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[:, 3] = targets["hard"] == 3
    target = targets[kind].clone()
    if kind == "soft":
        target = target * mask / (target * mask).sum(-1, keepdim=True)
    filled = class_scores.masked_fill(~mask, -1e6)  # so low that it has no probability
    for function, alpha in ((sparsemax_loss, 2.0), (entmax15_loss, 1.5), (None, 1.3)):
        function = function or (lambda *a, **o: fenchel_young_loss(*a, 1.3, **o))
        found = function(class_scores, target, class_mask=mask)
        torch.testing.assert_close(found, output_loss(EntMax(alpha), filled, target))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6), r"class_mask must be boolean .* got torch.float32"),
        (torch.ones(5) > 0, r"class_mask of shape \(5,\) must broadcast to the scores, of .*, 6\)"),
        (torch.ones(2, 5, 6) > 0, r"class_mask of shape \(2, 5, 6\) must broadcast"),
        (torch.ones(6, device="meta") > 0, "class_mask is on meta"),
    ],
)
def test_bad_masks(loss, class_scores, targets, mask, message):
    for normalizer in (SoftMax(), EntMax()):
        with pytest.raises(ValueError, match=message):
            loss(normalizer, class_scores, targets["hard"], class_mask=mask)
    with pytest.raises(ValueError, match=message):
        fenchel_young_loss(class_scores, targets["hard"], class_mask=mask)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_an_error(layout):
    scores = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)
    target, weight = torch.zeros(5, dtype=torch.int64), torch.ones(4, 4)
    for call in (
        lambda: output_loss(SoftMax(), scores, target),
        lambda: linear_output_loss(SoftMax(), scores, weight, target),
        lambda: fenchel_young_loss(scores, target),
        lambda: fenchel_young_loss(scores, target, torch.tensor(1.5)),
    ):
        with pytest.raises(ValueError, match=r"nested .* pad them, torch.nested.to_padded_tensor"):
            call()
