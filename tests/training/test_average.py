"""Checkpoints that are kept, and their mean."""

import json

import pytest
import torch
from tiny import only, run_quietly, tiny_config

from multimax import evaluate
from multimax.files import load_checkpoint, save_checkpoint
from multimax.tasks.image_classification import ImageClassification
from multimax.training.average import average, main
from multimax.training.config import config_hash, read_config
from multimax.training.folder import kept

OPTIONS = ("trainer.updates=7", "+trainer.keep=2", "trainer.ema_decay=0.5")


def test_the_last_evaluations_are_kept_and_their_mean_is_evaluated(tmp_path, capsys):
    config = tiny_config(tmp_path, *OPTIONS)
    run_quietly(config)
    folder = only(tmp_path, "result.json").parent
    assert [path.name for path in kept(folder)] == ["update-6.pt", "update-7.pt"]
    main([str(folder)])
    assert "averaged.pt: the mean of update-6.pt, update-7.pt" in capsys.readouterr().out
    first, second = (load_checkpoint(path) for path in kept(folder))
    mean = load_checkpoint(folder / "averaged.pt")
    for network in ("model", "ema"):
        for name, tensor in mean[network].items():
            exact = (first[network][name].double() + second[network][name].double()) / 2
            assert torch.equal(tensor, exact.to(tensor.dtype)), name
        moved = (
            first[network]["blocks.0.attn.qkv.weight"] != mean[network]["blocks.0.attn.qkv.weight"]
        )
        assert moved.any()
    assert mean["position"] == second["position"]

    main([str(folder), "--last", "1", "--output", str(folder / "one.pt")])
    assert torch.equal(load_checkpoint(folder / "one.pt")["model"]["head.weight"],
                       second["model"]["head.weight"])  # fmt: skip
    evaluate.main([str(folder / "averaged.pt"), "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["metrics"]["test"]
    recorded = json.loads((folder / "result.json").read_text())["metrics"]["test"]
    assert figures.keys() == recorded.keys()
    assert figures["loss"] != recorded["loss"]


@pytest.mark.parametrize("higher", [True, False])
def test_the_best_of_those_that_are_kept(tmp_path, capsys, monkeypatch, higher):
    monkeypatch.setattr(ImageClassification, "higher_is_better", higher)
    run_quietly(tiny_config(tmp_path, "trainer.updates=10", "+trainer.keep=4"))
    folder = only(tmp_path, "result.json").parent
    values = {2: 99.0, 4: 30.0, 6: 10.0, 8: 30.0, 10: 20.0}  # the first is not kept any more
    lines = [{"update": 4, "train/loss": 1.0}, {"update": 12, "valid/top1": 50.0}]
    lines += [{"update": update, "valid/top1": value} for update, value in values.items()]
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main([str(folder), "--best", "1"])
    assert f"the mean of update-{4 if higher else 6}.pt" in capsys.readouterr().out
    main([str(folder), "--best", "3"])
    mean = [4, 8, 10] if higher else [4, 6, 10]
    said = ", ".join(f"update-{update}.pt" for update in mean)
    assert f"averaged.pt: the mean of {said}\n" in capsys.readouterr().out
    file.write_text(json.dumps({"update": 8, "valid/top1": None}) + "\n")
    with pytest.raises(
        SystemExit, match=r"metrics\.jsonl has valid/top1 of 0 checkpoints: --best 1"
    ):
        main([str(folder), "--best", "1"])


def test_what_is_kept_is_no_part_of_what_is_computed(tmp_path):
    plain, keeping = (tiny_config(tmp_path, *options) for options in ((), OPTIONS[1:2]))
    assert config_hash(read_config(plain)) == config_hash(read_config(keeping))


def checkpoint(path, value, **changes):
    state = {
        "format": 2, "fingerprint": "f", "inputs": {"data": "d", "weights": None}, "position": {},
        "model": {"w": torch.tensor([value], dtype=torch.float16), "n": torch.tensor(3)},
        "ema": None,
    }  # fmt: skip
    save_checkpoint(path, state | changes)
    return path


def test_the_mean_of_many_half_precision_weights_has_no_overflow_and_counts_are_kept(tmp_path):
    paths = [checkpoint(tmp_path / f"{i}.pt", 60000.0 - 32 * i) for i in range(4)]
    state = average(paths)
    assert state["model"]["w"].dtype == torch.float16
    assert state["model"]["w"].item() == torch.tensor(59952.0).half().item()
    assert state["model"]["n"].item() == 3
    assert state["ema"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"v": torch.ones(1)}}, r"2\.pt is of another model than .*1\.pt"),
        ({"model": {"w": torch.ones(2), "n": torch.tensor(3)}}, "another model"),
        ({"ema": {"w": torch.ones(1), "n": torch.tensor(3)}}, "another model"),
        ({"inputs": {"data": "e", "weights": None}}, r"2\.pt is of other data than .*1\.pt"),
        ({"fingerprint": "g"}, "other data"),
        ({"format": 1}, r"2\.pt is no checkpoint of this version"),
    ],
)
def test_checkpoints_that_do_not_belong_together_are_refused(tmp_path, changes, message):
    paths = [checkpoint(tmp_path / "1.pt", 1.0), checkpoint(tmp_path / "2.pt", 1.0, **changes)]
    with pytest.raises(ValueError, match=message):
        average(paths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}"], r"there are no checkpoints update-\*\.pt: train with \+trainer\.keep=5"),
        (["{}", "{}"], "give one run folder, or checkpoint files"),
        (["{}/1.pt", "--last", "2"], "--last 2: .* has 1 checkpoints"),
        (["{}", "--best", "1"], "--best 1: .* has 0 checkpoints"),
        (["{}/1.pt", "--best", "1"], "--best 1 needs a run folder: give .*"),
        (["{}/none.pt"], "no checkpoint at"),
    ],
)
def test_what_cannot_be_averaged_is_said(tmp_path, arguments, message):
    checkpoint(tmp_path / "1.pt", 1.0)
    with pytest.raises(SystemExit, match=message):
        main([argument.format(tmp_path) for argument in arguments])
