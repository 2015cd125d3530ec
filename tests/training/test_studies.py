"""Studies: what their files say, which runs they make, and how launchers run them."""

import json
import os
import re
import stat
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib import import_module

import pytest
from hydra import compose, initialize_config_dir
from joblib.externals.loky import get_reusable_executor
from tiny import ROOT

from experiments.selection import differences
from multimax.training.config import hashed_settings, read_config
from multimax.training.studies import read_study

STUDIES = sorted(path.stem for path in (ROOT / "configs" / "study").glob("*.yaml"))
SMALL = [
    "debug=two_updates", "model.depth=1", "model.embed_dim=16", "model.num_heads=2",
    "trainer.batch_size=20", "trainer.eval_batch_size=1000",
]  # fmt: skip


@cache
def composed(*overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def study(name):
    return read_study(composed(f"study={name}").study)


def example(**changes):
    cells = {"a": {"row": ["A"], "settings": ["attention=topk"], "seeds": 3},
             "b": {"row": ["B"], "settings": []}}  # fmt: skip
    return {"name": "s", "title": "S", "base": ["task=translation"], "seeds": 2, "row": ["cell"],
            "columns": {"BLEU": "test/bleu"}, "digits": 2, "unit": "sentences",
            "baseline": "a", "cells": cells} | changes  # fmt: skip


def test_jobs_go_seed_by_seed_and_say_where_they_belong():
    jobs = read_study(example()).jobs()
    assert [(job[-2], job[-1]) for job in jobs] == [
        ("tags=[s,a]", "seed=0"), ("tags=[s,b]", "seed=0"), ("tags=[s,a]", "seed=1"),
        ("tags=[s,b]", "seed=1"), ("tags=[s,a]", "seed=2"),
    ]  # fmt: skip
    assert jobs[0][:3] == ["task=translation", "attention=topk", "group=s"]


def test_a_part_of_the_jobs():
    jobs = read_study(example()).jobs(["b"], ["10", "9"], ["optimizer.lr=1", "debug=two_updates"])
    assert [job[-3:] for job in jobs] == [
        [f"seed={seed}", "optimizer.lr=1", "debug=two_updates"] for seed in (9, 10)
    ]
    assert jobs[0][-4] == "tags=[s,b,debug]"  # so that it does not count as a result


def tuned(**changes):
    cells = {
        "a": {
            "row": ["A"],
            "settings": ["attention=topk"],
            "tuning": [["attention.k=2"], ["attention.k=4"]],
            "chosen": 1,
        },
        "b": {"row": ["B"], "settings": [], "tuning": [["optimizer.lr=1"], ["optimizer.lr=2"]]},
    }
    tuning = {"seeds": [9, 8], "figure": "valid/bleu", "lower": False, "settings": ["x=3"]}
    return example(cells=cells, tuning=tuning) | changes  # fmt: skip


def test_settings_to_choose_from_are_run_with_seeds_of_their_own():
    jobs = read_study(tuned()).jobs(tuning=True)
    assert [(job[1:-3], job[-2], job[-1]) for job in jobs] == [
        ([*cell, *tried, "x=3"], f"tags=[s,{name},tuning]", f"seed={seed}")
        for seed in (8, 9)
        for name, cell, tries in (
            ("a", ["attention=topk"], (["attention.k=2"], ["attention.k=4"])),
            ("b", [], (["optimizer.lr=1"], ["optimizer.lr=2"])),
        )
        for tried in tries
    ]


def test_chosen_settings_are_those_of_the_cell():
    of = read_study(tuned())
    assert of.jobs(["a"])[0][:3] == ["task=translation", "attention=topk", "attention.k=4"]
    with pytest.raises(ValueError, match=r"settings of cell b are not chosen: run -m study=s tun"):
        of.jobs()
    with pytest.raises(ValueError, match="study s has nothing to choose"):
        read_study(example()).jobs(tuning=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": None}, r"cell a: study\.tuning and the tuning of cells need each other"),
        ({"seeds": 10}, r"study\.tuning\.seeds: 8 is a seed of the study too"),
        ({"cells": {"a": {"row": ["A"], "settings": [], "tuning": [["x=1"]], "chosen": 1}}},
         r"cell a: chosen=1 must be less than 1"),
        ({"cells": tuned()["cells"] | {"c": {"row": ["C"], "settings": [], "tuning": [["x=1"]]}}},
         r"cells have \[1, 2\] settings to try"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_tuning_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read_study(tuned(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "c"}, r"unknown cell 'c'; known: a, b"),
        ({"row": ["x", "y"]}, r"cell a has the row \['A'\]: it must have a text for each of x, y"),
        ({"seeds": 0}, r"study\.seeds=0 must be"),
        ({"tilte": "S"}, r"there is no setting study\.tilte"),
        ({"base": ["translation"]}, r"study\.base"),
    ],
)
def test_what_is_wrong_with_a_study_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read_study(example(**changes))


@pytest.mark.parametrize(
    ("part", "message"),
    [((["c"],), "unknown cell 'c'"), ((None, ["x"]), "seed=x must be a whole number")],
)
def test_a_part_that_is_not_there_is_named(part, message):
    with pytest.raises(ValueError, match=message):
        read_study(example()).jobs(*part)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_each_cell_is_another_configuration_of_one_recipe(name):
    of = study(name)
    settings = {
        cell: hashed_settings(read_config(composed(*of.settings(cell)))) for cell in of.cells
    }
    texts = Counter(json.dumps(content, sort_keys=True) for content in settings.values())
    assert set(texts.values()) == {1}
    for content in settings.values():  # the scalars' own decay is no part of the recipe
        content["optimizer"].pop("decay_scalars", None)
        if of.tuning:
            for setting in ("lr", "scalars_lr_scale"):
                content["optimizer"].pop(setting, None)
    recipes = [
        {key: content[key] for key in ("task", "data", "trainer", "optimizer", "schedule")}
        | {"loss": content.get("loss")}
        for content in settings.values()
    ]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert len({tuple(cell.row) for cell in of.cells.values()}) == len(of.cells)


@pytest.mark.slow
def test_the_ablation_changes_one_thing_and_shares_runs_with_table_2():
    def settings(name):
        of = study(name)
        return {c: hashed_settings(read_config(composed(*of.settings(c)))) for c in of.cells}

    ablation, table2 = settings("ablation"), settings("table2")
    base = ablation.pop("multimax2-both")
    assert base == table2["multimax2-both"]
    assert ablation["multimax1-both"] == table2["multimax1-both"]
    both = {"order": ["attention.order", "output.order"], "init": ["attention.init", "output.init"]}
    assert {cell: sorted(differences(content, base)) for cell, content in ablation.items()} == {
        "multimax1-both": both["order"], "multimax3-both": both["order"], "identity": both["init"],
        "decay": ["optimizer.decay_scalars"], "before-scale": ["attention.before_scale"],
        "shared": ["attention.shared"],
    }  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_begins_with_its_title_and_command(name):
    lines = (ROOT / "configs" / "study" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].endswith(study(name).title)
    assert lines[2] == f"# python train.py -m study={name}"
    runs = sum(cell.seeds or study(name).seeds for cell in study(name).cells.values())
    assert lines[3].startswith(f"# small scale: {runs} runs of ")
    assert study(name).name == name


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "workstation"])
def test_only_what_is_missing_is_run(train, tmp_path, launcher):
    def sweep(*arguments):
        code, *said = train("-m", *SMALL, f"output_dir={tmp_path}", "study=table2", "seed=0",
                            *arguments)  # fmt: skip
        return code, "".join(said)

    code, said = sweep("cells=softmax")
    assert (code, "sweep of 1 jobs: 1 finished\n" in said) == (0, True), said
    result = json.loads(next(tmp_path.glob("small/deit/*/result.json")).read_text())
    assert result["config"]["group"] == "table2"
    assert result["config"]["tags"] == ["table2", "softmax", "debug"]
    launched = f"hydra/launcher={launcher}"
    code, said = sweep("cells=softmax,topk-both", "optimizer.lr=1e-3,1e30", launched)
    if launcher == "workstation":
        get_reusable_executor().shutdown(wait=True)  # the workers, which wait for more
    assert code == 1
    (counts,) = re.findall("sweep of 4 jobs: (.*)", said)
    assert set(counts.split(", ")) == {"1 finished before", "1 finished", "2 failed"}, said
    assert "Lower optimizer.lr" in said


@pytest.mark.slow
def test_what_is_recorded_can_be_left_out(train, tmp_path):
    study = "study=table1", "cells=average-1", f"output_dir={tmp_path}"
    code, *said = train("-m", *study, "recorded=skip")
    assert (code, "sweep of 5 jobs: 5 finished before\n" in "".join(said)) == (0, True), said
    assert not (tmp_path / "small").exists()
    code, *said = train("-m", *study, "recorded=skip", "seed=0", "optimizer.lr=1e30")
    assert (code, "sweep of 1 jobs: 1 failed\n" in "".join(said)) == (1, True), said
    assert train("-m", *study, "recorded=no")[0] == "error: recorded=no must be run or skip"


@pytest.mark.slow
def test_a_study_is_a_sweep(train):
    code, *_ = train("study=table1")
    assert code == "error: study=table1 is many runs: python train.py -m study=table1"


@pytest.mark.slow
def test_the_script_of_a_table_runs_it_and_draws_it(train, tmp_path, monkeypatch):
    """Its commands, which a PYTHON that only writes them down is given, are then run here."""
    python, written = tmp_path / "python", tmp_path / "commands"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "" >> {written}\n')
    python.chmod(stat.S_IRWXU)
    (tmp_path / "out" / "sweeps").mkdir(parents=True)  # as the sweep will have made it
    parts = ["cells=average-1", "seed=0", *SMALL[1:], "trainer.updates=2", "schedule.warmup=0",
             "logger.wandb=disabled"]  # fmt: skip
    subprocess.run(
        [ROOT / "scripts" / "table1.sh", *parts, f"output_dir={tmp_path}/out"],
        check=True, env=os.environ | {"PYTHON": str(python)},
    )  # fmt: skip
    first, *others = (text.split("\n") for text in written.read_text().strip().split("\n\n"))
    assert first[0] == "train.py"
    code, said, _ = train(*first[1:])
    assert (code, "sweep of 1 jobs: 1 finished" in said) == (0, True), said
    assert others[0][1:] == [
        "experiments.results",
        f"{tmp_path}/out/small",
        f"{tmp_path}/out/sweeps",
    ]
    monkeypatch.chdir(tmp_path)
    for option, module, *arguments in others:
        assert option == "-m"
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        import_module(module).main()
    table = (tmp_path / "results" / "tables" / "table1_small.md").read_text()
    assert re.search(r"\| average \| 1 \| \d+\.\d+ \|  \| 1 \| 2,000 \|", table)


@pytest.mark.slow
def test_settings_to_choose_from_are_run(train, tmp_path):
    study = "study=max_retrieval", "cells=softmax", "tuning=true", "seed=1000"
    tiny = "debug=two_updates", "data.valid_size=10", "data.test_size=10", f"output_dir={tmp_path}"
    code, *said = train("-m", *study, *tiny)
    assert (code, "sweep of 12 jobs: 12 finished\n" in "".join(said)) == (0, True), said
    found = [json.loads(file.read_text()) for file in tmp_path.glob("small/*/*/result.json")]
    assert len({(r["config"]["attention"]["temperature"], r["config"]["optimizer"]["lr"])
                for r in found}) == 12  # fmt: skip
    assert {tuple(r["config"]["tags"]) for r in found} == {
        ("max_retrieval", "softmax", "tuning", "debug")
    }
    assert train("-m", "study=max_retrieval", "tuning=1")[0] == (
        "error: tuning=1 must be true or false"
    )
