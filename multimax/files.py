"""Files that are either whole or absent, digests, and a lock that keeps a folder to one process."""

import argparse
import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

log: logging.Logger = logging.getLogger(__name__)

RESUME = "Free some space and run the same command again: it goes on where it stopped"
OTHER_CHECKPOINT = "give another one, or start afresh with resume=never"
# What NFS without a lock service, and Lustre mounted without flock, say of every lock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_HELD = (errno.EAGAIN, errno.EACCES)  # the latter by some servers


def write_atomically(
    path: Path,
    write: Callable[[BinaryIO], object],
    remedy: str = RESUME,
    several_writers: bool = False,
) -> None:
    """Write a file by way of a temporary neighbour: a crash leaves the old one or the new one.

    Args:
        path: the file; its folder is made.
        write: writes the content to a binary stream.
        remedy: what a user can do if it fails.
        several_writers: processes may write the same file at once, as in a cache: each has a
            neighbour of its own, and the last one's file stays. Else there is one neighbour, and
            one that a killed process left is written over.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was.
    """
    writer = f".{os.getpid()}" if several_writers else ""
    temporary = path.with_name(f".{path.name}{writer}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"{error.strerror} while writing {path}; the previous version is intact. {remedy}",
            ) from error
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused, since they are not JSON."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


def digest(content: bytes | str) -> str:
    """16 hexadecimal digits that tell contents apart (SHA-256, shortened)."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


def digest_parts(parts: Iterable[bytes | str]) -> str:
    """`digest` of many parts, of which it counts too where one ends and the next begins."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()[:16]


def digest_file(path: Path) -> str:
    """`digest` of the content of a file, of which a part is in memory at a time."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def user_cache() -> Path:
    """The folder of what can be made again, `~/.cache/multimax`; XDG_CACHE_HOME moves it.

    Raises:
        RuntimeError: the user has no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "multimax"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain Python values atomically."""
    import torch  # not above: setup.py imports this where torch is not installed

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
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a last.pt or best.pt")
    try:
        # The official code of MultiMax stores its command line beside the weights.
        known = argparse.Namespace in torch.serialization.get_safe_globals()  # and stays it
        with torch.serialization.safe_globals([] if known else [argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint, it is truncated or something else "
            f"({error}): {OTHER_CHECKPOINT}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, which is no checkpoint: {OTHER_CHECKPOINT}"
        )
    return content


def make_folder(folder: Path) -> None:
    """Make a folder below `output_dir`; OSError says what to change where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error


def _cannot_be_written(folder: Path, error: OSError) -> OSError:
    reason = f"{error.strerror}, {folder} cannot be written: choose another output_dir="
    return OSError(error.errno, reason)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; the lock goes with the process, however it ends.

    Where the file system takes no locks, a warning says so and nothing is held.

    Raises:
        ValueError: another process is writing there.
        OSError: nothing can be written there.
    """
    make_folder(folder)
    try:
        stream = (folder / ".lock").open("w")
    except OSError as error:
        raise _cannot_be_written(folder, error) from error
    with stream:
        _lock(stream, folder)
        yield


def _lock(stream: TextIO, folder: Path) -> None:
    import fcntl  # not on Windows, where the library still is to be imported

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            log.warning(
                f"{folder} is on a file system without locks ({error.strerror}): see to it that "
                "no second process runs this configuration and seed"
            )
        elif error.errno in _HELD:
            raise ValueError(
                f"another process is running this very configuration and seed in {folder}: "
                "wait for it, or change `seed` or `output_dir`"
            ) from None
        else:
            raise
