"""Wheels and the source distribution: what is in them, and what they do when installed."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import multimax
from multimax.kernels import c_build, prebuilt

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).parents[1]
MEGABYTE = 1_000_000

# As in the environment that pip builds in: torch is not there.
BUILD = """
import sys
sys.modules["torch"] = None
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])("dist"))
"""

# What was installed computes, and says with what.
COMPUTE = """
import json
import torch
import multimax
from multimax.kernels import c_library
from multimax import MultiMax, use_backend

scores, normalizer = torch.randn(4, 33), MultiMax()
with torch.no_grad(), use_backend("c"):
    probabilities = normalizer(scores)
with torch.no_grad(), use_backend("eager"):
    error = (probabilities - normalizer.double()(scores.double())).abs().max().item()
libraries = [c_library._library_or_reason(dtype)._name for dtype in c_library.DTYPES]
lines = open("/proc/self/maps").read().splitlines()
openmp = {line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line}
print(json.dumps([multimax.__file__, error, libraries, len(openmp)]))
"""


def build(tree, kind, **environment):
    """Build in a copy of the repository; returns the file, or what the failed build printed."""
    command = [sys.executable, "-c", BUILD, kind]
    environment = {"MULTIMAX_PREBUILT": "0"} | environment
    done = subprocess.run(
        command, cwd=tree, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return tree / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the repository, with what an older build may have left."""
    tree = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("multimax", "experiments", "benchmarks", "hydra_plugins", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    stale = tree / "build/lib/multimax/data/embedded/old.npz"
    stale.parent.mkdir(parents=True)
    stale.touch()
    return tree


@pytest.fixture(scope="module")
def pure(tree):
    return build(tree, "wheel")


def install(wheel, folder):
    """Unpack a wheel as pip does, with its script, and without a network."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--disable-pip-version-check", "--no-compile", "--target", folder, wheel]
    subprocess.run(pip, check=True)
    return folder


def run(folder, *arguments, **environment):
    """Python with the installed package, away from the repository."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )


def library_files():
    """What the library consists of, without data."""
    files = (path for path in (ROOT / "multimax").rglob("*") if path.suffix in (".py", ".c", ".h"))
    names = {path.relative_to(ROOT).as_posix() for path in files}
    return {name for name in names if "/embedded/" not in name} | {"multimax/py.typed"}


@pytest.mark.slow
def test_a_wheel_is_the_library_without_data_and_experiments(pure):
    assert pure.name == f"multimax-{multimax.__version__}-py3-none-any.whl"
    assert pure.stat().st_size < 0.5 * MEGABYTE
    names = {name for name in zipfile.ZipFile(pure).namelist() if ".dist-info/" not in name}
    assert {"multimax/__init__.py", "multimax/kernels/csrc/softmax.c"} < names
    assert names == library_files()
    (scripts,) = (name for name in zipfile.ZipFile(pure).namelist() if "entry_points" in name)
    assert b"multimax = multimax.__main__:main" in zipfile.ZipFile(pure).read(scripts)


@pytest.mark.slow
def test_a_source_distribution_is_the_same_and_can_be_built(tree):
    archive = build(tree, "sdist")
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    ours = {name for name in names if name.startswith("multimax/") and Path(name).suffix}
    assert ours == library_files()
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} < names
    assert not {name for name in names if name.startswith(("experiments", "configs"))}
    assert archive.stat().st_size < 0.5 * MEGABYTE


def can_compile_ahead():
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or not prebuilt.levels():
        return False
    try:
        compiler = c_build.find_compiler()
    except c_build.NoLibraryError:
        return False
    question = [*compiler, "-march=x86-64-v4", "-E", "-x", "c", os.devnull]
    return subprocess.run(question, capture_output=True).returncode == 0


needs_levels = pytest.mark.skipif(
    not can_compile_ahead(), reason="needs x86-64-v3, and gcc 11 or clang 12 or newer"
)


@pytest.mark.slow
@needs_levels
def test_a_wheel_with_kernels_computes_where_there_is_no_compiler(tree, tmp_path):
    script = tmp_path / "quick"  # optimizes nothing
    script.write_text(f'#!/bin/sh\nexec {shlex.join(c_build.find_compiler())} "$@" -O0\n')
    script.chmod(0o755)
    wheel = build(tree, "wheel", MULTIMAX_PREBUILT="1", CC=str(script))
    pattern = r"multimax-[\d.]+-py3-none-(manylinux_2_\d+|linux)_x86_64\.whl"
    assert re.fullmatch(pattern, wheel.name), wheel
    assert wheel.stat().st_size < 2 * MEGABYTE
    content = zipfile.ZipFile(wheel)
    libraries = {name for name in content.namelist() if name.endswith(".so")}
    assert set(content.namelist()) >= library_files()
    kinds = {name.rpartition("/")[2].rsplit("-", 2)[0] for name in libraries}
    levels = ("x86-64-v3", "x86-64-v4")
    assert kinds == {f"kernels-{kind}-{level}" for kind in ("float", "double") for level in levels}
    assert len(libraries) == 4
    assert not any(b"libgomp" in content.read(name) for name in libraries)  # torch's is used

    folder, cache = install(wheel, tmp_path / "site"), tmp_path / "cache"
    nothing = {"PATH": str(tmp_path / "nowhere"), "CC": "", "XDG_CACHE_HOME": str(cache)}
    done = run(folder, "-W", "error::UserWarning", "-c", COMPUTE, **nothing)
    assert (done.returncode, done.stderr) == (0, "")
    where, error, loaded, openmp = json.loads(done.stdout)
    assert Path(where).parent == folder / "multimax"
    assert 0 < error < 1e-6
    best = prebuilt.levels()[0]
    for path, kind in zip(loaded, ("float", "double"), strict=True):
        assert path.startswith(str(folder / f"multimax/kernels/compiled/kernels-{kind}-{best}-"))
    assert openmp == 1
    assert not cache.exists()
    done = run(folder, "bin/multimax", "--version")
    assert done.stdout == f"{multimax.__version__}\n", done.stderr
    pure = zipfile.ZipFile(build(tree, "wheel"))  # after the other one, in the same folder
    assert not [name for name in pure.namelist() if name.endswith(".so")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        (
            {"MULTIMAX_PREBUILT": "yes"},
            "MULTIMAX_PREBUILT is 'yes': 1 compiles kernels, 0 does not",
        ),
        (
            {"MULTIMAX_PREBUILT": "1", "CC": "nowhere"},
            "CC is 'nowhere', which is not found; install gcc or clang, or set CC",
        ),
    ],
)
def test_a_wheel_that_cannot_be_built(tree, environment, problem):
    if environment.get("CC") and platform.machine() != "x86_64":
        pytest.skip("kernels are compiled ahead for x86-64")
    assert build(tree, "wheel", **environment) == f"error: {problem}"
