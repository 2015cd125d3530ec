"""The benchmark of training options, on a small model of the recipe."""

import csv

import pytest

from benchmarks import options

pytestmark = pytest.mark.slow
SMALL = [
    "model.depth=1", "model.embed_dim=16", "model.num_heads=2", "model.patch_size=16",
    "data.image_size=32", "trainer.batch_size=8", "trainer.eval_batch_size=6",
]  # fmt: skip


def test_each_option_has_a_row_and_a_failed_one_its_reason(tmp_path, capsys):
    wanted = ["", "precision=bf16,fused,softmax", "channels_last", "precision=bf17"]
    command = ["deit", "--updates", "2", "--settings", *SMALL, "--options", *wanted]
    options.main([*command, "--results", str(tmp_path)])
    with (tmp_path / "benchmarks" / "options_deit.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["options"] for row in rows] == ["fp32", *wanted[1:]]
    for row in rows[:-1]:
        assert float(row["rate"]) * float(row["update_ms"]) == pytest.approx(8 * 1000)
    assert "bf17" in rows[-1]["failed"]
    assert not rows[-1]["rate"]
    assert "precision=bf17: " in capsys.readouterr().out


def test_an_option_is_what_the_run_gets():
    trainer = options.build(
        ["experiment=deit_multimax", "scale=paper", *SMALL], "precision=bf16,fused,softmax"
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.optimizer.param_groups[0]["fused"] is True
    assert trainer.config.attention.name == "softmax"
    options._forget()
