"""Attention where there is NaN, nothing to attend to, autocast, or what does not fit together."""

import math

import pytest
import torch
import torch.nn.functional as F

from multimax import MultiMax, SoftMax, SparseMax
from multimax.attention import attention

BACKENDS = ["eager", "auto"]
FITS = "must broadcast to the scores, of shape"
ONES = {"dtype": torch.bool}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def qkv(batch=2, heads=2, queries=5, keys=7, dim=4, dtype=torch.float64):
    """All positive, so that inf makes scores of inf and not of -inf, which would be masked."""
    shapes = (batch, heads, queries, dim), (batch, heads, keys, dim), (batch, heads, keys, dim)
    return [torch.rand(shape, dtype=dtype) + 0.1 for shape in shapes]


def attended(tensors, normalizer, backend, **options):
    """The output, and the gradients of query, key and value."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = attention(*tensors, normalizer, backend=backend, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return out.detach(), *torch.autograd.grad(out, tensors, upstream)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_of_nan_spoils_its_row_alone(normalizer, backend, value, masked, causal):
    normalizer, tensors = normalizer.double(), qkv()
    mask = None
    if masked:
        mask = torch.ones(5, 7, **ONES)
        mask[:, 2] = False
    expected = attended(tensors, normalizer, backend, mask=mask, causal=causal)
    tensors[0][0, 1, 1] = value
    out, of_query, of_key, of_value = attended(
        tensors, normalizer, backend, mask=mask, causal=causal
    )
    spoilt = torch.zeros(2, 2, 5, **ONES)
    spoilt[0, 1, 1] = True
    for tensor, without in ((out, expected[0]), (of_query, expected[1])):
        assert tensor[spoilt].isnan().all()
        assert torch.equal(tensor[~spoilt], without[~spoilt])
    for tensor, without in ((of_key, expected[2]), (of_value, expected[3])):
        assert tensor[0, 1, 0].isnan().all()
        assert torch.equal(tensor[:, 0], without[:, 0])
        assert torch.equal(tensor[1], without[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_key_of_nan_spoils_the_rows_that_see_it(normalizer, backend, value):
    normalizer, tensors = normalizer.double(), qkv()
    mask = torch.ones(5, 7, **ONES)
    mask[:3, 2] = False
    expected = attention(*tensors, normalizer, mask, backend=backend)
    tensors[1][0, 0, 2] = value
    out = attention(*tensors, normalizer, mask, backend=backend)
    assert out[0, 0, 3:].isnan().all()
    torch.testing.assert_close(out[0, 0, :3], expected[0, 0, :3])
    torch.testing.assert_close(out[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_keys_give_zeros(normalizer, backend, masked, causal, dropout):
    tensors = qkv(keys=0, dtype=torch.float32)
    mask = torch.ones(5, 0, **ONES) if masked else None
    options = {"mask": mask, "causal": causal, "dropout": dropout}
    out, *gradients = attended(tensors, normalizer, backend, **options)
    assert out.shape == (2, 2, 5, 4)
    assert (out == 0).all()
    assert (gradients[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)])
def test_no_queries(normalizer, backend, shape):
    query = torch.ones(shape)
    key = torch.ones(*shape[:2], 7, 4)
    assert attention(query, key, key, normalizer, backend=backend).shape == shape


def test_what_does_not_fit_is_one_error(normalizer, backend):
    query, key, value = qkv(dtype=torch.float32)
    for shape in ((3, 2, 2, 5, 7), (2, 2, 6, 7), (2, 2, 5, 1, 7), (2, 3, 5, 7), (6,)):
        with pytest.raises(ValueError, match=FITS):
            attention(query, key, value, normalizer, torch.ones(shape, **ONES), backend=backend)
    mask = torch.ones(2, 1, 5, 8, **ONES)
    with pytest.raises(ValueError, match=FITS):  # of grouped heads
        attention(query, key[:, :1], value[:, :1], normalizer, mask, backend=backend)
    mask = torch.ones(2, 5, 7, **ONES)
    with pytest.raises(ValueError, match=FITS):  # of no heads
        attention(query[0, 0], key[0, 0], value[0, 0], normalizer, mask, backend=backend)
    with pytest.raises(ValueError, match=r"query \(2, 2, 5, 0\) .* head_dim of 0.* at least 1"):
        attention(query[..., :0], key[..., :0], value, normalizer, backend=backend)
    with pytest.raises(ValueError, match=r"query \(2, 2, 5, 4\) has 2 heads, key .* has 0"):
        attention(query, key[:, :0], value[:, :0], normalizer, backend=backend)
    three = torch.ones(2, 3, 7, 4)
    with pytest.raises(ValueError, match=r"query \(2, 2, 5, 4\) has 2 .* key \(2, 3, 7, 4\) has 3"):
        attention(query, three, three, normalizer, backend=backend)


def test_grouped_heads_take_a_mask_of_every_query_head(normalizer, backend):
    query, key, value = qkv(heads=4)
    mask = torch.rand(2, 4, 5, 7) < 0.6
    grouped = attention(query, key[:, :2], value[:, :2], normalizer.double(), mask, backend=backend)
    repeated = [tensor[:, :2].repeat_interleave(2, 1) for tensor in (key, value)]
    expected = attention(query, *repeated, normalizer, mask, backend=backend)
    torch.testing.assert_close(grouped, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_an_error(backend, layout):
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)
    plain = torch.ones(2, 3, 4)
    for tensors in ([nested] * 3, [plain, nested, nested], [plain, plain, nested]):
        with pytest.raises(ValueError, match=r"nested .* pad them, torch.nested.to_padded_tensor"):
            attention(*tensors, SoftMax(), backend=backend)


def test_views_with_the_negative_bit(normalizer, backend):
    query, key, value = (torch._neg_view(tensor) for tensor in qkv())
    assert query.is_neg()
    plain = [tensor.resolve_neg().clone() for tensor in (query, key, value)]
    expected = attention(*plain, normalizer.double(), backend=backend)
    out = attention(query, key, value, normalizer, backend=backend)
    torch.testing.assert_close(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("module", [SoftMax, MultiMax, SparseMax])
def test_autocast_casts_as_torch_does(module, backend, dtype, compiled):
    torch._dynamo.reset()  # the limit of recompilations is for all parameters together
    tensors, module = qkv(dtype=dtype), module()
    call = torch.compile(attention, backend="eager", fullgraph=True) if compiled else attention
    with torch.autocast("cpu", torch.bfloat16):
        out = call(*tensors, module, backend=backend)
        expected = F.scaled_dot_product_attention(*tensors)
    assert out.dtype == expected.dtype
    cast = [tensor.to(expected.dtype) for tensor in tensors]
    torch.testing.assert_close(out, attention(*cast, module, backend=backend))
    assert attention(*tensors, module, backend=backend).dtype == dtype


def test_autocast_leads_gradients_to_the_dtype_of_the_inputs(normalizer, backend):
    tensors = [tensor.requires_grad_() for tensor in qkv(dtype=torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*tensors, normalizer, backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors)
    assert all(tensor.grad.isfinite().all() for tensor in tensors)
