"""Kernels that came with the package: which are loaded, on which processor, and when none is."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled import load
from kernels_here import needs_kernels

from multimax.__main__ import main
from multimax.files import digest
from multimax.kernels import c_build, c_library, prebuilt

# Flags as Linux lists them, but for those that no level asks for.
CORE2 = "fpu vme sse sse2 cx16 lahf_lm pni ssse3"
IVY_BRIDGE = f"{CORE2} popcnt sse4_1 sse4_2 xsave avx f16c"
HASWELL = f"{IVY_BRIDGE} avx2 bmi1 bmi2 fma abm movbe"
KNIGHTS_LANDING = f"{HASWELL} avx512f avx512pf avx512er avx512cd"
SKYLAKE_SERVER = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl"
V3, V4 = "x86-64-v3", "x86-64-v4"
PROCESSORS = {
    "Core 2": ([CORE2], []),
    "Ivy Bridge": ([IVY_BRIDGE], []),
    "Haswell": ([HASWELL], [V3]),
    "Knights Landing": ([KNIGHTS_LANDING], [V3]),
    "Skylake server": ([SKYLAKE_SERVER] * 2, [V4, V3]),
    "two kinds of cores": ([SKYLAKE_SERVER, HASWELL], [V3]),
    "no flags, as on Arm": ([], []),
}
LOADER = Path("/lib64/ld-linux-x86-64.so.2")


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Makes the machine one of these processors, and gives the package libraries of a content."""
    folder = tmp_path / "compiled"
    monkeypatch.setattr(prebuilt.platform, "machine", lambda: "x86_64")

    def processors(*flags):
        (tmp_path / "cpuinfo").write_text(
            "".join(f"processor\t: {n}\nflags\t\t: {f}\n\n" for n, f in enumerate(flags))
        )
        monkeypatch.setattr(prebuilt, "PROCESSOR", tmp_path / "cpuinfo")

    def libraries(content=b"library", named=None):
        monkeypatch.setattr(prebuilt, "FOLDER", folder)
        folder.mkdir()
        for level in (V3, V4):
            for precision in ("float", "double"):
                name = prebuilt._name(level, precision)
                (folder / f"{name}-{digest(named or content)}.so").write_bytes(content)
        return folder

    processors(HASWELL)
    libraries.processors = processors
    return libraries


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_best_level_of_a_processor(plant, name):
    flags, expected = PROCESSORS[name]
    plant.processors(*flags)
    assert prebuilt.levels() == expected
    folder = plant()
    for precision in ("float", "double"):
        found = prebuilt.find_prebuilt(precision)
        if expected:
            assert found.parent == folder
            assert found.name.startswith(f"kernels-{precision}-{expected[0]}-")
        else:
            assert found is None


def test_a_level_needs_every_one_of_its_instructions(plant):
    flags = SKYLAKE_SERVER.split()
    for missing in flags:
        plant.processors(" ".join(flag for flag in flags if flag != missing))
        older = missing in HASWELL.split()
        expected = [V4, V3] if missing in ("fpu", "vme", "sse", "sse2") else [] if older else [V3]
        assert prebuilt.levels() == expected, missing


@pytest.mark.skipif(not LOADER.exists(), reason="needs glibc's loader for x86-64")
def test_the_levels_of_this_machine_are_those_of_its_loader():
    said = subprocess.run([LOADER, "--help"], capture_output=True, text=True).stdout
    if V3 not in said:
        pytest.skip("a glibc before 2.33, which lists no levels")
    assert prebuilt.levels() == re.findall(r"(x86-64-v[34]) \(supported", said)


def test_no_level_on_another_machine_or_where_the_processor_is_not_described(plant, monkeypatch):
    monkeypatch.setattr(prebuilt, "PROCESSOR", Path("/nowhere"))
    assert prebuilt.levels() == []
    plant.processors(SKYLAKE_SERVER)
    monkeypatch.setattr(prebuilt.platform, "machine", lambda: "aarch64")
    assert prebuilt.levels() == []


def test_half_a_library_and_one_of_other_sources_are_not_found(plant, monkeypatch):
    folder = plant(content=b"libr", named=b"library")
    assert prebuilt.find_prebuilt("float") is None
    shutil.rmtree(folder)
    plant()
    assert prebuilt.find_prebuilt("float") is not None
    changed = c_build.sources() | {"softmax.c": b"int x;"}
    with monkeypatch.context() as patch:
        patch.setattr(c_build, "sources", lambda: changed)
        assert prebuilt.find_prebuilt("float") is None
    monkeypatch.setattr(prebuilt, "COMPILE", [*prebuilt.COMPILE, "-ffast-math"])
    assert prebuilt.find_prebuilt("float") is None


@needs_kernels
def test_what_came_with_the_package_is_loaded_and_nothing_compiled(
    cache, compiler, library, plant, capsys, monkeypatch
):
    compiler()
    folder = plant(library.read_bytes())
    assert Path(load()._name).parent == folder
    assert not cache.exists()
    monkeypatch.setenv("CC", "nowhere")
    assert Path(load()._name).parent == folder
    assert (compiler.runs(), capsys.readouterr()) == (0, ("", ""))
    monkeypatch.setattr(sys, "argv", ["multimax", "kernels"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    said = capsys.readouterr().out.splitlines()
    for name, precision, line in zip(
        ("float32", "float64"), ("float", "double"), said, strict=True
    ):
        assert line.startswith(f"{name}: came with the package, {folder}/kernels-{precision}-{V3}-")


@needs_kernels
def test_what_cannot_be_loaded_is_compiled_as_if_there_were_none(cache, compiler, plant, capsys):
    compiler()
    plant(b"no library")
    assert isinstance(load(), ctypes.CDLL)
    assert compiler.runs() == len(list(cache.iterdir())) == 1
    said = capsys.readouterr().err
    assert said.startswith("multimax cannot load its prebuilt CPU kernels: ")
    assert "compiled/kernels-float-x86-64-v3-" in said
    assert "multimax compiles its CPU kernels for torch.float32" in said


@needs_kernels
def test_a_processor_without_a_library_compiles(cache, compiler, library, plant):
    plant(library.read_bytes())
    plant.processors(IVY_BRIDGE)
    compiler()
    assert Path(load()._name).parent == cache
    assert compiler.runs() == 1


def test_the_platform_of_a_wheel_is_that_of_the_newest_symbol(tmp_path):
    assert prebuilt.platform_tag(tmp_path) == "linux_x86_64"
    (tmp_path / "a.so").write_bytes(b"\0pow\0GLIBC_2.2.5\0GLIBC_2.9\0libm.so.6\0")
    assert prebuilt.platform_tag(tmp_path) == "manylinux_2_9_x86_64"
    (tmp_path / "b.so").write_bytes(b"\0exp\0GLIBC_2.14\0GLIBC_2.3.4\0")
    assert prebuilt.platform_tag(tmp_path) == "manylinux_2_14_x86_64"


def test_another_machine_compiles_nothing_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt.platform, "machine", lambda: "aarch64")
    with pytest.raises(c_build.NoLibraryError, match="on Linux on x86-64 alone"):
        prebuilt.compile_ahead(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_both_precisions_have_a_name():
    assert {c_build.precision(dtype) for dtype in c_library.DTYPES} == set(prebuilt.PRECISIONS)
    assert c_build.precision(torch.float64) == "double"
