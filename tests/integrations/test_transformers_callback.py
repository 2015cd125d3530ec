"""The monitor in the Trainer of transformers, and scalars in its optimizer."""

import math
import time

import pytest
import torch
from offline_wandb import records
from torch import nn
from two_processes import in_two_processes, needs_fork

from experiments.drop_in.transformers_models import VOCABULARY, build, move
from multimax import (
    MultiMax,
    NormalizerRecorder,
    clip_gradients,
    monitor,
    parameter_groups,
    replace_softmax,
)
from multimax.attention import attention

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LAYER = "transformer.h.1.attn"


def tiny_gpt2():
    torch.manual_seed(0)
    model = build("GPT-2")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # the scores are all but equal otherwise
                parameter.normal_(std=0.3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    replace_softmax(model)
    move(model)
    return model


def texts(count=4):
    """As many texts of nine words: the whole of them is the batch of an update."""
    tokens = torch.randint(4, VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder, model, callback=True, data=None, optimizers=(None, None), **options):
    from multimax.integrations.transformers import MonitorCallback

    options = {"max_steps": 5, "logging_steps": 2, "report_to": "none", **options}
    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=0.01,
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | options,
    )
    made = transformers.Trainer(
        model, arguments, train_dataset=data or texts(), optimizers=optimizers
    )
    made.remove_callback(transformers.PrinterCallback)
    if callback:
        made.add_callback(MonitorCallback(made))
    return made


def figures(trainer):
    """What was logged of normalizers, by step; no step has two such entries."""
    history = [entry for entry in trainer.state.log_history if f"learned/{LAYER}/t_b_1" in entry]
    by_step = {entry["step"]: entry for entry in history}
    assert len(by_step) == len(history)
    return by_step


def losses(trainer):
    return [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def measured(model, data):
    """The measures of one layer on all of the data at once."""
    with NormalizerRecorder(model) as recorder, torch.no_grad():
        model(input_ids=torch.stack([text["input_ids"] for text in data]))
    summary = recorder.summary()[f"{LAYER}.normalizer"]
    return {name: value for name, value in summary.items() if not name.endswith("_count")}


def assert_measured(logged, expected):
    for name, value in expected.items():
        assert logged[f"normalizers/{LAYER}/{name}"] == pytest.approx(value, rel=1e-5), name


def test_training(tmp_path):
    """Values, steps, an unchanged training, and one that goes on from a checkpoint."""
    expected = measured(tiny_gpt2(), texts())
    options = {"logging_first_step": True, "save_steps": 3, "gradient_checkpointing": True}
    watched = trainer(tmp_path / "a", tiny_gpt2(), **options)
    watched.train()
    logged = figures(watched)
    assert list(logged) == [1, 2, 4]
    assert_measured(logged[1], expected)
    assert logged[1] != logged[2]

    plain = trainer(tmp_path / "b", tiny_gpt2(), callback=False, **options)
    plain.train()
    assert hooks(watched.model) == hooks(plain.model)
    assert losses(watched) == losses(plain)
    assert [step for step, _ in losses(watched)] == [1, 2, 4]
    for ours, theirs in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert ours.equal(theirs)

    again = trainer(tmp_path / "c", tiny_gpt2(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert figures(again) == logged


def test_a_log_for_each_epoch(tmp_path):
    """Of three updates, and a last one that is not whole."""
    made = trainer(tmp_path, tiny_gpt2(), data=texts(10), logging_strategy="epoch", max_steps=7)
    made.train()
    assert list(figures(made)) == [step for step, _ in losses(made)] == [3, 6, 7]
    module = made.model.get_submodule(f"{LAYER}.normalizer")
    assert figures(made)[7][f"learned/{LAYER}/t_b_1"] == 1 - module.ts[0].double().item()


def test_an_error_leaves_no_hook(tmp_path):
    model = tiny_gpt2()
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("in the pass")

    handle = model.transformer.ln_f.register_forward_hook(fail)
    made = trainer(tmp_path, model, logging_steps=1)
    with pytest.raises(RuntimeError, match="in the pass"):
        made.train()
    handle.remove()
    assert list(figures(made)) == [1]
    assert not hooks(model)
    made.train()
    assert len(figures(made)) == 5


def test_a_model_without_a_normalizer_is_refused(tmp_path):
    made = trainer(tmp_path, build("GPT-2"))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no normalizer"):
        made.train()


class OneLayer(nn.Module):
    """Small, as it is compiled."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.normalizer = MultiMax()

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids)
        hidden = attention(x, 2 * x, 3 * x, self.normalizer)
        return {"loss": nn.functional.cross_entropy(hidden.flatten(0, 1), labels.flatten() % 8)}


def test_a_compiled_model(tmp_path):
    graphs, compiled = [], torch._dynamo.utils.counters["stats"]

    class Count(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            graphs.append(compiled["unique_graphs"])

    logs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.manual_seed(0)
        steps = {"max_steps": 4, "logging_steps": 3, "logging_first_step": True}
        made = trainer(tmp_path, OneLayer(), **steps, **options)
        made.add_callback(Count())
        made.train()
        entries = [e for e in made.state.log_history if "learned/model/t_b_1" in e]
        logs.append({(e["step"], key): value for e in entries for key, value in e.items()})
    assert {step for step, _ in logs[0]} == {1, 3}
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    *_, first, second, third, fourth = graphs
    assert first == graphs[0] < second == third == fourth  # the first is measured, not compiled


@needs_fork
def test_two_processes_log_the_measures_of_the_whole_batch(tmp_path):
    expected = measured(tiny_gpt2(), texts())

    def work():
        made = trainer(
            tmp_path,
            tiny_gpt2(),
            gradient_accumulation_steps=1,
            logging_first_step=True,
            max_steps=2,
            ddp_backend="gloo",
        )
        made.train()
        assert made.accelerator.num_processes == 2
        return figures(made), hooks(made.model)

    (first, hooks_of_first), (second, _) = in_two_processes(work)
    assert list(first) == [1, 2]
    assert_measured(first[1], expected)
    assert first == second
    assert not hooks_of_first


class ClipApart(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **given):
        clip_gradients(given["model"], 0.1)


def test_scalars_do_not_decay_and_are_clipped_apart(tmp_path):
    """A Trainer as in docs/transformers.md, next to the same updates written out."""
    model, options = tiny_gpt2(), {"weight_decay": 0.5, "lr": 0.01}
    optimizer = torch.optim.SGD(parameter_groups(model, **options), lr=0.02)
    constant = {"max_grad_norm": 0, "lr_scheduler_type": "constant", "logging_steps": 1}
    made = trainer(tmp_path, model, optimizers=(optimizer, None), max_steps=3, **constant)
    made.add_callback(ClipApart())
    made.train()

    expected = tiny_gpt2()
    scalars = [p for name, p in expected.named_parameters() if "normalizer" in name]
    ids = set(map(id, scalars))
    weights = [p for p in expected.parameters() if id(p) not in ids]
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": 0.5},
            {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
            {"params": scalars, "weight_decay": 0.0, "lr": 0.01},
        ],
        lr=0.02,
    )
    tokens = torch.stack([text["input_ids"] for text in texts()])
    for _ in range(3):
        optimizer.zero_grad()
        expected(input_ids=tokens, labels=tokens).loss.backward()
        for group in (weights, scalars):
            nn.utils.clip_grad_norm_(group, 0.1)
        optimizer.step()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def written(file, seconds=20):
    """All records of a run that has ended, whose last may come later than the end."""
    for _ in range(20 * seconds):
        found = list(records(file))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.05)
    raise AssertionError(f"{file} has no end")


def test_weights_and_biases(tmp_path, monkeypatch):
    """The Trainer reports to it, and a run of it is a logger of the monitor."""
    import wandb

    monkeypatch.chdir(tmp_path)
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # what an earlier test has started would keep its own settings
    made = trainer(tmp_path, tiny_gpt2(), report_to="wandb", max_steps=2)
    made.train()
    run = wandb.run
    with monitor(made.model, every=1, log=run):  # whose step is beyond the first
        made.model(input_ids=texts()[0]["input_ids"][None])
    run.finish()
    wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for record in written(file):
        for item in record.history.item:
            found[item.key or item.nested_key[0]] = float(item.value_json)
    (logged,) = figures(made).values()
    key = f"normalizers/{LAYER}/sparsity"
    assert found[f"train/{key}"] == pytest.approx(logged[key])
    assert 0 < found[key] < 1
    assert math.isfinite(found[f"learned/{LAYER}/t_d_2"])


def test_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, values = tiny_gpt2(), {}
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for log in (writer, lambda given, step: values.update(given)):
            with monitor(model, every=2, log=log):
                for text in texts(3):
                    model(input_ids=text["input_ids"][None])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(values)
    for name, value in values.items():
        (event,) = events.Scalars(name)
        assert event.step == 2
        assert event.value == pytest.approx(value, rel=1e-6)
