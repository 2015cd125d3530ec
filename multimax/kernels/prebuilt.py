"""Kernels compiled ahead of time, which a wheel for one platform carries beside `csrc/`.

There is one library for each level of x86-64 and each precision; the best level that the processor
has is loaded. They are part of the package and trusted as its code is. A name holds a digest of the
sources, so that a library of other sources is never loaded. Elsewhere there is none, and `c_build`
compiles when the kernels are first used.
"""

import platform
import re
import tempfile
from pathlib import Path

from multimax.files import digest, write_atomically
from multimax.kernels import c_build

FOLDER = Path(__file__).with_name("compiled")
PROCESSOR = Path("/proc/cpuinfo")
# What each level needs (System V ABI for AMD64, "micro-architecture levels"), as Linux names it;
# abm is LZCNT, pni is SSE3. Linux lists an instruction only if it also keeps its registers.
_V2 = {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS = {"x86-64-v4": _V4, "x86-64-v3": _V3}  # the best one first
PRECISIONS = {"float": [], "double": ["-DDOUBLE"]}
# No library is linked that brings OpenMP: its functions are those of torch's, which are global in
# the process, whatever the name of the file. `now`: if they are not there, loading is what fails.
COMPILE = [*[flag for flag in c_build.FLAGS if flag != "-shared"], "-fopenmp"]
LINK = ["-shared", "-Wl,-z,now"]


def find_prebuilt(precision: str) -> Path | None:
    """The library for this processor that is in the package; None if there is none.

    Args:
        precision: one of `PRECISIONS`.
    """
    for level in levels():
        for path in FOLDER.glob(f"{_name(level, precision)}-*.so"):
            if c_build.is_whole(path):
                return path
    return None


def levels() -> list[str]:
    """Those of `LEVELS` that every processor of this machine has, the best one first."""
    if platform.machine() != "x86_64":
        return []
    try:
        lines = PROCESSOR.read_text(errors="replace").splitlines()
    except OSError:
        return []
    known = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    common = set.intersection(*known) if known else set()
    return [level for level, needed in LEVELS.items() if needed <= common]


def compile_ahead(folder: Path) -> None:
    """Compile every library into a folder, as `setup.py` does for a wheel.

    Raises:
        NoLibraryError: there is no compiler that can.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise c_build.NoLibraryError("kernels are compiled ahead of time on Linux on x86-64 alone")
    compiler = c_build.find_compiler()
    for level in LEVELS:
        for precision, macros in PRECISIONS.items():
            with tempfile.TemporaryDirectory(prefix="multimax-") as scratch:
                objects = []
                for unit in c_build.write_sources(Path(scratch)):
                    objects.append(f"{unit}.o")
                    arguments = [f"-march={level}", *macros, "-c", unit, "-o", objects[-1]]
                    c_build.run(compiler, [*COMPILE, *arguments], c_build.COMPILE_SECONDS, True)
                built = Path(scratch) / "kernels.so"
                arguments = [*LINK, *objects, "-o", str(built), "-lm"]
                c_build.run(compiler, arguments, c_build.COMPILE_SECONDS, True)
                content = built.read_bytes()
            path = folder / f"{_name(level, precision)}-{digest(content)}.so"
            write_atomically(path, lambda stream, content=content: stream.write(content))


def platform_tag(folder: Path) -> str:
    """The platform of a wheel with these libraries: manylinux of the newest glibc they name."""
    found = {
        (int(major), int(minor))
        for path in folder.glob("*.so")
        for major, minor in re.findall(rb"\0GLIBC_(\d+)\.(\d+)", path.read_bytes())
    }
    if not found:  # of another C library
        return "linux_x86_64"
    major, minor = max(found)
    return f"manylinux_{major}_{minor}_x86_64"


def _name(level: str, precision: str) -> str:
    """The part of a library's name that says what it is compiled from."""
    options = repr((COMPILE, LINK))
    key = digest(b"\0".join([*c_build.sources().values(), options.encode()]))
    return f"kernels-{precision}-{level}-{key}"
