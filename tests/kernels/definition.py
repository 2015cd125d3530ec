"""What the C kernels compute next to what the eager definition does."""

import copy

import torch

from multimax import EntMax15, MultiMax, SoftMax, SparseMax
from multimax.attention import attention
from multimax.kernels import c_rows
from multimax.kernels.backend import use_backend

MODULATED = {
    "softmax": SoftMax,
    "softmax-cold": lambda: SoftMax(0.5),
    "softmax-learned": lambda: SoftMax(0.7, learned=True),
    "multimax-1": lambda: MultiMax(1),
    "multimax-1-affine": lambda: MultiMax(1, affine=True),
    "multimax-2": lambda: MultiMax(2),
    "multimax-2-affine": lambda: MultiMax(2, affine=True),
}
THRESHOLDS = {"sparsemax": SparseMax, "entmax15": EntMax15}


def build(name):
    """A normalizer that has a kernel, in float64, with its scalars moved apart."""
    module = (MODULATED | THRESHOLDS)[name]().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def random(*shape, spread=1.0, generator=None):
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64)


def qkv(batch=2, heads=3, queries=9, keys=11, dim=8, value_dim=5, key_heads=None):
    """Query, key and value."""
    shapes = (heads, queries, dim), (key_heads or heads, keys, dim)
    return [random(batch, *shape) for shape in (*shapes, (*shapes[1][:2], value_dim))]


def normalized(module, scores, mask=None, dim=-1, backend="auto", upstream=None):
    """Probabilities, and the gradients of scores and scalars for a fixed dL/dp."""
    module = copy.deepcopy(module)
    scores = scores.detach().requires_grad_()
    with use_backend(backend):
        assert c_rows.usable(scores, module) == (backend != "eager")
        p = module(scores, dim, mask)
        return p.detach(), *_gradients(p, [scores, *module.parameters()], upstream)


def attended(tensors, module, mask=None, backend="c", upstream=None, bias=None, **options):
    """The output, and the gradients of query, key, value, scalars and bias for a fixed dL/d out."""
    module = copy.deepcopy(module)
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    inputs = [*tensors, *module.parameters()]
    if bias is not None:
        inputs.append(bias := bias.detach().requires_grad_())
    out = attention(*tensors, module, mask, backend=backend, bias=bias, **options)
    return out.detach(), *_gradients(out, inputs, upstream)


def _gradients(output, inputs, upstream):
    if upstream is None:
        upstream = random(*output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(output, inputs, upstream.to(output))


# Both sides round at 1e-16 and add up some thousand terms, in another order. The absolute part is
# for sums that cancel.
def assert_equal(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected) > 0
    assert all(map(torch.equal, actual, expected))


def for_threads(function):
    """The results of a function with 1, 2, again 2, and 3 threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(function())
    finally:
        torch.set_num_threads(before)
    return found
