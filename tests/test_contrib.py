"""The profiles of security modules are what their compilers take.  tests/apparmor shows one at work."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CONTRIB = Path(__file__).resolve().parent.parent / "contrib"
SELINUX = Path("/usr/share/selinux/devel/Makefile")


def test_apparmor_takes_the_profile(tmp_path):
    """That of AppArmor 3, without the two lines that only a later one knows, as the head of the file says."""
    if shutil.which("apparmor_parser") is None:
        pytest.skip("apparmor is not installed")
    text = (CONTRIB / "apparmor/pysplice").read_text()
    version = subprocess.run(
        ["apparmor_parser", "--version"], capture_output=True, text=True, check=True
    ).stdout
    if "version 3." in version:
        for line in ("abi <abi/4.0>,\n", "  userns,\n"):
            assert line in text
            text = text.replace(line, "")
    profile = tmp_path / "pysplice"
    profile.write_text(text)
    command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--debug", str(profile)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "/dev/net/tun" in result.stdout


def test_selinux_takes_the_policy(tmp_path):
    if not SELINUX.exists():
        pytest.skip("selinux-policy-dev is not installed")
    folder = shutil.copytree(CONTRIB / "selinux", tmp_path / "selinux")
    command = ["make", "-f", str(SELINUX), "pysplice.pp"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warning" not in (result.stdout + result.stderr).lower()
    assert (folder / "pysplice.pp").stat().st_size
