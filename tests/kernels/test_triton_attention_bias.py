"""Attention with a bias by the Triton kernels, against its eager definition in float64."""

import math

import pytest
import torch
from definition import assert_equal, attended, build, qkv, random

pytest.importorskip("triton")

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.slow]

SHAPE = (2, 2, 17, 18)  # batch, heads, queries, keys: two tiles of each


@pytest.fixture(params=["after", "before"])
def place(request):
    return request.param


def grouped_heads(device):
    tensors = qkv(2, 2, 17, 18, dim=16, value_dim=16, key_heads=1)
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize(
    ("shape", "name", "causal", "place"),
    [
        (SHAPE, "multimax-2", False, "after"),
        (SHAPE, "multimax-2", False, "before"),
        ((2, 17, 18), "multimax-1-affine", True, "before"),
        ((2, 1, 1, 18), "softmax-learned", False, "after"),
        ((2, 1, 1, 18), "multimax-2-affine", False, "before"),
        ((2, 17, 1), "multimax-2-affine", True, "after"),
        ((), "multimax-2", False, "after"),
    ],
    ids=str,
)
def test_output_and_gradients(shape, name, causal, place, device):
    tensors, bias = grouped_heads(device), random(*shape).to(device)
    if shape:
        bias[0, ..., 0] = -math.inf  # whole queries if all keys have the same bias
    module, mask = build(name).to(device), torch.rand(17, 18, device=device) < 0.8
    options = dict(bias=bias, bias_place=place, causal=causal)
    found, expected = (
        attended(tensors, module, mask, backend, **options) for backend in ("triton", "eager")
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("shape", [SHAPE, (18,)], ids=str)
def test_a_bias_in_lower_precision_of_a_strided_view(place, shape, device):
    tensors = [tensor.float() for tensor in grouped_heads(device)]
    bias = random(*shape, 2).to(device)[..., 0].half()
    module, options = build("multimax-2").to(device), dict(bias_place=place)
    *expected, of_bias = attended(
        [t.double() for t in tensors], module, backend="eager", bias=bias.double(), **options
    )
    *found, half = attended(tensors, module.float(), backend="triton", bias=bias, **options)
    assert half.dtype == torch.float16
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.dist(actual.double(), wanted) < 1e-4 * wanted.norm()
    assert torch.dist(half.double(), of_bias) < 2e-3 * of_bias.norm()


@pytest.mark.parametrize(("low", "added"), [(-15e3, 4e3), (-8e3, -7e3)])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_what_comes_in_below_the_floor_is_masked(low, added, scale, place, device):
    """A learned scale and shift could lift it."""
    module = build("multimax-2-affine").to(device)
    with torch.no_grad():
        module.scale.fill_(-0.5)
        module.ts[-2] = 0.7
    tensors = [tensor.to(device) for tensor in qkv(1, 1, 3, 4, dim=1, value_dim=1)]
    tensors[0].fill_(1.0)
    tensors[1][..., 3, :] = low / scale
    bias = torch.tensor([0.3, -0.2, 0.1, added], dtype=torch.float64, device=device)
    options = dict(bias=bias, bias_place=place, scale=scale)
    found, expected = (
        attended(tensors, module, backend=backend, **options) for backend in ("triton", "eager")
    )
    assert_equal(found, expected)
    assert (found[2][..., 3, :] == 0).all()  # the gradient of its key
