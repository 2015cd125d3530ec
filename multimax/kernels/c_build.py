"""Compiling `csrc/` to shared libraries, and keeping them on disk.

A library is kept in a folder and used again only if nobody else can have written it. Its name says
what it was made of, for what processor and by what compiler, so that a home directory may be shared
between machines; one that is kept for this processor is used without a compiler.
"""

from __future__ import annotations

import atexit
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from multimax.files import digest, user_cache, write_atomically

if TYPE_CHECKING:  # setup.py compiles where torch is not installed
    import torch

# Whatever speeds up loops without changing how infinities and NaN are treated.
FLAGS = ["-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
# Where a loop happens to lie makes 2 % of the time of attention.
FLAGS += ["-falign-functions=64", "-falign-loops=64"]
# What a compiler may not know is left out, in this order. OpenMP is that of torch, in its process.
OPTIONAL = (["-march=native", "-fopenmp"], ["-march=native"], [])
COMPILE_SECONDS, ASK_SECONDS = 300, 30  # after which a compiler is taken to hang
# Lines of /proc/cpuinfo by which processors of different instructions differ; those of Arm last.
PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
PROCESSOR += ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision")
PROCESSOR += ("Features",)


class NoLibraryError(Exception):
    """There is no library and none can be made; the text says why."""


def find_library(dtype: torch.dtype) -> Path | None:
    """The library of this compiler, processor and source that is kept; None if there is none.

    Without a compiler, that of this processor and source by any.

    Raises:
        NoLibraryError: there is neither a library nor a compiler that works.
    """
    name = _name(dtype)
    try:
        pattern = f"{name}-*-{_target(tuple(find_compiler()))}-*.so"
    except NoLibraryError:
        processor = _processor()
        found = _kept(f"{name}-{processor}-*.so") if processor else None
        if found is None:
            raise
        return found
    return _kept(pattern)


def compile_library(dtype: torch.dtype) -> Path:
    """Compile for this processor and keep the result, in a folder of this process if need be.

    Raises:
        NoLibraryError: there is no compiler that works.
    """
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(prefix="multimax-") as folder:
        units = write_sources(Path(folder))
        macros = ["-DDOUBLE"] if precision(dtype) == "double" else []
        built = Path(folder) / "kernels.so"
        for optional in OPTIONAL:
            last = optional == OPTIONAL[-1]
            arguments = [*FLAGS, *optional, *macros, *units, "-o", str(built), "-lm"]
            if run(compiler, arguments, COMPILE_SECONDS, must=last) is not None:
                break
        content = built.read_bytes()
    described = f"{_name(dtype)}-{_processor() or 'unknown'}-{_target(tuple(compiler))}"
    path = _folder_to_write() / f"{described}-{digest(content)}.so"

    def write(stream):
        if hasattr(os, "fchmod"):
            os.fchmod(stream.fileno(), 0o644)  # whatever the umask: see `distrust`
        stream.write(content)

    remedy = "The kernels cannot be kept there: set XDG_CACHE_HOME to another folder"
    write_atomically(path, write, remedy, several_writers=True)
    return path


def find_compiler() -> list[str]:
    """The command of the compiler, which may have arguments, as in CC="ccache gcc".

    Raises:
        NoLibraryError: there is none.
    """
    remedy = "install gcc or clang, or set CC"
    wanted = os.environ.get("CC", "")
    if not wanted.strip():
        found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if found is None:
            raise NoLibraryError(f"no C compiler was found; {remedy}")
        return [found]
    try:
        command = shlex.split(wanted)
    except ValueError as error:
        raise NoLibraryError(
            f"CC is {wanted!r}, which is no command ({error}); {remedy}"
        ) from error
    if not command or not shutil.which(command[0]):
        raise NoLibraryError(f"CC is {wanted!r}, which is not found; {remedy}")
    return command


def write_sources(folder: Path) -> list[str]:
    """Copy `csrc/` into a folder, and return the files to compile."""
    for file, content in sources().items():
        (folder / file).write_bytes(content)
    return [str(folder / file) for file in sources() if file.endswith(".c")]


def cache_folder() -> Path:
    """Where libraries are kept, whether or not it is there; RuntimeError without a home."""
    return user_cache() / "kernels"


def distrust(path: Path) -> str | None:
    """Why others could have written a file or the content of a folder; None if they could not.

    It must belong to the user or to root, who alone may write it, and must be no link. In a folder
    above, others may replace it only if that folder is sticky.
    """
    if not hasattr(os, "geteuid"):
        return None  # no owners and modes, as on Windows
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link"
    if found.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path}: chmod go-w it"
    for parent in path.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"others may write to {parent}: chmod o-w it"
    return None


def is_whole(path: Path) -> bool:
    """Whether a name ends with the digest of its content: half a library would end the process."""
    return path.stem.endswith(f"-{digest(path.read_bytes())}")


def _kept(pattern: str) -> Path | None:
    """The newest whole library of this name that only the user and root can have written."""
    try:
        folder = cache_folder()
        if distrust(folder):
            return None
        found = [path for path in folder.glob(pattern) if not distrust(path)]
        whole = filter(is_whole, found)
        return max(whole, key=lambda path: path.stat().st_mtime, default=None)
    except (OSError, RuntimeError):  # it is not there or cannot be read; there is no home
        return None


@cache
def _folder_to_write() -> Path:
    """`cache_folder()`, or a folder of this process where that cannot be written or trusted."""
    try:
        path = cache_folder()
        for folder in (path.parent.parent, path.parent, path):  # whatever the umask
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        problem = distrust(path)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        problem = str(error)
    else:
        if problem is None:
            return path
    print(f"multimax cannot keep its compiled CPU kernels: {problem}", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="multimax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def sources() -> dict[str, bytes]:
    """The files of `csrc/` by name."""
    folder = resources.files("multimax.kernels") / "csrc"
    files = sorted(folder.iterdir(), key=lambda path: path.name)
    return {path.name: path.read_bytes() for path in files if path.name.endswith((".c", ".h"))}


def _name(dtype: torch.dtype) -> str:
    """The part of a library's name that says what it is compiled from."""
    options = repr((FLAGS, OPTIONAL, platform.machine(), platform.libc_ver()))
    key = digest(b"\0".join([*sources().values(), options.encode()]))
    return f"kernels-{precision(dtype)}-{key}"


def precision(dtype: torch.dtype) -> str:
    """What C calls fp32 and fp64."""
    return "double" if dtype.itemsize == 8 else "float"


def _processor() -> str | None:
    """A digest of the processor as its system describes it; None where that is not known.

    Two of one description may still differ, if one system hides instructions. So a library is found
    by it only where no compiler can be asked for what `-march=native` means.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    found = {line for line in lines if line.partition(":")[0].strip() in PROCESSOR}
    return digest("\n".join(sorted(found))) if found else None


@cache
def _target(compiler: tuple[str, ...]) -> str:
    """A digest of the compiler, its version and the instructions that it would use.

    Those are the macros that it defines, which say how it reads `-march=native` on this machine.

    Raises:
        NoLibraryError: it does not answer.
    """
    question = ["-dM", "-E", "-x", "c", os.devnull]
    native = run(compiler, [*FLAGS, "-march=native", *question], ASK_SECONDS, must=False)
    if native is None:
        native = run(compiler, [*FLAGS, *question], ASK_SECONDS, must=True)
    return digest(repr((compiler, native)))


def run(
    compiler: Sequence[str], arguments: Sequence[str], seconds: float, must: bool
) -> bytes | None:
    """What the compiler prints; None if it fails, NoLibraryError if it `must` not, or hangs."""
    failed = f"{shlex.join(compiler)} failed"
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            # A group of its own, which ends whole: a compiler runs others.
            process = subprocess.Popen(
                [*compiler, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise NoLibraryError(f"{failed}: {error}") from error
        try:
            code = process.wait(seconds)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise NoLibraryError(f"{failed}: no answer for {seconds:g} s") from error
            raise
        out.seek(0)
        errors.seek(0)
        if code == 0:
            return out.read()
        if not must:
            return None
        details = errors.read().decode(errors="replace").strip()[-500:]
        raise NoLibraryError(f"{failed}: {details or f'exit status {code}'}")


def _end(process: subprocess.Popen) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
