"""The build backend: setuptools, and mypyc for the rooms that every message passes.

A wheel has these rooms compiled from the same .py files, which are installed beside the compiled code.  Two
variables of the environment change that: with PYSPLICE_PURE=1 nothing is compiled; with PYSPLICE_COMPILED=1 the
rooms of an editable installation are compiled too, and a change of their .py files then has no effect until it is
made anew.
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

PURE, IN_PLACE = "PYSPLICE_PURE", "PYSPLICE_COMPILED"
COMPILER = "mypy>=1.15"

# A class and those derived from it are compiled together, or not at all
ROOMS = (
    "tcp/*.py",
    "stream/*.py",
    "link/neighbours.py",
    "link/plane.py",
    "link/reader.py",
    "link/tap.py",
    "datagram/*.py",
    "splice/*.py",
    "budget.py",
    "loop.py",
    "wire.py",
)


def _wanted(commands: list[str]) -> bool:
    """True if these commands of setuptools are to compile rooms."""
    if os.environ.get(PURE):
        return False
    return "bdist_wheel" in commands or ("editable_wheel" in commands and bool(os.environ.get(IN_PLACE)))


def _rooms() -> list[str]:
    """The files to compile."""
    files = sorted(str(path) for pattern in ROOMS for path in Path("pysplice").glob(pattern))
    return [path for path in files if not path.endswith("__init__.py")]


def _extensions() -> list[Any]:
    """An extension for each room; none where mypyc is missing or does not accept the sources."""
    try:
        from mypyc.build import mypycify

        options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
        extensions = mypycify([*options, *_rooms()], opt_level="2", debug_level="0", separate=True)
    except (ImportError, SystemExit) as e:
        print(f"pysplice: nothing is compiled by mypyc: {e}", file=sys.stderr)
        return []
    for extension in extensions:
        # A warning of another compiler is no reason to fail
        extension.extra_compile_args = [flag for flag in extension.extra_compile_args if flag != "-Werror"]
    return extensions


class Build(build):
    """Builds in a folder for each kind: the one must not find what the other has left."""

    def finalize_options(self) -> None:
        if self.build_base == "build":
            self.build_base = "build/compiled" if _wanted(self.distribution.commands) else "build/pure"
        super().finalize_options()


class BuildExt(build_ext):
    """Builds the extension in C, and the compiled rooms, on all processors."""

    def finalize_options(self) -> None:
        if _wanted(self.distribution.commands):
            self.distribution.ext_modules += _extensions()
            self.parallel = self.parallel or os.cpu_count()
        super().finalize_options()


class BdistWheel(bdist_wheel):
    """Without compiled rooms the wheel serves every CPython from 3.11 on; with them one version."""

    def finalize_options(self) -> None:
        if not _wanted(self.distribution.commands):
            self.py_limited_api = "cp311"
        super().finalize_options()


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What building a wheel needs."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler(["bdist_wheel"])


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What an editable installation needs."""
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler(["editable_wheel"])


def _compiler(commands: list[str]) -> list[str]:
    return [COMPILER] if _wanted(commands) else []
