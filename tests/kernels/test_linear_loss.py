"""The chunked output layer against the linear layer and the loss, one after the other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from modulators import moved_apart

from multimax import (
    EntMax,
    EvSoftMax,
    MultiMax,
    SoftMax,
    SparseMax,
    TopK,
    linear_output_loss,
    use_backend,
)
from multimax.kernels import linear_loss

NORMALIZERS = {
    "softmax": lambda: SoftMax(0.7),
    "softmax-learned": lambda: SoftMax(2.0, learned=True),
    "multimax-1-affine": lambda: MultiMax(1, affine=True),
    "multimax-2": MultiMax,
    "multimax-3": lambda: MultiMax(3),
    "topk": lambda: TopK(3),
    "sparsemax": SparseMax,
    "entmax-learned": lambda: EntMax(1.3, learned=True),
    "evsoftmax": EvSoftMax,
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of 3 rows, of which the last is shorter."""
    monkeypatch.setattr(linear_loss, "LEAST_ROWS", 3)
    monkeypatch.setattr(linear_loss, "LEAST_SCORES", 1)


def draw(dtype=torch.float64, classes=11):
    """Features (2, 5, 6), weight, bias and class indices, of which one does not count."""
    features, weight, bias = (
        torch.randn(shape, dtype=dtype) for shape in ((2, 5, 6), (classes, 6), (classes,))
    )
    target = torch.randint(0, classes, (2, 5))
    target[0, 1] = -100
    return features, weight, bias, target


def build(name):
    return moved_apart(NORMALIZERS[name]())


def loss_and_gradients(module, features, weight, bias, target, backend="auto", **options):
    """The loss, and gradients of features, weight, bias and scalars for an uneven dL/dloss."""
    module = copy.deepcopy(module)
    inputs = [t if t is None else t.clone().requires_grad_() for t in (features, weight, bias)]
    with use_backend(backend):
        loss = linear_output_loss(module, *inputs[:2], target, inputs[2], **options)
    upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype).reshape(loss.shape)
    loss.backward(upstream)
    leaves = [*inputs, *module.parameters()]
    return loss.detach(), *(leaf.grad for leaf in leaves if leaf is not None)


def compare(module, *inputs, **options):
    chunked = loss_and_gradients(module, *inputs, **options)
    whole = loss_and_gradients(module, *inputs, backend="eager", **options)
    # Two orders of summation of some tens of float64 terms.
    torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_indices(name, reduction, label_smoothing):
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    compare(build(name), *draw(), **options)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_probabilities_as_target(name, reduction, label_smoothing):
    features, weight, bias, _ = draw()
    target = torch.rand(2, 5, 11, dtype=torch.float64)
    target[0, 0, :9] = 0.0
    target = target / target.sum(-1, keepdim=True)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    compare(build(name), features, weight, bias, target, **options)


@pytest.mark.parametrize("name", ["multimax-2", "sparsemax"])
def test_without_bias_and_with_another_ignored_class(name):
    features, weight, _, target = draw()
    target = target.clamp_min(0)
    compare(build(name), features, weight, None, target, ignore_index=4)


def test_softmax_is_cross_entropy_of_torch():
    features, weight, bias, target = draw()
    expected = F.cross_entropy(
        F.linear(features, weight, bias).flatten(0, 1), target.flatten(), label_smoothing=0.2
    )
    loss = linear_output_loss(SoftMax(), features, weight, target, bias, label_smoothing=0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)


def test_no_score_matrix_is_kept_or_made(monkeypatch):
    shapes, kept, linear = [], [], F.linear

    def counted(x, weight, bias):
        shapes.append(x.shape)
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    features, weight, bias, target = draw()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_output_loss(MultiMax(), features.requires_grad_(), weight, target, bias)
    assert [shape[0] for shape in shapes] == [3, 3, 3, 1]
    assert (10, 11) not in kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "multimax-2"),
        (torch.float16, "multimax-2"),
        (torch.bfloat16, "entmax-learned"),
    ],
)
def test_half_precision_sums_in_fp32(dtype, name):
    """Sums over 4,096 rows in chunks of 3 would lose their digits in half precision."""
    features, weight = torch.randn(4096, 8, dtype=dtype), torch.randn(50, 8, dtype=dtype)
    target, module = torch.randint(0, 50, (4096,)), build(name)
    inputs = module.float(), features, weight, None, target
    expected = loss_and_gradients(*inputs, reduction="sum", backend="eager")
    chunked = loss_and_gradients(*inputs, reduction="sum")
    assert [t.dtype for t in chunked[:3]] == [torch.float32, dtype, dtype]
    # Gradients are rounded to the dtype once more: 8 bits of bf16, 11 of fp16.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for result, reference in zip(chunked, expected, strict=True):
        assert (result - reference).abs().max() <= tolerance * reference.abs().max()


def test_autocast_computes_scores_in_its_dtype():
    features, weight, bias, target = (t.float() if i < 3 else t for i, t in enumerate(draw()))
    inputs = features.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_output_loss(MultiMax(init="identity"), *inputs, target, bias)
    scores = F.linear(features.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()
    expected = F.cross_entropy(scores.flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert [tensor.grad.dtype for tensor in inputs] == [torch.float32] * 2


def test_a_graph_can_be_gone_through_twice():
    features, weight, bias, target = draw()
    weight.requires_grad_()
    loss = linear_output_loss(MultiMax().double(), features, weight, target, bias)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)


def test_without_gradients_nothing_is_kept():
    features, weight, bias, target = draw()
    with torch.no_grad():
        loss = linear_output_loss(MultiMax().double(), features, weight, target, bias)
    assert not loss.requires_grad


def test_the_whole_batch_may_be_ignored():
    features, weight, bias, target = draw()
    target.fill_(-100)
    loss = linear_output_loss(
        MultiMax().double(), features.requires_grad_(), weight, target, bias, reduction="sum"
    )
    loss.backward()
    assert loss == 0
    assert (features.grad == 0).all()


def test_bad_targets():
    features, weight, bias, target = draw()
    with pytest.raises(ValueError, match=r"target must be in \[0, 11\)"):
        linear_output_loss(SoftMax(), features, weight, target + 11, bias, ignore_index=-89)
    with pytest.raises(ValueError, match="shape of scores without the class dimension"):
        linear_output_loss(SoftMax(), features, weight, target[0], bias)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_mean_over_no_rows_is_nan_and_its_gradients_are_zero(name):
    """As those of torch's cross-entropy; one such batch must not spoil all processes' weights."""
    torch.manual_seed(0)
    normalizer = NORMALIZERS[name]()
    features, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    target = torch.full((3,), -100)
    expected = F.cross_entropy(features @ weight.t(), target)
    wanted = torch.autograd.grad(expected, [features, weight])
    loss = linear_output_loss(normalizer, features, weight, target)
    learned = list(normalizer.parameters())
    got = torch.autograd.grad(loss, [features, weight, *learned], allow_unused=True)
    assert loss.isnan()
    assert expected.isnan()
    for gradient, zero in zip(got[:2], wanted, strict=True):
        assert torch.equal(gradient, zero)
    assert all(g is None or (g == 0).all() for g in got)
