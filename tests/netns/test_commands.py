"""Every command in the README and in docs/: each is run here as written, except for the names of this world."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..support.namespaces import stop

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# Commands that need the package registry, or that are the tests themselves
ELSEWHERE = {
    "examples/quickstart": "run by itself: it installs",
    "tests/run": "these are its tests",
    'ln -sf "$(command -v pysplice)" /tmp/pesto': "tests/netns/test_commands.py, by another way",
    "python3 -m pip install .": "it installs; tests/matrix does",
    '.venv/bin/python -m pip install -q -e ".[docs]"': "it installs; tests/run does",
    '.venv/bin/pip install -e ".[lab]"': "it installs; tests/run does",
    ".venv/bin/sphinx-build -q -W docs build/docs": "tests/test_docs.py",
    ".venv/bin/python examples/window_lab.py window --rtt 10": "tests/netns/test_examples.py, shorter",
    ".venv/bin/python examples/window_lab.py latency": "tests/netns/test_examples.py, shorter",
    ".venv/bin/python examples/window_lab.py grid --rtt 0,10 --condition plain,rate --json grid.json": "the same",
    ".venv/bin/python examples/window_lab.py throughput --json grid.json": "the same",
    "examples/compare_pasta.py --rounds 5 --seconds 3": "the same",
    "examples/compare_loopback.py --gib 1 --rounds 3": "the same",
}


def commands(page: Path) -> list[str]:
    """The commands in blocks that are marked as shell, without comments."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        found += [re.sub(r"\s+# .*", "", line).strip() for line in block.splitlines() if line.strip()]
    return found


COMMANDS = {command: page.name for page in PAGES for command in commands(page)}


def plain(command: str) -> str:
    return command.replace(".venv/bin/pysplice", "pysplice")


def test_each_command_is_run_somewhere():
    tested = {plain(command) for command in (*RUN, *SERVE, *CTL, *PESTO)}
    left = [c for c in COMMANDS if c not in ELSEWHERE and plain(c) not in tested]
    assert not left
    assert set(map(plain, COMMANDS)) >= tested | set(map(plain, ELSEWHERE)), "a command that no page has"


@pytest.fixture
def ready(world, tmp_path):
    """A remote host with a web page, and names of this world for those of the documentation."""
    (tmp_path / "index.html").write_text("a page\n")
    server = world.remote.spawn(
        sys.executable, "-m", "http.server", "80", "--bind", world.REMOTE4,
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(200):
        with contextlib.suppress(OSError), world.host.connect(world.REMOTE4, 80):
            break
        time.sleep(0.05)
    yield world
    stop(server)


def words(world, command: str, folder: Path) -> list[str]:
    """A command as it is run here."""
    text = plain(command).replace("https://example.org/", f"http://{world.REMOTE4}/")
    for name in ("net.sock", "pesto.sock"):
        text = text.replace(f"/tmp/{name}", f"{folder}/{name}")
    made = shlex.split(text)
    if made[0] == "/tmp/pesto":
        return [f"{folder}/pesto", *made[1:]]
    assert made[0] == "pysplice"
    return [sys.executable, "-m", "pysplice", *made[1:]]


RUN = {
    "pysplice --config-net -- curl -s https://example.org/": "a page\n",
    "pysplice --config-net": "in the shell\n",
    "pysplice --config-net -p tap.pcap -- curl -s https://example.org/": "a page\n",
    "pysplice --config-net -d -- curl -s https://example.org/": "a page\n",
    "pysplice --config-net --dns-forward 10.1.1.1 --resolv-conf -- cat /etc/resolv.conf": "nameserver 10.1.1.1\n",
}


@pytest.mark.parametrize("command", RUN)
def test_commands_that_end(ready, tmp_path, command):
    env = {**os.environ, "SHELL": "/bin/sh", "PYTHONPATH": str(ROOT)}
    result = ready.host.run(
        *words(ready, command, tmp_path), cwd=tmp_path, env=env, stdin=None, input="echo in the shell\n"
    )
    assert result.stdout.startswith(RUN[command])
    if "-d " in command:
        assert f"-> {ready.REMOTE4}:80: connecting" in result.stderr
    if "tap.pcap" in command:
        assert (tmp_path / "tap.pcap").stat().st_size > 1000
        assert (tmp_path / "tap.pcap").stat().st_mode & 0o077 == 0


SERVE = {
    "pysplice --config-net -t 8080 -- python3 -m http.server 8080": 8080,
    "pysplice --config-net -t none -c /tmp/pesto.sock --control /tmp/net.sock -- python3 -m http.server 8080": 8080,
    "pysplice --config-net --tap eth0 4711": 0,
}
CTL = {
    "pysplice ctl /tmp/net.sock add -t 8081:8080 -u 5353": "",
    "pysplice ctl /tmp/net.sock show": "rule -t 8081:8080\n",
    "pysplice ctl /tmp/net.sock del -t 8081:8080": "",
}
PESTO = {
    "/tmp/pesto /tmp/pesto.sock": "  HOST\n",
    "/tmp/pesto -A -t 8082:8080 /tmp/pesto.sock": "",
    "/tmp/pesto -D -t 8082:8080 /tmp/pesto.sock": "",
}


def reads_a_page(world, port: int) -> bool:
    """True once the host's port leads to a web server."""
    result = world.host.run("curl", "-s", "-m", "5", f"http://{world.HOST4}:{port}/", check=False)
    return "Directory listing" in result.stdout


def until(condition, seconds=20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_server_in_the_namespace(ready, tmp_path):
    command = "pysplice --config-net -t 8080 -- python3 -m http.server 8080"
    process = ready.host.spawn(*words(ready, command, tmp_path), cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        until(
            lambda: (
                ready.host.run("curl", "-s", f"http://{ready.HOST4}:8080/", check=False).stdout
                == "a page\n"
            )
        )
    finally:
        end_command(process)


def end_command(process: subprocess.Popen) -> None:
    """End the command's server, which outlives pysplice (as with pasta), then pysplice."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        for grandchild in Path(f"/proc/{child}/task/{child}/children").read_text().split():
            os.kill(int(grandchild), signal.SIGTERM)
    process.wait(20)


def test_a_control_socket(ready, tmp_path):
    command = "pysplice --config-net -t none -c /tmp/pesto.sock --control /tmp/net.sock -- python3 -m http.server 8080"
    tmp_path.chmod(0o777)
    process = ready.host.spawn(*words(ready, command, tmp_path), cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        until(lambda: (tmp_path / "net.sock").exists())
        pesto = tmp_path / "pesto"  # what the link is to
        pesto.write_text(f"#!{sys.executable}\nfrom pysplice.__main__ import main\nmain()\n")
        pesto.chmod(0o755)
        for ctl, said in (CTL | PESTO).items():
            result = ready.host.run(
                *words(ready, ctl, tmp_path), env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
            assert said in result.stdout
            if " add " in ctl or " -A " in ctl:
                page = f"http://{ready.HOST4}:{8081 if ' add ' in ctl else 8082}/"
                until(lambda page=page: ready.host.run("curl", "-s", page, check=False).stdout)
    finally:
        end_command(process)


def test_the_namespace_of_a_process(ready, tmp_path):
    guest = ready.host.spawn("unshare", "-Urn", "sleep", "60")
    try:
        until(
            lambda: os.readlink(f"/proc/{guest.pid}/ns/net") != os.readlink(f"/proc/{os.getpid()}/ns/net")
        )
        time.sleep(0.2)  # unshare writes its maps
        command = next(c for c in SERVE if "4711" in c)
        served = words(ready, command.replace("4711", str(guest.pid)), tmp_path)
        result = ready.host.run(*served[:3], "--runas", "root", *served[3:])
        assert f"serving process {guest.pid} as process" in result.stderr
        enter = ("nsenter", "-t", str(guest.pid), "-U", "-n", "--preserve-credentials", "--")
        assert "eth0" in ready.host.run(*enter, "ip", "-brief", "link").stdout
        got = ready.host.run(*enter, "curl", "-s", f"http://{ready.REMOTE4}/")
        assert got.stdout == "a page\n"
    finally:
        stop(guest)
