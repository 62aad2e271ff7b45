"""What a user is told: typical mistakes and surprises, each with a line that says what to do instead."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.namespaces import PYSPLICE, stop
from .test_forward import NONE, until

CODE = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CODE)}


def ours(world, *words, check=False, **kwargs):
    """Run pysplice on the host to its end."""
    return world.host.run(*PYSPLICE, *words, check=check, env=ENVIRONMENT, **kwargs)


@pytest.mark.parametrize("option", ("--help", "--version", "ctl --help"))
@pytest.mark.parametrize("sink", ("full", "closed"))
def test_a_text_that_cannot_be_written(option, sink):
    """To a full disk or a pipe that no program reads: quiet, with status 1."""
    if sink == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    result = subprocess.run(
        [*PYSPLICE, *option.split()],
        stdout=out,
        stderr=subprocess.PIPE,
        timeout=30,
        check=False,
        env=ENVIRONMENT,
    )
    os.close(out)
    assert (result.returncode, result.stderr) == (1, b"")


def test_the_name_that_it_was_called_by(tmp_path):
    link = tmp_path / "pasta"
    link.write_text(f"#!{sys.executable}\nfrom pysplice.__main__ import main\nmain()\n")
    link.chmod(0o755)
    result = subprocess.run(
        [link, "--help"], capture_output=True, text=True, timeout=30, check=True, env=ENVIRONMENT
    )
    assert result.stdout.startswith("Usage: pasta [OPTION]") and "Usage: pysplice" not in result.stdout


def test_what_the_version_says():
    result = subprocess.run(
        [*PYSPLICE, "--version"], capture_output=True, text=True, timeout=30, env=ENVIRONMENT
    )
    assert re.match(r"pysplice \d+\.\d+\.\d+\n", result.stdout)
    assert "CPython 3." in result.stdout and "uvloop " in result.stdout and "Linux " in result.stdout


def test_counts_at_the_end_and_bytes(world):
    with world.remote.listen(world.REMOTE4, 9000) as server:
        code = (
            "import socket; s = socket.create_connection(('10.99.0.2', 9000)); s.sendall(b'x' * 3000); "
            "assert s.recv(10) == b'answer'"
        )
        process = world.host.spawn(
            *PYSPLICE, "--config-net", *NONE, "--stats", "60", "--", sys.executable, "-c", code,
            stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        client, _ = server.accept()
        with client:
            got = 0
            while got < 3000:
                got += len(client.recv(4096))
            client.sendall(b"answer")
            assert process.wait(20) == 0
    last = process.stderr.read().splitlines()[-1]
    stop(process)
    assert "1 connections (0 open)" in last or "1 connections (1 open)" in last
    assert "2.93 KiB from the guest, 6 B to it" in last


def test_counts_while_nothing_happens(world):
    process = world.pysplice("--config-net", *NONE, "--stats", "1")
    lines = [line for line in (process.stderr.readline() for _ in range(8)) if "connections" in line]
    assert len(lines) >= 2


def test_ping_that_the_host_does_not_allow(world):
    """Said once, without -d, though stderr is a command's."""
    # "1 0", no group, is what a new namespace has
    code = f"for n in 1 2; do ping -c 1 -W 1 {world.REMOTE4} >/dev/null 2>&1; done; true"
    result = ours(world, "--config-net", *NONE, "--", "sh", "-c", code)
    told = [line for line in result.stderr.splitlines() if "ping_group_range" in line]
    assert len(told) == 1 and "echo requests (ping) cannot be passed on" in told[0]


@pytest.mark.parametrize("absolute", (False, True))
def test_the_log(world, tmp_path, absolute):
    log = tmp_path / "log"
    log.touch()
    options = ("--log-time",) if absolute else ()
    process = world.pysplice("--config-net", *NONE, "-d", "-l", str(log), *options)
    with world.remote.listen(world.REMOTE4, 9000), world.guest.connect(world.REMOTE4, 9000):
        until(lambda: "connecting" in log.read_text())
    stop(process)
    first, *lines = log.read_text().splitlines()
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}$", first)
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}" if absolute else r"\d+\.\d{4}"
    assert all(re.match(rf"{stamp}: (info|debug|warning): +\S", line) for line in lines), lines
    assert any(re.search(r"debug: +[\d.]+:\d+ -> 10\.99\.0\.2:9000: connecting", line) for line in lines)


def as_user(world, *words, **kwargs):
    """The same without any privilege, as an ordinary user has it."""
    plain = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    return world.host.run(*plain, *PYSPLICE, *words, check=False, env=ENVIRONMENT, **kwargs)


def mistakes(world, folder):
    (folder / "file").touch()
    return (
        (("--control", str(folder / "file"), "--", "true"), "a file that is not a socket is there"),
        (
            ("--netns", world.guest.path, *NONE),
            "be root, or name the user namespace that owns it (--userns)",
        ),
        (
            ("--netns-only", *NONE, "--", "true"),
            "without a user namespace (--netns-only) this requires privileges",
        ),
        (("ctl", str(folder / "file"), "show"), "it is not a socket"),
        (("-config-net", "--", "true"), "did you mean --config-net?"),
    )


@pytest.mark.parametrize("number", range(5), ids=("socket", "namespace", "netns-only", "ctl", "dash"))
def test_mistakes_of_a_user(world, tmp_path, number):
    words, message = mistakes(world, tmp_path)[number]
    result = as_user(world, *words, cwd="/")
    assert result.returncode == 1
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_no_more_user_namespaces(isolated):
    """user.max_user_namespaces is set for the user namespace that unshare makes."""
    code = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    result = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", code, "sh", *PYSPLICE, *NONE, "--", "true"],
        capture_output=True, text=True, timeout=30, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 1
    assert "cannot make namespaces: No space left on device; no user namespace may be made" in result.stderr
    assert "user.max_user_namespaces" in result.stderr


def test_an_interface_that_is_not_there(world):
    result = ours(world, "--config-net", *NONE, "--outbound-if4", "nope", "--", "true")
    assert result.returncode == 0
    assert "--outbound-if4 nope: there is no such interface on the host now" in result.stderr


def test_ipv6_alone_on_a_host_without_it(world):
    for address in (f"{world.HOST6}/64",):
        world.host.run("ip", "-6", "addr", "del", address, "dev", "veth0")
    result = ours(world, "--config-net", *NONE, "-6", "--", "true")
    assert "no IPv6 on the host" in result.stderr and "name server" not in result.stderr


def test_ports_that_follow_and_others_add_up(world):
    """-t auto -t 9001: the one that is written out is open at once."""
    process = world.pysplice(
        "--config-net", "-t", "auto", "-t", "9001:91", "-u", "none", "-T", "none", "-U", "none"
    )
    # Nobody listens in the guest, so a reset may come before connect() returns
    with contextlib.suppress(ConnectionResetError):
        world.host.connect(world.HOST4, 9001).close()
    with world.guest.listen("0.0.0.0", 9002) as server:
        until(lambda: _connects(world, 9002))
        with server.accept()[0]:
            pass
    assert process.poll() is None


def _connects(world, port) -> bool:
    try:
        world.host.connect(world.HOST4, port).close()
    except OSError:
        return False
    return True


def test_a_part_of_a_range_is_taken_out(world, tmp_path):
    path = tmp_path / "control"
    process = world.pysplice("--config-net", *NONE, "-t", "9000-9003:80-83", "--control", str(path))

    def ctl(*words):
        return ours(world, "ctl", str(path), *words)

    with world.guest.listen("0.0.0.0", 83) as server:
        assert ctl("del", "-t", "9001:81").returncode == 0
        shown = ctl("show").stdout
        assert "rule -t 9000:80\n" in shown and "rule -t 9002-9003:82-83\n" in shown
        assert not _connects(world, 9001)
        client = world.host.connect(world.HOST4, 9003)
        with client, server.accept()[0] as got:
            got.sendall(b"still")
            client.settimeout(10)
            assert client.recv(10) == b"still"
    assert "but '9000:80' is" in ctl("del", "-t", "9000").stderr
    # Several at once, and the port can be had again
    assert ctl("add", "-t", "9001:81", "-u", "9001").returncode == 0
    with socket.socket():
        assert "rule -u 9001\n" in ctl("show").stdout
    assert process.poll() is None


def test_changes_of_one_command_are_made_together_or_not_at_all(world, tmp_path):
    path = tmp_path / "control"
    process = world.pysplice("--config-net", *NONE, "-d", "-t", "9000", "--control", str(path))
    with world.host.listen(world.HOST4, 9002):
        result = ours(world, "ctl", str(path), "add", "-u", "9001", "-t", "9002")
    assert result.returncode == 1 and "port 9002 (tcp)" in result.stderr
    result = ours(world, "ctl", str(path), "del", "-t", "9000", "-t", "9004")
    assert result.returncode == 1 and "'9004' is not forwarded" in result.stderr
    assert (
        "rule -t 9000\n" in (shown := ours(world, "ctl", str(path), "show").stdout) and "9001" not in shown
    )
    assert ours(world, "ctl", str(path), "add", "-u", "9001", "-T", "9003").returncode == 0
    shown = ours(world, "ctl", str(path), "show").stdout
    assert "rule -u 9001\n" in shown and "rule -T 9003\n" in shown
    command = " ".join([*PYSPLICE, "ctl", str(path), "show"])
    result = world.host.run("sh", "-c", f"{command} >/dev/full", check=False, env=ENVIRONMENT)
    assert result.returncode == 1 and "No space left on device" in result.stderr
    process.terminate()
    assert "udp of the host: 9001 is forwarded" in process.communicate(timeout=10)[1]


def test_ports_that_are_left_out(world, tmp_path):
    """More ports than descriptors: the one who asks is told."""
    path = tmp_path / "control"
    words = (*PYSPLICE, "--config-net", *NONE, "--control", str(path), "--", "sleep", "60")
    process = world.host.spawn(
        "prlimit", "--nofile=300:300", *words, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    try:
        until(lambda: path.exists() and ours(world, "ctl", str(path), "show").returncode == 0)
        result = ours(world, "ctl", str(path), "add", "-u", "all")
    finally:
        stop(process)
    assert result.returncode == 0
    assert re.search(r"'all': \d+ ports are left out for lack of descriptors\n", result.stderr)


@pytest.mark.parametrize("path", ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"))
def test_a_capture_to_a_pipe(world, path):
    command = " ".join(
        [*PYSPLICE, "-q", "--config-net", *NONE, "-p", path, "ping", "-c1", "-W1", "192.0.2.1"]
    )
    result = world.host.run("sh", "-c", f"{command} | od -An -tx1 -N4", check=False, env=ENVIRONMENT)
    assert result.stdout.split() == ["d4", "c3", "b2", "a1"]


def test_no_name_servers_at_all(world):
    options = ("-D", "none", "-S", "none", "--resolv-conf")
    result = ours(world, "--config-net", *NONE, *options, "--", "cat", "/etc/resolv.conf")
    assert (result.returncode, result.stdout.strip()) == (0, "")
