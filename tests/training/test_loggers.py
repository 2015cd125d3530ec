import io
import json
import logging
import re
import socket
import sys
import time
import types

import pytest
from offline_wandb import records
from rich.console import Console
from tiny import Regression, build_trainer, interrupted, only, run_quietly, tiny_config

from multimax.training.loggers import JsonLinesLogger, ProgressDisplay, WandbLogger
from multimax.training.result import offline_run
from multimax.training.run import run


def break_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)


class FakeRun:
    def __init__(self, broken):
        self.broken, self.summary, self.calls = broken, {}, []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, *arguments))
            if name == self.broken:
                raise RuntimeError(f"{name} is broken\nsecond line")

        return call


def fake_wandb(monkeypatch, broken):
    """A module `wandb` of which one call fails."""
    run = FakeRun(broken)

    def init(**options):
        run.options = options
        if broken == "init":
            raise TimeoutError("init is broken")
        return run

    module = types.SimpleNamespace(
        init=init,
        Settings=lambda **_: None,
        login=lambda **_: broken == "nothing",
        errors=types.SimpleNamespace(CommError=ConnectionError),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["import", "init", "log", "finish"])
def test_broken_wandb_costs_no_run_and_is_said_once(tmp_path, monkeypatch, caplog, broken):
    if broken == "import":
        break_import(monkeypatch)
    else:
        fake = fake_wandb(monkeypatch, broken)
    result = run_quietly(tiny_config(tmp_path, "logger.wandb=online"))
    assert result["updates"] == 4
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    (said,) = [warning for warning in warnings if "Weights & Biases" in warning]
    assert "off for this run" in said
    assert "logger.wandb=disabled" in said
    if broken != "import":
        assert f"{broken} is broken)" in said
        names = [name for name, *_ in fake.calls]
        assert names.count(broken) == (broken != "init")


@pytest.mark.slow
def test_what_wandb_gets(tmp_path, monkeypatch, caplog):
    fake = fake_wandb(monkeypatch, "nothing")
    config = tiny_config(tmp_path, "logger.wandb=auto", "group=table1", "tags=[table1,cell]")
    result = run_quietly(config)
    folder = only(tmp_path, "result.json").parent
    options = fake.options
    assert (options["project"], options["mode"]) == ("multimax", "online")
    assert (options["group"], options["name"]) == ("table1", folder.name)
    assert (options["tags"], options["dir"]) == (["table1", "cell"], folder)
    assert options["config"] == result["config"]
    assert options["id"] == (folder / "wandb_id").read_text()
    logged = [metrics for name, metrics in (c for c in fake.calls if len(c) == 2) if name == "log"]
    assert logged == [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert fake.summary["test/top1"] == result["metrics"]["test"]["top1"]
    ts, ranges = (
        result["learned_scalars"][f"blocks.0.attn.normalizer.{n}"] for n in ("ts", "ranges")
    )
    learned = {
        name: fake.summary[f"learned/blocks.0.attn/{name}"] for name in ("t_b_2", "t_d_1", "d_2")
    }
    assert learned == {"t_b_2": 1 - ts[2], "t_d_1": 1 + ts[1], "d_2": ranges[3]}
    for measure in ("sparsity", "uniform_sparsity", "multi_modality"):
        row = result["normalizers"]["blocks.0.attn.normalizer"]
        assert fake.summary[f"normalizers/blocks.0.attn/{measure}"] == row[measure]
        assert f"normalizers/output/{measure}" in fake.summary
    assert fake.calls[0] == ("define_metric", "*")
    assert fake.calls[-1] == ("finish",)
    assert not caplog.records


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, "online"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ("online", {}, "online"),
        ("offline", {"WANDB_API_KEY": "x"}, "offline"),
    ],
)
def test_wandb_mode(tmp_path, monkeypatch, mode, environment, expected):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fake = fake_wandb(monkeypatch, None)
    WandbLogger(mode, tmp_path, {})
    assert fake.options["mode"] == expected


def test_disabled_wandb_is_not_touched(tmp_path, monkeypatch, caplog):
    break_import(monkeypatch)
    logger = WandbLogger("disabled", tmp_path, {})
    logger.log(1, {"train/loss": 1.0})
    logger.finish({"test/top1": 1.0})
    assert not caplog.records


def test_a_run_that_fails_is_closed(tmp_path, monkeypatch):
    fake = fake_wandb(monkeypatch, None)
    logger = WandbLogger("online", tmp_path, {})
    logger.abort()
    logger.abort()
    logger.log(1, {"train/loss": 1.0})
    assert [name for name, *_ in fake.calls] == ["define_metric", "finish"]


@pytest.fixture
def wandb_folders(tmp_path, monkeypatch):
    """What W&B writes beside the run folder goes to a folder of the test."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def logged(record):
    """The metrics in a file of W&B, once its process has written the last figure."""
    deadline = time.monotonic() + 60
    while b"test/top1" not in record.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.2)
    histories = [r.history for r in records(record) if r.WhichOneof("record_type") == "history"]
    entries = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in h.item}
        for h in histories
    ]
    return [{k: v for k, v in entry.items() if not k.startswith("_")} for entry in entries]


@pytest.mark.slow
def test_an_interrupted_run_is_whole_in_its_last_mirror(wandb_folders, tmp_path, monkeypatch):
    interrupted(tiny_config(tmp_path, "logger.wandb=offline"), monkeypatch, 3)
    first = offline_run(only(tmp_path, "last.pt").parent)
    time.sleep(1.1)  # W&B names its folders by the second
    run_quietly(tiny_config(tmp_path, "logger.wandb=offline"))
    folder = only(tmp_path, "result.json").parent
    last = offline_run(folder)
    assert last != first
    (record,) = last.glob("run-*.wandb")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [entry["update"] for entry in lines] == [1, 2, 2, 3, 4, 4]
    assert logged(record) == lines


@pytest.mark.slow
def test_without_an_answer_the_mirror_is_offline(wandb_folders, tmp_path, monkeypatch, caplog):
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections, and says nothing
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setattr("multimax.training.loggers.SECONDS_FOR_WANDB", 2.0)
    with silent:
        run_quietly(tiny_config(tmp_path, "logger.wandb=online", "trainer.updates=2"))
    folder = only(tmp_path, "result.json").parent
    (record,) = offline_run(folder).glob("run-*.wandb")
    assert [entry["update"] for entry in logged(record)] == [1, 2, 2]
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("multimax")]
    assert "does not answer" in said
    assert "this run is mirrored offline" in said


@pytest.mark.slow
def test_real_wandb_offline(wandb_folders, tmp_path, caplog):
    said = io.StringIO()
    run(tiny_config(tmp_path, "logger.wandb=offline", "trainer.updates=2"), Console(file=said))
    folder = only(tmp_path, "result.json").parent
    (record,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert (folder / "wandb_id").read_text() in record.name
    assert logged(record)
    assert f"to upload it, log in and type\n  wandb sync {record.parent}\n" in said.getvalue()
    assert offline_run(folder) == record.parent
    record.with_suffix(".wandb.synced").touch()
    assert offline_run(folder) is None
    assert not [r for r in caplog.records if r.name.startswith("multimax")]


def test_json_lines(tmp_path):
    logger = JsonLinesLogger(tmp_path / "metrics.jsonl")
    logger.resume(0)
    for update in (1, 2, 3):
        logger.log(update, {"train/loss": 1 / update, "train/gradient_norm": float("inf")})
    logger.resume(2)
    logger.log(3, {"valid/top1": 9.0})
    logger.finish({})
    expected = [{"update": u, "train/loss": 1 / u, "train/gradient_norm": None} for u in (1, 2)]
    lines = [json.loads(line) for line in logger.path.read_text().splitlines()]
    assert lines == [*expected, {"update": 3, "valid/top1": 9.0}]
    logger.resume(0)
    assert logger.path.read_text() == ""


def display_of(terminal, every=0.0):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with ProgressDisplay(console, "images", every=every) as display:
        display.start_at(10, 40)
        for update in (11, 12):
            display.show(update, 2, 0.5, 1e-3, 1234.0)
        display.print("after update 12: valid  top1 9")
        display.show(40, 3, 0.25, 1e-5, 1234.0)
    return console.file.getvalue()


def test_plain_lines_without_a_terminal():
    lines = display_of(terminal=False).splitlines()
    expected = r"epoch 3  update 11/40  loss 0\.5000  1,234 images/s  lr 1\.00e-03  \d+ s left"
    assert re.fullmatch(expected, lines[0])
    assert lines[2] == "after update 12: valid  top1 9"
    assert lines[3].startswith("epoch 4  update 40/40  loss 0.2500")
    assert lines[3].endswith(" 0 s left")
    assert len(lines) == 4
    assert "\x1b" not in "".join(lines)


def test_plain_lines_are_not_too_many():
    assert display_of(terminal=False, every=60.0) == "after update 12: valid  top1 9\n"


def test_bar_on_a_terminal():
    output = display_of(terminal=True)
    assert "━" in output
    assert "40/40" in output
    assert "epoch 4" in output
    assert "loss 0.2500  1,234 images/s" in output
    assert "after update 12: valid  top1 9" in output
    assert "s left" not in output


class Display:
    """Keeps what it is to show."""

    def __init__(self):
        self.shown = []

    def __enter__(self):
        self.shown.append("on")

    def __exit__(self, *error):
        self.shown.append("off")

    def __getattr__(self, name):
        return lambda *values: self.shown.append((name, *values))


def test_each_update_and_each_evaluation_is_shown(tmp_path):
    trainer = build_trainer(tmp_path, Regression((5, 3)))
    trainer.display = Display()
    trainer.fit(stop_after=2)
    trainer.fit()
    log = trainer.loggers[0]
    series = [log.series(f"train/{name}") for name in ("loss", "learning_rate", "rate")]
    updates = [
        ("show", update, (update - 1) // 2, *values)
        for update, *values in zip((1, 2, 3, 4), *series, strict=True)
    ]
    lines = [
        ("print", f"after update {update}: valid  loss {loss:.4g}")
        for update, loss in zip((2, 4), log.series("valid/loss"), strict=True)
    ]
    assert trainer.display.shown == [
        "on", ("start_at", 0, 4), *updates[:2], lines[0], "off",
        "on", ("start_at", 2, 4), *updates[2:], lines[1], "off",
    ]  # fmt: skip
