"""The window on real sockets: the kernel's own first window, small queues, and the trace."""

import fcntl
import itertools
import json
import os
import select
import socket
import struct
import sys
import time

import pytest
from pytun_pmd3.linux import IFF_NO_PI, IFF_TAP
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from pysplice.setup.addresses import RING_FRAMES
from pysplice.tcp import window

from ..support.namespaces import PYSPLICE, Namespace
from ..support.transfer import Background, transfer
from .test_flows import pair

TUNSETIFF = 0x400454CA


# What the kernel decides


@pytest.fixture
def lonely(isolated):
    """A namespace with a tap, whose other end is ours to read."""
    namespace = Namespace("lonely")

    def open_tap():
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"tap0", IFF_TAP | IFF_NO_PI))
        return fd

    fd = namespace.call(open_tap)
    for words in (
        "link set tap0 address 02:00:00:00:00:01 mtu 1500 up",
        "addr add 10.1.0.1/24 dev tap0",
        "addr add fd01::1/64 dev tap0 nodad",
        "neigh add 10.1.0.2 lladdr 02:00:00:00:00:02 dev tap0",
        "neigh add fd01::2 lladdr 02:00:00:00:00:02 dev tap0",
    ):
        namespace.run("ip", *words.split())
    yield namespace, fd
    os.close(fd)
    namespace.delete()


def syn_of(namespace, fd, version):
    """The window, scale (None without the option) and MSS of the kernel's SYN."""
    sock = namespace.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
    with sock:
        sock.setblocking(False)
        sock.connect_ex(("10.1.0.2" if version == 4 else "fd01::2", 80))
        until = time.monotonic() + 5
        while time.monotonic() < until:
            if not select.select([fd], (), (), 1)[0]:
                continue
            frame = Ether(os.read(fd, 2000))
            if TCP in frame and frame[TCP].flags == "S" and (IP if version == 4 else IPv6) in frame:
                options = dict(frame[TCP].options)
                return frame[TCP].window, options.get("WScale"), options["MSS"]
    raise AssertionError("no SYN")


@pytest.mark.parametrize("version", (4, 6))
@pytest.mark.parametrize("rmem_max", (131072, 3839488, 6291456, 33554432))
@pytest.mark.parametrize(
    ("clamp", "init_rcv_wnd", "scaling", "signed"),
    ((20_000, 0, 1, 0), (1_000_000, 0, 1, 0), (0, 4, 1, 0), (0, 4, 0, 0), (60_000, 0, 1, 1)),
)
def test_the_kernel_chooses_the_same(lonely, version, rmem_max, clamp, init_rcv_wnd, scaling, signed):
    """Its SYN carries what select_initial_window() says, whatever tcp_rmem and the route ask for."""
    namespace, fd = lonely
    space = 65536  # what tcp_rmem[1] makes of it is never less than a half
    namespace.sysctl("net.ipv4.tcp_rmem", f"4096 {8 * space} {rmem_max}")
    namespace.sysctl("net.ipv4.tcp_window_scaling", str(scaling))
    namespace.sysctl("net.ipv4.tcp_workaround_signed_windows", str(signed))
    more = (["window", str(clamp)] if clamp else []) + (
        ["initrwnd", str(init_rcv_wnd)] if init_rcv_wnd else []
    )
    remote = "10.1.0.2" if version == 4 else "fd01::2"
    namespace.run("ip", f"-{version}", "route", "add", remote, "dev", "tap0", *more)
    with open("/proc/sys/net/core/rmem_max") as file:
        most = max(rmem_max, int(file.read()))

    said, wscale, mss = syn_of(namespace, fd, version)
    ours = window.select_initial_window(
        4 * space, mss, clamp, bool(scaling), most, init_rcv_wnd, bool(signed)
    )
    assert wscale == (ours.rcv_wscale if scaling else None)
    assert said == min(ours.rcv_wnd, window.WINDOW_FIELD_MAX)


def test_the_guest_is_offered_a_scale_for_the_send_buffer(world):
    """tcp_wmem[2] of the host decides, and the guest's kernel hears it."""
    world.host.sysctl("net.ipv4.tcp_wmem", "4096 16384 33554432")
    world.pysplice("--config-net")
    guest, remote = pair(world, 4)
    with guest, remote:
        info = guest.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert info[6] & 0x0F == 10  # tcpi_snd_wscale


# Estimators, small queues


@pytest.mark.parametrize("name", sorted(window.ESTIMATORS))
@pytest.mark.parametrize("mtu", ("1500", "65520"))
def test_every_estimator_brings_the_bytes(world, name, mtu):
    world.pysplice("--config-net", "--mtu", mtu, "--window", name)
    guest, remote = pair(world, 4)
    with guest, remote:
        transfer(guest, remote, 5, 48 << 20)
    assert drops(world.guest) == 0


@pytest.mark.parametrize("limit", ("1000", "131072", "off"))
def test_limits_that_somebody_chose(world, limit, tmp_path):
    """Also one below a segment: the list of the throttled keeps the connection going."""
    path = tmp_path / "trace.jsonl"
    process = world.pysplice("--config-net", "--limit-output", limit, "--trace-window", str(path))
    guest, remote = pair(world, 4)
    with guest, remote:
        transfer(guest, remote, 6, 8 << 20, timeout=30)
    process.terminate()
    process.wait(10)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if limit == "off":
        assert all(line["by"] != "queue" and not line["budget_frames"] for line in lines)
    else:
        # A segment where the limit is less; and what rounding adds
        assert max(line["window"] for line in lines) <= max(int(limit), 16384) + 256


def ring_length(namespace):
    words = namespace.run("ip", "link", "show", "tap0").stdout.split()
    return int(words[words.index("qlen") + 1])


def drops(namespace):
    line = namespace.run("sh", "-c", "grep tap0 /proc/net/dev").stdout.split()
    return int(line[12])


def test_the_length_of_the_ring(world):
    world.pysplice("--config-net")
    assert ring_length(world.guest) == RING_FRAMES


def test_a_length_that_somebody_chose_stays(world):
    world.guest.run("ip", "tuntap", "add", "tap0", "mode", "tap")
    world.guest.run("ip", "link", "set", "tap0", "txqueuelen", "500")
    world.pysplice("--config-net")
    assert ring_length(world.guest) == 500


def send_small(socks, count):
    """`count` segments of 100 bytes on each; MSG_EOR keeps those that wait apart."""
    poll = select.epoll()
    left = {}
    for sock in socks:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        poll.register(sock, select.EPOLLOUT)
        left[sock.fileno()] = (sock, count)
    until = time.monotonic() + 60
    while left:
        assert time.monotonic() < until, f"{len(left)} connections stand still"
        for fd, _ in poll.poll(1):
            sock, todo = left[fd]
            try:
                for _ in range(min(todo, 50)):
                    sock.send(b"s" * 100, socket.MSG_EOR)
                    todo -= 1
            except BlockingIOError:
                pass
            left[fd] = (sock, todo)
            if not todo:
                poll.unregister(fd)
                del left[fd]
                sock.setblocking(True)
                sock.shutdown(socket.SHUT_WR)
    poll.close()


def count_to_the_end(sock):
    total = 0
    while n := len(sock.recv(1 << 18)):
        total += n
    return total


@pytest.mark.parametrize(
    ("mtu", "options"),
    (("1500", ()), ("65520", ()), ("1500", ("--no-offload",)), ("9000", ("--no-offload",))),
)
def test_small_segments_on_many_connections_do_not_overrun_the_ring(world, mtu, options):
    world.pysplice("--config-net", "--mtu", mtu, *options)
    pairs = [pair(world, 4) for _ in range(64)]
    sinks = [Background(count_to_the_end, remote) for _, remote in pairs]
    send_small([guest for guest, _ in pairs], 1500)
    for sink in sinks:
        assert sink.result(60) == 150_000
    assert drops(world.guest) == 0
    for guest, remote in pairs:
        guest.close()
        remote.close()


def test_a_large_write_after_many_small_ones(world):
    """A window for small segments is less than one large one: that has to be noticed and mended."""
    world.pysplice("--config-net", "--mtu", "65520")
    pairs = [pair(world, 4) for _ in range(64)]
    for guest, _ in pairs:
        guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sinks = [Background(count_to_the_end, remote) for _, remote in pairs]
    for _ in range(5):
        for guest, _ in pairs:
            for _ in range(100):
                guest.send(b"s" * 100, socket.MSG_EOR)
        for guest, _ in pairs:
            guest.sendall(b"l" * 100_000)
    for guest, _ in pairs:
        guest.shutdown(socket.SHUT_WR)
    for sink in sinks:
        assert sink.result(60) == 550_000
    assert drops(world.guest) == 0
    for guest, remote in pairs:
        guest.close()
        remote.close()


# The trace


def test_the_trace(world, tmp_path):
    path = tmp_path / "trace.jsonl"
    process = world.pysplice("--config-net", "--trace-window", str(path))
    guest, remote = pair(world, 4)
    with guest, remote:
        transfer(guest, remote, 7, 16 << 20)
    process.terminate()
    process.wait(10)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) > 10
    (flow,) = {line["flow"] for line in lines}
    assert f"{world.HOST4}:" in flow and f"-> {world.REMOTE4}:" in flow
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    edges = [line["edge"] for line in lines]
    assert lines[0]["by"] == "initial" and "initial" not in {line["by"] for line in lines[1:]}
    assert lines[-1]["read"] >= 16 << 20
    # The right edge never moves left, but for what the scale cannot say (RFC 7323, 2.4)
    assert all(after > before - 256 for before, after in itertools.pairwise(edges))
    rules = {"initial", "estimate", "silly", "writable", "queue", "edge", "kept", "field"}
    for line in lines:
        assert line["by"] in rules
        assert line["edge"] == line["read"] + line["window"]
        if "sndbuf" in line:
            facts = window.SocketFacts(**{name: line[name] for name in window.SocketFacts._fields})
            assert line["room"] == window.room(facts, line["mss"])
            assert line["estimates"] == {name: rule(facts) for name, rule in window.ESTIMATORS.items()}
            if line["by"] == "estimate":
                assert abs(line["window"] - line["estimate"]) < 256


def test_a_trace_that_cannot_be_written(world, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, reason in (
        ("/no/such/dir/file", "No such file or directory"),
        (str(tmp_path), "Is a directory"),
        (str(tmp_path / "fifo"), "No such device or address"),  # nobody reads it
    ):
        result = world.host.run(*PYSPLICE, "--trace-window", path, "--", "true", check=False, timeout=20)
        assert result.returncode == 1
        assert result.stderr == f"pysplice: cannot write {path}: {reason}\n"


def test_a_trace_that_failed_is_told_when_the_command_has_ended(world):
    address = world.REMOTE4
    with world.remote.listen(address) as listener:
        code = (
            f"import socket; socket.create_connection(('{address}', {listener.getsockname()[1]})); exit(3)"
        )
        words = ("--config-net", "--trace-window", "/dev/full", "--", sys.executable, "-c", code)
        result = world.host.run(*PYSPLICE, *words, check=False, timeout=20)
    assert result.returncode == 3
    assert result.stderr == "pysplice: the trace of windows ends: No space left on device\n"


def test_a_trace_on_a_full_disk_ends_and_nothing_else(world):
    """Half a MiB of lines is more than is gathered before it is written."""
    process = world.pysplice("--config-net", "--trace-window", "/dev/full")
    guest, remote = pair(world, 4)
    with guest, remote:
        for _ in range(3000):
            guest.send(b"x")
            assert remote.recv(1) == b"x"
        transfer(guest, remote, 8, 1 << 20)
    process.terminate()
    assert process.communicate(timeout=10)[1].count("No space left on device") == 1
