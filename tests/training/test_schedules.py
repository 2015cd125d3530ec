import math

import pytest
import torch
from tiny import schedule
from torch import nn

from multimax.options import validate
from multimax.training.optimization import LearningRate, build_optimizer
from multimax.training.sections import OptimizerSection

INVERSE_SQRT = {"name": "inverse_sqrt", "warmup": 40, "warmup_lr": 1e-7}
RESTARTS = {
    "name": "cosine_restarts", "warmup": 16, "warmup_lr": 1e-7, "min_lr": 1e-4, "period": 27,
    "period_growth": 2.0, "shrink": 0.75,
}  # fmt: skip


def rates(options, updates, peak):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter]}, {"params": [], "lr": peak / 2}], lr=peak)
    rate = LearningRate(optimizer, schedule(options), length=7, updates_per_unit=3)
    got = []
    for update in updates:
        rate.set(update)
        first, second = (group["lr"] for group in optimizer.param_groups)
        got.append(first)
    return got, second


def fairseq_inverse_sqrt(num_updates, lr, warmup_updates, warmup_init_lr):
    """`InverseSquareRootSchedule.step_update`, written out."""
    lr_step = (lr - warmup_init_lr) / warmup_updates
    decay_factor = lr * warmup_updates**0.5
    if num_updates < warmup_updates:
        return warmup_init_lr + num_updates * lr_step
    return decay_factor * num_updates**-0.5


def fairseq_cosine(num_updates, max_lr, warmup, warmup_lr, min_lr, period, t_mult, shrink):
    """`CosineLRSchedule.step_update`, written out."""
    if num_updates < warmup:
        return warmup_lr + num_updates * (max_lr - warmup_lr) / warmup
    curr_updates = num_updates - warmup
    if t_mult != 1:
        i = math.floor(math.log(1 - curr_updates / period * (1 - t_mult), t_mult))
        t_i = t_mult**i * period
        t_curr = curr_updates - (1 - t_mult**i) / (1 - t_mult) * period
    else:
        i = math.floor(curr_updates / period)
        t_i = period
        t_curr = curr_updates - (period * i)
    lr_shrink = shrink**i
    low, high = min_lr * lr_shrink, max_lr * lr_shrink
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * t_curr / t_i))


def test_inverse_sqrt_is_fairseqs():
    expected = [fairseq_inverse_sqrt(update, 5e-4, 40, 1e-7) for update in range(500)]
    assert rates(INVERSE_SQRT, range(500), 5e-4)[0] == pytest.approx(expected, rel=1e-12)
    assert max(expected) == expected[40] == 5e-4


def test_inverse_sqrt_without_warmup():
    got, _ = rates(INVERSE_SQRT | {"warmup": 0}, range(5), 1.0)
    assert got == pytest.approx([1, 1, 2**-0.5, 3**-0.5, 0.5])


def test_cosine_restarts_without_warmup():
    got, _ = rates(RESTARTS | {"warmup": 0}, (0, 27, 81), 1.0)
    assert got == [1.0, 0.75, 0.75**2]


@pytest.mark.parametrize("growth", [1.0, 2.0, 1.5])
def test_cosine_restarts_are_fairseqs(growth):
    expected = [fairseq_cosine(u, 1.0, 16, 1e-7, 1e-4, 27, growth, 0.75) for u in range(400)]
    # Where a period ends, fairseq's logarithm may round down to the one before.
    ends = {round(16 + 27 * sum(growth**i for i in range(n))) for n in range(1, 16)}
    options = RESTARTS | {"period_growth": growth}
    got, _ = rates(options, range(400), 1.0)
    inside = [update for update in range(400) if update not in ends]
    assert len(inside) > 380
    assert [got[u] for u in inside] == pytest.approx([expected[u] for u in inside], rel=1e-9)
    assert got[16] == 1.0
    assert got[43] == pytest.approx(0.75)
    assert got[42] < 0.01


def test_each_group_keeps_its_share():
    (first,), second = rates(RESTARTS, [16], 0.4)
    assert (first, second) == (0.4, 0.2)


def test_rate_survives_loading_of_the_optimizer():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rate = LearningRate(optimizer, schedule(INVERSE_SQRT), 1, 1)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 123.0
    optimizer.load_state_dict(state)
    rate.set(160)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"name": "linear"},
            "schedule.name='linear' must be cosine, inverse_sqrt or cosine_restarts",
        ),
        (
            {"name": "inverse_sqrt", "warmup": 2},
            "inverse_sqrt needs a value for schedule.warmup_lr",
        ),
        ({"name": "inverse_sqrt"}, "schedule.warmup is missing; it must be a whole number >= 0"),
        (RESTARTS | {"shrink": None}, "cosine_restarts needs a value for schedule.shrink"),
        (RESTARTS | {"name": "cosine"}, "cosine needs a value for schedule.per_epoch"),
    ],
)
def test_schedules_that_cannot_be(options, problem):
    with pytest.raises(ValueError, match=problem):
        rates(options, [0], 1.0)


class FairseqNAG:
    """fairseq's `NAG.step` for fp32, written out."""

    def __init__(self, parameter, lr, momentum):
        self.parameter, self.momentum, self.lr_old = parameter, momentum, lr
        self.buffer = torch.zeros_like(parameter)

    def step(self, gradient, lr):
        correct = lr / self.lr_old
        self.parameter += self.momentum * self.momentum * correct * self.buffer
        self.parameter -= (1 + self.momentum) * lr * gradient
        self.buffer.mul_(self.momentum * correct).sub_(lr * gradient)
        self.lr_old = lr


class FairseqAdam:
    """fairseq's `Adam.step` for fp32, written out."""

    def __init__(self, parameter, lr, betas, eps, weight_decay):
        self.parameter, self.betas, self.eps, self.decay = parameter, betas, eps, weight_decay
        self.mean, self.square, self.steps = 0, 0, 0

    def step(self, gradient, lr):
        self.steps += 1
        first, second = self.betas
        self.mean = first * self.mean + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient**2
        size = lr * math.sqrt(1 - second**self.steps) / (1 - first**self.steps)
        self.parameter -= self.decay * lr * self.parameter
        self.parameter -= size * self.mean / (self.square**0.5 + self.eps)


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("nesterov", {"momentum": 0.99, "weight_decay": 0.0}, FairseqNAG),
        ("adamw", {"betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.01}, FairseqAdam),
    ],
)
def test_optimizers_are_fairseqs(name, options, reference):
    model = nn.Linear(3, 2).double()
    copies = [parameter.detach().clone() for parameter in model.parameters()]
    starts = [copy.clone() for copy in copies]
    chosen = {"name": name, "lr": 0.05, "filter_bias_and_bn": False, **options}
    settings = validate(OptimizerSection, chosen)
    optimizer = build_optimizer(model, settings)
    if reference is FairseqNAG:
        options = {"momentum": 0.99}
    expected = [reference(copy, lr=0.05, **options) for copy in copies]
    for step in range(30):
        lr = 0.05 / (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, other in zip(model.parameters(), expected, strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.step(parameter.grad, lr)
        optimizer.step()
    for parameter, copy in zip(model.parameters(), copies, strict=True):
        torch.testing.assert_close(parameter.detach(), copy, rtol=1e-6, atol=1e-7)
    assert all(
        (copy - start).abs().min() > 0.01 for copy, start in zip(copies, starts, strict=True)
    )
