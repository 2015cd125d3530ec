import csv
import itertools
import json
import resource
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from benchmarks import (
    attention,
    deit_step,
    gpu,
    gpu_workloads,
    memory,
    monitoring,
    normalizers,
    output_layer,
    report,
    training,
)
from benchmarks.timing import Workload, quantiles, settle_allocator, time_phases

pytestmark = pytest.mark.slow

SHARED = {"dtype", "threads", "device", "torch", "timm", "entmax", "compiler", "commit"}
TIMES = {f"{phase}{part}_ms" for phase in ("forward", "step") for part in ("", "_p20", "_p80")}
SMALL = {
    attention: {"tokens": 6, "batch": 2, "causal": True},
    deit_step: {"batch": 2, "image_size": 32, "depth": 1, "compiled": False},
    monitoring: {"model": "language"},
    normalizers: {"shape": "3x2x12"},
    output_layer: {"vocabulary": 30, "tokens": 5},
}
COMMANDS = [
    (attention, ["--tokens", "4", "--causal"], "attention_causal", {"tokens", "batch"}),
    (attention, ["--tokens", "4", "--dtype", "bfloat16"], "attention_bf16", {"tokens", "batch"}),
    (deit_step, ["--batch", "1", "--image-size", "32", "--depth", "1"], "deit_step", {"depth"}),
    (normalizers, ["--shapes", "2x8", "4x4"], "normalizers", {"shape", "activation_scores"}),
    (output_layer, ["--vocabularies", "9", "16", "--tokens", "2"], "output_layer", {"vocabulary"}),
]
EQUAL = [
    (attention, ["SDPA", "SoftMax", "SoftMax, eager"]),
    (attention, [name for name in attention.PROVIDERS if name.startswith("MultiMax")]),
    (deit_step, ["timm", "SoftMax"]),
    (deit_step, [n for n in deit_step.PROVIDERS if n.startswith("MultiMax") and "also" not in n]),
    (monitoring, list(monitoring.PROVIDERS)),
    (normalizers, ["torch.softmax", "SoftMax"]),
    (normalizers, [name for name in normalizers.PROVIDERS if name.startswith("MultiMax")]),
    (normalizers, [name for name in normalizers.PROVIDERS if "sparsemax" in name]),
    (normalizers, [name for name in normalizers.PROVIDERS if "1.5-entmax" in name]),
    (output_layer, [*output_layer.PROVIDERS[:-7], "SoftMax"]),
    (output_layer, ["MultiMax", "MultiMax, eager"]),
    (output_layer, ["sparsemax", "sparsemax, eager"]),
    (output_layer, ["1.5-entmax", "1.5-entmax, eager"]),
]


@pytest.fixture
def small(monkeypatch):
    """Small batches, and numbers in the place of memory measured in processes of their own."""

    def measure(module, provider, options, warmup, threads):
        return {"activation_mib": 2.0, "peak_mib": 3.0}

    monkeypatch.setattr(report, "measure_memory", measure)
    monkeypatch.setattr(attention, "SCORES", 200)


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(("module", "command", "name", "columns"), COMMANDS)
def test_command_writes_csv_and_figure(module, command, name, columns, tmp_path, small):
    common = ["--rounds", "2", "--threads", "1", "--results", str(tmp_path)]
    module.main([*command, *common])
    rows = read(tmp_path / "benchmarks" / f"{name}.csv")
    assert set(rows[0]) >= SHARED | TIMES | columns | {"provider", "rounds", "peak_mib"}
    assert {row["provider"] for row in rows} == set(module.PROVIDERS)
    assert all(float(row["step_ms"]) > 0 and row["rounds"] == "2" for row in rows)
    assert float(rows[0]["step_ratio"]) == 1
    assert (tmp_path / "figures" / f"benchmark_{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("module", "command"),
    [
        (attention, ["--tokens", "4", "6"]),
        (normalizers, ["--shapes", "2x8", "4x4"]),
        (output_layer, ["--vocabularies", "9", "16"]),
    ],
)
def test_a_shape_that_is_cut_costs_none_of_those_before_it(module, command, tmp_path, monkeypatch):
    measured = []

    def measure(_, options, *__, **___):
        if measured:
            raise KeyboardInterrupt
        measured.append(options)
        times = {"forward_ms": 1.0, "backward_ms": 1.0, "step_ms": 2.0, "step_ratio": 1.0}
        return [{**options, "provider": name, **times} for name in module.PROVIDERS]

    monkeypatch.setattr(module, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        module.main([*command, "--results", str(tmp_path)])
    name = module.__name__.rsplit(".")[-1]
    assert len(read(tmp_path / "benchmarks" / f"{name}.csv")) == len(module.PROVIDERS)
    assert (tmp_path / "figures" / f"benchmark_{name}.png").stat().st_size > 10_000


def test_steps_of_attention_beside_the_plain_form(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "STEP_SHAPES", ((1, 2, 5),))
    attention.main(["--steps", "--rounds", "2", "--results", str(tmp_path)])
    rows = {row["provider"]: row for row in read(tmp_path / "benchmarks" / "attention_steps.csv")}
    assert len(rows) == 4 * len(attention.STEPS)
    assert float(rows["MultiMax"]["plain_ratio"]) == 1
    time = {name: float(row["step_ms"]) for name, row in rows.items()}
    cap = rows["MultiMax + cap"]
    assert float(cap["plain_ratio"]) == pytest.approx(time["MultiMax + cap"] / time["MultiMax"])
    eager = time["MultiMax + cap, eager"]
    assert float(cap["eager_ratio"]) == pytest.approx(time["MultiMax + cap"] / eager)
    for names in ({name, f"{name}, eager"} for name in rows if "eager" not in name):
        made = attention.workloads(sorted(names), 5, 1, False).values()
        torch.testing.assert_close(*map(first_step, made), rtol=1e-5, atol=1e-6)


def test_the_monitor_of_every_hundredth_step(tmp_path, small):
    common = ["--rounds", "3", "--results", str(tmp_path)]
    monitoring.main(["--models", "language", *common])
    rows = read(tmp_path / "benchmarks" / "monitoring.csv")
    none, counted, measured = (float(row["step_ms"]) for row in rows)
    expected = (99 * counted + measured) / 100 / none
    assert float(rows[-1]["every_100_ratio"]) == pytest.approx(expected)


@pytest.mark.parametrize(("module", "names"), EQUAL)
def test_providers_compute_the_same(module, names):
    made = module.workloads(names, **SMALL[module])
    results = {name: first_step(workload) for name, workload in made.items()}
    assert len(names) > 1
    for first, second in itertools.pairwise(results.values()):
        shared = min(len(first), len(second))
        assert shared >= 2
        torch.testing.assert_close(first[:shared], second[:shared], rtol=1e-5, atol=1e-6)
        for tensor in first[shared:] + second[shared:]:  # of a modulator that only one has
            assert tensor.shape == (4,)


GPU_SHAPES = {
    "attention": (["--tokens", "8", "16", "--queries", "16", "--causal"], "gpu_attention_causal"),
    "output": (["--vocabularies", "9", "20", "--rows", "4"], "gpu_output"),
    "deit": (["--batch", "1", "--image-size", "32", "--depth", "1"], "gpu_deit"),
}


@pytest.mark.parametrize("what", GPU_SHAPES)
def test_the_benchmark_of_a_gpu_runs_on_the_host(what, tmp_path, capsys):
    """All but the providers that a compiler must make, and one that torch refuses there."""
    options, name = GPU_SHAPES[what]
    providers = {"attention": gpu.ATTENTION, "output": gpu.OUTPUT, "deit": gpu.DEIT}[what]
    named = [provider for provider in providers if not provider.endswith("compiled")]
    common = ["--device", "cpu", "--rounds", "2", "--results", str(tmp_path), "--providers", *named]
    gpu.main([what, *options, *common])
    rows = read(tmp_path / "benchmarks" / f"{name}.csv")
    assert [row["provider"] for row in rows] == named * (len(rows) // len(named))
    for row in rows:
        flex = row["provider"].startswith("FlexAttention")
        assert ("backward on CPU" in row["failed"]) == flex
        assert row["rounds"] == ("0" if flex else "2")
        assert flex or float(row["step_ms"]) >= float(row["forward_ms"]) > 0
    assert ("FlexAttention, SoftMax: NotImpl" in capsys.readouterr().out) == (what == "attention")


def test_without_a_gpu_its_benchmark_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["output"])
    assert "no CUDA device is available; --device cpu" in capsys.readouterr().err


def test_providers_on_a_gpu_compute_the_same():
    names = ["MultiMax", "MultiMax, eager", "MultiMax, official"]
    made = [gpu_workloads.attention_workload(name, 16, 2, True, "cpu") for name in names]
    for workload in made[1:]:  # with the modulator of the first
        for own, first in zip(workload.leaves[3:], made[0].leaves[3:], strict=True):
            own.data.copy_(first)
    first, *others = [first_step(workload) for workload in made]
    for other in others:
        for found, expected in zip(other, first, strict=True):
            assert torch.dist(found, expected) < 0.05 * expected.norm()  # the official's are bf16


def first_step(workload: Workload) -> list[Tensor]:
    """The result and all gradients, sorted by shape; those of the modulator come last."""
    workload.drop_gradients()
    forward, backward = (workload.phases[name] for name in ("forward", "backward"))
    out = forward(None)
    backward(out)
    grads = [leaf.grad.clone() for leaf in workload.leaves if leaf.grad is not None]
    return [out.detach(), *sorted(grads, key=lambda grad: (grad.shape == (4,), grad.shape))]


def test_memory_of_attention_is_that_of_its_scores():
    options = {"tokens": 256, "batch": 1, "causal": False}
    warmup = {"tokens": 4, "batch": 1, "causal": False}
    scores = attention.HEADS * 256**2 * 4 / 2**20
    found = memory.measure_memory("benchmarks.attention", "SoftMax, eager", options, warmup, 1)
    assert found is not None
    assert scores <= found["activation_mib"] < 3 * scores
    assert found["activation_mib"] < found["peak_mib"] < 10 * scores


def test_activations_are_what_is_held_after_the_forward_pass():
    x = torch.randn(1000, requires_grad=True)
    assert memory.activation_bytes(lambda: x.exp(), [x]) == 4000
    assert memory.activation_bytes(lambda: x * x, [x]) == 0

    def forgets():
        torch.autograd.grad(x.exp().sum(), x)
        return x.sum()

    assert memory.activation_bytes(forgets, [x]) == 0


def test_out_of_memory_leaves_the_numbers_empty(monkeypatch, tmp_path):
    def measure(module, provider, *_):
        return None if "eager" in provider else {"activation_mib": 2.0, "peak_mib": 3.0}

    monkeypatch.setattr(report, "measure_memory", measure)
    names = ["MultiMax", "MultiMax, eager"]
    output_layer.main(
        ["--vocabularies", "9", "--tokens", "2", "--results", str(tmp_path), "--providers", *names]
    )
    fits, lacks = read(tmp_path / "benchmarks" / "output_layer.csv")
    assert fits["step_ms"]
    assert lacks["rounds"] == "0"
    assert lacks["step_ms"] == lacks["peak_mib"] == ""


def test_rounds_are_interleaved_and_bounded():
    order: list[str] = []

    def provider(name):
        return Workload({"forward": lambda _: order.append(name)}, [])

    made = {name: provider(name) for name in "abc"}
    times = time_phases(made, rounds=9, seconds=0, warmup=0)
    assert "".join(order) == "abcbcacab"
    assert {len(phases["step"]) for phases in times.values()} == {3}


def test_inference_is_no_part_of_the_step():
    phases = {"forward": lambda _: 1, "backward": lambda value: value, "inference": lambda _: 2}
    times = time_phases({"a": Workload(phases, [])}, rounds=3, seconds=0)["a"]
    assert len(times["step"]) == len(times["inference"]) == 3
    for forward, backward, step in zip(
        times["forward"], times["backward"], times["step"], strict=True
    ):
        assert step == forward + backward


def test_quantiles_are_in_milliseconds():
    columns = quantiles({"step": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
    expected = {"step_ms": 3500, "step_p20_ms": 2000, "step_p80_ms": 5000}
    assert columns == pytest.approx(expected)


TRAIN = """
import json, pathlib, subprocess, sys
options = dict(argument.split("=") for argument in sys.argv[1:])
commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
result = {"commit": commit, "training_seconds": SECONDS, "peak_memory_mib": {"host": 100.0}}
folder = pathlib.Path(options["output_dir"]) / options["experiment"]
folder.mkdir()
(folder / "result.json").write_text(json.dumps(result))
"""


def test_training_compares_the_working_tree_with_a_commit(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    script = repository / "train.py"
    subprocess.run([*git, "init", "-q"], check=True)
    script.write_text(TRAIN.replace("SECONDS", "4.0"))
    subprocess.run([*git, "add", "train.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "slow"], check=True)
    script.write_text(TRAIN.replace("SECONDS", "1.0"))

    options = ["--updates", "3", "--rounds", "2", "--results", str(tmp_path)]
    training.main(["--commit", "HEAD", "--experiment", "lm", "mt", *options])
    rows = read(tmp_path / "benchmarks" / "training.csv")
    assert [row["experiment"] for row in rows] == ["lm", "lm", "mt", "mt"]
    assert [float(row["step_ratio"]) for row in rows] == [1, 0.25, 1, 0.25]
    assert set(rows[0]) >= SHARED | {"updates", "peak_mib", "peak_ratio", "step_p20_ms"}
    assert (tmp_path / "figures" / "benchmark_training.png").exists()
    trees = subprocess.check_output(["git", "worktree", "list"], text=True)
    assert len(trees.splitlines()) == 1


def test_memory_command_prints_json(capsys, monkeypatch):
    monkeypatch.setattr(memory, "limit_to_free_memory", lambda: None)
    task = {"provider": "torch.softmax", "options": {"shape": "4x8"}, "warmup": None, "threads": 1}
    memory.main(["benchmarks.normalizers", json.dumps(task)])
    assert json.loads(capsys.readouterr().out)["activation_mib"] == 4 * 8 * 4 / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of glibc")
def test_freed_memory_is_used_again():
    settle_allocator()
    pages = []
    for _ in range(20):  # until all of the heap has been touched
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB: 16,384 pages
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert max(pages[-3:]) < 1000
