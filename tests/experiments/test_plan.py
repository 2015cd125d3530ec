"""The plan of a study and of a run: what is finished and missing, hours, totals and files."""

import csv
import sys

import pytest

from experiments import plan
from experiments.cost import Cost
from experiments.plan import PEAKS, Row, main, markdown, plan_study, total
from experiments.selection import Run, settings_of, study_of

COST = Cost(22_036_176, 10**15, 4 * 2**30, 2**31, None, 1024, 1000)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line without recorded results; returns what it printed."""
    monkeypatch.setattr(plan, "load", dict)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plan", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


def test_seeds_that_are_recorded_are_finished_and_the_others_missing(monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "cost_of", lambda config, n: seen.append((config, n)) or COST)
    cell = study_of("ablation").settings("shared")
    runs = [Run(settings_of(*cell), seed, {}, "") for seed in (1, 7)]
    rows = plan_study("ablation", "small", runs, [], 4)
    by_cell = {row.cell: row for row in rows}
    assert list(by_cell) == list(study_of("ablation").cells)
    assert (by_cell["shared"].finished, by_cell["shared"].missing) == ((1,), (0, 2))
    assert (by_cell["decay"].finished, by_cell["decay"].missing) == ((), (0, 1, 2))
    assert {n for _, n in seen} == {4}
    assert [config.attention.order for config, _ in seen][:3] == [2, 1, 3]


def test_hours_and_totals():
    half = Row("s", "a", COST, "bf16", (0, 1), (2,))
    single = Row("s", "b", COST, "no", (), (0,))
    seconds = 10**15 * 1000 / 312e12 / 0.5
    assert half.hours("A100", 0.5) == pytest.approx(seconds / 3600)
    assert half.hours("H100", 0.5) == pytest.approx(seconds / 3600 * 312 / 989)
    assert single.hours("A100", 0.5) == pytest.approx(seconds / 3600 * 312 / 19.5)
    said = total([half, single], 1e-3)
    everything, rest = ((n * 312 + 312**2 / 19.5) * seconds / 312 / 3600 * 500 for n in (3, 1))
    assert said.startswith(
        "2 cells, 4 runs, 2 finished and 2 missing; "
        f"{everything:,.0f} A100-hours, {rest:,.0f} of them missing; "
    )
    text = markdown([half, single], 0.5, 4)
    assert "| a | 22.0 M | 1.00 P | 4.00 | 2.00 |  | 1.02 M | 1,000 | 1.8 | 0.56 | 2 | 1 |" in text
    assert set(PEAKS["A100"]) == {"no", "bf16", "fp16"}


def test_a_run_is_planned_without_data_and_written(command, tmp_path):
    files = "--csv", tmp_path / "plan.csv", "--markdown", tmp_path / "plan.md"
    said = command(
        "experiment=deit_softmax",
        "model.depth=1",
        "trainer.updates=7",
        "--utilization",
        "0.5",
        *files,
    )
    assert "1 cells, 1 runs, 0 finished and 1 missing" in said
    assert "50% of the dense peak" in " ".join(said.split())
    (line,) = csv.DictReader((tmp_path / "plan.csv").open())
    assert (line["cell"], line["updates"], line["units"]) == ("deit_softmax", "7", "50")
    assert float(line["H100_hours"]) == pytest.approx(
        int(line["flops"]) * 7 / 67e12 / 0.5 / 3600, rel=1e-9
    )
    assert "| deit_softmax | 82.0 k |" in (tmp_path / "plan.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "error: unknown study 'table9'"),
        (["study=table2", "experiment=deit_softmax"], "error: experiment= is one run"),
        (["experiment=deit_softmax", "scale=huge"], "error: scale=huge must be one of paper"),
        (["experiment=deit_softmax", "data=timm"], "trainer.updates="),
        (
            ["experiment=lm_softmax", "trainer.epochs=2", "schedule.warmup=0"],
            "how many tokens there are to train on",
        ),
    ],
)
def test_what_cannot_be_planned_is_said(command, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert message in str(stop.value)
