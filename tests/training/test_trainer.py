import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    Regression,
    assert_same,
    build_trainer,
    history,
    only,
    outcome,
    run_quietly,
    state,
    tiny_config,
)
from torch import nn

from multimax import MultiMax
from multimax.files import load_checkpoint
from multimax.tasks import build_task
from multimax.training.config import read_config
from multimax.training.trainer import Trainer

EVERYTHING_RANDOM = (
    "loss.mixup=0.8",
    "loss.cutmix=1.0",
    "model.dropout=0.1",
    "model.drop_path=0.3",
    "data.crop_padding=2",
    "data.random_erasing=0.5",
    "trainer.ema_decay=0.9",
)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_close(got, expected, **tolerance):
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (1, 7)])
def test_accumulated_batches_are_one_large_batch(tmp_path, sizes):
    options = "trainer.updates=3", "trainer.clip_norm=1.0", "optimizer.lr=0.1"
    parts = build_trainer(tmp_path, Regression(sizes), *options, "trainer.accumulation=2")
    whole = build_trainer(tmp_path, Regression((8,)), *options)
    start = weights(whole.task.model)
    assert_close(parts.task.model.state_dict(), start, rtol=0, atol=0)
    for trainer in (parts, whole):
        trainer.fit()
    assert_close(parts.task.model.state_dict(), whole.task.model.state_dict(), rtol=1e-6, atol=1e-9)
    logs = [trainer.loggers[0] for trainer in (parts, whole)]
    for name in ("train/loss", "train/gradient_norm"):
        assert logs[0].series(name) == pytest.approx(logs[1].series(name), rel=1e-6)
    assert not torch.equal(start["0.weight"], whole.task.model.state_dict()["0.weight"])


def test_average_of_the_weights(tmp_path):
    trainer = build_trainer(tmp_path, Regression((4,) * 3), "trainer.ema_decay=0.7")
    expected = weights(trainer.task.model)
    for update in range(1, 5):
        trainer.fit(stop_after=update)
        now = weights(trainer.task.model)
        expected = {name: 0.7 * expected[name] + 0.3 * now[name] for name in now}
    assert_close(trainer.ema.module.state_dict(), expected, rtol=1e-6, atol=1e-12)
    averaged = copy.deepcopy(trainer.task.model)
    averaged.load_state_dict(expected)
    loss = trainer.task.evaluate(averaged, "valid", lambda total: total)["loss"]
    assert trainer.evaluate("valid")["ema_loss"] == pytest.approx(loss, rel=1e-6)
    assert trainer.evaluate("valid")["loss"] != pytest.approx(loss, rel=1e-6)


def test_a_tied_tensor_is_averaged_once(tmp_path):
    task = Regression((4,) * 3)
    first, scalars, last = task.model
    task.model = nn.Sequential(first, scalars, nn.Linear(4, 4), MultiMax(), last).double()
    task.model[3].ts = scalars.ts
    trainer = build_trainer(tmp_path, task, "trainer.ema_decay=0.7")
    expected = scalars.ts.detach().clone()
    for update in range(1, 5):
        trainer.fit(stop_after=update)
        expected = 0.7 * expected + 0.3 * scalars.ts.detach()
    assert (expected - scalars.ts).abs().max() > 1e-4
    for place in (1, 3):
        torch.testing.assert_close(trainer.ema.module[place].ts.detach(), expected)


@pytest.mark.slow
def test_loss_falls_and_each_update_is_logged(tmp_path):
    trainer = build_trainer(
        tmp_path, Regression((8, 8)), "trainer.updates=200", "optimizer.lr=0.1",
        "optimizer.weight_decay=0", "trainer.evaluate_every=100",
    )  # fmt: skip
    trainer.fit()
    losses = trainer.loggers[0].series("train/loss")
    assert len(losses) == 200
    assert losses[-1] < 0.1 * losses[0]
    assert [update for update, f in trainer.loggers[0].entries if "valid/loss" in f] == [100, 200]
    assert trainer.position.update == 200
    assert trainer.position.epoch == 100


@pytest.mark.slow
def test_bf16_computes_in_bf16(tmp_path):
    task = Regression((8,), torch.float32)
    trainer = build_trainer(tmp_path, task, "trainer.precision=bf16", precision="bf16")
    seen = set()
    task.model[0].register_forward_hook(lambda *args: seen.add(args[2].dtype))
    trainer.fit()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    result = run_quietly(tiny_config(tmp_path, "trainer.precision=bf16"))
    assert result["metrics"]["test"]["loss"] < 3


@pytest.mark.slow
def test_compiled_is_eager(tmp_path):
    """The same numbers, and the normalizers can still be looked into."""
    eager, compiled = (
        build_trainer(tmp_path, Regression((8,)), f"trainer.compile={flag}", "trainer.updates=3")
        for flag in ("false", "true")
    )
    called = []
    real = compiled.task.model._compiled_call_impl
    compiled.task.model._compiled_call_impl = lambda *a: called.append(1) or real(*a)
    for trainer in (eager, compiled):
        trainer.fit()
    assert called
    for name in ("train/loss", "valid/loss"):
        expected = eager.loggers[0].series(name)
        assert compiled.loggers[0].series(name) == pytest.approx(expected, rel=1e-9)
    got, expected = compiled.inspect()["1"], eager.inspect()["1"]
    assert expected["entropy_count"] == 8
    assert got == pytest.approx(expected, rel=1e-9)


class Scripted(Regression):
    """A task whose figure follows a script."""

    def __init__(self, values, higher_is_better):
        super().__init__((4, 4))
        self.values, self.higher_is_better = list(values), higher_is_better
        self.seen = []

    def evaluate(self, model, split, reduce):
        self.seen.append(weights(model))
        return {"loss": self.values[len(self.seen) - 1]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("higher", "values", "best"),
    [(True, (3.0, 7.0, 7.0, 5.0), 2), (False, (3.0, 1.0, 1.0, 1.5), 2)],
)
def test_best_checkpoint_holds_the_best_weights(tmp_path, higher, values, best):
    task = Scripted(values, higher)
    trainer = build_trainer(tmp_path, task, "trainer.evaluate_every=1")
    trainer.fit()
    assert (trainer.position.best, trainer.position.best_update) == (values[best - 1], best)
    assert_same(load_checkpoint(tmp_path / "best.pt")["model"], task.seen[best - 1])
    assert_same(weights(task.model), task.seen[-1])
    trainer.load_best()
    assert_same(weights(task.model), task.seen[best - 1])


@pytest.mark.slow
@pytest.mark.parametrize("report", ["best", "last"])
def test_reported_weights(tmp_path, monkeypatch, report):
    real = Trainer._update

    def forgetful(self, group):
        metrics = real(self, group)
        if self.position.update == 25:
            torch.nn.init.zeros_(self.task.model.head.weight)
        return metrics

    monkeypatch.setattr(Trainer, "_update", forgetful)
    options = "trainer.updates=30", "trainer.evaluate_every=10", "optimizer.lr=3e-3"
    result = run_quietly(tiny_config(tmp_path, f"trainer.report={report}", *options))
    valid = [entry["valid/top1"] for entry in history(tmp_path) if "valid/top1" in entry]
    assert len(set(valid)) > 1
    assert max(valid) > valid[-1] + 5
    assert result["reported_weights"] == report
    assert result["metrics"]["valid"]["top1"] == (max(valid) if report == "best" else valid[-1])
    assert result["best"]["value"] == max(valid)
    assert result["best"]["update"] == 10 * (1 + valid.index(max(valid)))


@pytest.mark.slow
def test_a_result_has_the_figures_of_each_split(tmp_path):
    config = read_config(tiny_config(tmp_path, "output=softmax"))
    result = run_quietly(config)
    task = build_task(config, 0, 1, torch.device("cpu"))
    task.model.load_state_dict(load_checkpoint(only(tmp_path, "last.pt"))["model"])
    data, losses = task.data, set()
    for split, examples in (("valid", 1000), ("test", 2000)):
        images, labels = data.splits[split]
        with torch.no_grad():
            scores = task.model.eval()((images / 255 - data.mean) / data.std)
        row = result["metrics"][split]
        assert row["examples"] == len(labels) == examples
        assert row["top1"] == pytest.approx(100 * (scores.argmax(1) == labels).double().mean())
        assert row["loss"] == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-4)
        losses.add(row["loss"])
    assert len(losses) == 2


def nan_in_parameter(task):
    with torch.no_grad():
        task.model[2].weight[0, 1] = float("nan")


def infinity_in_buffer(task):
    task.model[0].register_buffer("shift", torch.tensor([0.0, float("inf")]))
    task.model[0].register_forward_hook(lambda module, _, output: output + module.shift[1])


def infinity_in_input(task):
    task.train_loader.given[0][0][2, 1] = float("inf")


def nan_in_forward(task):
    def spoil(module, inputs, output):
        return output.index_fill(1, torch.tensor([2]), float("nan"))

    task.model[1].register_forward_hook(spoil)


def infinity_in_loss(task):
    real = task.loss
    task.loss = lambda model, batch: real(model, batch) + float("inf")


def nan_in_gradient(task):
    task.model[0].weight.register_hook(lambda gradient: gradient * float("nan"))


def infinity_in_scalar_gradient(task):
    task.model[1].ts.register_hook(lambda gradient: gradient + float("inf"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (nan_in_parameter, r"parameter 2\.weight \(1 of its 4 entries\)"),
        (infinity_in_buffer, r"buffer 0\.shift \(1 of its 2 entries\)"),
        (infinity_in_input, r"input 0 \(1 of its 12 entries\)"),
        (nan_in_forward, r"output of 1 \(4 of its 16 entries\)"),
        (infinity_in_loss, "no single tensor: the loss itself overflows"),
        (nan_in_gradient, r"gradient of 0\.weight \(12 of its 12 entries\)"),
        (infinity_in_scalar_gradient, r"gradient of 1\.ts \(4 of its 4 entries\)"),
    ],
)
def test_non_finite_number_stops_the_run_and_is_found(tmp_path, spoil, culprit):
    task = Regression((4,))
    options = "trainer.evaluate_every=1", "trainer.clip_norm=1.0"
    trainer = build_trainer(tmp_path, task, *options)
    trainer.fit(stop_after=2)
    good = {name: (tmp_path / name).read_bytes() for name in ("last.pt", "best.pt")}
    spoil(task)
    with pytest.raises(
        FloatingPointError, match=f"at update 2; first non-finite: {culprit}.*intact"
    ):
        trainer.fit()
    assert {name: (tmp_path / name).read_bytes() for name in good} == good


@pytest.mark.slow
def test_same_seed_same_numbers(tmp_path):
    places = [tmp_path / name for name in ("first", "again", "other")]
    for place, seed in zip(places, (0, 0, 1), strict=True):
        torch.manual_seed(len(str(place)))  # what was drawn before does not matter
        run_quietly(tiny_config(place, f"seed={seed}", *EVERYTHING_RANDOM))
    first, again, other = places
    assert_same(state(again), state(first))
    assert history(again) == history(first)
    assert outcome(again) == outcome(first)
    losses = [[entry.get("train/loss") for entry in history(place)] for place in (first, other)]
    assert losses[0][0] != losses[1][0]
    assert outcome(other)["metrics"] != outcome(first)["metrics"]


def test_loader_shorter_than_it_says(tmp_path):
    task = Regression((4, 4))
    trainer = build_trainer(tmp_path, task, "trainer.accumulation=2")
    task.train_loader.given.pop()
    with pytest.raises(RuntimeError, match="its __len__ is wrong"):
        trainer.fit()


@pytest.mark.slow
def test_only_the_named_files_are_left(tmp_path):
    run_quietly(tiny_config(tmp_path))
    names = {path.name for path in only(tmp_path, "result.json").parent.iterdir()}
    assert names == {
        ".lock", "best.pt", "config.yaml", "last.pt", "metrics.jsonl", "result.json", "wandb_id",
    }  # fmt: skip
