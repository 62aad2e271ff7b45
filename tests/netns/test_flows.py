"""TCP from a guest through a real tap to a remote host: what applications see."""

import contextlib
import errno
import os
import select
import socket
import struct
import subprocess
import time

import pytest

from ..support.transfer import Background, digest, receive, send, transfer

BOTH = pytest.mark.parametrize("version", (4, 6))
LINGER_RESET = struct.pack("ii", 1, 0)


def pair(world, version):
    """A connection from the guest, and what the remote host accepted for it."""
    address = world.remote_address(version)
    with world.remote.listen(address) as listener:
        guest = world.guest.connect(address, listener.getsockname()[1])
        listener.settimeout(10)
        remote, _ = listener.accept()
        remote.settimeout(20)
    return guest, remote


def exactly(sock, n):
    """n bytes, or what there is before the end (MSG_WAITALL means nothing to a socket with a time-out)."""
    got = b""
    while len(got) < n and (part := sock.recv(n - len(got))):
        got += part
    return got


@BOTH
def test_bytes_arrive_both_ways_at_once(served, version):
    guest, remote = pair(served, version)
    with guest, remote:
        size = 32 << 20
        up = Background(transfer, guest, remote, 1, size)
        down = Background(transfer, remote, guest, 2, size)
        up.result()
        down.result()


@BOTH
@pytest.mark.parametrize("close", (False, True))
def test_server_speaks_first(served, version, close):
    """What the remote host says at once is reported together with the end of connect()."""
    address = served.remote_address(version)
    with served.remote.listen(address) as listener:
        port = listener.getsockname()[1]

        def greet() -> None:
            for _ in range(50):
                sock, _ = listener.accept()
                sock.sendall(b"220 ready\r\n")
                if close:
                    sock.close()
                else:
                    kept.append(sock)

        kept = []
        greeting = Background(greet)
        for _ in range(50):
            with served.guest.connect(address, port) as sock:
                sock.settimeout(5)
                assert exactly(sock, 11) == b"220 ready\r\n"
                if close:
                    assert sock.recv(1) == b""
        greeting.result()
        for sock in kept:
            sock.close()


def test_urgent_data_is_data(served):
    """A read stops at the urgent mark: that is not the end of what there is."""
    guest, remote = pair(served, 4)
    with guest, remote:
        for _ in range(20):
            remote.send(b"abc")
            remote.send(b"!", socket.MSG_OOB)
            remote.send(b"def")
            assert exactly(guest, 7) == b"abc!def"


@BOTH
@pytest.mark.parametrize("first", ("guest", "remote"))
def test_half_close(served, version, first):
    """One end says all and closes its direction, the other answers afterwards."""
    guest, remote = pair(served, version)
    with guest, remote:
        a, b = (guest, remote) if first == "guest" else (remote, guest)
        transfer(a, b, 3, 100_000)
        time.sleep(0.05)
        transfer(b, a, 4, 3_000_000)


@BOTH
def test_refused_is_refused(served, version):
    with pytest.raises(ConnectionRefusedError):
        served.guest.connect(served.remote_address(version), 9)


@BOTH
def test_unreachable_is_an_icmp_error(served, version):
    """The host has no route: the guest's connect() fails at once, for the same reason."""
    served.host.run("ip", f"-{version}", "route", "add", "unreachable",
                    "198.51.100.0/24" if version == 4 else "2001:db8:1::/64")  # fmt: skip
    begun = time.monotonic()
    with pytest.raises(OSError) as caught:
        served.guest.connect("198.51.100.7" if version == 4 else "2001:db8:1::7", 80)
    assert caught.value.errno == errno.EHOSTUNREACH
    assert time.monotonic() - begun < 5


def test_unreachable_that_is_found_out_later(served):
    """Nobody has the address on the host's link: connect() fails after it was begun."""
    with pytest.raises(OSError) as caught:
        served.guest.connect("10.99.0.77", 80)
    assert caught.value.errno == errno.EHOSTUNREACH


@BOTH
def test_reset_by_the_remote_host(served, version):
    guest, remote = pair(served, version)
    with guest:
        guest.sendall(b"x")
        assert remote.recv(1) == b"x"
        remote.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        remote.close()
        with pytest.raises(ConnectionResetError):
            guest.recv(1)


def test_reset_by_the_remote_host_that_had_said_all(served):
    """Half-closed first, then closed with unread data: the guest, which only writes, is told."""
    guest, remote = pair(served, 4)
    with guest:
        remote.shutdown(socket.SHUT_WR)
        assert guest.recv(1) == b""
        guest.sendall(b"unread")
        time.sleep(0.1)
        remote.close()
        time.sleep(0.1)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            guest.sendall(b"more")


@BOTH
def test_reset_by_the_guest(served, version):
    guest, remote = pair(served, version)
    with remote:
        remote.sendall(b"x")
        assert guest.recv(1) == b"x"
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        guest.close()
        with pytest.raises(ConnectionResetError):
            remote.recv(1)


def test_reset_while_the_guest_does_not_read(served):
    """The window is closed and bytes wait on the host: the reset still gets through."""
    guest, remote = pair(served, 4)
    with guest:
        remote.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                remote.send(bytes(65536))
                select.select([], [remote], [], 0.5)
        remote.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        remote.close()
        with pytest.raises(ConnectionResetError):
            while guest.recv(1 << 20):
                pass


@BOTH
def test_simultaneous_close(served, version):
    for _ in range(20):
        guest, remote = pair(served, version)
        with guest, remote:
            guest.shutdown(socket.SHUT_WR)
            remote.shutdown(socket.SHUT_WR)
            assert guest.recv(1) == b""
            assert remote.recv(1) == b""


@pytest.mark.parametrize("reader", ("remote", "guest"))
def test_zero_window_opens_again(served, reader):
    """A reader that sleeps stops the writer, loses nothing, and gets the rest later."""
    guest, remote = pair(served, 4)
    with guest, remote:
        a, b = (guest, remote) if reader == "remote" else (remote, guest)
        b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        size = 24 << 20
        writing = Background(send, a, 5, size)
        time.sleep(2.5)
        assert writing.is_alive()
        got = Background(receive, b, size)
        writing.result()
        assert got.result() == (digest(5, size), size)


def test_small_writes_arrive_in_time(served):
    """Request and response, a thousand times: nothing waits for a timer."""
    guest, remote = pair(served, 4)
    with guest, remote:
        guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def echo() -> None:
            while data := remote.recv(64):
                remote.sendall(data)

        Background(echo)
        begun = time.monotonic()
        for i in range(1000):
            guest.sendall(struct.pack("I", i))
            assert exactly(guest, 4) == struct.pack("I", i)
        assert time.monotonic() - begun < 10
        guest.shutdown(socket.SHUT_WR)


def test_gateway_is_the_host(served):
    for gateway, loopback in ((served.GATEWAY4, "127.0.0.1"), (served.GATEWAY6, "::1")):
        with served.host.listen(loopback) as listener:
            with served.guest.connect(gateway, listener.getsockname()[1]) as guest:
                accepted, peer = listener.accept()
                with accepted:
                    assert peer[0] == loopback
                    accepted.sendall(b"host")
                    assert guest.recv(10) == b"host"


def descriptors(process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def test_connections_leave_nothing_behind(served):
    """2,000 connections one after the other: as many descriptors as before."""
    address = served.REMOTE4
    with served.remote.listen(address) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            for _ in range(2000):
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(sock.recv(100))

        before = descriptors(served.process)
        answering = Background(answer)
        for i in range(2000):
            with served.guest.connect(address, port) as sock:
                sock.sendall(b"%d" % i)
                assert sock.recv(100) == b"%d" % i
                assert sock.recv(1) == b""
        answering.result()
    until = time.monotonic() + 5
    while descriptors(served.process) > before and time.monotonic() < until:
        time.sleep(0.05)
    assert descriptors(served.process) <= before


def test_parallel_downloads(served):
    """200 connections at once, 5 MiB each."""
    size, count = 5 << 20, 200
    expected = digest(6, size)
    with served.remote.listen(served.REMOTE4, backlog=count) as listener:
        port = listener.getsockname()[1]

        def serve(sock) -> None:
            with sock:
                send(sock, 6, size)

        def accept() -> None:
            for _ in range(count):
                sock, _ = listener.accept()
                sock.settimeout(60)
                Background(serve, sock)

        accepting = Background(accept)
        socks = [served.guest.connect(served.REMOTE4, port) for _ in range(count)]
        readers = [Background(receive, sock) for sock in socks]
        for reader in readers:
            assert reader.result(120) == (expected, size)
        accepting.result()
        for sock in socks:
            sock.close()


@BOTH
def test_a_guest_that_changes_its_mac(world, version):
    """Its connections follow, once it has asked for a neighbour again."""
    world.pysplice("--config-net")
    guest, remote = pair(world, version)
    with guest, remote:
        for address in ("02:00:00:00:00:77", "02:00:00:00:00:78"):
            world.guest.run("ip", "link", "set", "tap0", "address", address)
            guest.sendall(b"here I am")
            assert exactly(remote, 9) == b"here I am"
            remote.sendall(b"so I see")
            assert exactly(guest, 8) == b"so I see"


@pytest.mark.parametrize("kind", ("tcp", "udp", "echo"))
def test_a_limit_for_new_flows(world, tmp_path, kind):
    """--limit-flows: a burst of as many as may begin in a second; flows that there are go on."""
    world.remote.sysctl("net.ipv4.ping_group_range", "0 0")
    world.host.sysctl("net.ipv4.ping_group_range", "0 0")
    world.pysplice("--config-net", "--limit-flows", "5")
    remote = world.REMOTE4
    if kind == "tcp":
        with world.remote.listen(remote) as listener:
            port = listener.getsockname()[1]
            socks = [world.guest.socket() for _ in range(30)]
            for sock in socks:
                sock.setblocking(False)
                sock.connect_ex((remote, port))
            listener.settimeout(0.5)
            accepted = []
            with contextlib.suppress(TimeoutError):
                while True:
                    accepted.append(listener.accept()[0])
            # The guest's kernel sends its SYNs again after a second
            assert 5 <= len(accepted) < 20
            accepted[0].sendall(b"on")
            for sock in (*socks, *accepted):
                sock.close()
        return
    if kind == "udp":
        with world.remote.socket(kind=socket.SOCK_DGRAM) as server:
            server.bind((remote, 0))
            clients = [world.guest.socket(kind=socket.SOCK_DGRAM) for _ in range(30)]
            for client in clients:
                client.sendto(b"x", server.getsockname())
            clients[0].sendto(b"again", server.getsockname())
            server.settimeout(0.5)
            got = []
            with contextlib.suppress(TimeoutError):
                while True:
                    got.append(server.recv(10))
            assert 5 <= got.count(b"x") < 20 and b"again" in got
            for client in clients:
                client.close()
        return
    processes = [
        world.guest.spawn("ping", "-n", "-c", "1", "-W", "1", remote, stdout=subprocess.DEVNULL)
        for _ in range(20)
    ]
    answered = [process.wait(20) for process in processes].count(0)
    assert 5 <= answered < 20
