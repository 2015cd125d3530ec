"""Compiling the C kernels: where they are kept, which are used, and which compilers fail how."""

import ctypes
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from compiled import load
from kernels_here import needs_kernels

from multimax.kernels import c_build, c_library
from multimax.kernels.__main__ import main

ROOT = Path(__file__).parents[2]


@needs_kernels
def test_compiles_once_and_keeps_it_in_the_cache_folder(cache, compiler):
    compiler()
    for _ in range(3):
        assert isinstance(load(), ctypes.CDLL)
    assert compiler.runs() == 1
    (kept,) = cache.iterdir()
    assert kept.name.startswith("kernels-float-")
    assert isinstance(load(torch.float64), ctypes.CDLL)
    assert compiler.runs() == 2


@needs_kernels
def test_the_cache_folder_is_below_the_home_by_default(tmp_path, monkeypatch, compiler):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    compiler()
    assert isinstance(load(), ctypes.CDLL)
    assert len(list((tmp_path / ".cache" / "multimax" / "kernels").iterdir())) == 1
    c_build._folder_to_write.cache_clear()


@needs_kernels
@pytest.mark.parametrize(
    "content", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + b"?"]
)
def test_a_broken_library_is_compiled_again(cache, compiler, content):
    """Loading half a library would end the process."""
    compiler()
    load()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # it is loaded
    kept.write_bytes(content(whole))
    assert isinstance(load(), ctypes.CDLL)
    assert kept.read_bytes() == whole
    load()
    assert compiler.runs() == 2


@needs_kernels
def test_what_changes_the_library_is_part_of_its_name(cache, compiler, monkeypatch):
    compiler()
    load()
    compiler(version="2.0")  # or other macros: the meaning of -march=native, say
    load()
    monkeypatch.setattr(c_build, "FLAGS", [*c_build.FLAGS, "-g"])
    load()
    assert compiler.runs() == len(list(cache.iterdir())) == 3
    monkeypatch.setattr(c_build, "_processor", lambda: "another")
    load()  # the compiler knows better whether it is another
    assert compiler.runs() == 3


@needs_kernels
def test_a_compiler_with_arguments(cache, compiler, monkeypatch):
    script = compiler('test "$1" = real && shift || exit 1')
    assert "failed" in load()
    monkeypatch.setenv("CC", f"'{script}' real")
    assert isinstance(load(), ctypes.CDLL)


@needs_kernels
def test_options_that_a_compiler_does_not_know_are_left_out(cache, compiler):
    compiler('case "$*" in *-fopenmp*|*-march*) exit 1;; esac')
    assert isinstance(load(), ctypes.CDLL)
    assert compiler.runs() == 1


@needs_kernels
def test_a_compiler_that_fails(cache, compiler):
    script = compiler('case "$*" in *-dM*) ;; *) echo no space >&2; exit 1;; esac')
    assert load() == f"{script} failed: no space"
    compiler("echo broken >&2; exit 1")
    assert load() == f"{script} failed: broken"
    compiler("exit 1")
    assert load() == f"{script} failed: exit status 1"
    compiler("printf 'kein Speicher \\374brig' >&2; exit 1")  # Latin-1
    assert load() == f"{script} failed: kein Speicher \ufffdbrig"
    assert not cache.exists()


@needs_kernels
def test_what_is_compiled_cannot_be_loaded(cache, compiler):
    compiler('while [ "$1" != -o ]; do test $# = 1 && exit; shift; done; echo > "$2"; exit')
    assert load().endswith(".so: file too short")


@pytest.mark.parametrize("value", ["nowhere", "/nowhere/gcc -m64"])
def test_no_such_compiler(cache, monkeypatch, value):
    monkeypatch.setenv("CC", value)
    assert load() == f"CC is '{value}', which is not found; install gcc or clang, or set CC"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ('gcc "', "which is no command (No closing quotation)"),
        ("gcc\\", "which is no command (No escaped character)"),
        ("# gcc", "which is not found"),
        ("''", "which is not found"),
    ],
)
def test_what_is_no_command(cache, monkeypatch, value, problem):
    monkeypatch.setenv("CC", value)
    assert load() == f"CC is {value!r}, {problem}; install gcc or clang, or set CC"


@pytest.mark.parametrize("value", [None, "", " ", "\t"])
def test_no_compiler(cache, monkeypatch, value):
    monkeypatch.delenv("CC", raising=False)
    if value is not None:
        monkeypatch.setenv("CC", value)
    monkeypatch.setenv("PATH", "/nowhere")
    assert load() == "no C compiler was found; install gcc or clang, or set CC"


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_cc_is_none(monkeypatch, value):
    monkeypatch.setenv("CC", value)
    empty = c_build.find_compiler()
    monkeypatch.delenv("CC")
    assert empty == c_build.find_compiler()


@needs_kernels
def test_a_compiler_may_print_any_bytes(cache, compiler):
    compiler('case "$*" in *-dM*) printf "gcc \\374 1.0"; exit;; esac')
    for _ in range(2):
        assert isinstance(load(), ctypes.CDLL)
    assert compiler.runs() == 1


@needs_kernels
@pytest.mark.parametrize("when", ["ASK", "COMPILE"])
def test_a_compiler_that_hangs_is_ended_with_its_children(
    cache, compiler, monkeypatch, tmp_path, when
):
    monkeypatch.setattr(c_build, f"{when}_SECONDS", 0.2)
    child = f"sleep 60 & echo $! > {tmp_path}/child; wait"
    script = compiler(
        f'case "$*" in *-dM*) {":" if when == "COMPILE" else child};; *) {child};; esac'
    )
    start = time.monotonic()
    assert load() == f"{script} failed: no answer for 0.2 s"
    assert time.monotonic() - start < 10
    state = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not state.exists() or state.read_text().split()[2] == "Z"


@needs_kernels
@pytest.mark.parametrize("obstacle", ["a file", "no home"])
def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch, compiler, obstacle):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if obstacle == "a file" else "")
    (tmp_path / "file").touch()
    monkeypatch.setattr(Path, "expanduser", no_home if obstacle == "no home" else Path.absolute)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    compiler()
    assert isinstance(load(), ctypes.CDLL)
    (folder,) = tmp_path.glob("multimax-*")
    assert len(list(folder.iterdir())) == 1
    c_build._folder_to_write.cache_clear()


@needs_kernels
def test_a_kept_library_needs_no_compiler(cache, compiler, monkeypatch):
    compiler()
    load()
    (kept,) = cache.iterdir()
    for broken in ("exit 1", "kill -9 $$"):
        compiler(broken)
        assert Path(load()._name) == kept
    monkeypatch.setenv("CC", "nowhere")
    assert Path(load()._name) == kept
    monkeypatch.setattr(c_build, "_processor", lambda: "another")
    assert load().startswith("CC is 'nowhere', which is not found")
    monkeypatch.setattr(c_build, "_processor", lambda: None)
    assert load().startswith("CC is 'nowhere', which is not found")


@needs_kernels
def test_threads_compile_once(cache, compiler, monkeypatch):
    compiler('case "$*" in *kernels.so*) sleep 0.3;; esac')
    c_build._folder_to_write.cache_clear()
    monkeypatch.setattr(c_library, "_load", functools.cache(c_library._load.__wrapped__))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(c_library._library_or_reason(torch.float32)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == compiler.runs() == 1
    assert isinstance(found[0], ctypes.CDLL)


@needs_kernels
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_it_says_that_it_compiles(cache, compiler, monkeypatch, capsys, rank):
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    compiler()
    load()
    said = capsys.readouterr()
    expected = (
        "multimax compiles its CPU kernels for torch.float32, once on this machine: about 10 s "
        "(beforehand: python -m multimax.kernels)\n"
    )
    assert said == ("", "" if rank == "1" else expected)
    load()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@needs_kernels
def test_compiling_beforehand(cache, compiler, tmp_path, monkeypatch, capsys):
    def run(*environment):
        """Another time, in a process that has imported what it needs."""

        def child():
            os.environ.update(environment)
            for known in (c_library._load, c_library._warn_if_unavailable,
                          c_build._folder_to_write, c_build._target):  # fmt: skip
                known.cache_clear()
            sys.argv = ["multimax.kernels"]
            with said.open("w") as stream, redirect_stdout(stream):
                code = main()
            os._exit(code)

        said = tmp_path / "said"
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        return process.exitcode, said.read_text()

    compiler()
    command = [sys.executable, "-m", "multimax.kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = sorted(path.name for path in cache.iterdir())
    assert (done.returncode, len(names)) == (0, 2)
    for precision, name in zip(("float64", "float32"), names, strict=True):
        pattern = rf"^{precision}: compiled in \d+\.\d s, {re.escape(str(cache / name))}$"
        assert re.search(pattern, done.stdout, re.MULTILINE)
    code, said = run()
    assert (code, said.count("kept already")) == (0, 2)
    assert compiler.runs() == 2
    code, said = run(("CC", "nowhere"), ("XDG_CACHE_HOME", str(tmp_path / "other")))
    assert (code, said.count("CC is 'nowhere', which is not found")) == (1, 2)
    cache.chmod(0o777)
    code, said = run()
    assert (code, said.count("cannot be used: nothing is kept")) == (1, 2)
    monkeypatch.setattr(sys, "argv", ["multimax.kernels", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "Compile the CPU kernels" in capsys.readouterr().out


@pytest.mark.slow
@needs_kernels
def test_two_processes_compile_at_once(cache, compiler):
    compiler('case "$*" in *kernels.so*) sleep 0.5;; esac')
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=lambda: os._exit(isinstance(load(), str))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert compiler.runs() == 2
    assert len(list(cache.iterdir())) == 1
