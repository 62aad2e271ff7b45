"""The ways to run a namespace: a command, a process, a path, a tap that is there, a descriptor."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pysplice.proxy import LINGER_COMMAND

from ..support.namespaces import PYSPLICE, run, stop, written
from ..support.transfer import Background, transfer
from .test_flows import pair
from .test_forward import NONE, open_to, until

IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUNSETIFF = 0x400454CA


def command(world, *words, options=(), check=True, **kwargs):
    """Run a command in new namespaces on the world's host."""
    return world.host.run(*PYSPLICE, *options, "--", *words, check=check, **kwargs)


# A command


@pytest.mark.parametrize("status", (0, 1, 7, 255))
def test_exit_status_is_the_commands(shared_world, status):
    result = command(shared_world, "sh", "-c", f"exit {status}", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (status, "", "")


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV))
def test_death_by_signal(shared_world, number):
    result = command(shared_world, "sh", "-c", f"kill -{number} $$", check=False)
    assert result.returncode == 128 + number


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    (
        ("/no/such/program", 127, "No such file or directory"),
        ("nosuchcommand", 127, "No such file or directory"),
        ("", 127, "No such file or directory"),
        ("/etc/passwd", 126, "Permission denied"),
        ("/", 126, "Permission denied"),
    ),
)
def test_command_that_cannot_be_run(shared_world, program, status, reason):
    """As with a shell, whatever directories in PATH cannot be read."""
    env = {**os.environ, "PATH": "/root/none:/proc/1/root:" + os.environ["PATH"]}
    result = command(shared_world, program, check=False, env=env)
    assert (result.returncode, result.stderr) == (status, f"pysplice: cannot run '{program}': {reason}\n")


def test_options_behind_a_pid(shared_world):
    result = command(shared_world, "4711", "-t", "8080", check=False)
    assert result.returncode == 127
    assert "cannot run '4711': No such file or directory; options go before the PID" in result.stderr


@pytest.mark.parametrize("address", ("10.99.0.7", "10.99.0.8"))
def test_the_hosts_own_address_by_another_name(world, address):
    """It is the guest's address where the host has that too, else the host's own: its servers are there."""
    world.host.run("ip", "addr", "add", "10.99.0.7/24", "dev", "veth0")
    world.pysplice("--config-net", "-a", address, "-n", "24", "--map-guest-addr", "192.0.2.1")
    with world.host.listen("0.0.0.0") as listener:
        with world.guest.connect("192.0.2.1", listener.getsockname()[1]):
            server, _ = listener.accept()
            with server:
                assert server.getsockname()[0] == (address if address == "10.99.0.7" else world.HOST4)


def test_standard_streams_environment_and_directory(shared_world, tmp_path):
    result = command(
        shared_world, "sh", "-c", "cat; echo $MARK; pwd; echo err >&2",
        input="in\n", stdin=None, env={**os.environ, "MARK": "mark"}, cwd=tmp_path,
    )  # fmt: skip
    assert result.stdout == f"in\nmark\n{tmp_path}\n"
    assert result.stderr == "err\n"


def test_the_shell_is_the_default(shared_world):
    result = shared_world.host.run(
        *PYSPLICE, input="echo $0; ip link show tap0\n", stdin=None, env={**os.environ, "SHELL": "/bin/sh"}
    )
    assert result.stdout.startswith("-/bin/sh\n")
    assert "tap0" in result.stdout


def test_namespaces_of_the_command(shared_world):
    script = "id -u; cat /proc/self/uid_map; ls /proc | grep -c '^[0-9]'; hostname; cat /proc/sys/net/ipv4/ping_*_range"
    lines = command(shared_world, "sh", "-c", script).stdout.split("\n")
    assert lines[0] == "0"
    assert lines[1].split() == ["0", "0", "1"]
    assert int(lines[2]) < 10  # a PID namespace, and its own /proc
    assert lines[3].startswith("pasta-")
    assert lines[4].split() == ["0", "0"]


def test_background_children_die_with_the_command(shared_world):
    begun = time.monotonic()
    command(shared_world, "sh", "-c", "sleep 60 </dev/null >/dev/null 2>&1 &")
    assert time.monotonic() - begun < 15


def test_without_a_pid_namespace(shared_world):
    result = command(shared_world, "sh", "-c", "echo $$", options=("--no-pidns",))
    assert int(result.stdout) > 10


SPEAKER = """
import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
sock.sendall(bytes(range(256)) * (int(sys.argv[3]) // 256))
"""


@pytest.mark.parametrize("size", (60_160, 3 << 20))
def test_what_was_said_before_the_end_arrives(shared_world, size):
    """The command ends with its connection full of data, and the remote host reads slowly."""
    world = shared_world
    with world.remote.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind((world.REMOTE4, 0))
        listener.listen()
        words = ("python3", "-c", SPEAKER, world.REMOTE4, str(listener.getsockname()[1]), str(size))
        process = world.host.spawn(*PYSPLICE, "--config-net", "--", *words)
        remote, _ = listener.accept()
        with remote:
            time.sleep(1)
            got = b""
            while part := remote.recv(65536):
                got += part
                time.sleep(0.001)
        assert got == bytes(range(256)) * (size // 256)
        assert process.wait(15) == 0


def test_a_connect_that_is_pending_holds_nobody_up(shared_world):
    """The command gives up while its SYN is on the way: so do we."""
    script = "import socket; s = socket.socket(); s.settimeout(0.2); s.connect(('10.99.0.111', 9))"
    begun = time.monotonic()
    result = command(shared_world, "python3", "-c", script, options=("--config-net",), check=False)
    assert result.returncode == 1 and "timed out" in result.stderr
    assert time.monotonic() - begun < LINGER_COMMAND, "as long as data would be waited for"


def test_a_relative_path_in_the_background(world, tmp_path):
    """Something else in the directory goes away: we stay."""
    os.chdir("/run/netns")
    (tmp_path / "pid").touch()
    other = "/run/netns/other"
    open(other, "w").close()
    world.host.run(*PYSPLICE, "--netns", f"./{world.guest.name}", "-P", str(tmp_path / "pid"), timeout=15)
    pid = int((tmp_path / "pid").read_text())
    os.unlink(other)
    time.sleep(0.5)
    assert os.path.exists(f"/proc/{pid}")
    os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("closed", (1, 2))
def test_a_closed_stream(shared_world, closed):
    words = " ".join(shared_world.host.enter(*PYSPLICE, "--", "sh", "-c", "'exit 4'"))
    result = run("sh", "-c", f"{words} {closed}>&-", check=False)
    assert result.returncode == 4 and "Traceback" not in result.stderr


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGQUIT))
def test_ended_by_a_signal(shared_world, number, tmp_path):
    """We exit with 0 and leave the command running, as pasta does."""
    mark = tmp_path / "mark"
    process = shared_world.host.spawn(*PYSPLICE, "--", "sh", "-c", f"echo up; sleep 1; echo x > {mark}",
                                      stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == b"up\n"
    process.send_signal(number)
    assert process.wait(10) == 0
    for _ in range(100):
        if mark.exists():
            break
        time.sleep(0.05)
    assert mark.exists()
    process.stdout.close()


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.parent, child = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "-c", *words],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, **environment},
        )
        os.close(child)

    def type(self, text: bytes, pause: float = 0.3) -> None:
        os.write(self.parent, text)
        time.sleep(pause)

    def end(self) -> tuple[int, bytes]:
        """Exit status and all output."""
        status = self.process.wait(10)
        output = b""
        with contextlib.suppress(OSError):
            while part := os.read(self.parent, 4096):
                output += part
        os.close(self.parent)
        return status, output


@pytest.mark.parametrize("words", ((), ("--", "/bin/sh")))
def test_a_plain_shell_on_a_terminal(shared_world, words):
    """dash gives the terminal back to the group that it found there."""
    terminal = Terminal(*shared_world.host.enter(*PYSPLICE, *words), SHELL="/bin/sh")
    terminal.type(b"exit 5\n", 0)
    status, output = terminal.end()
    assert status == 5 and b"Cannot" not in output


def test_interrupt_from_the_terminal_is_the_commands(shared_world):
    script = "import time\ntry: print('up', flush=True); time.sleep(20)\nexcept KeyboardInterrupt: print('caught')"
    terminal = Terminal(*shared_world.host.enter(*PYSPLICE, "--", "python3", "-c", script))
    time.sleep(1.5)
    terminal.type(b"\x03")
    status, output = terminal.end()
    assert status == 0 and b"caught" in output


def test_interrupt_by_somebody_else_ends_us(shared_world):
    process = shared_world.host.spawn(
        *PYSPLICE, "--", "sh", "-c", "echo up; sleep 1", stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    process.stdout.close()


def test_a_terminal(shared_world):
    """An interactive shell has job control on the terminal that we were started from."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "-c", *shared_world.host.enter(*PYSPLICE)],
        stdin=child, stdout=child, stderr=child, env={**os.environ, "SHELL": "/bin/bash", "PS1": "$ "},
    )  # fmt: skip
    os.close(child)
    os.write(parent, b"sleep 30\n")
    time.sleep(1.5)
    os.write(parent, b"\x03")  # interrupts sleep, and nothing else
    time.sleep(0.2)
    os.write(parent, b"echo a$((1 + 1))b; exit 5\n")
    assert process.wait(10) == 5
    output = b""
    with contextlib.suppress(OSError):
        while part := os.read(parent, 4096):
            output += part
    assert b"a2b" in output
    os.close(parent)


# Configuration


def ip(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_addresses_and_routes_are_the_hosts(shared_world):
    world = shared_world
    world.host.run("ip", "route", "add", "203.0.113.0/24", "via", world.REMOTE4, "metric", "77")
    out = command(world, "sh", "-c", "ip addr; ip route; ip -6 route", options=("--config-net",)).stdout
    assert ip(out, "inet 10.99.0.1/24", "tap0")
    assert ip(out, "inet6 fd99::1/64")
    assert ip(out, "default via 10.99.0.254 dev tap0")
    assert ip(out, "203.0.113.0/24 via 10.99.0.2", "metric 77")
    assert ip(out, "default via fd99::fe dev tap0")
    assert ip(out, "tap0", "mtu 65520", "UP")
    assert not ip(out, "tentative")
    assert ip(out, "lo", "mtu 65536", "UP")


def test_addresses_by_option(shared_world):
    options = (
        "--config-net", "-a", "10.1.2.3/20", "-g", "10.1.0.1", "-a", "fd77::5", "-g", "fe80::77", "-m", "1280",
        "--ns-mac-addr", "02:01:02:03:04:05", "--tap", "eth7",
    )  # fmt: skip
    out = command(shared_world, "sh", "-c", "ip addr; ip route; ip -6 route", options=options).stdout
    assert ip(out, "inet 10.1.2.3/20", "eth7")
    assert ip(out, "default via 10.1.0.1 dev eth7")
    assert not ip(out, "10.99")
    assert ip(out, "inet6 fd77::5/64")
    assert ip(out, "default via fe80::77 dev eth7")
    assert ip(out, "eth7", "mtu 1280")
    assert ip(out, "link/ether 02:01:02:03:04:05")


def test_gateway_off_the_link(shared_world):
    options = ("--config-net", "-a", "10.1.2.3/32", "-g", "10.9.9.9")
    out = command(shared_world, "ip", "route", options=options).stdout
    assert ip(out, "default via 10.9.9.9 dev tap0")


@pytest.mark.parametrize(
    ("option", "there", "absent"), (("-4", "inet ", "inet6"), ("-6", "inet6 fd99", "inet 10"))
)
def test_one_version_only(shared_world, option, there, absent):
    out = command(shared_world, "ip", "addr", "show", "tap0", options=("--config-net", option)).stdout
    assert there in out and absent not in out


def test_a_small_mtu_leaves_ipv6_out(shared_world):
    result = command(shared_world, "ip", "addr", "show", "tap0", options=("--config-net", "-m", "1000"))
    assert "mtu 1000" in result.stdout and "inet " in result.stdout and "inet6" not in result.stdout
    assert result.stderr == "pysplice: no IPv6: it needs an MTU of at least 1280\n"


def test_a_host_without_network(world):
    world.host.run("ip", "link", "set", "veth0", "down")
    out = command(world, "sh", "-c", "ip addr; ip route; ip -6 route", options=("--config-net",)).stdout
    assert ip(out, "inet 169.254.2.1/16", "tap0")
    assert ip(out, "default via 169.254.2.2")
    assert ip(out, "default via fe80::1")


def test_the_guest_configures_itself(shared_world):
    """Without --config-net: ARP for static addresses, router advertisements for SLAAC."""
    world = shared_world
    script = f"""
        sysctl -qw net.ipv6.conf.tap0.accept_dad=0
        ip link set tap0 up
        ip addr add {world.HOST4}/24 dev tap0
        ip route add default via {world.GATEWAY4}
        for i in $(seq 50); do ip -6 addr show tap0 | grep -q 'inet6 fd99:' && break; sleep 0.1; done
        ip -6 addr show tap0; ip -6 route
        python3 -c 'import socket; socket.create_connection(("{world.REMOTE4}", 7), 5).send(b"4")'
        python3 -c 'import socket; socket.create_connection(("{world.REMOTE6}", 7), 5).send(b"6")'
    """
    listeners = [world.remote.listen(address, 7) for address in (world.REMOTE4, world.REMOTE6)]
    out = command(world, "sh", "-c", script)
    assert ip(out.stdout, "inet6 fd99:", "/64")
    assert ip(out.stdout, "default via fe80::", "proto ra")
    for listener, mark in zip(listeners, (b"4", b"6"), strict=True):
        accepted, _ = listener.accept()
        assert accepted.recv(1) == mark
        accepted.close()
        listener.close()


# Joining


def joined(world, *options, **kwargs):
    return world.host.spawn(*PYSPLICE, *options, stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "not in time"
        time.sleep(0.02)


def echo_through(world, connect):
    with world.remote.listen(world.REMOTE4) as listener:
        sock = connect(world.REMOTE4, listener.getsockname()[1])
        accepted, _ = listener.accept()
        with sock, accepted:
            sock.sendall(b"ping")
            assert accepted.recv(4) == b"ping"


@pytest.fixture
def target(isolated):
    """A process in user and network namespaces of its own."""
    process = subprocess.Popen(
        ["unshare", "-Urn", "sh", "-c", "echo up; exec sleep 60"], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"up\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_join_a_process(world, target, tmp_path):
    pid_file = tmp_path / "pid"
    process = joined(world, "-f", "--config-net", "-P", str(pid_file), str(target.pid))
    try:
        enter = ["nsenter", "-t", str(target.pid), "-U", "-n", "--preserve-credentials"]
        wait_for(lambda: written(pid_file))
        with world.remote.listen(world.REMOTE4) as listener:
            address = (world.REMOTE4, listener.getsockname()[1])
            code = f"import socket; socket.create_connection({address}).send(b'x')"
            subprocess.run([*enter, "python3", "-c", code], check=True, timeout=10)
            accepted, _ = listener.accept()
            assert accepted.recv(1) == b"x"
            accepted.close()
        target.kill()
        assert process.wait(10) == 0
    finally:
        stop(process)


def test_join_a_path_until_it_goes_away(world):
    process = world.pysplice("--config-net")
    echo_through(world, world.guest.connect)
    world.guest.delete()
    assert process.wait(10) == 0


def test_join_by_name_in_the_background(world, tmp_path):
    """The parent exits 0 when all is ready, keeps no stream open, and leaves the process ID."""
    pid_file = tmp_path / "pid"
    result = world.host.run(
        *PYSPLICE, "--config-net", "--netns", world.guest.name, "-P", str(pid_file), timeout=15
    )
    assert (result.returncode, result.stdout) == (0, "")
    pid = int(pid_file.read_text())
    assert pid_file.read_text() == f"{pid}\n"
    assert os.getsid(pid) == pid
    assert all(os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null" for fd in range(3))
    with open(f"/proc/{pid}/status") as file:
        status = file.read()
    # Low ports may have to be bound later
    assert "CapEff:\t0000000000000400" in status and "NoNewPrivs:\t1" in status
    echo_through(world, world.guest.connect)
    os.kill(pid, signal.SIGTERM)
    wait_for(
        lambda: not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read().split()[2]
    )


def test_stay_when_the_path_goes_away(world):
    process = world.pysplice("--no-netns-quit", "--config-net")
    world.guest.delete()
    time.sleep(1)
    assert process.poll() is None


def test_attach_to_a_persistent_tap(world):
    world.guest.run("ip", "tuntap", "add", "tap0", "mode", "tap")
    world.guest.run("ip", "link", "set", "tap0", "address", "02:00:00:00:00:99")
    process = world.pysplice("--config-net")
    assert "02:00:00:00:00:99" in world.guest.run("ip", "link", "show", "tap0").stdout
    echo_through(world, world.guest.connect)
    stop(process)
    assert "tap0" in world.guest.run("ip", "link").stdout
    world.pysplice("--config-net", "--no-offload")
    echo_through(world, world.guest.connect)


def test_attach_to_a_tap_with_several_queues(world):
    world.guest.run("ip", "tuntap", "add", "tap0", "mode", "tap", "multi_queue")
    world.pysplice("--config-net")
    echo_through(world, world.guest.connect)


def test_a_tap_with_packet_information_is_refused(world):
    fd = world.guest.call(open_tap, IFF_TAP)
    result = world.host.run(*PYSPLICE, "--fd", str(fd), check=False, timeout=20, pass_fds=[fd])
    os.close(fd)
    assert result.stderr == f"pysplice: descriptor {fd} must be a tap with IFF_NO_PI\n"


def open_tap(flags):
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"tap9", flags))
    return fd


@pytest.mark.parametrize("congestion", ("reno", "bbr"))
def test_a_plain_tap_is_not_overrun(world, congestion):
    """16 uploads at once over a ring of 1000 frames: none is dropped."""
    fd = world.guest.call(open_tap, IFF_TAP | IFF_NO_PI)
    process = joined(world, "-f", "--fd", str(fd), pass_fds=[fd])
    os.close(fd)
    try:
        world.guest.run("ip", "link", "set", "tap9", "up")
        world.guest.run("ip", "addr", "add", f"{world.HOST4}/24", "dev", "tap9")
        pairs = [pair(world, 4) for _ in range(16)]
        for guest, _ in pairs:
            with contextlib.suppress(OSError):
                guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        transfers = [
            Background(transfer, guest, remote, i, 4 << 20) for i, (guest, remote) in enumerate(pairs)
        ]
        for running in transfers:
            running.result(30)
        for sockets in pairs:
            for sock in sockets:
                sock.close()
        assert world.guest.run("sh", "-c", "grep tap9 /proc/net/dev").stdout.split()[12] == "0"
    finally:
        stop(process)


@pytest.mark.parametrize("vnet", (False, True))
@pytest.mark.parametrize("options", ((), ("--no-offload",)))
def test_a_tap_handed_over(world, vnet, options):
    fd = world.guest.call(open_tap, IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet else 0))
    process = joined(world, "-f", "--fd", str(fd), *options, pass_fds=[fd])
    os.close(fd)
    try:
        world.guest.run("ip", "link", "set", "tap9", "up")
        world.guest.run("ip", "addr", "add", f"{world.HOST4}/24", "dev", "tap9")
        echo_through(world, world.guest.connect)
    finally:
        assert stop(process) == 0


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (
            ("--netns", "nonesuch"),
            "cannot open the namespace /run/netns/nonesuch: No such file or directory",
        ),
        (
            ("--netns", "/etc/passwd"),
            "cannot join the network namespace /etc/passwd: not a namespace of that kind",
        ),
        (("4194303",), "there is no process 4194303"),
        (
            ("--netns", "/proc/self/ns/net"),
            "/proc/self/ns/net is the network namespace that this process runs in",
        ),
        (
            ("-o", "192.0.2.77", "true"),
            "connections cannot come from 192.0.2.77: Cannot assign requested address",
        ),
        (("-i", "nonesuch", "true"), "no interface 'nonesuch' on the host"),
        (
            ("--tap", "lo", "true"),
            "cannot open the tap lo: another kind of interface has that name",
        ),
        (("-P", "/no/such/dir/pid", "true"), "cannot write /no/such/dir/pid: No such file or directory"),
        (("--fd", "250"), "descriptor 250 is not a tap: Bad file descriptor"),
        (("-t", "80,", "true"), "invalid ports for -t: '80,' ('' is not a port)"),
        (("-6", "-t", "127.0.0.1/80", "true"), "'127.0.0.1/80': IPv4 is switched off"),
        (
            ("-t", "203.0.113.1/80", "true"),
            "cannot listen on 203.0.113.1 port 80 (tcp): Cannot assign requested address",
        ),
        (("-l", "/no/such/dir/log", "true"), "cannot write /no/such/dir/log: No such file or directory"),
        (("-p", "/no/such/dir/cap", "true"), "cannot write /no/such/dir/cap: No such file or directory"),
        (
            ("-c", "/no/such/dir/ctl", "true"),
            "cannot listen on /no/such/dir/ctl: No such file or directory",
        ),
        (("--runas", "nonesuch", "true"), "no such user or group: 'nonesuch'"),
        (("--fd", "250", "-T", "80"), "'80' does not go with --fd: no process of ours is in the namespace"),
    ),
)
def test_errors_are_one_line(shared_world, options, message):
    result = shared_world.host.run(*PYSPLICE, *options, check=False, timeout=20)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"pysplice: {message}\n")


def test_a_tap_that_is_in_use(world):
    world.pysplice("--config-net")
    result = world.host.run(*PYSPLICE, "-f", "--netns", world.guest.path, check=False, timeout=20)
    assert result.returncode == 1
    assert result.stderr == "pysplice: the tap tap0 is in use by another process\n"
    echo_through(world, world.guest.connect)


def test_a_tap_that_the_guest_deletes(shared_world):
    """Its own fault: the command goes on without a network, and its status is still ours."""
    result = command(shared_world, "sh", "-c", "ip link del tap0; sleep 0.3; exit 3", check=False)
    assert result.returncode == 3


def test_a_leaked_descriptor_is_closed(shared_world):
    parent, child = socket.socketpair()
    process = shared_world.host.spawn(*PYSPLICE, "--", "sleep", "1", pass_fds=[child.fileno()])
    child.close()
    parent.settimeout(10)
    begun = time.monotonic()
    assert parent.recv(1) == b""
    assert time.monotonic() - begun < 1.5
    parent.close()
    assert process.wait(10) == 0


def test_idle_costs_nothing(world):
    """A hundred connections that say nothing, and ports that follow nobody: no processor time at all."""
    process = world.pysplice("--config-net", "-t", "8080", "-u", "none", "-T", "none", "-U", "none")
    with world.remote.listen(world.REMOTE4) as listener:
        port = listener.getsockname()[1]
        pairs = []
        for _ in range(100):
            sock = world.guest.connect(world.REMOTE4, port)
            pairs.append((sock, listener.accept()[0]))
        time.sleep(2)  # the timers of the handshakes
        before = usage(process.pid)
        time.sleep(5)
        switches, seconds = (b - a for a, b in zip(before, usage(process.pid), strict=True))
        for pair in pairs:
            for sock in pair:
                sock.close()
    assert switches <= 4
    assert seconds <= 0.02


def test_the_process_that_serves_has_nothing(world, tmp_path):
    """No files, no privileges but for low ports, and system calls that are filtered: it and the agent.

    The follower reads files.
    """
    process = world.pysplice("--config-net")
    agent, follower = children(process.pid)
    for pid in (process.pid, agent, follower):
        status = Path(f"/proc/{pid}/status").read_text()
        assert "CapEff:\t0000000000000400" in status and "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
    for pid in (process.pid, agent):
        assert os.listdir(f"/proc/{pid}/root/") == [] and os.readlink(f"/proc/{pid}/cwd") == "/"
        for name in ("mnt", "ipc", "uts"):
            assert os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")


EARLY = """
import signal, uvloop
from pysplice import __main__

class Early(uvloop.Loop):
    def run_forever(self):
        signal.raise_signal(signal.SIGTERM)
        super().run_forever()

uvloop.new_event_loop = Early
__main__.main()
"""


def test_a_signal_that_comes_before_the_loop_runs(world):
    process = world.host.spawn(sys.executable, "-c", EARLY, "-f", "--netns", world.guest.path, *NONE)
    try:
        assert process.wait(10) == 0
    finally:
        stop(process)


PRIVATE_DEV = """
set -e
mount --make-rprivate /
mkdir $D/net
for name in null zero urandom random tty net/tun; do touch $D/$name; mount --bind /dev/$name $D/$name; done
ln -s /proc/self/fd $D/fd
mount --rbind $D /dev
exec "$@"
"""


def test_the_systems_logger_hears_what_happens_later(world, tmp_path):
    """In the background nobody else does; the way to it is open before the file system is gone."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as logger,
    ):
        logger.bind(f"{folder}/log")
        logger.settimeout(10)
        words = ("--netns", world.guest.path, "--config-net", *NONE, "-P", str(tmp_path / "pid"))
        world.host.run(
            "env", f"D={folder}", "unshare", "-m", "sh", "-c", PRIVATE_DEV, "sh", *PYSPLICE, *words
        )
        pid = int((tmp_path / "pid").read_text())
        assert os.listdir(f"/proc/{pid}/root/") == []
        world.guest.run("ip", "link", "del", "tap0")
        message = logger.recv(1000).decode()
        assert re.match(rf"<28>.* pysplice\[{pid}\]: the tap is gone", message)


LOW_PORT = "import socket; print(socket.create_server(('0.0.0.0', 80)).accept()[1][0])"


def test_low_ports_may_follow_where_they_could_before(world):
    """A user with only that capability keeps it, at the cost of a separate root directory."""
    # The other one is for the map of user IDs, because we are root here
    only = ("-all,+net_bind_service,+setfcap",) * 3
    process = world.host.spawn(
        *("setpriv", "--inh-caps", only[0], "--ambient-caps", only[1], "--bounding-set", only[2]),
        *(*PYSPLICE, "--config-net", *NONE[2:], "-t", "auto", "--", sys.executable, "-c", LOW_PORT),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: open_to(world.remote, world.HOST4, 80), 10)
        assert process.communicate(timeout=10)[0] == f"{world.REMOTE4}\n"
    finally:
        stop(process)


def test_socket_files_are_taken_away_again(world, tmp_path):
    """For which the file system has to stay."""
    process = world.pysplice("--control", str(tmp_path / "control"), "-t", f"unix:{tmp_path}/web:80")
    assert sorted(os.listdir(tmp_path)) == ["control", "web"]
    assert "Seccomp:\t2" in Path(f"/proc/{process.pid}/status").read_text()
    stop(process)
    assert os.listdir(tmp_path) == []


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("options", ((), ("--no-offload",)), ids=("offload", "plain"))
def test_the_largest_mtu(world, options):
    world.pysplice("--config-net", "--mtu", "65521", *options)
    assert "mtu 65521" in world.guest.run("ip", "link", "show", "tap0").stdout
    with world.remote.listen(world.REMOTE4) as listener:
        with world.guest.connect(world.REMOTE4, listener.getsockname()[1]) as client:
            server, _ = listener.accept()
            with server:
                transfer(client, server, 1, 16 << 20)
                transfer(server, client, 2, 16 << 20)


def test_following_ports_costs_little(world):
    """A thousand sockets that listen, in the namespace and on the host, and all four kinds of ports follow."""
    socks = [world.host.listen("127.0.0.1", 10000 + i) for i in range(500)]
    socks += [world.guest.listen("127.0.0.1", 20000 + i) for i in range(500)]
    process = world.pysplice("--config-net")
    try:
        time.sleep(3)
        before = processor_time(process.pid)
        time.sleep(5)
        after = processor_time(process.pid)
    finally:
        for sock in socks:
            sock.close()
    # About 1 ms a second.  The machine is shared: this is to notice a scan that makes a line of text for each socket.
    assert (after - before) / 5 <= 0.015


def processor_time(pid):
    """Seconds, exactly."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def usage(pid):
    """Times it was woken, and processor seconds."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    with open(f"/proc/{pid}/stat") as file:
        parts = file.read().rsplit(")", 1)[1].split()
    return int(fields["voluntary_ctxt_switches"]), (int(parts[11]) + int(parts[12])) / os.sysconf(
        "SC_CLK_TCK"
    )
