"""Which compiled kernels are loaded: not those that others could have written."""

import ctypes
import os
import stat
import tempfile
from pathlib import Path

import pytest
from compiled import load
from kernels_here import needs_kernels

from multimax.kernels import c_build

# How others could have written what is kept. Each gets the folder and the library in it.
PLANTED = {
    "folder of a group": lambda folder, file: folder.chmod(0o775),
    "folder of all": lambda folder, file: folder.chmod(0o777),
    "folder in a folder of all": lambda folder, file: folder.parent.chmod(0o777),
    "folder of another": lambda folder, file: os.chown(folder, 65534, -1),
    "folder behind a link": lambda folder, file: (
        folder.rename(folder.with_name("other")).with_name("kernels").symlink_to("other")
    ),
    "file of a group": lambda folder, file: file.chmod(0o664),
    "file of all": lambda folder, file: file.chmod(0o646),
    "file of another": lambda folder, file: os.chown(file, 65534, -1),
    "file behind a link": lambda folder, file: (
        file.rename(folder.with_name("other")) and file.symlink_to("../other")
    ),
}


@needs_kernels
@pytest.mark.parametrize("way", PLANTED)
def test_what_others_could_have_written_is_not_loaded(
    cache, compiler, monkeypatch, tmp_path, capsys, way
):
    if "another" in way and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    compiler()
    load()
    (kept,) = cache.iterdir()
    PLANTED[way](cache, kept)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    capsys.readouterr()
    loaded = Path(load()._name)
    assert compiler.runs() == 2
    said = capsys.readouterr().err
    if way.startswith("folder"):
        assert loaded.parent.parent == tmp_path
        assert stat.S_IMODE(loaded.parent.stat().st_mode) == 0o700
        assert "multimax cannot keep its compiled CPU kernels: " in said
        assert str(cache.parent) in said
    else:
        assert loaded == kept
        assert c_build.distrust(kept) is None
        assert "cannot keep" not in said


@needs_kernels
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_what_is_kept_is_used_again_whatever_the_umask(cache, compiler, mask):
    compiler()
    before = os.umask(mask)
    try:
        for _ in range(2):
            assert isinstance(load(), ctypes.CDLL)
    finally:
        os.umask(before)
    assert compiler.runs() == 1
    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o022 == cache.stat().st_mode & 0o022 == 0


@needs_kernels
def test_a_library_in_a_sticky_folder_is_trusted(cache, compiler):
    compiler()
    load()
    cache.parent.chmod(0o1777)
    load()
    assert compiler.runs() == 1
