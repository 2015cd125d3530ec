"""The C kernels under torch.compile, torch.export, torch.func, forward mode, and memory."""

import subprocess
import sys

import pytest
import torch
from definition import MODULATED, assert_equal, build, qkv, random
from kernels_here import needs_kernels
from torch import nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import functional_call, jvp, vmap

from multimax import EntMax15, MultiMax, SoftMax
from multimax.attention import attention
from multimax.kernels.backend import use_backend

pytestmark = [needs_kernels, pytest.mark.slow]


class Block(nn.Module):
    """Attention and output normalizers on the features of some tokens."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(8, 24)
        self.normalizer = MultiMax(2)
        self.outputs = nn.ModuleList([MultiMax(1, affine=True), SoftMax(2.0, learned=True)])
        self.dropout = dropout

    def forward(self, x):
        qkv = self.linear(x).unflatten(-1, (3, 2, 4)).transpose(1, 3)
        out = attention(*qkv.unbind(2), self.normalizer, causal=True, dropout=self.dropout)
        y = out.transpose(1, 2).flatten(-2)
        return sum(output(y) for output in self.outputs)


def gradients(function, module, x):
    torch.manual_seed(5)
    out = function(x)
    upstream = torch.linspace(0, 1, out.numel()).view_as(out)
    return out, *torch.autograd.grad(out, [x, *module.parameters()], upstream)


def operators(graph):
    return {str(node.target) for node in graph.nodes if "multimax" in str(node.target)}


# Compiling C++ takes long, so the graph is run as it is; what Inductor makes of the rest of the
# graph is not this library's.
@pytest.mark.parametrize("normalizer", [None, EntMax15()], ids=["block", "entmax15"])
def test_compile_to_one_graph(normalizer):
    torch._dynamo.reset()
    module, x = normalizer or Block(), torch.randn(2, 9, 8, requires_grad=True)
    seen = set()

    def backend(graph_module, inputs):
        seen.update(operators(graph_module.graph))
        for inner in graph_module.children():  # autograd functions
            seen.update(operators(inner.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, inputs)

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients(compiled, module, x), gradients(module, module, x))
    names = ["threshold"] if normalizer else ["attention", "softmax"]
    for name in names:
        assert any(f"{name}_forward" in operator for operator in seen)


def test_compiled_shapes_may_change():
    torch._dynamo.reset()
    module = Block()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 5, 70):
        x = torch.randn(2, tokens, 8, requires_grad=True)
        torch.testing.assert_close(gradients(compiled, module, x), gradients(module, module, x))


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_compile_keeps_to_the_backend(backend):
    torch._dynamo.reset()
    graphs = []

    def keep(graph_module, inputs):
        graphs.append(graph_module.graph)
        return graph_module

    with use_backend(backend), torch.no_grad():
        torch.compile(Block(), fullgraph=True, backend=keep)(torch.randn(2, 9, 8))
    assert bool(operators(graphs[0])) == (backend == "auto")


def test_an_exported_program_holds_torch_operations_alone():
    module, x = Block().eval(), torch.randn(2, 9, 8)
    program = torch.export.export(module, (x,))
    assert not operators(program.graph)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("name", MODULATED)
def test_function_transforms(name):
    normalizer, tensors = build(name), qkv()
    tangents = qkv()

    def function(query, key, value):
        return attention(query, key, value, normalizer, causal=True)

    expected = function(*tensors)
    assert_equal(vmap(function)(*tensors), expected)
    out, tangent = jvp(function, tuple(tensors), tuple(tangents))
    step = [t + 1e-6 * d for t, d in zip(tensors, tangents, strict=True)]
    back = [t - 1e-6 * d for t, d in zip(tensors, tangents, strict=True)]
    assert_equal(out, expected)
    numeric = (function(*step) - function(*back)) / 2e-6
    assert_equal(tangent, numeric, rtol=1e-6, atol=1e-7)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(*pair) for pair in zip(tensors, tangents, strict=True)]
        assert_equal(forward_ad.unpack_dual(function(*dual)).tangent, tangent)


@pytest.mark.parametrize("name", MODULATED)
def test_function_transforms_of_a_normalizer(name):
    normalizer, scores = build(name), random(3, 4, 7)
    assert_equal(vmap(normalizer)(scores), normalizer(scores))
    with forward_ad.dual_level():
        p = normalizer(forward_ad.make_dual(scores, torch.ones_like(scores)))
        assert forward_ad.unpack_dual(p).tangent.shape == scores.shape


class Attention(nn.Module):
    def __init__(self, normalizer, *options):
        super().__init__()
        self.normalizer, self.options = normalizer, options

    def forward(self, query, key, value):
        return attention(query, key, value, self.normalizer, *self.options, backend="c")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MODULATED)
def test_second_derivatives_of_attention(name, causal):
    module = Attention(build(name), torch.rand(4, 5) < 0.8, causal)
    names = [name for name, _ in module.named_parameters()]

    def function(query, key, value, *values):
        state = dict(zip(names, values, strict=True))
        return functional_call(module, state, (query, key, value))

    tensors = [tensor.requires_grad_() for tensor in qkv(1, 1, 4, 5, 3, 2)]
    assert gradgradcheck(function, (*tensors, *module.parameters()))


def test_second_derivatives_with_dropout_are_an_error():
    tensors = [tensor.requires_grad_() for tensor in qkv()]
    out = Attention(build("multimax-2"), None, False, 0.1)(*tensors)
    with pytest.raises(RuntimeError, match=r"with dropout need `with use_backend\('eager'\)`"):
        torch.autograd.grad(out.sum(), tensors, create_graph=True)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_saves_nothing_of_queries_by_keys(dropout):
    saved, tensors = [], [tensor.requires_grad_() for tensor in qkv(1, 2, 300, 400)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention(*tensors, build("multimax-2"), torch.rand(400) < 0.5, True, dropout)
    assert sum(tensor.numel() for tensor in saved) < 300 * 400 / 4


MEMORY = """
import resource
import torch
from multimax import MultiMax
from multimax.attention import attention

def run(tokens):
    query, key, value = (torch.randn(1, 1, tokens, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(tokens, dtype=torch.bool)
    attention(query, key, value, MultiMax(), mask, causal=True, dropout=0.1).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small = run(64)
print(run(5000) - small)
"""


def test_attention_never_holds_queries_by_keys():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kibibytes = int(done.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert kibibytes < 20 * 1024  # one fp32 matrix of 5000 x 5000 is 95 MiB
