"""What the kernels, which take addresses, must refuse before they look at memory."""

import pytest
import torch
from kernels_here import needs_kernels

from multimax import (
    MultiMax,
    SoftMax,
    SparseMax,
    TopK,
    build_normalizer,
    linear_output_loss,
    output_loss,
    registered_normalizers,
    use_backend,
)
from multimax.attention import attention


@pytest.mark.parametrize("name", registered_normalizers())
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool])
def test_dtypes_that_are_no_scores(name, dtype):
    with pytest.raises(ValueError, match=f"scores must be float16, .* got {dtype}: use .float"):
        build_normalizer(name)(torch.zeros(4, 16).to(dtype))


class Doubled(MultiMax):
    """Gives its coefficients in another dtype than it is asked for."""

    def coefficients(self, dtype, device):
        return super().coefficients(torch.float64, device)


@pytest.mark.slow
def test_coefficients_of_another_dtype():
    with pytest.raises(ValueError, match=r"coefficients must be torch\.float32 on cpu, .*float64"):
        Doubled()(torch.randn(4, 16))
    query = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"coefficients must be torch\.float32 on cpu, .*float64"):
        attention(query, query, query, Doubled())
    assert torch.isfinite(Doubled()(torch.randn(4, 16, dtype=torch.float64))).all()


@pytest.mark.parametrize("soft", [False, True])
def test_a_target_elsewhere(soft):
    target = torch.rand(3, 5).softmax(-1) if soft else torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"target is on meta, the others are on cpu: use \.to"):
        linear_output_loss(SoftMax(), torch.randn(3, 4), torch.randn(5, 4), target.to("meta"))


NORMALIZERS = [SoftMax(), MultiMax(3), SparseMax()]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
@pytest.mark.parametrize("elsewhere", ["weight", "bias", "target"])
def test_an_argument_of_the_output_layer_elsewhere(normalizer, elsewhere, backend):
    tensors = {"weight": torch.randn(5, 4), "bias": torch.zeros(5), "target": torch.arange(3)}
    tensors[elsewhere] = tensors[elsewhere].to("meta")
    error = pytest.raises(ValueError, match=f"{elsewhere} is on meta, the others are on cpu")
    with use_backend(backend), error:
        linear_output_loss(normalizer, torch.randn(3, 4), **tensors)
    with use_backend(backend), error:
        linear_output_loss(normalizer, torch.randn(3, 4), **tensors, reduction="none")


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_a_target_of_the_loss_elsewhere(normalizer):
    with pytest.raises(ValueError, match="target is on meta, the others are on cpu"):
        output_loss(normalizer, torch.randn(3, 5), torch.arange(3, device="meta"))


@needs_kernels
@pytest.mark.parametrize("normalizer", [*NORMALIZERS[::2], TopK(2)], ids=str)
def test_a_mask_elsewhere(normalizer):
    mask = torch.ones(5, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="mask is on meta, the others are on cpu"):
        normalizer(torch.randn(3, 5), mask=mask)


@pytest.mark.parametrize("backend", ["auto", "eager", "c"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64, torch.bool])
def test_dtypes_that_are_no_bias(dtype, backend):
    query, bias = torch.randn(1, 2, 4, 8), torch.zeros(4, 4).to(dtype)
    with pytest.raises(ValueError, match=f"bias must be float16, .* got {dtype}: pass a boolean"):
        attention(query, query, query, SoftMax(), bias=bias, backend=backend)


@pytest.mark.parametrize("backend", ["auto", "eager", "c"])
@pytest.mark.parametrize("elsewhere", ["key", "value", "mask", "bias"])
def test_an_argument_of_attention_elsewhere(elsewhere, backend):
    tensors = {name: torch.randn(1, 2, 4, 8) for name in ("key", "value")}
    tensors["mask"], tensors["bias"] = torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4)
    tensors[elsewhere] = tensors[elsewhere].to("meta")
    with pytest.raises(ValueError, match=f"{elsewhere} is on meta, the others are on cpu"):
        attention(torch.randn(1, 2, 4, 8), normalizer=SoftMax(), **tensors, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64])
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_dtypes_that_attention_and_losses_do_not_take(normalizer, dtype, backend):
    x = torch.zeros(1, 2, 4, 8).to(dtype)
    expected = f"{dtype} and .*: they must be float16, bfloat16, float32 or float64, use .float"
    with pytest.raises(ValueError, match=expected):
        attention(x, x, x, normalizer, backend=backend)
    expected = f"scores must be float16, .* got {dtype}: use .float"
    with use_backend(backend), pytest.raises(ValueError, match=expected):
        linear_output_loss(normalizer, x[0, 0], torch.zeros(5, 8).to(dtype), torch.zeros(4).long())
    with use_backend(backend), pytest.raises(ValueError, match=expected):
        output_loss(normalizer, x[0, 0], torch.zeros(4).long())


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_features_without_dimensions(normalizer, backend):
    with use_backend(backend), pytest.raises(ValueError, match=r"\(\.\.\., dim\), got a scalar"):
        linear_output_loss(normalizer, torch.tensor(1.0), torch.zeros(5, 1), torch.tensor(0))


class Other(MultiMax):
    """Gives as many coefficients as it is told."""

    def coefficients(self, dtype, device):
        return torch.zeros(self.count, dtype=dtype, device=device)


@needs_kernels
@pytest.mark.parametrize("count", [0, 1, 3, 5, 7, 9, 14, (1, 6)])
def test_another_number_of_coefficients(count):
    module, x = Other(), torch.randn(2, 3, 4, 8)
    module.count = count
    expected = "coefficients must be .* 2, 6 or 10 entries, got shape"
    with pytest.raises(ValueError, match=expected):
        module(x)
    with pytest.raises(ValueError, match=expected):
        attention(x, x, x, module)
    with pytest.raises(ValueError, match=expected):
        linear_output_loss(module, x, torch.zeros(5, 8), torch.zeros(2, 3, 4).long())


ops = torch.ops.multimax
ROWS, WIDE = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.float64)
COEFFICIENTS, MASK = torch.tensor([1.0, 0.0]), torch.ones(4, 8, dtype=torch.bool)
QUERY, STATISTICS = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 2)
OPTIONS = (None, None, None, None, False, 0.0, 1.0, False, True, None)
BIAS, FACTOR, SUMS = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 1, 1), STATISTICS[..., 0]


def backward(out=QUERY, statistics=STATISTICS, grad=QUERY, bias=BIAS, factor=FACTOR, of_sum=SUMS):
    inputs = (QUERY, QUERY, QUERY, COEFFICIENTS, bias, factor)
    kept = (out, statistics, grad, of_sum, True, True, True)
    return ops.attention_backward(*inputs, *OPTIONS[2:], *kept)


def forward_of(bias=BIAS, factor=FACTOR):
    inputs = (QUERY, QUERY, QUERY, COEFFICIENTS, bias, factor)
    return ops.attention_forward(*inputs, *OPTIONS[2:])


# The operators themselves, with one argument that they would misread.
MISREAD = {
    "coefficients": lambda: ops.softmax_forward(ROWS, COEFFICIENTS.double(), None),
    "scores": lambda: ops.softmax_forward(ROWS.half(), COEFFICIENTS, None),
    "scores that are transposed": lambda: ops.softmax_forward(ROWS.t(), COEFFICIENTS, None),
    "mask": lambda: ops.softmax_forward(ROWS, COEFFICIENTS, MASK.float()),
    "p": lambda: ops.softmax_backward(ROWS, COEFFICIENTS, None, WIDE, ROWS, True),
    "a part of p": lambda: ops.softmax_backward(ROWS, COEFFICIENTS, None, ROWS[:2], ROWS, True),
    "grad": lambda: ops.softmax_backward(ROWS, COEFFICIENTS, None, ROWS, WIDE, True),
    "a part of grad": lambda: ops.softmax_backward(ROWS, COEFFICIENTS, None, ROWS, ROWS[:2], True),
    "scores of sparsemax": lambda: ops.threshold_forward(ROWS.int(), False, None),
    "grad of sparsemax": lambda: ops.threshold_backward(ROWS, False, WIDE),
    "a part of grad of sparsemax": lambda: ops.threshold_backward(ROWS, False, ROWS[:2]),
    "scores of top-k": lambda: ops.kth_largest(ROWS.half(), 2, None),
    "k above": lambda: ops.kth_largest(ROWS, 9, None),
    "k below": lambda: ops.kth_largest(ROWS, 0, None),
    "value": lambda: ops.attention_forward(QUERY, QUERY, QUERY.double(), COEFFICIENTS, *OPTIONS),
    "a part of value": lambda: ops.attention_forward(
        QUERY, QUERY, QUERY[:, :, :2], COEFFICIENTS, *OPTIONS
    ),
    "key of another size": lambda: ops.attention_forward(
        QUERY, QUERY[..., :4], QUERY, COEFFICIENTS, *OPTIONS
    ),
    "key of more heads": lambda: ops.attention_forward(
        QUERY[:, :1], QUERY, QUERY, COEFFICIENTS, *OPTIONS
    ),
    "mask of attention": lambda: ops.attention_forward(
        QUERY, QUERY, QUERY, COEFFICIENTS, None, None, torch.ones(4, 4), *OPTIONS[3:]
    ),
    "bias of three dimensions": lambda: forward_of(BIAS[0]),
    "bias that does not fit": lambda: forward_of(BIAS[..., :3]),
    "bias of booleans": lambda: forward_of(BIAS.bool()),
    "bias of float8": lambda: forward_of(BIAS.to(torch.float8_e4m3fn)),
    "bias of the backward pass": lambda: backward(bias=BIAS[:, :, :2]),
    "grad of attention": lambda: backward(grad=QUERY.double()),
    "a part of grad of attention": lambda: backward(grad=QUERY[:, :, :2]),
    "a part of out": lambda: backward(out=QUERY[..., :2]),
    "factor of each key": lambda: forward_of(factor=BIAS),
    "factor of two dimensions": lambda: forward_of(factor=FACTOR[0, 0]),
    "factor of integers": lambda: forward_of(factor=FACTOR.int()),
    "factor of the backward pass": lambda: backward(factor=FACTOR.expand(1, 2, 3, 1)),
    "grad of log sum exp": lambda: backward(of_sum=SUMS.double()),
    "a part of grad of log sum exp": lambda: backward(of_sum=SUMS[:, :, 1:]),
    "statistics": lambda: backward(statistics=STATISTICS.double()),
    "a part of statistics": lambda: backward(statistics=STATISTICS[:, :, :1]),
}


@needs_kernels
@pytest.mark.parametrize("case", MISREAD)
def test_operators_check_every_argument(case):
    with pytest.raises((ValueError, NotImplementedError)):
        MISREAD[case]()
    assert torch.equal(ops.softmax_forward(ROWS, COEFFICIENTS, MASK).sum(-1), torch.ones(4))
    assert len(backward()) == 6
