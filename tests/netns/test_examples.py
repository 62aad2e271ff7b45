"""The examples that measure: they run, and say what they should.  How fast is not for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name, *words, timeout=120):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        capture_output=True, text=True, timeout=timeout, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "workload", ("upload", "loaded", "tiny64", "udp_up", "udp_down", "udp_rr1", "splice_rr1", "idle1000")
)
def test_compare_pasta(isolated, tmp_path, workload):
    result = example(
        "compare_pasta.py", "--rounds", "1", "--seconds", "0.5", "--mtu", "1500", "--workloads", workload,
        "--only", "direct,pysplice", "--json", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (cell,) = json.loads((tmp_path / "out").read_text())
    for name in ("direct", "pysplice"):
        (run,) = cell["peers"][name]
        assert run["value"] > 0, run
    assert cell["peers"]["pysplice"][0]["drops"] == 0


def test_the_grid_of_the_laboratory(isolated, tmp_path):
    file = tmp_path / "grid.json"
    result = example(
        "window_lab.py", "grid", "--rtt", "0", "--mtu", "65520", "--condition", "plain,rate", "--rounds", "1",
        "--seconds", "0.5", "--estimators", "peer,truesize", "--json", str(file),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "of 2 cells" in result.stdout
    plain, rate = json.loads(file.read_text())
    assert (plain["condition"], rate["condition"]) == ("plain", "rate")
    for cell in (plain, rate):
        for name in ("direct", "peer", "truesize"):
            (run,) = cell["peers"][name]
            assert run["value"] > 0 and sum(run["tenths"]) > 0, run
        assert cell["peers"]["truesize"][0]["sends"] > 0
    # A bottleneck behind a large window: what the socket cannot take is cut off
    assert rate["peers"]["peer"][0]["short"] > 0
    drawn = example("window_lab.py", "throughput", "--json", str(file), "--out", str(tmp_path))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "throughput.png").stat().st_size > 10_000


@pytest.mark.parametrize("picture", ("window", "latency"))
def test_the_pictures_of_the_laboratory(isolated, tmp_path, picture):
    drawn = example("window_lab.py", picture, "--seconds", "0.5", "--out", str(tmp_path))
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert (tmp_path / f"{picture}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (("grid", "--condition", "rain"), "unknown: rain; there are plain, loss"),
        (("grid", "--estimators", "best"), "unknown: best; there are sndbuf"),
        (("grid", "--peer", "x"), "--peer takes NAME=COMMAND"),
        (("throughput",), "--json names the result of a grid"),
    ),
)
def test_what_the_laboratory_refuses(words, message):
    result = example("window_lab.py", *words)
    assert result.returncode
    assert message in result.stderr


def test_compare_loopback(isolated):
    result = example("compare_loopback.py", "--gib", "0.25", "--rounds", "1", "--hash")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("direct", "pysplice"):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{name}:")]
        assert "hashes equal" in line


def test_chaos(isolated):
    words = ("--fault", "loss,tap,kill-client", "--traffic", "upload,spliced,datagrams", "--during", "1")
    result = example("chaos.py", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [
        line for line in result.stdout.splitlines() if line.startswith(("| loss", "| tap", "| kill-client"))
    ]
    assert len(rows) == 3
    assert rows[0].count("whole") == 2 and "answered" in rows[0] and "lives" in rows[0]
    assert rows[2].count("ended") == 3


def test_soak(isolated):
    few = ("--connections", "2000", "--datagrams", "5000", "--at-once", "300")
    result = example("soak.py", "--part", "churn,datagrams,many", *few)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2,000 connections" in result.stdout and "300 connections at once of 300" in result.stdout


@pytest.mark.parametrize("name", ("chaos.py", "soak.py"))
def test_a_name_that_there_is_not(name):
    result = example(name, "--part" if name == "soak.py" else "--fault", "flod")
    assert result.returncode == 2 and "there is no" in result.stderr
