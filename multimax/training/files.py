"""Files that are either whole or absent, and a lock that keeps a run folder to one process."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file by way of a temporary neighbour: a crash leaves the old one or the new one.

    One process at a time; a neighbour that a killed one left is written over.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"{error.strerror} while writing {path}; the previous version is intact. "
                "Free some space and run the same command again: it goes on where it stopped",
            ) from error
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused, since they are not JSON."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain Python values atomically."""

    def write(stream: BinaryIO) -> None:
        try:
            torch.save(state, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides what the disk said
                raise error.__context__ from None
            raise

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code that it may hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or not a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a last.pt or best.pt")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint, it is truncated or something else "
            f"({error}): give another one, or start afresh with resume=never"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; the lock goes with the process, however it ends.

    Raises:
        ValueError: another process is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is running this very configuration and seed in {folder}: "
                "wait for it, or change `seed` or `output_dir`"
            ) from None
        yield
