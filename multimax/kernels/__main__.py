"""Compile the C kernels beforehand: `python -m multimax.kernels`."""

import argparse
import sys
import time

from multimax.kernels import c_build, c_library


def main() -> int:
    """Compile for fp32 and fp64 what is not there yet; 1 if one is missing or cannot be kept."""
    description = (
        "Compile the CPU kernels of multimax, which else happens when they are first used."
    )
    argparse.ArgumentParser("python -m multimax.kernels", description=description).parse_args()
    failed = False
    for dtype in c_library.DTYPES:
        name = str(dtype).removeprefix("torch.")
        library = c_library.load_prebuilt(dtype)
        if library is not None:
            print(f"{name}: came with the package, {library._name}", flush=True)
            continue
        try:
            path, start = c_build.find_library(dtype), time.monotonic()
            how = "kept already"
            if path is None:
                print(f"{name}: compiling ...", flush=True)
                path = c_build.compile_library(dtype)
                how = f"compiled in {time.monotonic() - start:.1f} s"
            if path.parent == c_build.cache_folder():
                reason = c_library.unavailable(dtype)
            else:
                reason = f"{how}, but {c_build.cache_folder()} cannot be used: nothing is kept"
        except (OSError, c_build.NoLibraryError) as error:
            path, how, reason = None, "", str(error)
        print(f"{name}: {reason}" if reason else f"{name}: {how}, {path}", flush=True)
        failed |= reason is not None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
