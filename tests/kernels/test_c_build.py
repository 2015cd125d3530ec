"""Compiling the C kernels: where they are kept, which are used, and which compilers fail how."""

import ctypes
import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest
import torch
from definition import needs_kernels

from multimax.kernels import c_build, c_library

ROOT = Path(__file__).parents[2]


def load(dtype=torch.float32):
    """The library or the reason why there is none, as in a new process."""
    c_build._folder_to_write.cache_clear()
    c_build._target.cache_clear()
    return c_library._load.__wrapped__(dtype)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder where libraries are kept during the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "multimax" / "kernels"
    c_build._folder_to_write.cache_clear()


@pytest.fixture(scope="module")
def library():
    """A library that has been compiled, for compilers to copy."""
    yield c_build.find_library(torch.float32) or c_build.compile_library(torch.float32)
    c_build._folder_to_write.cache_clear()


@pytest.fixture
def compiler(library, tmp_path, monkeypatch):
    """Makes CC a quick compiler that counts its runs."""
    runs = tmp_path / "runs"

    def install(before="", version="1.0"):
        script = tmp_path / "compiler"
        script.write_text(
            f"#!/bin/sh\n{before}\n"
            f'case "$*" in *-dM*) echo {version}; exit;; esac\n'
            f'echo "$*" >> {runs}\n'
            'while [ "$1" != -o ]; do shift; done\n'
            f'cp {library} "$2"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        return script

    install.runs = lambda: len(runs.read_text().splitlines()) if runs.exists() else 0
    return install


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
    compiler(version="2.0")
    load()
    monkeypatch.setattr(c_build, "FLAGS", [*c_build.FLAGS, "-g"])
    load()
    monkeypatch.setattr(c_build, "_processor", lambda: "another")
    load()
    assert compiler.runs() == len(list(cache.iterdir())) == 4


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
    assert load().startswith(f"{script} failed: ")
    assert "returned non-zero exit status 1" in load()
    assert not list(cache.iterdir())


@needs_kernels
def test_what_is_compiled_cannot_be_loaded(cache, compiler):
    script = compiler(
        'while [ "$1" != -o ]; do test $# = 1 && echo 1 && exit; shift; done; echo > "$2"; exit'
    )
    assert load().startswith(f"{script} failed: ")


@pytest.mark.parametrize("value", ["nowhere", "/nowhere/gcc -m64"])
def test_no_such_compiler(cache, monkeypatch, value):
    monkeypatch.setenv("CC", value)
    assert load() == f"CC is '{value}', which is not found; install gcc or clang, or set CC"


def test_no_compiler(cache, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert load() == "no C compiler was found; install gcc or clang, or set CC"
    monkeypatch.setattr(c_library, "_library_or_reason", lambda dtype: "no C compiler was found")
    with pytest.raises(RuntimeError, match="no C compiler was found"):
        c_library.call(torch.float32, "softmax_forward")


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
