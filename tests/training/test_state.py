"""The state of a run in memory and on disk, on a task of a few numbers."""

import copy
import itertools
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from tiny import Regression, assert_same, build_trainer
from torch import nn

from multimax.files import load_checkpoint
from multimax.training import trainer as trainer_module
from multimax.training.optimization import LearningRate
from multimax.training.trainer import InterruptedRunError

SIZES = (4, 4, 4)


def trained(folder, updates, *overrides):
    folder.mkdir(exist_ok=True)
    trainer = build_trainer(folder, Regression(SIZES), *overrides)
    trainer.fit(stop_after=updates)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "total"),
    [
        (("trainer.updates=5",), 5),
        (("trainer.updates=null", "trainer.epochs=4"), 12),
        (("trainer.updates=null", "trainer.epochs=4", "trainer.accumulation=3"), 4),
    ],
)
def test_length_of_training(tmp_path, options, total):
    trainer = build_trainer(tmp_path, Regression(SIZES), *options)
    assert trainer.total_updates == total
    trainer.fit()
    assert trainer.position.update == total


def test_too_few_batches(tmp_path):
    with pytest.raises(ValueError, match=r"accumulation=4 needs as many batches, .* are 3"):
        build_trainer(tmp_path, Regression(SIZES), "trainer.accumulation=4")


@pytest.mark.slow
def test_the_best_needs_a_split_to_be_found_on(tmp_path):
    for split, report in (("valid", "best"), ("valid", "last"), ("test", "last")):
        task = Regression(SIZES)
        task.splits = {split: 12}
        build_trainer(tmp_path, task, f"trainer.report={report}")
    task.splits = {"test": 12}
    with pytest.raises(ValueError, match=r"report=best needs a split 'valid'"):
        build_trainer(tmp_path, task, "trainer.report=best")


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_resumed_run_has_everything_of_the_first(tmp_path, own):
    first = trained(tmp_path / "first", 2, "trainer.ema_decay=0.9")
    folder = tmp_path / ("first" if own else "second")
    folder.mkdir(exist_ok=True)
    second = build_trainer(folder, Regression(SIZES), "trainer.ema_decay=0.9")
    assert second.resume(first.last_checkpoint) == own
    assert_same(second.task.model.state_dict(), first.task.model.state_dict())
    assert_same(second.ema.module.state_dict(), first.ema.module.state_dict())
    assert_same(second.optimizer.state_dict()["state"], first.optimizer.state_dict()["state"])
    position = copy.deepcopy(first.position)
    if not own:
        position.origin = f"resumed from {first.last_checkpoint} at update 2"
        position.best, position.best_update = None, 0
    assert second.position == position
    assert second.saved_random_state is not None  # in the middle of an epoch
    first.fit()
    second.fit()
    assert_same(second.task.model.state_dict(), first.task.model.state_dict())


def test_random_numbers_of_an_epoch_begin_anew(tmp_path):
    first = trained(tmp_path, 3)
    second = build_trainer(tmp_path, Regression(SIZES))
    assert second.resume(first.last_checkpoint)
    assert (second.position.epoch, second.position.epoch_update) == (1, 0)
    assert second.saved_random_state is None


def test_a_best_checkpoint_that_is_gone_is_not_the_best(tmp_path):
    first = trained(tmp_path, 2)
    assert first.position.best_update == 2
    first.best_checkpoint.unlink()
    second = build_trainer(tmp_path, Regression(SIZES))
    assert second.resume(first.last_checkpoint)
    assert (second.position.best, second.position.best_update) == (None, 0)
    assert not second.position.due


def test_the_end_of_another_run_is_still_to_be_evaluated(tmp_path):
    first = trained(tmp_path / "first", 4)
    (tmp_path / "second").mkdir()
    second = build_trainer(tmp_path / "second", Regression(SIZES))
    assert not second.resume(first.last_checkpoint)
    assert second.position.due
    second.fit()
    assert second.position.best_update == 4
    assert second.best_checkpoint.exists()


class Scaler:
    """What is saved of the scaler of fp16."""

    def __init__(self, scale):
        self.scale = scale

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = state["scale"]


@pytest.mark.parametrize(("saved", "own", "wanted"), [(8, 1, 8), (8, None, None), (None, 1, 1)])
def test_the_scale_of_fp16_goes_on(tmp_path, saved, own, wanted):
    first = build_trainer(tmp_path, Regression(SIZES))
    first.accelerator.scaler = saved and Scaler(saved)
    first.save()
    assert load_checkpoint(first.last_checkpoint)["scaler"] == (saved and {"scale": saved})
    second = build_trainer(tmp_path, Regression(SIZES))
    second.accelerator.scaler = own and Scaler(own)
    second.resume(first.last_checkpoint)
    scaler = second.accelerator.scaler
    assert (scaler and scaler.scale) == wanted


def test_each_update_has_its_rate(tmp_path):
    options = "trainer.updates=6", "schedule.warmup=2", "schedule.per_epoch=false"
    trainer = build_trainer(tmp_path, Regression(SIZES), *options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=trainer.config.optimizer.lr)
    rate, expected = LearningRate(optimizer, trainer.config.schedule, 6, 1), []
    for update in range(6):
        rate.set(update)
        expected.append(optimizer.param_groups[0]["lr"])
    trainer.fit()
    assert trainer.loggers[0].series("train/learning_rate") == expected
    assert len(set(expected)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_updates_are_logged(tmp_path, every):
    trainer = trained(tmp_path, 6, "trainer.updates=6", f"trainer.log_every={every}")
    logged = [update for update, metrics in trainer.loggers[0].entries if "train/loss" in metrics]
    assert logged == list(range(every, 7, every))
    assert all(rate > 0 for rate in trainer.loggers[0].series("train/rate"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "updates"),
    [
        (("trainer.updates=5",), [2, 4, 5]),
        (("trainer.updates=null", "trainer.epochs=3"), [6, 9]),  # epochs of three updates
    ],
)
def test_every_second_update_or_epoch_and_the_last_are_evaluated(tmp_path, length, updates):
    trainer = trained(tmp_path, None, "trainer.evaluate_every=2", *length)
    evaluated = [u for u, metrics in trainer.loggers[0].entries if "valid/loss" in metrics]
    assert evaluated == updates


def test_an_evaluation_is_between_two_states_on_disk(tmp_path):
    trainer, seen = build_trainer(tmp_path, Regression(SIZES), "trainer.evaluate_every=2"), []

    def look(*_):
        position = load_checkpoint(trainer.last_checkpoint)["position"]
        seen.append(tuple(position[name] for name in ("update", "due", "best_update")))
        return {"loss": 1.0}

    trainer.task.evaluate = look
    trainer.fit()
    look()
    assert seen == [(2, True, 0), (4, True, 2), (4, False, 2)]


def test_a_signal_in_the_last_update_comes_before_its_evaluation(tmp_path):
    first = trained(tmp_path, 3)
    first._stop.received.add(signal.SIGTERM)
    with pytest.raises(InterruptedRunError, match=r"after update 4$"):
        first.fit()
    assert len(first.loggers[0].series("valid/loss")) == 1  # after update 2
    second = build_trainer(tmp_path, Regression(SIZES))
    assert second.resume(first.last_checkpoint)
    second.fit()
    assert [update for update, _ in second.loggers[0].entries] == [4]
    assert second.position.best_update == 4


def test_the_logged_norm_is_that_of_the_weights(tmp_path):
    trainer = build_trainer(tmp_path, Regression(SIZES))
    model = copy.deepcopy(trainer.task.model)
    trainer.task.loss(model, trainer.task.train_loader.given[0]).backward()
    weights = [p.grad for name, p in model.named_parameters() if not name.startswith("1.")]
    trainer.fit(stop_after=1)
    (norm,) = trainer.loggers[0].series("train/gradient_norm")
    assert norm == pytest.approx(torch.nn.utils.get_total_norm(weights).item(), rel=1e-6)


def test_the_time_of_an_update_is_counted(tmp_path, monkeypatch):
    clock = itertools.count(1000, 0.25)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    trainer = build_trainer(tmp_path, Regression((5, 3)), "trainer.updates=4")
    trainer.fit()
    assert trainer.loggers[0].series("train/rate") == [20, 12, 20, 12]  # rows in a second
    assert trainer.position.seconds == 1


@pytest.mark.parametrize(("stop", "error"), [(False, RuntimeError), (True, InterruptedRunError)])
def test_an_error_in_an_evaluation_is_not_lost(tmp_path, stop, error):
    """After a signal the other processes have gone: that they are missing is not the reason."""
    trainer = trained(tmp_path, 1)

    def fails(*_):
        trainer._stop.received |= {signal.SIGTERM} if stop else set()
        raise RuntimeError("stopped by the network")

    trainer.task.evaluate = fails
    with pytest.raises(error, match=r"stopped by (the network|a signal after update 1)"):
        trainer.evaluate("valid")


def test_gradients_of_fp16_are_unscaled_before_they_are_measured(tmp_path, monkeypatch):
    plain = build_trainer(tmp_path, Regression(SIZES))
    plain.fit(stop_after=1)
    scaled = build_trainer(tmp_path, Regression(SIZES))
    scaled.accelerator.scaler = Scaler(8)

    def unscale(optimizer):
        assert optimizer is scaled.optimizer
        for parameter in scaled.task.model.parameters():
            parameter.grad /= 8

    monkeypatch.setattr(scaled.accelerator, "backward", lambda loss: (8 * loss).backward())
    monkeypatch.setattr(scaled.accelerator, "unscale_gradients", unscale)
    scaled.fit(stop_after=1)
    for name in ("train/loss", "train/gradient_norm"):
        assert scaled.loggers[0].series(name) == plain.loggers[0].series(name)
    assert_same(scaled.task.model.state_dict(), plain.task.model.state_dict())


def test_an_infinite_gradient_is_left_to_the_scaler_of_fp16(tmp_path, monkeypatch):
    """The scaler skips the update and lowers its scale; the run goes on."""
    trainer = build_trainer(tmp_path, Regression(SIZES))
    trainer.accelerator.scaler, skipped = Scaler(8), []
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: loss.backward())
    monkeypatch.setattr(trainer.accelerator, "unscale_gradients", lambda _: None)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: skipped.append(trainer.position.update))
    trainer.task.model[0].weight.register_hook(lambda gradient: gradient * math.inf)
    trainer.fit()
    assert skipped == [0, 1, 2, 3]
    norms = trainer.loggers[0].series("train/gradient_norm")
    assert len(norms) == 4
    assert not any(math.isfinite(norm) for norm in norms)


class Drawing(Regression):
    """Keeps a random number of each loss, as dropout would draw it."""

    def __init__(self):
        super().__init__(SIZES)
        self.drawn = []

    def loss(self, model, batch):
        self.drawn.append(torch.rand(()).item())
        return super().loss(model, batch)


def test_a_resumed_epoch_draws_on_and_the_next_one_anew(tmp_path):
    whole, first, second = (
        build_trainer(tmp_path, Drawing(), "trainer.updates=7", "trainer.evaluate_every=7")
        for _ in range(3)
    )
    whole.fit()
    first.fit(stop_after=2)
    assert second.resume(first.last_checkpoint)
    second.fit()
    drawn = whole.task.drawn
    assert len(drawn) == len(set(drawn)) == 8  # one more in the evaluation
    assert first.task.drawn + second.task.drawn == drawn
