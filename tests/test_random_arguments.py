"""Public functions on tensors of any shape, layout and dtype, and of which any take gradients.

What they compute must be what they compute of plain copies; what they do not take is a ValueError.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normalizer_cases import CASES, build_case

from multimax import metrics
from multimax.attention import attention
from multimax.losses import (
    entmax15_loss,
    fenchel_young_loss,
    linear_output_loss,
    output_loss,
    sparsemax_loss,
)

pytestmark = pytest.mark.slow
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["plain", "transposed", "strided", "offset", "broadcast", "reversed"]
MEASURES = {
    "entropy": lambda p, _scores, dim, _mask: metrics.entropy(p, dim),
    "support_size": lambda p, _scores, dim, _mask: metrics.support_size(p, dim),
    "top_k_mass": lambda p, _scores, dim, _mask: metrics.top_k_mass(p, 2, dim),
    "sparsity": lambda p, scores, dim, mask: metrics.sparsity(p, scores, 0.1, 0.2, dim, mask),
    "softmax_reference": lambda _p, scores, dim, mask: metrics.softmax_reference(scores, dim, mask),
    "uniform_reference": lambda _p, scores, dim, mask: metrics.uniform_reference(scores, dim, mask),
    "row_mean": lambda _p, scores, dim, mask: metrics.row_mean(scores, dim, mask),
    "multi_modality": lambda p, scores, dim, mask: metrics.multi_modality(p, scores, 0, dim, mask),
}
LOSSES = {
    "sparsemax_loss": sparsemax_loss,
    "entmax15_loss": entmax15_loss,
    "fenchel_young_loss": functools.partial(fenchel_young_loss, alpha=1.3),
    **{
        case: lambda x, y, case=case, **options: output_loss(module_of(case), x, y, **options)
        for case in ("softmax-learned", "multimax", "sparsemax", "entmax-1.2", "topk")
    },
}


@functools.cache
def module_of(case):
    torch.manual_seed(0)
    return build_case(case).eval()


def laid_out(tensor, layout):
    """The same numbers in another place of memory."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "strided" and tensor.dim():
        return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]
    if layout == "offset":
        flat = torch.full((tensor.numel() + 3,), 7, dtype=tensor.dtype)
        flat[3:] = tensor.flatten()
        return flat[3:].view(tensor.shape)
    if layout == "broadcast" and tensor.dim() > 1:
        return tensor[:1].expand(tensor.shape)
    if layout == "reversed" and tensor.dim():
        return tensor.flip(-1).contiguous().flip(-1)
    return tensor


@st.composite
def tensors(draw, least=0, most=4):
    """A tensor of small scores, a dimension of it, and a mask or None."""
    shape = draw(st.lists(st.integers(0, 4), min_size=least, max_size=most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    plain = 2 * torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    tensor = laid_out(plain, draw(st.sampled_from(LAYOUTS)))
    dim = draw(st.integers(-max(1, len(shape)), max(0, len(shape) - 1)))
    mask = None
    if draw(st.booleans()):
        kept = [size if draw(st.booleans()) else 1 for size in shape]
        kept = kept[draw(st.integers(0, len(kept))) :]
        mask = laid_out(torch.rand(kept, generator=generator) < 0.7, draw(st.sampled_from(LAYOUTS)))
    return tensor, dim, mask


def outcome(function, leaves):
    """The result, and the gradients of what takes any."""
    leaves = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
    result = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not (wanted and result.requires_grad):
        return [result.detach()]
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return [result.detach(), *torch.autograd.grad((result * weights).sum(), wanted)]


def plain(tensor):
    return None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format)


def assert_as_of_copies(function, leaves, *others):
    """`function(*leaves, *others)` does not depend on where its tensors lie."""
    found = outcome(lambda *inputs: function(*inputs, *others), leaves)
    copies = [plain(leaf).requires_grad_(leaf.requires_grad) for leaf in leaves]
    expected = outcome(lambda *inputs: function(*inputs, *map(plain, others)), copies)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0
        torch.testing.assert_close(one, other, rtol=4 * eps, atol=4 * eps, equal_nan=True)
    return found


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25)
@given(data=st.data())
def test_normalizers(case, data):
    scores, dim, mask = data.draw(tensors())
    scores = scores.detach().requires_grad_(data.draw(st.booleans()))
    module = module_of(case)
    found, *gradients = assert_as_of_copies(lambda x, m: module(x, dim, m), [scores], mask)
    assert found.dtype == scores.dtype
    assert found.shape == scores.shape
    for tensor in (found, *gradients):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10)
@given(data=st.data())
def test_normalizers_under_vmap(case, data):
    scores, dim, _ = data.draw(tensors(least=2))
    batch = data.draw(st.integers(0, scores.dim() - 1))
    if not scores.size(batch):  # which vmap refuses
        return
    of_row = dim % scores.dim()
    if of_row == batch:
        return
    module = module_of(case)
    found = torch.vmap(lambda x: module(x, of_row - (batch < of_row)), batch, batch)(scores)
    eps = torch.finfo(scores.dtype).eps
    torch.testing.assert_close(found, module(scores, dim), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("name", MEASURES)
@settings(max_examples=25)
@given(data=st.data())
def test_metrics(name, data):
    scores, dim, mask = data.draw(tensors(least=1))
    scores = scores.float()
    probabilities = scores.softmax(dim)

    def measure(p, x, m):
        return MEASURES[name](p, x, dim, m)

    assert_as_of_copies(measure, [probabilities, scores], mask)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("case", ["softmax-learned", "multimax", "multimax-steps", "sparsemax"])
@settings(max_examples=30)
@given(data=st.data())
def test_attention(case, backend, data):
    size = functools.partial(st.integers, 0)
    batch, groups, queries, keys = (data.draw(size(most)) for most in (2, 2, 5, 5))
    heads = groups * data.draw(st.integers(1, 2))
    dim, value_dim = (data.draw(st.integers(1, 5)) for _ in range(2))
    shapes = [(batch, heads, queries, dim), (batch, groups, keys, dim)]
    shapes.append((batch, groups, keys, value_dim))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    leaves = []
    for shape in shapes:
        tensor = 2 * torch.randn(shape, generator=generator).to(dtype)
        tensor = laid_out(tensor, data.draw(st.sampled_from(LAYOUTS)))
        leaves.append(tensor.detach().requires_grad_(data.draw(st.booleans())))
    mask = None
    if data.draw(st.booleans()):
        whole = (batch, heads, queries, keys)
        kept = [size if data.draw(st.booleans()) else 1 for size in whole]
        mask = torch.rand(kept, generator=generator) < 0.7
        mask = laid_out(mask, data.draw(st.sampled_from(LAYOUTS)))
    causal, module = data.draw(st.booleans()), module_of(case)

    def attend(query, key, value, mask):
        return attention(query, key, value, module, mask, causal, backend=backend)

    found, *gradients = assert_as_of_copies(attend, leaves, mask)
    assert found.shape == (batch, heads, queries, value_dim)
    assert found.dtype == dtype
    for tensor in (found, *gradients):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=30)
@given(data=st.data())
def test_losses_of_scores(name, data):
    scores, _, _ = data.draw(tensors(least=2, most=3))
    if not scores.size(-1):
        return
    scores = scores.detach().requires_grad_(data.draw(st.booleans()))
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(scores.size(-1), scores.shape[:-1], generator=generator)
    if data.draw(st.booleans()):
        target = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.3, -100)
    target = laid_out(target, data.draw(st.sampled_from(LAYOUTS)))
    options = {
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.3])),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
    }
    assert_as_of_copies(lambda x, y: LOSSES[name](x, y, **options), [scores], target)


@settings(max_examples=30)
@given(data=st.data())
def test_linear_output_loss(data):
    rows, features, classes = (data.draw(st.integers(least, 6)) for least in (0, 1, 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    leaves = []
    for shape in ((rows, features), (classes, features)):
        tensor = laid_out(torch.randn(shape).to(dtype), data.draw(st.sampled_from(LAYOUTS)))
        leaves.append(tensor.detach().requires_grad_(data.draw(st.booleans())))
    target, module = torch.arange(rows) % classes, module_of("multimax")
    assert_as_of_copies(lambda x, w, y: linear_output_loss(module, x, w, y), leaves, target)
