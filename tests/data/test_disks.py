"""Disks that are full, and caches that are shared."""

import errno
import os
import stat

import pytest

from multimax.data.prepare import run_command_line
from multimax.data.text.files import byte_pairs
from multimax.files import write_atomically

LINES = ["a text of some words", "and others"] * 20


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_what_others_may_do_with_a_file_is_for_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        byte_pairs(LINES, 270, str(tmp_path))
        write_atomically(tmp_path / "file", lambda stream: stream.write(b"x"))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {mode}


def test_a_vocabulary_that_cannot_be_read_is_not_to_be_deleted(tmp_path, monkeypatch):
    byte_pairs(LINES, 270, str(tmp_path))

    def refuse(*_arguments, **_options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(OSError, match=r"Permission denied while reading .*set data\.cache") as e:
        byte_pairs(LINES, 270, str(tmp_path))
    assert "delete" not in str(e.value)


@pytest.mark.parametrize("full_disk", [1000], indirect=True)
def test_preparing_on_a_full_disk_names_the_folder(full_disk, tmp_path, monkeypatch):
    def prepare(archive, folder):
        folder.mkdir()
        (folder / "train").write_text("x" * 2000)

    monkeypatch.setattr("sys.argv", ["prepare", "archive", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=rf"too large while writing {tmp_path}/out: free some"):
        run_command_line(prepare, "", "")
