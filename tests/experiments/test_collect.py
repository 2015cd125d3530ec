"""Which runs become results, and which tables and figures are made of them."""

import json
import re
import sys

import pytest
from test_tables import result

from experiments import modulators, results, tables


def write(folder, content, name="result.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def command(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_debug_runs_are_no_results(tmp_path):
    write(tmp_path / "previous-work" / "out" / "good", result())
    named = result(overrides=("debug=two_updates", "name=mine")) | {"experiment": "mine"}
    write(tmp_path / "previous-work" / "out" / "tagged", named)
    old = result() | {"experiment": "debug"}  # before debug runs had a tag
    write(tmp_path / "previous-work" / "out" / "old", old)
    write(tmp_path / "previous-work" / "out" / "good" / "previous-1", result())
    # What lies above the folder that is given says nothing about its runs.
    copied = results.collect([tmp_path / "previous-work" / "out"], tmp_path / "runs")
    assert [path.name for path in copied] == ["good.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no .*: give folders of finished runs"), ("{", "is damaged .*: delete it")],
)
def test_collect_says_what_is_wrong(tmp_path, monkeypatch, content, said):
    if content:
        write(tmp_path / "out", content)
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        command(results, monkeypatch, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["table1", "--scale", "paper"],
            "no run at paper scale .* no table is written; python train",
        ),
        (["table3", "--scale", "paper_wiki103"], "no run at paper_wiki103 scale"),
        (["table1", "--scale", "paper_wiki103"], "its task has no scale paper_wiki103"),
        (
            ["table1", "optimizer.lr=9"],
            "table1: there is no run at small scale with these settings",
        ),
        (["--scale", "paper"], "table1: .*\ntable2: .*\ntable3: .*\ntable4: "),
    ],
)
def test_a_table_without_runs_is_not_written(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / results.RUNS, result(), "run.json")
    with pytest.raises(SystemExit, match="1"):
        command(tables, monkeypatch, *arguments)
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "results" / "tables").exists()


@pytest.mark.slow
def test_tables_with_runs_are_written_beside_those_without(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / results.RUNS, result(), "run.json")
    command(tables, monkeypatch)
    names = sorted(path.name for path in (tmp_path / "results" / "tables").iterdir())
    assert names == [
        f"{name}_small{suffix}"
        for name in ("table1", "table2")
        for suffix in (".csv", ".md", ".tex")
    ]
    assert "table3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: Could not override 'nonsense'"):
        command(tables, monkeypatch, "table1", "nonsense=3")


@pytest.mark.slow
def test_a_length_in_a_table_needs_no_null(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ("trainer.updates=20", "trainer.epochs=null")
    write(tmp_path / results.RUNS, result(overrides=overrides), "run.json")
    command(tables, monkeypatch, "table1", "trainer.updates=20")
    assert (tmp_path / "results" / "tables" / "table1_small.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "metrics", "title"),
    [
        ("deit_multimax", {"top1": 86.6, "loss": 1.0}, "test top1 86.6 (n = 2,000)"),
        ("lm_multimax", {"perplexity": 128.36, "loss": 4.8}, "test perplexity 128.4 (n = 2,000)"),
        ("mt_multimax", {"bleu": 22.21, "perplexity": 8.0}, "test bleu 22.21 (n = 2,000)"),
        ("mt_multimax", {"smoothed_perplexity": 8.0}, "test smoothed_perplexity 8 (n = 2,000)"),
        ("lm_multimax", {"loss": 8.0}, "test loss 8 (n = 2,000)"),
    ],
)
def test_modulators_of_every_task(tmp_path, experiment, metrics, title):
    run = result(experiment)
    run["metrics"]["test"] = metrics | {"examples": 2000}
    write(tmp_path, run)
    lines = [{"update": 1, "train/loss": None}, {"update": 2, "valid/loss": 1.5}]
    write(tmp_path, "".join(json.dumps(line) + "\n" for line in lines), "metrics.jsonl")
    assert modulators._title(run) == f"{experiment}, small scale, seed 0: {title}"
    assert modulators.draw(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_modulators_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .*result\.json does not exist"):
        command(modulators, monkeypatch, tmp_path)


def test_help_names_every_scale(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        command(tables, monkeypatch, "--help")
    assert "{paper,paper_wiki103,small}" in capsys.readouterr().out
