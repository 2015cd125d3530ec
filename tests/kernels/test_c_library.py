"""Compiling the C kernels: where they are kept, and what happens where that cannot be done."""

import ctypes
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from definition import needs_kernels

from multimax.kernels import c_library

ROOT = Path(__file__).parents[2]


def load(dtype=torch.float32):
    """The library or the reason why there is none, as in a new process."""
    c_library._cache.cache_clear()
    return c_library._library_or_reason.__wrapped__(dtype)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder where libraries are kept during the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "multimax"
    c_library._cache.cache_clear()


@pytest.fixture(scope="module")
def library():
    """A library that has been compiled, for compilers to copy."""
    yield c_library._compile(c_library._compiler(), torch.float32)
    c_library._cache.cache_clear()


@pytest.fixture
def compiler(library, tmp_path, monkeypatch):
    """Makes CC a quick compiler that counts its runs."""
    runs = tmp_path / "runs"

    def install(before="", version="1.0"):
        script = tmp_path / "compiler"
        script.write_text(
            f"#!/bin/sh\n{before}\n"
            f'case "$*" in *--version) echo {version}; exit;; esac\n'
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
    assert len(list((tmp_path / ".cache" / "multimax").iterdir())) == 1
    c_library._cache.cache_clear()


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
    monkeypatch.setattr(c_library, "FLAGS", [*c_library.FLAGS, "-g"])
    load()
    monkeypatch.setattr(c_library, "_processor", lambda: "another")
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
    script = compiler('case "$*" in *--version) ;; *) echo no space >&2; exit 1;; esac')
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


@needs_kernels
@pytest.mark.parametrize("structure", c_library.STRUCTURES)
@pytest.mark.parametrize("change", ["missing", "added", "wider", "last narrower"])
def test_a_structure_that_is_another_one_in_c(monkeypatch, structure, change):
    fields = dict(structure._fields_)
    last = list(fields)[-1]
    if change == "missing":
        del fields[last]
    elif change == "added":
        fields["another"] = ctypes.c_int64
    elif change == "wider":
        fields[next(iter(fields))] = ctypes.c_int64 * 2
    else:  # of the same size, but written elsewhere
        del fields[last]
        fields |= {"padding": ctypes.c_int32, last: ctypes.c_int32}
    wrong = c_library._structure(structure.__name__, **fields)
    monkeypatch.setattr(c_library, "STRUCTURES", (wrong,))
    reason = load()
    expected = rf"structure {structure.__name__} has size and last offset \[.*\] in csrc, but \["
    assert re.match(expected, reason)
    monkeypatch.setattr(c_library, "_library_or_reason", lambda dtype: reason)
    with pytest.raises(RuntimeError, match=expected):
        c_library.call(torch.float32, "softmax_forward")
    with pytest.warns(UserWarning, match=expected):
        assert c_library._warn_if_unavailable.__wrapped__() == reason


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
    c_library._cache.cache_clear()


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


def test_what_the_kernels_answer(monkeypatch):
    library = SimpleNamespace(good=lambda *pointers: 0, bad=lambda *pointers: 1)
    monkeypatch.setattr(c_library, "_library_or_reason", lambda dtype: library)
    c_library.call(torch.float32, "good", torch.ones(3), None, 2)
    with pytest.raises(MemoryError, match="no memory for the working space of bad"):
        c_library.call(torch.float32, "bad")
    with pytest.raises(ValueError, match="a tensor is on meta, the others are on the CPU"):
        c_library.call(torch.float32, "good", torch.ones(3, device="meta"))


# Every normalizer inside of attention, by default and by definition; what there was to say.
EVERYTHING = """
import json
import warnings
import torch
from multimax import MultiMax, build_normalizer, registered_normalizers
from multimax.attention import attention

def results(normalizer, backend):
    out = attention(*tensors, normalizer, causal=True, backend=backend)
    return out, *torch.autograd.grad(out.square().sum(), tensors)

warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    tensors = [torch.randn(2, 3, 40, 8, requires_grad=True) for _ in range(3)]
    for name in registered_normalizers():
        normalizer = build_normalizer(name)
        torch.testing.assert_close(results(normalizer, None), results(normalizer, "eager"))
said = [str(warning.message) for warning in caught if "multimax" in str(warning.message)]
try:
    named = attention(*tensors, MultiMax(), backend="c").shape
except ValueError as error:
    named = str(error)
print(json.dumps([said, named]))
"""


def run_everything(**environment):
    """What `EVERYTHING` prints in this environment."""
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_without_a_compiler_all_works_and_a_warning_says_so_once(tmp_path):
    reason = "no C compiler was found; install gcc or clang, or set CC"
    said, named = run_everything(CC="", PATH="", XDG_CACHE_HOME=tmp_path)
    assert said == [f"multimax runs without its compiled CPU kernels: {reason}"]
    assert named == f"backend 'c' cannot compute this attention: {reason}"


@pytest.mark.slow
@needs_kernels
def test_a_plain_compiler_and_no_place_to_keep_the_library(tmp_path):
    """Without OpenMP and for any processor; what is written is gone in the end."""
    script, temporary = tmp_path / "plain", tmp_path / "temporary"
    temporary.mkdir()
    script.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*|*-march*) exit 1;; esac\n'
        f'exec {shlex.join(c_library._compiler())} "$@" -O1\n'  # which is quicker
    )
    script.chmod(0o755)
    said, named = run_everything(CC=script, XDG_CACHE_HOME=script, TMPDIR=temporary)
    assert said == []
    assert named == [2, 3, 40, 8]
    # Torch itself may leave a folder of its compiler's there.
    assert [path for path in temporary.iterdir() if "torchinductor" not in path.name] == []


def test_what_is_no_module_is_in_the_wheel_and_in_the_source_distribution(tmp_path):
    sources = {path.name for path in (resources.files("multimax.kernels") / "csrc").iterdir()}
    assert {"rows.h", "softmax.c", "attention.c"} <= sources
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "multimax/kernels", tmp_path / "multimax/kernels")
    for name in ("__init__.py", "py.typed"):
        shutil.copy(ROOT / "multimax" / name, tmp_path / "multimax")
    build = "from setuptools.build_meta import *; build_wheel('dist'); build_sdist('dist')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,), (archive,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    needed = {f"multimax/kernels/csrc/{name}" for name in sources} | {"multimax/py.typed"}
    assert needed <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(archive) as members:
        assert needed <= {name.partition("/")[2] for name in members.getnames()}
