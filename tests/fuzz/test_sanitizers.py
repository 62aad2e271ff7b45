"""The whole extension under AddressSanitizer and UBSan, and without a warning of two compilers."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ..support.namespaces import have, run

ROOT = Path(__file__).parent.parent.parent
FLAGS = (
    "-g",
    "-O1",
    "-std=c11",
    "-D_GNU_SOURCE",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
needs_gcc = pytest.mark.skipif(not have("gcc"), reason="not installed: gcc")


@needs_gcc
def test_the_extension(tmp_path):
    """The tests of the extension and of the doors once more, with an instrumented build."""
    package = tmp_path / "pysplice"
    run(
        "cp", "-r", str(ROOT / "pysplice"), str(ROOT / "tests"), str(ROOT / "pyproject.toml"), str(tmp_path)
    )
    for built in package.glob("_cext*.so"):
        built.unlink()
    sources = [str(p) for p in (ROOT / "cext").glob("*.c")]
    run(
        "gcc", *FLAGS, "-shared", "-fPIC", "-DPy_LIMITED_API=0x030B0000",
        f"-I{sysconfig.get_path('include')}", "-o", str(package / "_cext.abi3.so"), *sources,
    )  # fmt: skip
    runtime = run("gcc", "-print-file-name=libasan.so").stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        # The interpreter frees little at its end; what is resident says nothing here
        "ASAN_OPTIONS": "detect_leaks=0,halt_on_error=1",
        "PYSPLICE_EXPECT": str(package),
    }
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "tests/cext", "tests/doors", "-k", "not leaks and not trim",
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout


@pytest.mark.parametrize("compiler", ("gcc", "clang"))
def test_no_warnings(tmp_path, compiler):
    if not have(compiler):
        pytest.skip(f"not installed: {compiler}")
    for source in (ROOT / "cext").glob("*.c"):
        result = run(
            compiler, "-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror",
            "-DPy_LIMITED_API=0x030B0000", f"-I{sysconfig.get_path('include')}",
            "-c", str(source), "-o", str(tmp_path / "out.o"),
        )  # fmt: skip
        assert result.stderr == ""
