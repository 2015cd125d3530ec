"""Wheels: `MULTIMAX_PREBUILT=1` adds kernels compiled ahead. All else is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def wanted() -> bool:
    """Whether the environment asks for compiled kernels."""
    value = os.environ.get("MULTIMAX_PREBUILT", "0")
    if value not in ("0", "1"):
        raise SystemExit(f"error: MULTIMAX_PREBUILT is {value!r}: 1 compiles kernels, 0 does not")
    return value == "1"


def prebuilt() -> ModuleType:
    """`multimax.kernels.prebuilt` without `multimax/__init__.py`, which needs torch."""
    package = ModuleType("multimax")
    package.__path__ = [str(ROOT / "multimax")]
    sys.modules["multimax"] = package
    from multimax.kernels import prebuilt

    return prebuilt


class Modules(build_py):
    """The package in a fresh folder: setuptools would pack what an earlier build left there."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "multimax", ignore_errors=True)
        super().run()
        if wanted() and not self.editable_mode:
            kernels = prebuilt()
            try:
                kernels.compile_ahead(Path(self.build_lib, "multimax/kernels", kernels.FOLDER.name))
            except kernels.c_build.NoLibraryError as error:
                raise SystemExit(f"error: {error}") from error


class Wheel(bdist_wheel):
    """For any Python 3, and with compiled kernels for the platforms that can load them."""

    def get_tag(self) -> tuple[str, str, str]:
        if not wanted():
            return super().get_tag()
        kernels = prebuilt()
        folder = Path(str(self.bdist_dir), "multimax/kernels", kernels.FOLDER.name)
        return "py3", "none", kernels.platform_tag(folder)


class Platform(Distribution):
    """What it installs is for one platform if there are compiled kernels."""

    def has_ext_modules(self) -> bool:
        return wanted()


setup(cmdclass={"build_py": Modules, "bdist_wheel": Wheel}, distclass=Platform)
