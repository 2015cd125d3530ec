"""What is summed over processes and exchanged between them, with other processes imitated."""

import contextlib
import signal

import pytest
import torch
from accelerate import Accelerator
from test_updates import SGD
from tiny import Regression, assert_same, build_trainer

from multimax.data.workers import STOP_SIGNALS


@pytest.fixture
def trainer(tmp_path):
    """An update of it is made of three batches of different sizes."""
    return build_trainer(tmp_path, Regression((5, 3, 4)), *SGD, "trainer.accumulation=3")


def test_a_process_with_a_twin_makes_the_update_of_both(trainer, tmp_path, monkeypatch):
    """The average of two equal gradients is one of them; what is summed is doubled."""
    batches = trainer.task.train_loader.given
    alone = trainer._update(batches)
    twin = build_trainer(tmp_path, Regression((5, 3, 4)), *SGD, "trainer.accumulation=3")
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(twin.accelerator, "reduce", lambda tensor: 2 * tensor)
    assert alone["train/units"] == 12
    assert twin._update(batches) == alone | {"train/units": 24}
    assert_same(twin.task.model.state_dict(), trainer.task.model.state_dict())


def test_gradients_are_exchanged_with_the_last_batch_of_an_update(trainer, monkeypatch):
    events, backward = [], trainer.accelerator.backward

    @contextlib.contextmanager
    def no_sync(model):
        assert model is trainer.model
        events.append("off")
        yield
        events.append("on")

    monkeypatch.setattr(trainer.accelerator, "no_sync", no_sync)
    monkeypatch.setattr(
        trainer.accelerator, "backward", lambda loss: (events.append("backward"), backward(loss))
    )
    trainer._update(trainer.task.train_loader.given)
    assert events == 2 * ["off", "backward", "on"] + ["backward"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("other", [None, False, True])
def test_all_processes_stop_if_one_is_asked_to(trainer, monkeypatch, own, other):
    """None: there is no other process."""
    asked = torch.tensor([float(number == signal.SIGUSR2) for number in STOP_SIGNALS])
    if other is not None:
        monkeypatch.setattr(Accelerator, "num_processes", 2)
        monkeypatch.setattr(trainer.accelerator, "reduce", lambda tensor: tensor + other * asked)
    trainer._stop.received |= {signal.SIGUSR2} if own else set()
    assert trainer._signals() == ({signal.SIGUSR2} if own or other else set())
