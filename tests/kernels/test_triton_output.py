import pytest
import torch
from modulators import NORMALIZERS, build, coefficients

from multimax import SoftMax
from multimax.kernels.backend import use_backend
from multimax.losses import output_loss

pytest.importorskip("triton")

from multimax.kernels import triton_output as module
from multimax.kernels.triton_output import modulated_cross_entropy_

# The interpreter warns of overflow where the compiled code computes what it then throws away.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.slow]

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64; a step in float32 would leave 1e-8
MANY = 4200  # classes: two blocks and a part of a third


def draw(classes, soft=False, device="cpu"):
    """Scores and target of six rows; of the classes, the third row has the ignored one."""
    scores = 2 * torch.randn(6, classes, dtype=torch.float64, device=device)
    if soft:
        return scores, torch.rand(6, classes, dtype=torch.float64, device=device).softmax(-1)
    target = torch.randint(classes, (6,), device=device)
    target[2] = -100
    return scores, target


def reference(normalizer, scores, target, weight=None, label_smoothing=0.0):
    """Losses of the eager function in float64, and the gradients by scores and scalars."""
    leaf = scores.detach().double().cpu().requires_grad_()
    target = target.cpu()
    with use_backend("eager"):
        losses = output_loss(
            normalizer, leaf, target, label_smoothing=label_smoothing, reduction="none"
        )
    total = losses.sum() if weight is None else (losses * weight.cpu()).sum()
    return [losses.detach(), *torch.autograd.grad(total, [leaf, *normalizer.parameters()])]


def to_parameters(gradient, normalizer):
    """The gradients of the parameters behind the coefficients, through autograd."""
    c, parameters = coefficients(normalizer, "cpu"), list(normalizer.parameters())
    return torch.autograd.grad(c, parameters, gradient.cpu().to(c)) if parameters else ()


def compare(normalizer, scores, target, weight=None, label_smoothing=0.0):
    c = coefficients(normalizer, scores.device).detach()
    expected = reference(normalizer, scores, target, weight, label_smoothing)
    losses, gradient = modulated_cross_entropy_(scores, target, c, weight, label_smoothing)
    actual = [losses.cpu(), scores.cpu(), *to_parameters(gradient, normalizer)]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.125])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_every_normalizer_and_target(name, soft, label_smoothing, device):
    scores, target = draw(MANY, soft, device)
    weight = torch.rand(6, dtype=torch.float64, device=device)
    compare(build(name), scores, target, weight, label_smoothing)


@pytest.mark.parametrize("classes", [1, 2, 16, 17, 2048, 2049])
def test_number_of_classes(classes, device):
    compare(build("multimax-2"), *draw(classes, device=device))


def test_soft_target_whose_mass_is_not_one(device):
    scores, target = draw(40, soft=True, device=device)
    compare(build("multimax-2"), scores, 0.7 * target, label_smoothing=0.125)


def test_strides(device):
    scores, target = draw(40, device=device)
    target = torch.stack([target, target], -1)[:, 0]
    weight = torch.rand(6, 3, dtype=torch.float64, device=device)[:, 1]
    compare(build("multimax-2"), scores.t().contiguous().t(), target, weight)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
@pytest.mark.parametrize("name", ["softmax", "multimax-2"])
def test_lower_precision(name, dtype, error, device):
    """The gradient of the scores has the rounding of their dtype, the rest that of float32."""
    scores, target = draw(MANY, device=device)
    scores = scores.to(dtype)
    normalizer = build(name)
    c = coefficients(normalizer, device).detach().float()
    expected = reference(normalizer, scores, target)
    losses, gradient = modulated_cross_entropy_(scores, target, c, label_smoothing=0.0)
    assert (losses.dtype, scores.dtype, gradient.dtype) == (torch.float32, dtype, torch.float32)
    actual = [losses.cpu(), scores.cpu(), *to_parameters(gradient, normalizer)]
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.dist(a.double(), b) <= (error if i == 1 else 2e-6) * b.norm()


def test_an_ignored_row_is_not_read(device):
    scores, target = draw(40, device=device)
    normalizer = build("multimax-2")
    c = coefficients(normalizer, device).detach()
    rest = torch.tensor([0, 1, 3, 4, 5], device=device)
    other = scores[rest]
    expected = modulated_cross_entropy_(other, target[rest], c)
    scores[2] = torch.nan
    losses, gradient = modulated_cross_entropy_(scores, target, c)
    assert losses[2] == 0
    assert (scores[2] == 0).all()
    torch.testing.assert_close((losses[rest], gradient), expected)
    assert torch.equal(scores[rest], other)
    target[2] = 7
    assert modulated_cross_entropy_(torch.zeros_like(scores), target, c, ignore_index=7)[0][2] == 0


def test_large_scores_and_classes_that_are_excluded(device):
    """The first block has nothing but -inf; exp of the others would overflow."""
    scores, target = draw(MANY, device=device)
    scores += 2000
    scores[:, :3000] = -torch.inf
    target = target.where(target < 0, 3000 + target % 1000)
    compare(SoftMax(), scores, target)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_classes_that_a_score_forbids(name, device):
    normalizer = build(name)
    scores, target = draw(20, device=device)
    scores[:, 3] = -torch.inf
    scores[1, 5:9] = -1e5
    target = target.where((target != 3) & ~((target >= 5) & (target < 9)), 0)
    compare(normalizer, scores, target)


def test_a_target_that_is_no_class_is_nan(device):
    scores, target = draw(11, device=device)
    target[0] = 11
    losses, _ = modulated_cross_entropy_(scores, target, torch.tensor([1.0, 0.0], device=device))
    assert losses.isnan().tolist() == [True] + 5 * [False]


def test_without_gradient_the_scores_stay(device):
    scores, target = draw(40, device=device)
    before = scores.clone()
    c = coefficients(build("multimax-1"), device).detach()
    losses, gradient = modulated_cross_entropy_(scores, target, c, want_gradient=False)
    assert gradient is None
    assert torch.equal(scores, before)
    assert torch.equal(losses, modulated_cross_entropy_(scores, target, c)[0])


def test_gradients_are_the_same_bits_in_every_run(device):
    scores, target = draw(MANY, device=device)
    c = coefficients(build("multimax-2"), device).detach().float()
    runs = []
    for _ in range(2):
        copy = scores.float()
        runs.append([copy, *modulated_cross_entropy_(copy, target, c)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_no_rows(device):
    c = torch.ones(6, device=device)
    scores, target = torch.zeros(0, 5, device=device), torch.zeros(0, 5, device=device)
    losses, gradient = modulated_cross_entropy_(scores, target, c)
    assert losses.shape == (0,)
    assert torch.equal(gradient, torch.zeros_like(c))


ERRORS = {
    "scores must be": {"scores": torch.zeros(2, 3, 4)},
    "behind autograd": {"scores": torch.zeros(2, 3).requires_grad_()},
    r"target must be \(2,\)": {"target": torch.zeros(3, dtype=torch.int64)},
    "target must be int64": {"target": torch.zeros(2, dtype=torch.int32)},
    "coefficients must be a vector": {"coefficients": torch.zeros(3)},
    "weight must be": {"weight": torch.zeros(3)},
    "weight must be on": {"weight": torch.zeros(2, device="meta")},
    "label_smoothing must be in": {"label_smoothing": 1.0},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_is_wrong(message, monkeypatch):
    monkeypatch.setattr(module, "check_device", lambda *_: None)
    arguments = {"scores": torch.zeros(2, 3), "target": torch.zeros(2, dtype=torch.int64)}
    arguments["coefficients"] = coefficients(SoftMax(), "cpu")
    with pytest.raises(ValueError, match=message):
        modulated_cross_entropy_(**arguments | ERRORS[message])
