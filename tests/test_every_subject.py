"""Compilation, torch.func and copies of every normalizer, attention and model."""

import copy
import io
import pickle

import pytest
import torch
from subjects import NORMALIZERS, SIZES, SUBJECTS, draw_scores, subject
from torch.func import functional_call, grad, jvp, vmap

from multimax import registered_normalizers

LEARNING = [name for name in SUBJECTS if [*subject(name).module.parameters()]]
every_subject = pytest.mark.parametrize("name", SUBJECTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", registered_normalizers())
def test_compiled_for_all_sizes(name):
    torch._dynamo.reset()
    module = subject(name).module
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in SIZES[:2]:
        scores, mask = draw_scores(*sizes)
        inputs = [scores.requires_grad_(), *module.parameters()]
        weights = torch.linspace(0, 1, scores.numel()).view_as(scores)
        got, expected = compiled(scores, mask), module(scores, mask)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad((p * weights).sum(), inputs) for p in (got, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@every_subject
def test_vmap_over_the_batch(name):
    item = subject(name)
    batches = [item.draw(*SIZES[0]) for _ in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*batches, strict=True)]
    got = vmap(item.module)(*stacked)
    outputs = [item.module(*inputs) for inputs in batches]
    if isinstance(got, torch.Tensor):
        got, outputs = (got,), [(output,) for output in outputs]
    expected = tuple(torch.stack(tensors) for tensors in zip(*outputs, strict=True))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", LEARNING)
def test_gradients_of_parameters_for_each_sample(name):
    """As differentially private training takes them."""
    item = subject(name)
    parameters = {name: p.detach() for name, p in item.module.named_parameters()}
    batches = [item.draw(*SIZES[0]) for _ in range(2)]

    def loss(parameters, *inputs):
        output = functional_call(item.module, parameters, inputs)
        outputs = [output] if isinstance(output, torch.Tensor) else output
        return sum((y * torch.linspace(0, 1, y.size(-1))).square().sum() for y in outputs)

    stacked = [torch.stack(tensors) for tensors in zip(*batches, strict=True)]
    got = vmap(grad(loss), in_dims=(None, *[0] * len(stacked)))(parameters, *stacked)
    for index, inputs in enumerate(batches):
        wanted = torch.autograd.grad(
            loss(dict(item.module.named_parameters()), *inputs),
            list(item.module.parameters()),
            allow_unused=True,
        )
        for (key, sample), expected in zip(got.items(), wanted, strict=True):
            expected = torch.zeros_like(sample[index]) if expected is None else expected
            largest = float(expected.abs().max())
            assert (sample[index] - expected).abs().max() <= 1e-4 * max(largest, 1), key


@pytest.mark.parametrize("name", [*NORMALIZERS, "attention"])
def test_forward_mode_is_the_transpose_of_backward_mode(name):
    item = subject(name)
    module = item.module.double()
    first, *rest = [t.double() if t.is_floating_point() else t for t in item.draw(*SIZES[0])]
    finite = first.isfinite() & (first > -1e8)
    tangent = torch.randn_like(first).where(finite, 0.0)

    def function(x):
        out = module(x, *rest)
        return out if isinstance(out, torch.Tensor) else torch.stack(out)

    x = first.clone().requires_grad_()
    y = function(x)
    weights = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    along = jvp(function, (first,), (tangent,))[1]
    torch.testing.assert_close((along * weights).sum(), (gradient * tangent).sum())


def saved(module):
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def loaded(module):
    """Another one with the state dict, which is read as weights alone."""
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    return twin


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
    "state dict": loaded,
}


@pytest.mark.slow
@every_subject
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_computes_the_same_from_tensors_of_its_own(name, way):
    item = subject(name)
    inputs = item.draw(*SIZES[0])
    twin = COPIES[way](item.module)
    torch.testing.assert_close(twin(*inputs), item.module(*inputs), rtol=0, atol=0)
    ours = {p.data_ptr() for p in item.module.parameters()}
    assert not ours & {p.data_ptr() for p in twin.parameters()}
