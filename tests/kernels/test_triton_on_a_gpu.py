"""What only a GPU shows: sizes of real models, mixed precision, tensors beyond 2^31 elements."""

import copy

import pytest
import torch
import torch.nn.functional as F
from modulators import build, moved_apart

from multimax import MultiMax, SoftMax
from multimax.attention import attention
from multimax.losses import linear_output_loss, output_loss
from multimax.models.vision import build_vision_transformer

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.slow,
]
HALF = [torch.float16, torch.bfloat16]


def draw(*shape, dtype):
    return torch.randn(3, *shape, dtype=dtype, device="cuda").unbind()


def results(function, inputs, upstream, leaves=()):
    """The output and the gradients of the inputs and of other leaves, in fp64."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    output = function(*inputs)
    gradients = torch.autograd.grad(output, [*inputs, *leaves], upstream.to(output.dtype))
    return [t.detach().double() for t in (output, *gradients)]


def errors(found, expected):
    return [(torch.dist(a, b) / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_softmax_is_as_exact_as_that_of_torch(dtype, dim, causal):
    torch.manual_seed(0)
    inputs = draw(2, 4, 1000, dim, dtype=dtype)
    upstream = torch.randn_like(inputs[0])
    exact = [t.double() for t in inputs]

    def of_torch(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def ours(q, k, v):
        return attention(q, k, v, SoftMax(), causal=causal, backend="triton")

    expected = results(of_torch, exact, upstream)
    theirs = errors(results(of_torch, inputs, upstream), expected)
    own = errors(results(ours, inputs, upstream), expected)
    for mine, other in zip(own, theirs, strict=True):
        assert mine <= 1.5 * other + 1e-6, (own, theirs)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("name", ["multimax-1", "multimax-2"])
@pytest.mark.parametrize("causal", [False, True])
def test_multimax_of_real_sizes(dtype, name, causal):
    torch.manual_seed(0)
    inputs = draw(8, 6, 577, 64, dtype=dtype)
    upstream = torch.randn_like(inputs[0])
    normalizer = build(name).float().cuda()
    twin = copy.deepcopy(normalizer).double()
    found, expected = (
        results(
            lambda *qkv, m=module, b=backend: attention(*qkv, m, causal=causal, backend=b),
            tensors,
            upstream,
            list(module.parameters()),
        )
        for module, backend, tensors in (
            (normalizer, "triton", inputs),
            (twin, "eager", [t.double() for t in inputs]),
        )
    )
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert max(errors(found[:4], expected[:4])) < tolerance
    # Those of the ranges and of the shift are what is left of 16 million terms of both signs.
    assert max(errors(found[4:], expected[4:])) < {torch.float32: 5e-4}.get(dtype, 2e-3)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("kind", [SoftMax, MultiMax])
@pytest.mark.parametrize("length_scale", ["scores", "modulated"])
def test_length_scale_cap_and_sink_of_real_sizes(dtype, kind, length_scale):
    torch.manual_seed(0)
    inputs = draw(8, 6, 577, 64, dtype=dtype)
    upstream = torch.randn_like(inputs[0])
    normalizer = moved_apart(
        kind(length_scale=length_scale, softcap=20.0, sink=0.3, heads=6, reference_length=100)
    )
    module = copy.deepcopy(normalizer).float().cuda()
    twin = normalizer.cuda()
    found = results(
        lambda *qkv: attention(*qkv, module, causal=True, backend="triton"),
        inputs,
        upstream,
        list(module.parameters()),
    )
    expected = results(
        lambda *qkv: attention(*qkv, twin, causal=True, backend="eager"),
        [t.double() for t in inputs],
        upstream,
        list(twin.parameters()),
    )
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert max(errors(found[:4], expected[:4])) < tolerance
    assert max(errors(found[4:], expected[4:])) < {torch.float32: 5e-4}.get(dtype, 5e-3)


def test_gradients_are_the_same_bits_in_every_run_of_a_large_batch():
    torch.manual_seed(0)
    inputs = draw(32, 6, 197, 64, dtype=torch.bfloat16)
    upstream, normalizer = torch.randn_like(inputs[0]), MultiMax().cuda()
    leaves = list(normalizer.parameters())
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        runs.append(
            results(lambda *qkv: attention(*qkv, normalizer, dropout=0.1), inputs, upstream, leaves)
        )
    for later in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], later, strict=True))


def test_the_host_does_not_wait_for_the_gpu():
    inputs = draw(2, 2, 64, 64, dtype=torch.bfloat16)
    inputs = [t.detach().requires_grad_() for t in inputs]
    normalizers = [SoftMax().cuda(), MultiMax().cuda(), MultiMax(affine=True).cuda()]
    normalizers.append(SoftMax(learned=True).cuda())
    target = torch.arange(64, device="cuda")
    for strict in (False, True):  # compiles first
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            for normalizer in normalizers:
                out = attention(*inputs, normalizer, causal=True, dropout=0.1)
                linear_output_loss(normalizer, out[0, 0], inputs[1][0, 0], target).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_strides_beyond_32_bits():
    """Heads that are 2^31 elements apart, in a tensor of 8.6 GB."""
    step, size = 2**31 + 64, 128 * 64
    memory = torch.zeros(step + 3 * size, dtype=torch.bfloat16, device="cuda")
    views = [
        memory.as_strided((1, 2, 128, 64), (2 * step, step, 64, 1), i * size) for i in range(3)
    ]
    for view in views:
        view.copy_(torch.randn(1, 2, 128, 64))
    copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
    upstream, normalizer = torch.randn_like(copies[0]), MultiMax().cuda()
    found, expected = (
        results(lambda *qkv: attention(*qkv, normalizer, causal=True), tensors, upstream)
        for tensors in (views, copies)
    )
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_vision_transformer_trains_in_bf16(compiled):
    torch.manual_seed(0)
    model = build_vision_transformer(
        "deit_tiny_patch16_224",
        attention={"name": "multimax"},
        output={"name": "multimax"},
        num_classes=10,
        image_size=224,
        depth=2,
    ).cuda()
    call = torch.compile(model, fullgraph=True) if compiled else model
    images, target = torch.randn(8, 3, 224, 224, device="cuda"), torch.arange(8, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    start = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            loss = output_loss(model.output, call(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not [name for name, p in model.named_parameters() if torch.equal(p, start[name])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_of_a_large_vocabulary(dtype):
    torch.manual_seed(0)
    features = torch.randn(700, 64, dtype=dtype, device="cuda")
    weight = torch.randn(50_000, 64, dtype=dtype, device="cuda") / 8
    target = torch.randint(50_000, (700,), device="cuda")
    normalizer = MultiMax().cuda()
    twin = copy.deepcopy(normalizer).double()
    upstream = torch.ones((), device="cuda")

    def whole(x, w):
        return output_loss(twin, x @ w.T, target)

    def chunked(x, w):
        return linear_output_loss(normalizer, x, w, target)

    expected = results(
        whole, [t.double() for t in (features, weight)], upstream, [*twin.parameters()]
    )
    found = results(chunked, [features, weight], upstream, [*normalizer.parameters()])
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    assert max(errors(found, expected)) < tolerance
