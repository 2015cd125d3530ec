"""torch.func, torch.compile and torch.export of the entmax family and of every loss."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from multimax import EntMax, EntMax15, MultiMax, SoftMax, SparseMax, build_normalizer, entmax
from multimax.kernels.backend import use_backend
from multimax.losses import fenchel_young_loss, linear_output_loss, output_loss

FAMILY = {
    "sparsemax": SparseMax,
    "entmax15": EntMax15,
    "entmax": lambda: EntMax(1.3),
    "entmax-near-softmax": lambda: EntMax(1 + 1e-6),
    "entmax-learned": lambda: EntMax(1.3, learned=True),
    "entmax-learned-near-softmax": lambda: EntMax(1.01, learned=True),
    "entmax-above-two": lambda: EntMax(2.5),
}
NORMALIZERS = FAMILY | {
    "softmax": SoftMax,
    "multimax": MultiMax,
    "topk": partial(build_normalizer, "topk", k=3),
    "evsoftmax": partial(build_normalizer, "evsoftmax"),
}
each_of_the_family = pytest.mark.parametrize("name", FAMILY)
every_normalizer = pytest.mark.parametrize("name", NORMALIZERS)


def build(name):
    torch.manual_seed(0)
    return NORMALIZERS[name]().double()


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(actual, expected, atol=1e-11):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=atol)


@every_normalizer
@pytest.mark.parametrize(("dim", "batch"), [(-1, 0), (0, 2), (1, 1)])
def test_vmap_of_a_normalizer(name, dim, batch):
    normalizer, scores = build(name), draw(3, 4, 5, seed=2)
    expected = torch.stack([normalizer(part, dim) for part in scores.unbind(batch)])
    equal(vmap(partial(normalizer, dim=dim), in_dims=batch)(scores), expected)


@every_normalizer
def test_jacobians_of_a_normalizer(name):
    normalizer, scores, tangent = build(name), draw(6), draw(6, seed=3)
    expected = torch.autograd.functional.jacobian(normalizer, scores)
    equal(jacrev(normalizer)(scores), expected)
    equal(jacfwd(normalizer)(scores), expected)
    equal(jvp(normalizer, (scores,), (tangent,))[1], expected @ tangent)
    equal(vmap(jacrev(normalizer))(scores.expand(2, 6)), expected.expand(2, 6, 6))


@pytest.mark.parametrize("start", [1.01, 1.3])
def test_gradients_of_a_learned_alpha_for_each_sample(start):
    module, scores, weights = EntMax(start, learned=True).double(), draw(4, 6), draw(4, 6, seed=3)

    def value(logit, row, weight):
        return (functional_call(module, {"alpha_logit": logit}, (row,)) * weight).sum()

    logit = module.alpha_logit.detach()
    expected = torch.stack(
        [
            torch.autograd.grad((module(row) * weight).sum(), module.alpha_logit)[0]
            for row, weight in zip(scores, weights, strict=True)
        ]
    )
    equal(vmap(grad(value), in_dims=(None, 0, 0))(logit, scores, weights), expected)
    forward = vmap(jacfwd(value), in_dims=(None, 0, 0))(logit, scores, weights)
    equal(forward, expected)
    logits = logit + torch.arange(4.0).double()[:, None] / 10
    batched = vmap(value)(logits, scores, weights)
    equal(batched, torch.stack([value(*row) for row in zip(logits, scores, weights, strict=True)]))


def test_vmap_over_alpha_alone():
    scores, alphas = draw(3, 6), torch.tensor([1.01, 1.3, 1.5, 2.5], dtype=torch.float64)
    for dim in (-1, 0):
        expected = torch.stack([entmax(scores, alpha, dim) for alpha in alphas])
        equal(vmap(lambda alpha, dim=dim: entmax(scores, alpha, dim))(alphas), expected)


def losses(normalizer, soft, linear):
    weight = draw(5, 4, seed=4)

    def loss(features, target):
        if linear:
            return linear_output_loss(normalizer, features, weight, target, label_smoothing=0.1)
        return output_loss(normalizer, features @ weight.t(), target, label_smoothing=0.1)

    target = draw(3, 2, 5, seed=5).softmax(-1) if soft else torch.tensor([[0, 1], [4, 2], [3, 3]])
    return loss, draw(3, 2, 4), target


@every_normalizer
@pytest.mark.parametrize("linear", [False, True], ids=["output", "linear"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft"])
def test_transforms_of_a_loss(name, soft, linear):
    normalizer = build(name)
    loss, features, target = losses(normalizer, soft, linear)
    expected, gradients = [], []
    for x, y in zip(features, target, strict=True):
        x = x.clone().requires_grad_()
        expected.append(loss(x, y))
        gradients += torch.autograd.grad(expected[-1], x)
    equal(vmap(loss)(features, target), torch.stack(expected).detach())
    equal(vmap(grad(loss))(features, target), torch.stack(gradients))
    x, y, tangent = features[0], target[0], draw(2, 4, seed=6)
    equal(jacrev(loss)(x, y), gradients[0])
    value, along = jvp(lambda x: loss(x, y), (x,), (tangent,))
    equal(value, expected[0].detach())
    equal(along, (gradients[0] * tangent).sum())


@each_of_the_family
def test_second_derivatives_of_a_loss(name):
    loss, features, target = losses(build(name), False, False)
    x, y = features[0], target[0]
    with use_backend("eager"):
        expected = torch.autograd.functional.hessian(lambda x: loss(x, y), x)
    equal(hessian(loss)(x, y), expected, atol=1e-9)
    equal(jacrev(jacrev(loss))(x, y), expected, atol=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 1.02, 1.4])
def test_alpha_of_a_loss_under_transforms(alpha):
    scores, target = draw(4, 5), torch.tensor([0, 3, 2, 2])

    def loss(alpha, scores, target):
        return fenchel_young_loss(scores, target, alpha)

    leaf = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(leaf, scores, target), leaf)
    alpha = leaf.detach()
    equal(grad(loss)(alpha, scores, target), expected)
    along = jvp(lambda a: loss(a, scores, target), (alpha,), (torch.ones_like(alpha),))[1]
    equal(along, expected)


@pytest.mark.slow
@each_of_the_family
def test_an_exported_threshold_is_exact_for_long_rows(name):
    module = FAMILY[name]()
    scores = torch.cat([torch.zeros(1, 100_000), torch.randn(1, 100_000)])
    scores[:, 2] = -torch.inf
    program = torch.export.export(module, (scores,))
    assert not any("multimax" in str(node.target) for node in program.graph.nodes)
    p = program.module()(scores)
    torch.testing.assert_close(p, module(scores), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(p.sum(-1), torch.ones(2), rtol=1e-4, atol=0)
    short = draw(2, 100_000).float().index_fill(1, torch.arange(9, 100_000), -torch.inf)
    torch.testing.assert_close(program.module()(short), module(short), rtol=1e-5, atol=1e-6)


class WithLoss(nn.Module):
    """Probabilities and their loss."""

    def __init__(self, normalizer):
        super().__init__()
        self.normalizer = normalizer

    def forward(self, scores, target):
        loss = output_loss(self.normalizer, scores, target, label_smoothing=0.1)
        return self.normalizer(scores), loss


# Where there is no kernel, "auto" runs what "eager" runs.
EAGER = [name for name in NORMALIZERS if not name.startswith("entmax") or name == "entmax15"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [(n, "auto") for n in NORMALIZERS] + [(n, "eager") for n in EAGER]
)
def test_normalizer_and_loss_compile_to_one_graph(name, backend):
    torch._dynamo.reset()
    normalizer, scores = build(name), draw(4, 6).requires_grad_()
    target = torch.tensor([0, 5, -100, 2])
    inputs = [scores, *normalizer.parameters()]
    module, weights = WithLoss(normalizer), draw(4, 6, seed=7)
    with use_backend(backend):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        found = compiled(scores, target), module(scores, target)
        equal(*found)
        for values in zip(*((p * weights, loss) for p, loss in found), strict=True):
            got, wanted = (
                torch.autograd.grad(value.sum(), inputs, retain_graph=True) for value in values
            )
            equal(got, wanted)


def test_an_exported_loss():
    module = WithLoss(MultiMax())
    scores, target = draw(4, 6).float(), torch.tensor([0, 5, -100, 2])
    program = torch.export.export(module, (scores, target))
    torch.testing.assert_close(program.module()(scores, target), module(scores, target))


@pytest.mark.slow
def test_two_entmax_modules_in_one_process():
    torch._dynamo.reset()
    scores = draw(2, 5).float()
    modules = [EntMax(1.2), EntMax(1.6), EntMax(1.3, learned=True), EntMax(1.4, learned=True)]
    for module in modules:
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(scores), module(scores))


def test_second_derivatives_through_the_chunked_loss_are_an_error():
    features, weight = draw(3, 4).requires_grad_(), draw(5, 4, seed=2)
    target = torch.tensor([0, 1, 4])
    for reduction in ("mean", "none"):
        loss = linear_output_loss(MultiMax().double(), features, weight, target,
                                  reduction=reduction).sum()  # fmt: skip
        with pytest.raises(RuntimeError, match=r"need `with use_backend\('eager'\)`"):
            torch.autograd.grad(loss, features, create_graph=True)
    with use_backend("eager"):
        loss = linear_output_loss(MultiMax().double(), features, weight, target)
        (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
        assert gradient.square().sum().requires_grad
