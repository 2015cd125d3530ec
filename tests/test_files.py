import errno
import multiprocessing
import os
from unittest.mock import Mock

import pytest
import torch

from multimax.files import (
    load_checkpoint,
    locked,
    save_checkpoint,
    write_atomically,
    write_json,
)

LARGE = {"weights": torch.zeros(100_000)}


class RunsCode:
    """Something that a pickle may hold and that runs when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def no_space(stream):
    stream.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(stream):
    stream.write(b"half")
    raise KeyboardInterrupt


def test_failed_write_leaves_the_old_version(tmp_path):
    path = tmp_path / "folder" / "file"
    write_atomically(path, lambda stream: stream.write(b"old"))
    with pytest.raises(OSError, match=r"No space left .*file; .* intact. Free some space") as error:
        write_atomically(path, no_space)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_file_is_whole_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a)))
    write_atomically(tmp_path / "file", lambda stream: stream.write(b"new"))
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("size", [5_100, 100_000])  # torch fails at the end, or in the middle
def test_full_disk_leaves_the_old_checkpoint(tmp_path, size):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"update": 1})
    with pytest.raises(OSError, match=r"File too large .*last.pt; the previous version is intact"):
        save_checkpoint(path, {"weights": torch.zeros(size)})
    assert load_checkpoint(path) == {"update": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_leftover_of_a_killed_process_is_written_over(tmp_path):
    path = tmp_path / "last.pt"
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply_async(write_atomically, (path, _never_ends))
        partial = _wait_for(lambda: list(tmp_path.iterdir()))
    assert partial != [path]
    save_checkpoint(path, {"update": 2})
    assert list(tmp_path.iterdir()) == [path]


def _never_ends(stream):
    stream.write(b"half")
    stream.flush()
    multiprocessing.Event().wait()


def _wait_for(found):
    for _ in range(1000):
        if found():
            return found()
        multiprocessing.Event().wait(0.01)
    raise TimeoutError


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert path.read_text() == '{\n  "loss": 1.0\n}\n'


@pytest.mark.parametrize("kept", [0, 100, 200_000])
def test_truncated_checkpoint(tmp_path, kept):
    path = tmp_path / "last.pt"
    save_checkpoint(path, LARGE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"last\.pt cannot be read .* truncated .*resume=never"):
        load_checkpoint(path)


def test_missing_checkpoint(tmp_path):
    for place in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{place}: give the path of a last.pt"):
            load_checkpoint(place)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path, trace = tmp_path / "last.pt", tmp_path / "trace"
    torch.save({"weights": RunsCode(trace)}, path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    assert not trace.exists()


def _hold(folder, held):
    with locked(folder):
        held.set()
        multiprocessing.Event().wait()


def test_lock_excludes_a_second_process_and_goes_with_the_first(tmp_path):
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    first = fork.Process(target=_hold, args=(tmp_path / "run", held))
    first.start()
    assert held.wait(10)
    with pytest.raises(ValueError, match="another process is running this very configuration"):
        locked(tmp_path / "run").__enter__()
    first.kill()
    first.join()
    with locked(tmp_path / "run"):
        pass


def test_a_folder_in_which_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()  # no one can open it, not even root
    with pytest.raises(OSError, match=rf"{tmp_path} cannot be written: choose another output_dir="):
        locked(tmp_path).__enter__()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, number):
    flock = Mock(side_effect=OSError(number, "No locks available"))
    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / "run"):
        assert "on a file system without locks (No locks available): see to it" in caplog.text


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_held_elsewhere(tmp_path, monkeypatch, number):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, "held")))
    with pytest.raises(ValueError, match="another process"):
        locked(tmp_path / "run").__enter__()


def test_another_error_of_a_lock_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.EIO, "bad disk")))
    with pytest.raises(OSError, match="bad disk"):
        locked(tmp_path / "run").__enter__()
