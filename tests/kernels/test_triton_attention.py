import pytest
import torch
from modulators import NORMALIZERS, build, coefficients

from multimax import MultiMax, SoftMax
from multimax.attention import attention
from multimax.kernels.backend import use_backend

pytest.importorskip("triton")

from multimax.kernels import triton_arguments, triton_launch
from multimax.kernels.triton_arguments import Blocks, expanded_mask
from multimax.kernels.triton_attention import triton_attention

# The interpreter warns of overflow where the compiled code computes what it then throws away.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.slow]

# Sums of a thousand terms of size 1 leave 1e-13 in float64; a single step in float32, 1e-8.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def draw(queries, keys, dim=16, heads=2, key_heads=None, batch=2, device="cpu"):
    """Query, key and value in float64; the scores spread over about -8 ... 8."""
    shapes = [(batch, heads, queries, dim)] + 2 * [(batch, key_heads or heads, keys, dim)]
    tensors = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
    return [2 * tensors[0], tensors[1], tensors[2]]


def padding(keys, device):
    """(2, 1, 1, keys): the second sample is shorter."""
    lengths = torch.tensor([[keys], [max(1, keys // 2)]], device=device)
    return (torch.arange(keys, device=device) < lengths)[:, None, None]


def scattered(queries, keys, device, heads=1):
    """(2, heads, queries, keys): one row is all masked, one has a single entry."""
    mask = torch.rand(2, heads, queries, keys, device=device) < 0.6
    mask[0, :, queries // 2] = False
    mask[1, :, queries // 3] = torch.arange(keys, device=device) == keys // 2
    return mask


def reference(inputs, normalizer, mask=None, causal=False, scale=None):
    """The definition in float64 on the CPU, whose gradients lead to `inputs`."""
    query, key, value = (t.double().cpu() for t in inputs)
    group = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    mask = mask if mask is None else mask.cpu()
    with use_backend("eager"):
        return attention(query, key, value, normalizer, mask, causal, scale=scale)


def with_gradients(output, vector, inputs, normalizer):
    """The output and its gradients in float64 on the CPU: query, key, value and every scalar."""
    leaves = [*inputs, *normalizer.parameters()]
    gradients = torch.autograd.grad((output * vector.to(output)).sum(), leaves)
    return [t.detach().double().cpu() for t in (output, *gradients)]


def compare(inputs, normalizer, mask=None, causal=False, scale=None):
    inputs = [t.requires_grad_() for t in inputs]
    c = coefficients(normalizer, inputs[0].device)
    output = triton_attention(*inputs, c, mask, causal, scale=scale)
    expected = reference(inputs, normalizer, mask, causal, scale)
    vector = torch.randn_like(expected)
    pairs = zip(
        with_gradients(output, vector, inputs, normalizer),
        with_gradients(expected, vector, inputs, normalizer),
        strict=True,
    )
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, **EXACT)


@pytest.mark.parametrize("masked", ["", "padding", "scattered-causal"])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_every_normalizer_and_mask(name, masked, device):
    masks = {"": None, "padding": padding(21, device)}
    mask = masks.get(masked, scattered(19, 21, device))
    compare(draw(19, 21, heads=1, device=device), build(name), mask, causal="causal" in masked)


@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(1, 1, True), (1, 20, True), (35, 16, True), (16, 35, True), (32, 32, False)],
)
def test_lengths(queries, keys, causal, device):
    inputs = draw(queries, keys, heads=1, batch=1, device=device)
    compare(inputs, build("multimax-2"), causal=causal)


@pytest.mark.parametrize("dim", [1, 32, 64, 80, 128])
def test_head_dimensions(dim, device):
    compare(draw(18, 17, dim, heads=1, batch=1, device=device), build("multimax-2"))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1)])
def test_grouped_heads(heads, key_heads, device):
    inputs = draw(18, 20, 16, heads, key_heads, 1, device)
    mask = scattered(18, 20, device, heads)[:1]  # another one for each query head
    compare(inputs, build("multimax-2"), mask, causal=True)


@pytest.mark.parametrize("blocks", [(16, 64), (64, 16)])
@pytest.mark.parametrize(("queries", "keys"), [(50, 70), (70, 50)])
def test_tiles_of_any_form(queries, keys, blocks, device, monkeypatch):
    tile = Blocks(*blocks, warps=4, stages=1)
    monkeypatch.setattr(triton_launch, "block_sizes", lambda *_: (tile, tile, tile))
    inputs = draw(queries, keys, heads=1, batch=1, device=device)
    compare(inputs, build("multimax-2"), padding(keys, device)[1:], causal=True)


@pytest.mark.parametrize("shape", [(17, 20), (2, 1, 20), (2, 1, 17, 1)])
def test_mask_shapes(shape, device):
    """A mask for all samples, one for each head, one of whole queries; each as a view, too."""
    inputs = draw(17, 20, device=device)
    mask = torch.rand(*shape, 2, device=device)[..., 0] < 0.7
    compare(inputs, build("multimax-2"), mask)
    broadcast = expanded_mask(mask.expand(2, 2, 17, 20), inputs[0], 20)
    assert broadcast.shape == (2, 2, 17, 20)
    assert broadcast.untyped_storage().nbytes() < 8 * 2 * 17 * 32 + 1  # of int64, for fp64


@pytest.mark.parametrize("scale", [0.05, -0.3])
def test_scale(scale, device):
    inputs = draw(17, 18, heads=1, batch=1, device=device)
    compare(inputs, build("multimax-2"), scale=scale)


# Twice the rounding of the dtype for tensors (bf16 is cut off in the interpreter). The scalars'
# gradients are sums in fp32 of both signs, of exact products: the dtype does not matter to them.
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 5e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("name", ["softmax", "multimax-2"])
def test_lower_precision(name, dtype, error, device, bfloat16_products):
    """Errors are norms of differences to float64, over the norm of what is expected."""
    lengths = (70, 75) if dtype == torch.float32 else (140, 75)  # some tiles of each
    inputs = [t.to(dtype).requires_grad_() for t in draw(*lengths, 32, 2, 1, 1, device)]
    normalizer = build(name)
    output = triton_attention(*inputs, coefficients(normalizer, device), causal=True)
    expected = reference(inputs, normalizer, causal=True)
    vector = torch.randn_like(expected).to(dtype)
    assert output.dtype == dtype
    actual = with_gradients(output, vector, inputs, normalizer)
    wanted = with_gradients(expected, vector, inputs, normalizer)
    for i, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert torch.dist(a, b) <= (error if i < 4 else 3e-5) * b.norm()


def test_a_row_without_keys_is_zero_and_has_zero_gradients(device):
    query, key, value = (t.requires_grad_() for t in draw(20, 12, heads=1, device=device))
    c = coefficients(build("multimax-2"), device)
    output = triton_attention(query, key, value, c, causal=True)
    gradient = torch.autograd.grad(output.square().sum(), query)[0]
    for tensor in (output, gradient):
        assert (tensor[:, :, :8] == 0).all()  # the 8 queries before the first key
    assert (output[:, :, 8:] != 0).any(-1).all()
    assert (gradient[:, :, 9:] != 0).any(-1).all()  # one key alone gets all, whatever the query
    mask = torch.zeros(12, dtype=torch.bool, device=device)
    output = triton_attention(query, key, value, c, mask)
    gradients = torch.autograd.grad(output.sum(), [query, key, value])
    assert all((tensor == 0).all() for tensor in (output, *gradients))


def test_queries_beyond_the_last_add_nothing(device):
    """Their scores are 0, and exp(1000), which SoftMax of the others cancels, overflows."""
    inputs = [t.requires_grad_() for t in draw(17, 20, heads=1, batch=1, device=device)]
    results = []
    for shift in (0.0, 1000.0):
        c = torch.tensor([1.0, shift], dtype=torch.float64, device=device, requires_grad=True)
        output = triton_attention(*inputs, c)
        results.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, c])])
    for shifted, plain in zip(*results, strict=True):
        torch.testing.assert_close(shifted, plain, **EXACT)


@pytest.mark.parametrize("size", [1e4, 1e20])
def test_masked_scores_do_not_matter(size, device):
    """With ts2 > 0, very low scores bend up to the highest of all, or overflow."""
    query, key, value = (t.float() for t in draw(18, 20, heads=1, device=device))
    key[:, :, 15:] = -size * query.mean(2, keepdim=True)
    c = torch.tensor([1.0, 0, 0.1, -0.1, 0.5, 0.3, 0, 0, 0, 0], device=device)
    mask = torch.arange(20, device=device) < 15
    results = []
    for k, v, m in ((key, value, mask), (key[:, :, :15], value[:, :, :15], None)):
        leaves = [t.clone().requires_grad_() for t in (query, k, v, c)]
        output = triton_attention(*leaves, m)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        results.append([output, *gradients])
    for masked, short in zip(*results, strict=True):
        if masked.dim() == 4 and masked.size(2) == 20:  # gradients of key and value
            assert (masked[:, :, 15:] == 0).all()
            masked = masked[:, :, :15]
        torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-5)


def test_dropout(device):
    """Identity values turn the output into the probabilities that were kept, times 4 / 3."""
    query, key, random = draw(32, 16, device=device)
    value = torch.eye(16, dtype=torch.float64, device=device).expand(2, 2, 16, 16)
    normalizer = build("multimax-2")
    c = coefficients(normalizer, device)
    whole = triton_attention(query, key, value, c)
    torch.manual_seed(3)
    dropped = triton_attention(query, key, value, c, dropout=0.25)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] * 4 / 3, **EXACT)
    assert abs(kept.double().mean() - 0.75) < 0.03  # 2048 places: 3 standard deviations
    for dim in (0, 1):  # no head repeats the places of another
        assert (kept.select(dim, 0) != kept.select(dim, 1)).double().mean() > 0.3
    assert not torch.equal(dropped, triton_attention(query, key, value, c, dropout=0.25))
    torch.manual_seed(3)
    assert torch.equal(dropped, triton_attention(query, key, value, c, dropout=0.25))

    inputs = [t.requires_grad_() for t in (query, key, random)]
    torch.manual_seed(3)
    output = triton_attention(*inputs, c, dropout=0.25)
    with use_backend("eager"):
        probabilities = normalizer((query @ key.transpose(2, 3)).cpu() / 4)
    expected = (probabilities * kept.cpu() * 4 / 3) @ random.cpu()
    vector = torch.randn_like(expected)
    results = [with_gradients(o, vector, inputs, normalizer) for o in (output, expected)]
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, **EXACT)


def test_dropout_does_not_depend_on_the_tiles(device, monkeypatch):
    inputs = draw(33, 18, heads=1, device=device)
    c = coefficients(build("multimax-1"), device)
    outputs = []
    for blocks in (16, 32), (32, 16):
        tile = Blocks(*blocks, warps=4, stages=1)
        monkeypatch.setattr(triton_launch, "block_sizes", lambda *_, tile=tile: (tile, tile, tile))
        torch.manual_seed(1)
        outputs.append(triton_attention(*inputs, c, dropout=0.5))
    torch.testing.assert_close(*outputs, **EXACT)


def test_strides(device):
    """Views of one packed tensor, features that are not adjacent, and keys shared by the batch."""
    packed = torch.randn(2, 18, 3, 2, 16, dtype=torch.float64, device=device)
    compare(list(packed.permute(2, 0, 3, 1, 4).unbind()), build("multimax-2"), causal=True)
    query, key, value = draw(17, 18, heads=1, device=device)
    query = query.transpose(2, 3).contiguous().transpose(2, 3)
    compare([query, key[:1].expand(2, -1, -1, -1), value.flip(2)], build("multimax-2"))


def test_gradients_are_the_same_bits_in_every_run(device):
    inputs = [t.float().requires_grad_() for t in draw(33, 40, 16, 2, 1, 1, device)]
    c = coefficients(build("multimax-2"), device).detach().float().requires_grad_()
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        output = triton_attention(*inputs, c, causal=True, dropout=0.1)
        runs.append(torch.autograd.grad(output.square().sum(), [*inputs, c]))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_constant_coefficients(device):
    """No gradient of theirs is computed, and the others stay the same."""
    inputs = [t.requires_grad_() for t in draw(17, 18, heads=1, device=device)]
    c = coefficients(build("multimax-2"), device).detach()
    runs = []
    for coefficient in (c, c.clone().requires_grad_()):
        triton_attention(*inputs, coefficient).square().sum().backward()
        runs.append([tensor.grad for tensor in inputs])
        for tensor in inputs:
            tensor.grad = None
    assert c.grad is None
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_compile_to_one_graph(device):
    """The kernels are operations of the graph, with their gradients and with dropout's seed."""
    inputs = [t.requires_grad_() for t in draw(17, 20, heads=1, device=device)]
    normalizer = build("multimax-2").to(device)
    bias = torch.randn(17, 20, dtype=torch.float64, device=device, requires_grad=True)
    mask = padding(20, device)

    def run(query, key, value, bias):
        return attention(*(query, key, value), normalizer, mask, dropout=0.25, bias=bias)

    results = []
    with use_backend("triton"):
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(2)
            output = function(*inputs, bias)
            leaves = [*inputs, bias, *normalizer.parameters()]
            gradients = torch.autograd.grad(output.square().sum(), leaves)
            results.append([output, *gradients])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_second_derivatives_are_those_of_the_definition(device):
    inputs = [t.requires_grad_() for t in draw(17, 9, 4, heads=1, batch=1, device=device)]
    normalizer = build("multimax-2").to(device)
    leaves, results = [*inputs, *normalizer.parameters()], []
    for backend in ("triton", "eager"):
        output = attention(*inputs, normalizer, causal=True, backend=backend)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        loss = sum(gradient.square().sum() for gradient in first)
        results.append(torch.autograd.grad(loss, leaves))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, **EXACT)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_nothing_to_do(queries, keys, device):
    inputs = [t.requires_grad_() for t in draw(queries, keys, device=device)]
    c = coefficients(MultiMax().double(), device).detach().requires_grad_()
    output = triton_attention(*inputs, c)
    assert output.shape == (2, 2, queries, 16)
    gradients = torch.autograd.grad(output.sum(), [*inputs, c])
    assert all((tensor == 0).all() for tensor in (output, *gradients))


def wrong(**changes):
    query, key, value = draw(3, 4)
    arguments = {"query": query, "key": key, "value": value}
    arguments["coefficients"] = coefficients(SoftMax(), "cpu")
    return arguments | changes


ERRORS = {
    "query must be": {"query": torch.zeros(2, 3, 16, dtype=torch.float64)},
    "head_dim in 1 ... 128": {"query": torch.zeros(2, 2, 3, 129, dtype=torch.float64)},
    "key must be": {"key": torch.zeros(2, 2, 4, 8, dtype=torch.float64)},
    "value must have the shape of key": {"value": torch.zeros(2, 2, 4, 8, dtype=torch.float64)},
    "divides the 2 of query": {
        "key": torch.zeros(2, 3, 4, 16, dtype=torch.float64),
        "value": torch.zeros(2, 3, 4, 16, dtype=torch.float64),
    },
    "one real floating-point dtype": {"value": torch.zeros(2, 2, 4, 16)},
    "value must be on the device": {
        "value": torch.zeros(2, 2, 4, 16, dtype=torch.float64, device="meta")
    },
    "coefficients must be a vector": {"coefficients": torch.zeros(4)},
    "coefficients must be floating-point": {"coefficients": torch.zeros(2, dtype=torch.int64)},
    "mask must be boolean": {"mask": torch.zeros(3, 4)},
    "must broadcast to the scores": {"mask": torch.ones(4, 3, dtype=torch.bool)},
    "mask must be on the device": {"mask": torch.ones(3, 4, dtype=torch.bool, device="meta")},
    "dropout must be in": {"dropout": 1.0},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_is_wrong(message, monkeypatch):
    monkeypatch.setattr(triton_arguments, "check_device", lambda *_: None)
    with pytest.raises(ValueError, match=message):
        triton_attention(**wrong(**ERRORS[message]))
