"""Without a GPU the Triton kernels run in Triton's interpreter, on tensors of the CPU."""

import os
import sys

import pytest
import torch

from multimax.kernels import c_build, prebuilt

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    # It is read when triton is imported, which parts of torch do: let the next import be the first.
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        if not name.startswith("triton._C"):
            del sys.modules[name]


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Give the interpreter products of bf16 tiles: Triton 3.8 multiplies their bits as integers."""
    if not INTERPRETED:
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def create_dot(self, a, b, *rest):
        bf16, fp32 = interpreter.tl.bfloat16, interpreter.tl.float32
        a, b = (self.cast_impl(tile, fp32) if tile.dtype == bf16 else tile for tile in (a, b))
        return original(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.fixture
def none_prebuilt(tmp_path, monkeypatch):
    """The package came without compiled kernels, as from the repository."""
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "none")


@pytest.fixture
def cache(tmp_path, monkeypatch, none_prebuilt):
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
def compiler(library, tmp_path, monkeypatch, none_prebuilt):
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
