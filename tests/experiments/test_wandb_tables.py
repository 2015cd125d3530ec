"""Tables to and from Weights & Biases, without its servers."""

import json
import sys
from types import SimpleNamespace

import pytest
from offline_wandb import OfflineApi, media
from PIL import Image
from test_tables import composed, result, store

from experiments import wandb_tables
from experiments.results import load
from experiments.selection import run_of, study_of
from experiments.tables import build, main
from multimax.training.loggers import WandbLogger
from multimax.training.result import flat_summary


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def mirror(folder, entry):
    """The file of a run that the trainer's logger wrote offline."""
    folder.mkdir(parents=True)
    run = {"name": folder.name, "group": "table2", "tags": entry["config"]["tags"],
           "config": entry["config"]}  # fmt: skip
    logger = WandbLogger("offline", folder, run)
    logger.log(1, {"train/loss": 2.0})
    logger.finish(flat_summary(entry))
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file


@pytest.mark.slow
def test_the_table_of_offline_runs_is_that_of_the_files(offline, caplog):
    entries = [result("deit_softmax", seed, 80.0 + seed) for seed in (0, 1)]
    entries += [result("deit_multimax", seed, 81.0 + 2 * seed) for seed in (0, 1)]
    unwanted = []
    for tag in ("debug", "tuning"):
        unwanted.append(result("deit_softmax", 2, 1.0))
        unwanted[-1]["config"] = composed("experiment=deit_softmax") | {"tags": [tag], "seed": 2}
    store(offline / "runs", entries)
    files = [mirror(offline / f"run{i}", entry) for i, entry in enumerate(entries + unwanted)]
    study = study_of("table2")
    recorded = [run_of(entry) for entry in load(offline / "runs").values()]
    expected = build(study, "small", recorded)
    assert expected.runs == 4
    api = OfflineApi(*files)
    foreign = SimpleNamespace(name="other", tags=[], config={"seed": 1}, state="finished")
    stopped = SimpleNamespace(name="mine", tags=[], config={"seed": 1}, state="failed")
    project = SimpleNamespace(runs=lambda name: [*api.runs(name), foreign, stopped])
    assert build(study, "small", wandb_tables.runs_of("us/multimax", project)) == expected
    warned = [r.getMessage() for r in caplog.records if r.name == wandb_tables.__name__]
    assert [text.partition(":")[0] for text in warned] == [
        "run other of W&B cannot be read, and is left out",
        "run mine of W&B is failed, and left out",
    ]


@pytest.mark.slow
def test_a_table_is_logged_with_its_own_figures(offline, monkeypatch, capsys):
    """By the command: the table, the figure of its differences as of now, and no other figure."""
    entries = [result("deit_softmax", seed, 80.0 + seed) for seed in (0, 1)]
    entries += [result("deit_multimax", seed, 81.0 + 2 * seed) for seed in (0, 1)]
    (offline / "results").mkdir()
    store(offline / "results" / "runs", entries)
    figures = offline / "results" / "figures"
    figures.mkdir()
    for number, name in enumerate(("table1_small", "normalizers", "table2_small_more")):
        Image.new("RGB", (4 + number, 3)).save(figures / f"{name}.png")
    (figures / "table2_small.png").write_bytes(b"stale")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(offline)
    monkeypatch.setattr(sys, "argv", ["tables", "table2", "--wandb"])
    main()
    assert "table2_small: " in capsys.readouterr().out
    runs = [run_of(entry) for entry in entries]
    table = build(study_of("table2"), "small", runs)
    (file,) = offline.glob("outputs/wandb/offline-run-*/run-*.wandb")
    found = media(file)
    assert set(found) == {"table2_small", "figures/table2_small", "figures/table2_small_more"}
    content = json.loads(found["table2_small"].read_text())
    assert content["columns"] == table.columns
    assert content["data"] == [list(row.values()) for row in table.rows]
    for name in ("table2_small", "table2_small_more"):
        drawn = (figures / f"{name}.png").read_bytes()
        assert drawn.startswith(b"\x89PNG")
        assert found[f"figures/{name}"].read_bytes() == drawn
    (run,) = OfflineApi(file).runs(None)
    assert (run.group, run.tags) == ("table2", ["table2", "table"])
    assert run.summary["remarks"] == table.remarks


def test_a_project_that_cannot_be_read_is_named():
    class Broken:
        def runs(self, *_, **__):
            raise RuntimeError("no such project")

    with pytest.raises(ValueError, match="cannot read us/none from Weights & Biases: no such"):
        wandb_tables.runs_of("us/none", Broken())
