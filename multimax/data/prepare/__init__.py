"""One-time preparation of the paper's data sets from their official archives."""

import argparse
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors that name no file


def check_size(archive: Path, name: str, size: int, largest: int) -> None:
    """Raise ValueError for a file in an archive that is too large to be the right one, unread."""
    if size > largest:
        raise ValueError(
            f"{name} in {archive} would be {size:,} bytes, more than the {largest:,} that it can "
            "have: this is not the official archive"
        )


def run_command_line(prepare: Callable[..., Any], description: str, archive: str) -> None:
    """Prepare a data set as the command line says, or exit with what is wrong.

    Args:
        prepare: takes the paths of the archive and of the folder to write.
        description: shown by --help.
        archive: what the archive is, for --help.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("archive", type=Path, help=archive)
    parser.add_argument("folder", type=Path, help="where to write; then data.root of train.py")
    arguments = parser.parse_args()
    try:
        prepare(arguments.archive, arguments.folder)
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in FULL_DISK
        named = "while writing" in str(error)
        remedy = f" while writing {arguments.folder}: free some space, and run this again"
        raise SystemExit(f"error: {error}{remedy if full and not named else ''}") from error
