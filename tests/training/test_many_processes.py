"""Four processes, and two that translate: the numbers of one, and the same scalars in all."""

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir
from tiny import history, run_quietly, tiny_config
from tiny_runs import MT, ROOT, fewer_pairs
from two_processes import in_processes, in_two_processes, needs_fork

from multimax.parameters import learned_scalars
from multimax.training.trainer import Trainer

pytestmark = [pytest.mark.slow, needs_fork]

OPTIONS = (
    "trainer.updates=12",
    "trainer.evaluate_every=12",
    "trainer.batch_size=24",
    "trainer.accumulation=2",
    "data.valid_size=999",
    "model.depth=2",
    "attention.shared=true",
)


def scalars_after_updates(monkeypatch, config):
    """The learned scalars of this process after each update of a run."""
    found, real = [], Trainer._update
    torch.set_num_threads(1)

    def update(self, group):
        metrics = real(self, group)
        found.append(learned_scalars(self.task.model))
        return metrics

    with monkeypatch.context() as context:
        context.setattr(Trainer, "_update", update)
        run_quietly(copy.deepcopy(config))
    return found


def assert_history(folder, one, rel=2e-4):
    """Of the losses; a rounding difference can tip single images of the 999."""
    assert len(history(folder)) == len(history(one))
    for got, expected in zip(history(folder), history(one), strict=True):
        assert list(got) == list(expected)
        for name in expected:
            if "top" not in name and "bleu" not in name:
                assert got[name] == pytest.approx(expected[name], rel=rel), name


def assert_agree(processes, one):
    """Bit for bit among processes, and but for rounding with one process."""
    assert all(found == processes[0] for found in processes)
    assert len(processes[0]) == len(one)
    for got, expected in zip(processes[0], one, strict=True):
        assert got.keys() == expected.keys()
        for name, values in expected.items():
            assert got[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    assert processes[0][0] != processes[0][-1]


def test_four_processes(tmp_path, monkeypatch):
    one = scalars_after_updates(monkeypatch, tiny_config(tmp_path / "one", *OPTIONS))
    for name, shard in (("four", "false"), ("sharded", "true")):
        config = tiny_config(tmp_path / name, *OPTIONS, f"+trainer.shard={shard}")
        four = in_processes(4, lambda config=config: scalars_after_updates(monkeypatch, config))
        assert_agree(four, one)
        assert_history(tmp_path / name, tmp_path / "one")


def translation(folder, cache, *overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", [
            *MT, "trainer.updates=6", "trainer.batch_size=512", f"data.cache={cache}",
            f"output_dir={folder}", *overrides,
        ])  # fmt: skip


def test_processes_translate_as_accumulated_batches_of_one(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    with fewer_pairs():
        config = translation(one, tmp_path, "trainer.accumulation=2")
        expected = scalars_after_updates(monkeypatch, config)
        config = translation(two, tmp_path)
        found = in_two_processes(lambda: scalars_after_updates(monkeypatch, config))
    assert_agree(found, expected)
    assert_history(two, one)
