"""Keys and tokens of the environment are in nothing that a run writes or prints."""

import pytest
from forked import Forked
from tiny import only, tiny_overrides

pytestmark = pytest.mark.slow
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT", "GITHUB_TOKEN")


@pytest.mark.parametrize("settings", [(), ("trainer.batch_size=9000",)], ids=["finished", "failed"])
def test_no_secret_is_written_or_printed(tmp_path, settings):
    secrets = {name: f"{index}{name[0].lower()}" * 20 for index, name in enumerate(NAMES)}
    folder = tmp_path / "runs"
    arguments = [*tiny_overrides(folder, "logger.wandb=offline"), *settings]
    environment = {"WANDB_DIR": "", "WANDB_CACHE_DIR": str(tmp_path / "cache")} | secrets
    with Forked(arguments, tmp_path / "printed", **environment) as process:
        code, printed = process.finish()
    assert (code == 0) == (not settings), printed
    if not settings:
        assert list(only(folder, "result.json").parent.rglob("run-*.wandb"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for name, secret in secrets.items():
            assert secret.encode() not in content, (name, path)
