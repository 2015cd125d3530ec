"""The Triton kernels, interpreted, where there is NaN, inf, a forbidden class, or autocast."""

import math
from functools import partial

import pytest
import torch

from multimax import MultiMax, SoftMax, linear_output_loss, output_loss
from multimax.attention import attention
from multimax.kernels.backend import use_backend

pytest.importorskip("triton")

# The interpreter warns of numbers that the compiled code computes and then throws away.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.slow]

CLOSE = {"rtol": 1e-7, "atol": 1e-8}  # the share of label smoothing is rounded to fp32


def negative(module):
    torch.nn.init.constant_(module.scale, -1.3)
    return module


NORMALIZERS = {
    "softmax": SoftMax,
    "softmax-learned": lambda: SoftMax(2.0, learned=True),
    "multimax-1": lambda: MultiMax(1),
    "multimax-2": MultiMax,
    "multimax-affine": lambda: MultiMax(affine=True),
    "multimax-negative": lambda: negative(MultiMax(affine=True)),
}


@pytest.fixture(params=NORMALIZERS)
def fusible(request, device):
    module = NORMALIZERS[request.param]().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.to(device)


def gradients_of(function, inputs, parameters=()):
    """The result, and the gradients of inputs and scalars for an uneven upstream gradient."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in inputs]
    result = function(*leaves)
    upstream = torch.linspace(0.5, 2, result.numel(), dtype=result.dtype, device=result.device)
    upstream = upstream.reshape(result.shape)
    wanted = [*leaves, *parameters]
    return result.detach(), *torch.autograd.grad(result, wanted, upstream)


@pytest.mark.parametrize("masked", [False, True])
def test_nan_and_inf_in_attention_are_where_the_definition_has_them(fusible, masked, device):
    shape = (1, 2, 19, 8)  # two tiles
    query, key, content = (torch.rand(shape, dtype=torch.float64) + 0.1 for _ in range(3))
    query[0, 1, 3, 0], query[0, 1, 7, 0] = math.nan, math.inf
    mask = torch.rand(1, 1, 19, 19) < 0.7 if masked else None
    inputs = [tensor.to(device) for tensor in (query, key, content)]
    mask = mask if mask is None else mask.to(device)
    out, expected = (
        gradients_of(partial(attention, normalizer=fusible, mask=mask, backend=name), inputs)
        for name in ("triton", "eager")
    )
    assert out[0][0, 1, [3, 7]].isnan().all()
    assert not out[0][0, 0].isnan().any()
    # Masked keys of a row of NaN get 0 times NaN, or nothing, in the products of matrices.
    for actual, wanted in zip(out[:2], expected[:2], strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE, equal_nan=True)
    for actual, wanted in zip(out[2:], expected[2:], strict=True):
        torch.testing.assert_close(actual[0, 0], wanted[0, 0], **CLOSE)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["hard", "one-hot", "mixup", "soft"])
def test_forbidden_classes(fusible, class_scores, targets, kind, label_smoothing, device):
    """Two that no row has as target, one that is a target, and a row where all are forbidden."""
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[0, (targets["hard"][0] + 1) % 6] = mask[1, (targets["hard"][1] + 2) % 6] = False
    mask[2, targets["hard"][2]] = False
    mask, target = mask.to(device), targets[kind].to(device)
    weight = torch.randn(6, 6, dtype=torch.float64, device=device)
    options = {"label_smoothing": label_smoothing, "class_mask": mask, "reduction": "none"}

    def fused(features, weight, *_):
        with use_backend("triton"):
            return linear_output_loss(fusible, features, weight, target, **options)

    def whole(features, weight, *_):
        with use_backend("eager"):
            return output_loss(fusible, features @ weight.t(), target, **options)

    found, expected = (
        gradients_of(function, [class_scores.to(device), weight], fusible.parameters())
        for function in (fused, whole)
    )
    assert found[0][2] == math.inf
    torch.testing.assert_close(found, expected, **CLOSE)
    assert all(gradient.isfinite().all() for gradient in found[1:])
    mask[3] = False
    assert fused(class_scores.to(device), weight).isnan().tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_with_nan_and_inf_have_a_loss_of_nan(fusible, class_scores, targets, value, device):
    class_scores[1, 3] = value
    weight = torch.eye(6, dtype=torch.float64, device=device)
    with use_backend("triton"):
        losses = linear_output_loss(
            fusible, class_scores.to(device), weight, targets["hard"].to(device), reduction="none"
        )
    assert losses.isnan().tolist() == [False, True, False, False, False]


def test_autocast(fusible, device, bfloat16_products):
    tensors = [torch.randn(1, 2, 5, 8, device=device) for _ in range(3)]
    module = fusible.float()
    with torch.autocast(device, torch.bfloat16):
        out = attention(*tensors, module, backend="triton")
    assert out.dtype == torch.bfloat16
    cast = [tensor.bfloat16() for tensor in tensors]
    assert torch.equal(out, attention(*cast, module, backend="triton"))


def test_what_does_not_fit_is_the_error_of_the_others(device):
    tensor = torch.ones(1, 2, 5, 8, device=device)
    for shape in ((4, 1, 2, 5, 5), (1, 2, 6, 5), (3, 5)):
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        with pytest.raises(ValueError, match=r"mask of shape .* must broadcast to the scores, of"):
            attention(tensor, tensor, tensor, SoftMax(), mask, backend="triton")
    with pytest.raises(ValueError, match="head_dim of 0"):
        attention(tensor[..., :0], tensor[..., :0], tensor, SoftMax(), backend="triton")
