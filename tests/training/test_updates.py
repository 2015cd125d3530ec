"""Updates of the trainer next to the same updates written out by hand."""

import math

import pytest
import torch
from tiny import Regression, build_trainer

from multimax.training.optimization import normalizer_parameters

SGD = (
    "optimizer.name=momentum", "+optimizer.momentum=0", "optimizer.betas=null",
    "optimizer.eps=null", "optimizer.lr=0.08", "optimizer.weight_decay=0",
    "trainer.clip_norm=null",
)  # fmt: skip


def gradients(task, batch):
    """Of each parameter, from a backward pass of its own."""
    parameters = list(task.model.parameters())
    found = torch.autograd.grad(task.loss(task.model, batch), parameters)
    return dict(zip(task.model.state_dict(), found, strict=True))


def steps(trainer, updates):
    """(batch's gradients before, weights before, weights after) of each update."""
    task = trainer.task
    for update in range(updates):
        batches = task.train_loader.given
        expected = gradients(task, batches[update % len(batches)])
        before = {name: value.clone() for name, value in task.model.state_dict().items()}
        trainer.fit(stop_after=update + 1)
        yield expected, before, task.model.state_dict()


# Each rate by hand, of a peak of 0.08; the batches are two, so that an epoch has two updates.
COSINE = [0.04 * (1 + math.cos(math.pi * t / 6)) for t in range(6)]
RATES = {
    "cosine-by-update": (
        ("name=cosine", "warmup=2", "warmup_lr=0.02", "min_lr=0", "per_epoch=false"),
        ("trainer.updates=6",),
        [0.02, 0.05, *COSINE[2:]],
    ),
    "cosine-by-epoch": (
        ("name=cosine", "warmup=1", "warmup_lr=0.02", "min_lr=0", "per_epoch=true"),
        ("trainer.epochs=3", "trainer.updates=null"),
        [0.02, 0.02, 0.06, 0.06, 0.02, 0.02],
    ),
    "inverse_sqrt": (
        ("name=inverse_sqrt", "warmup=4", "warmup_lr=0"),
        ("trainer.updates=10",),
        [0, 0.02, 0.04, 0.06, 0.08, 0.16 / 5**0.5, 0.16 / 6**0.5, 0.16 / 7**0.5, 0.16 / 8**0.5,
         0.16 / 3],
    ),
    "cosine_restarts": (
        ("name=cosine_restarts", "warmup=1", "warmup_lr=0.01", "min_lr=0", "+period=2",
         "+period_growth=2", "+shrink=0.5"),
        ("trainer.updates=7",),
        [0.01, 0.08, 0.04, 0.04, 0.02 * (1 + 0.5**0.5), 0.02, 0.02 * (1 - 0.5**0.5)],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RATES)
def test_every_update_is_a_step_of_its_own_rate_along_its_own_gradient(tmp_path, name):
    options, length, expected = RATES[name]
    schedule = [
        f"{'+' * option.startswith('+')}schedule.{option.removeprefix('+')}" for option in options
    ]
    trainer = build_trainer(tmp_path, Regression((5, 3)), *SGD, *schedule, *length)
    found = []
    for gradient, before, after in steps(trainer, len(expected)):
        change = torch.cat([(before[name] - after[name]).flatten() for name in before])
        direction = torch.cat([gradient[name].flatten() for name in before])
        found.append(((change @ direction) / (direction @ direction)).item())
        torch.testing.assert_close(change, found[-1] * direction, rtol=1e-6, atol=1e-12)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert trainer.loggers[0].series("train/learning_rate") == pytest.approx(expected)
    assert trainer.position.update == trainer.total_updates == len(expected)


def norm(gradient, names):
    return math.sqrt(sum(gradient[name].square().sum().item() for name in names))


def test_every_update_is_clipped_before_it_is_made(tmp_path):
    flat = ("schedule.warmup=0", "schedule.min_lr=0.08", "trainer.updates=3")
    options = (*SGD, *flat, "trainer.clip_norm=0.01")
    trainer = build_trainer(tmp_path, Regression((5, 3)), *options)
    scalars = {id(parameter) for parameter in normalizer_parameters(trainer.task.model)}
    groups = {
        own: [n for n, p in trainer.task.model.named_parameters() if (id(p) in scalars) == own]
        for own in (False, True)
    }
    norms = []
    for gradient, before, after in steps(trainer, 3):
        norms.append(norm(gradient, groups[False]))
        for names in groups.values():
            size = norm(gradient, names)
            assert size > 0.01
            for name in names:
                step = 0.08 * 0.01 / size * gradient[name]
                torch.testing.assert_close(before[name] - after[name], step, rtol=1e-3, atol=1e-9)
    # What is logged is the norm before it is clipped.
    assert trainer.loggers[0].series("train/gradient_norm") == pytest.approx(norms)


class Coarse(Regression):
    """With losses of eight bits, as a model in bf16 can give them."""

    def loss(self, model, batch):
        return super().loss(model, batch).bfloat16()


def test_the_loss_of_an_update_is_averaged_in_single_precision(tmp_path):
    trainer = build_trainer(tmp_path, Coarse((5, 3, 4)), "trainer.accumulation=3")
    batches = trainer.task.train_loader.given
    losses = [trainer.task.loss(trainer.task.model, batch).item() for batch in batches]
    mean = sum(loss * rows / 12 for loss, rows in zip(losses, (5, 3, 4), strict=True))
    assert trainer._update(batches)["train/loss"] == pytest.approx(mean, rel=1e-6)


def test_weight_decay_shrinks_matrices_alone(tmp_path):
    """AdamW's first step has the size of its rate, beside the decay."""
    rate, decay = 0.01, 0.5
    options = (
        f"optimizer.lr={rate}", f"optimizer.weight_decay={decay}", "optimizer.eps=1e-30",
        "schedule.warmup=0", "schedule.min_lr=0", "trainer.updates=1", "trainer.clip_norm=null",
    )  # fmt: skip
    trainer = build_trainer(tmp_path, Regression((5, 3)), *options)
    ((gradient, before, after),) = steps(trainer, 1)
    assert sum(value.dim() > 1 for value in before.values()) == 2 < len(before)
    for name, value in before.items():
        kept = 1 - rate * decay if value.dim() > 1 else 1
        expected = kept * value - rate * gradient[name].sign()
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-9)


class Watched(Regression):
    """Keeps whether the model was in training mode when it was asked for something."""

    def __init__(self):
        super().__init__((4, 4))
        self.modes = []

    def loss(self, model, batch):
        self.modes.append(("evaluate" if batch is self.data else "loss", self.model.training))
        return super().loss(model, batch)

    def inspect(self, model):
        self.modes.append(("inspect", model.training))
        return super().inspect(model)


def test_training_mode_in_updates_and_evaluation_mode_in_evaluations(tmp_path):
    trainer = build_trainer(tmp_path, Watched())
    trainer.fit()
    trainer.task.model.train()
    trainer.evaluate("valid")
    trainer.task.model.train()
    trainer.inspect()
    update, evaluation = ("loss", True), ("evaluate", False)
    assert trainer.task.modes == [
        *(2 * [update, update, evaluation]), evaluation, ("inspect", False)
    ]  # fmt: skip
