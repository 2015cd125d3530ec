"""The files of a run folder that are neither checkpoint nor result."""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from multimax.files import write_atomically
from multimax.training.config import Config

KEPT = "update-*.pt"  # checkpoints of `trainer.keep`
NOTHING = (".lock", "config.yaml", "wandb_id")  # what alone makes no run


@contextmanager
def left_only_if_used(folder: Path) -> Iterator[None]:
    """Take the folder of a run that fails away, if there is nothing in it to go on from or read."""
    try:
        yield
    except BaseException:
        files = list(folder.iterdir())
        if all(file.name in NOTHING or _is_empty_file(file) for file in files):
            for file in files:
                file.unlink()
            folder.rmdir()
        raise


def _is_empty_file(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def set_aside(folder: Path) -> None:
    """Move what a folder holds into `previous-1`, `previous-2`, ...: nothing is ever deleted."""
    old = [p for p in folder.iterdir() if p.name != ".lock" and not p.name.startswith("previous-")]
    if old:
        names = [path.name.removeprefix("previous-") for path in folder.glob("previous-*")]
        number = max((int(name) for name in names if name.isdecimal()), default=0) + 1
        target = folder / f"previous-{number}"
        target.mkdir()
        for path in old:
            path.rename(target / path.name)


def save_config(config: Config, folder: Path) -> None:
    """Write `config.yaml`: the configuration as it was composed, readable by Hydra."""
    content = OmegaConf.to_yaml(OmegaConf.create(config.recorded())).encode()
    write_atomically(folder / "config.yaml", lambda stream: stream.write(content))


def wandb_id(file: Path) -> str:
    """The identity of the run in W&B, which a resumed run keeps; a damaged one is drawn anew."""
    content = file.read_bytes().decode(errors="replace").strip() if file.exists() else ""
    if not re.fullmatch(r"\w{1,64}", content, re.ASCII):
        content = uuid.uuid4().hex[:8]
        write_atomically(file, lambda stream: stream.write(content.encode()))
    return content


def kept(folder: Path) -> list[Path]:
    """The checkpoints that `trainer.keep` left in a run folder, the oldest first."""
    numbered = [(path.stem.partition("-")[2], path) for path in folder.glob(KEPT)]
    return [path for _, path in sorted((int(n), path) for n, path in numbered if n.isdecimal())]
