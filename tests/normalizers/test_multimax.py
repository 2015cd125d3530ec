"""MultiMax against the paper's formula, and the numerical traps of a modulator."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from multimax import MultiMax, SoftMax, modulate, multimax
from multimax.kernels.backend import use_backend

# (t_b, t_d, b, d) by order: sparser below b, flatter above d; the reverse; and a mix.
PARAMETERS = [
    ([1.5, 1.1, 1.02], [0.4, 0.95, 0.99], [-0.5, -1.0, -0.3], [0.8, 0.2, 1.0]),
    ([0.2, 0.9, 0.99], [1.6, 1.2, 1.01], [0.7, 0.1, 0.0], [-0.2, 0.3, 0.9]),
    ([1.3, 0.8, 1.01], [1.2, 0.9, 1.03], [1.0, -1.5, 0.2], [0.5, -0.5, 0.1]),
]


def build(t_b, t_d, b, d, **options):
    module = MultiMax(order=len(t_b), **options).double()
    with torch.no_grad():
        for n in range(len(t_b)):
            module.ts[2 * n], module.ts[2 * n + 1] = 1 - t_b[n], t_d[n] - 1
            module.ranges[2 * n], module.ranges[2 * n + 1] = b[n], d[n]
    return module


def paper_sigma(x, t_b, t_d, b, d):
    """The modulator as the paper writes it, on one float."""
    total = x
    for n, (t_bn, t_dn, b_n, d_n) in enumerate(zip(t_b, t_d, b, d, strict=True), start=1):
        total += (1 - t_bn) * max(b_n - x, 0) ** n + (t_dn - 1) * max(x - d_n, 0) ** n
    return total


def paper_multimax(row, *parameters):
    weights = [math.exp(paper_sigma(x, *parameters)) for x in row]
    return [w / math.fsum(weights) for w in weights]


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_is_the_formula_of_the_paper(parameters, order):
    parameters = [values[:order] for values in parameters]
    module = build(*parameters)
    for row in (2 * torch.randn(20, 6, dtype=torch.float64)).tolist():
        scores = torch.tensor(row, dtype=torch.float64)
        expected = torch.tensor(paper_multimax(row, *parameters), dtype=torch.float64)
        torch.testing.assert_close(module(scores), expected, atol=1e-13, rtol=1e-11)
        expected = torch.tensor([paper_sigma(x, *parameters) for x in row], dtype=torch.float64)
        torch.testing.assert_close(module.modulate(scores), expected, atol=1e-12, rtol=1e-12)


def test_layout_of_the_official_checkpoints():
    ts = torch.tensor([0.1, -0.2, 0.03, 0.04], dtype=torch.float64)
    ranges = torch.tensor([-0.5, 0.6, -0.7, 0.8], dtype=torch.float64)
    x = 2 * torch.randn(100, dtype=torch.float64)
    relu = torch.relu
    expected = x + ts[0] * relu(ranges[0] - x) + ts[1] * relu(x - ranges[1])
    expected += ts[2] * relu(ranges[2] - x) ** 2 + ts[3] * relu(x - ranges[3]) ** 2
    torch.testing.assert_close(modulate(x, ts, ranges), expected)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_state_dict_and_names_of_the_paper(order):
    module = MultiMax(order)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {"ts": (2 * order,), "ranges": (2 * order,)}
    assert module.order == order
    assert torch.equal(module.t_b, 1 - module.ts[0::2])
    assert torch.equal(module.t_d, 1 + module.ts[1::2])
    assert torch.equal(module.ranges, torch.stack([module.b, module.d], 1).flatten())


def test_starts():
    torch.manual_seed(0)
    values = torch.cat([torch.cat([m.ts, m.ranges]) for m in (MultiMax() for _ in range(500))])
    assert values.std().item() == pytest.approx(0.02, rel=0.05)
    assert values.mean().item() == pytest.approx(0.0, abs=0.002)
    identity = MultiMax(init="identity")
    assert (identity.ts == 0).all()
    assert (identity.ranges != 0).all()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_identity_start_is_exactly_softmax(scores, mask, order, masked):
    mask = mask if masked else None
    identity, plain = MultiMax(order, init="identity"), SoftMax()
    if identity.fusible:  # else one of the two is computed by torch
        assert torch.equal(identity(scores, mask=mask), plain(scores, mask=mask))
    with use_backend("eager"):
        assert torch.equal(identity(scores, mask=mask), plain(scores, mask=mask))


def test_ranges_get_no_gradient_while_ts_is_zero(scores):
    module = MultiMax(init="identity")
    module(scores).square().sum().backward()
    assert (module.ranges.grad == 0).all()
    assert (module.ts.grad != 0).all()


@pytest.mark.parametrize("ts", [0.5, 0.0, -0.5])
@pytest.mark.parametrize("fill", [-1e4, 0.0, 1e4])
def test_the_mask_acts_after_the_modulation(scores, mask, ts, fill):
    """A finite fill that is modulated gets all the mass if ts > 0, an infinite one gives NaN."""
    module = MultiMax()
    torch.nn.init.constant_(module.ts, ts)
    expected = torch.softmax(module.modulate(scores).masked_fill(~mask, -math.inf), -1)
    filled = scores.masked_fill(~mask, fill).requires_grad_()
    probabilities = module(filled, mask=mask)
    probabilities.square().sum().backward()
    torch.testing.assert_close(probabilities, expected.nan_to_num(0.0))
    assert (probabilities[~mask.expand_as(scores)] == 0).all()
    for parameter in (filled, module.ts, module.ranges):
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_do_not_overflow_in_half_precision(dtype):
    module = build([1.0, 1.0], [1.0, 1 - 1e-3], [0.0, 0.0], [0.0, 0.0]).float()
    scores = torch.tensor([256.0, 300.0, 496.0, -512.0], dtype=dtype)
    x = scores.double()
    expected = torch.softmax(x - 1e-3 * torch.relu(x).square(), -1)
    torch.testing.assert_close(module(scores).double(), expected, atol=4e-3, rtol=0)


class OperatorNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_pow(scores, order):
    """Autocast runs `pow` in fp32, which changes the dtype of what follows."""
    module = MultiMax(order)
    weights = torch.randn_like(scores)
    with OperatorNames() as operators, use_backend("eager"):
        (module(scores.requires_grad_()) * weights).sum().backward()
        module.derivative(scores)
    assert "relu" in operators.names
    assert not [name for name in operators.names if "pow" in name]


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_derivative(parameters, order, affine):
    module = build(*[values[:order] for values in parameters], affine=affine)
    if affine:
        torch.nn.init.constant_(module.scale, 0.7)
        torch.nn.init.constant_(module.shift, -0.2)
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(module.modulate(x).sum(), x)
    torch.testing.assert_close(module.derivative(x), expected)


def test_affine(scores):
    module = MultiMax(order=1, affine=True)
    assert torch.equal(module(scores), multimax(scores, module.ts, module.ranges))
    torch.nn.init.constant_(module.scale, 1.5)
    torch.nn.init.constant_(module.shift, 0.5)
    expected = multimax(1.5 * scores + 0.5, module.ts, module.ranges)
    torch.testing.assert_close(module(scores), expected)
    assert [tuple(module.state_dict()[name].shape) for name in ("scale", "shift")] == [(1,), (1,)]


def test_a_shift_of_all_scores_matters():
    """With t_b = 2, b = 0: sigma(-1) = -2 but sigma(1) = 1, so a shift by 2 changes the gap."""
    module = build([2.0], [1.0], [0.0], [0.0])
    scores = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(module(scores)[1].item(), 1 / (1 + math.exp(-3)))
    torch.testing.assert_close(module(scores + 2)[1].item(), 1 / (1 + math.exp(-2)))


@pytest.mark.slow
@given(
    row=st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=1, max_size=9),
    t_b=st.floats(0, 3),
    t_d=st.floats(0, 3),
    b=st.floats(-3, 3),
    d=st.floats(-3, 3),
)
def test_a_larger_score_never_gets_less_where_sigma_increases(row, t_b, t_d, b, d):
    """Order 1 has slopes t_b, 1 and t_d, and t_b + t_d - 1 from d to b where the ranges overlap."""
    assume(b <= d or t_b + t_d >= 1)
    scores = torch.tensor(row, dtype=torch.float64).sort().values
    module = build([t_b], [t_d], [b], [d])
    assert (module.derivative(scores) >= -1e-12).all()
    assert (module(scores).diff() >= -1e-12).all()


def test_the_second_order_can_flip_the_order():
    """With ts2 > 0 very low scores bend up again: sigma(-9) = -9 + 0.1 * 81 = -0.9 > -5."""
    module = build([1.0, 0.9], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0])
    scores = torch.tensor([-9.0, -5.0, 0.0], dtype=torch.float64)
    probabilities = module(scores)
    assert probabilities[0] > probabilities[1]
    torch.testing.assert_close(module.derivative(scores)[0].item(), 1 - 0.2 * 9)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((2,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_wrong_shapes(shapes):
    with pytest.raises(ValueError, match="ts and ranges must be vectors of one even length"):
        modulate(torch.ones(3), torch.zeros(shapes[0]), torch.zeros(shapes[1]))
    with pytest.raises(ValueError, match="ts and ranges must be vectors of one even length"):
        multimax(torch.ones(3), torch.zeros(shapes[0]), torch.zeros(shapes[1]))
