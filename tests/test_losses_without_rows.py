"""The mean loss over no rows: NaN, and gradients of 0 for every parameter, which DDP waits for.

One process whose batch has no target must not spoil the weights of all.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from multimax import EntMax, EntMax15, MultiMax, SoftMax, SparseMax, build_normalizer
from multimax.kernels.backend import use_backend
from multimax.losses import linear_output_loss, output_loss
from multimax.models.transformer import LanguageModel

NORMALIZERS = {
    "softmax": SoftMax,
    "softmax-learned": partial(SoftMax, learned=True),
    "multimax": MultiMax,
    "sparsemax": SparseMax,
    "entmax15": EntMax15,
    "entmax-learned": partial(EntMax, 1.3, learned=True),
    "topk": partial(build_normalizer, "topk", k=2),
    "evsoftmax": partial(build_normalizer, "evsoftmax"),
}


def targets():
    return {
        "all ignored": (3, torch.full((3,), -100)),
        "no rows": (0, torch.empty(0, dtype=torch.int64)),
        "no soft rows": (0, torch.empty(0, 5)),
    }


@pytest.mark.parametrize("kind", targets())
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("linear", [False, True], ids=["output", "linear"])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_as_torchs_cross_entropy(name, linear, backend, kind):
    torch.manual_seed(0)
    normalizer = NORMALIZERS[name]()
    rows, target = targets()[kind]
    features = torch.randn(rows, 4, requires_grad=True)
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    inputs = [features, weight, bias, *normalizer.parameters()]
    with use_backend(backend):
        if linear:
            loss = linear_output_loss(normalizer, features, weight, target, bias)
        else:
            loss = output_loss(normalizer, F.linear(features, weight, bias), target)
        assert loss.isnan()
        for tensor, gradient in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("output", ["softmax", "multimax", "entmax15"])
@pytest.mark.parametrize("cutoffs", [None, [4, 7]], ids=["full", "adaptive"])
def test_of_a_language_model(cutoffs, output):
    torch.manual_seed(0)
    model = LanguageModel(
        10, 1, embed_dim=8, ffn_dim=8, depth=1, num_heads=2, adaptive_cutoffs=cutoffs,
        adaptive_factor=2, attention={"name": "multimax"}, output={"name": output},
    )  # fmt: skip
    tokens = torch.randint(2, 10, (2, 5))
    loss = model.output.loss(model(tokens), torch.full((2, 5), 1))
    loss.backward()
    assert loss.isnan()
    for parameter in model.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
