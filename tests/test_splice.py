"""Spliced connections without namespaces: two sockets of the host, spliced in this process."""

import contextlib
import fcntl
import os
import select
import socket
import time
from types import SimpleNamespace

import pytest

from pysplice.splice.plane import SplicePlane
from pysplice.splice.streams import ROUNDS, SplicedStreams

from .support.loops import FakeLoop


class Deaf:
    """An epoll that hears of urgent data only once it has been read past: what a burst can look like."""

    def __init__(self, epoll):
        self.epoll = epoll

    def poll(self, timeout):
        return [(fd, ready & ~select.EPOLLPRI) for fd, ready in self.epoll.poll(timeout)]

    def __getattr__(self, name):
        return getattr(self.epoll, name)


@pytest.fixture
def spliced():
    """A client, a server, and the splice between them."""
    with contextlib.ExitStack() as stack:
        outer, inner = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        client = stack.enter_context(socket.create_connection(outer.getsockname()))
        epoll = select.epoll()
        splices = SplicedStreams(epoll, FakeLoop())
        stack.callback(splices.close)
        accepted, _ = outer.accept()
        accepted.setblocking(False)
        between = socket.socket()
        between.setblocking(False)
        splices.start(accepted, between, inner.getsockname())
        server, _ = inner.accept()
        stack.enter_context(server)
        yield SimpleNamespace(on_ready=splices.on_ready, epoll=epoll, all=splices.all), client, server


def read_to_end(splices, sock):
    """What arrives until the end, while bytes are moved."""
    sock.settimeout(0.02)
    got, end = b"", time.monotonic() + 10
    while time.monotonic() < end:
        splices.on_ready(splices.epoll.poll(0))
        with contextlib.suppress(TimeoutError):
            part = sock.recv(65536)
            if not part:
                return got
            got += part
    raise AssertionError(f"no end after {got!r}")


@pytest.mark.parametrize("heard", (True, False))
@pytest.mark.parametrize("before", (b"", b"before"))
def test_urgent_data_at_the_very_end(spliced, heard, before):
    """splice(2) calls it the end when a FIN has come behind urgent data, whether we heard of that or not."""
    splices, client, server = spliced
    server.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    splices.on_ready(splices.epoll.poll(0))
    if not heard:
        splices.epoll = Deaf(splices.epoll)
    if before:
        client.sendall(before)
    client.send(b"!", socket.MSG_OOB)
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(splices, server) == before + b"!"


@pytest.fixture
def calls(monkeypatch):
    """How often splice(2) was called."""
    count, real = [0], os.splice

    def counted(*args, **kwargs):
        count[0] += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "splice", counted)
    return count


def turn(splices, until=()):
    """One turn; with sockets, as many as it takes until one of them is readable."""
    end = time.monotonic() + 10
    splices.on_ready(splices.epoll.poll(0.01))
    while until and not select.select(until, (), (), 0)[0]:
        assert time.monotonic() < end
        splices.on_ready(splices.epoll.poll(0.01))


def test_a_message_costs_two_calls(spliced, calls):
    """Into the pipe and out of it; neither the other direction nor an empty socket is tried."""
    splices, client, server = spliced
    turn(splices)
    for sender, receiver in ((client, server), (server, client)) * 3:
        calls[0] = 0
        sender.send(b"message")
        turn(splices, [receiver])
        assert receiver.recv(100) == b"message"
        assert calls[0] == 2


@pytest.mark.parametrize("large", (True, False))
def test_a_pipe_that_small_segments_fill_is_no_empty_socket(spliced, monkeypatch, large):
    """Each takes a slot of the pipe, whatever it carries."""
    splices, client, server = spliced
    if not large:

        def refused(*args):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(fcntl, "fcntl", refused)
    turn(splices)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(3000):
        client.sendmsg([b"x"], [], socket.MSG_EOR)
    got = b""
    while len(got) < 3000:
        turn(splices, [server])
        got += server.recv(65536)
    assert got == b"x" * 3000


def test_a_descriptor_that_is_passed_keeps_nothing_back():
    """A read of a UNIX socket ends in front of what comes behind it; no event is to come for that."""
    with contextlib.ExitStack() as stack:
        inner = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client, accepted = socket.socketpair()
        stack.enter_context(client)
        epoll = select.epoll()
        splices = SplicedStreams(epoll, FakeLoop())
        stack.callback(splices.close)
        accepted.setblocking(False)
        between = socket.socket()
        between.setblocking(False)
        socket.send_fds(client, [b"A"], [0])
        client.send(b"BBBB")
        splices.start(accepted, between, inner.getsockname())
        server = stack.enter_context(inner.accept()[0])
        got = b""
        while got != b"ABBBB":
            turn(SimpleNamespace(on_ready=splices.on_ready, epoll=epoll), [server])
            got += server.recv(100)


def test_a_connection_that_stops_at_the_end_of_its_turn_gives_its_pipe_back(spliced, monkeypatch):
    """It has had all of its rounds, and the last one has emptied the socket."""
    splices, client, _ = spliced
    turn(splices)
    (splice,) = splices.all()
    (direction,) = (d for d in splice.directions if d.source is splice.client)
    writes, real = [0], os.splice

    def more(source, target, count, **kwargs):
        n = real(source, target, count, **kwargs)
        if target == direction.target.fileno():
            writes[0] += 1
            if writes[0] < ROUNDS:
                client.send(b"x" * (1000 if writes[0] < ROUNDS - 1 else 10))
                select.select([direction.source], (), (), 10)
        return n

    monkeypatch.setattr(os, "splice", more)
    client.send(b"x" * 1000)
    select.select([direction.source], (), (), 10)
    turn(splices)
    assert writes[0] == ROUNDS and not direction.held
    turn(splices)
    assert direction.pipe is None


class Served:
    """Spliced datagrams, as far as the plane asks; none is read, so every socket stays ready."""

    def __init__(self):
        self.counts = {}

    def owns(self, fd):
        return True

    def on_ready(self, ready, now):
        for fd, _ in ready:
            self.counts[fd] = self.counts.get(fd, 0) + 1


@pytest.mark.pure
def test_sockets_that_are_always_ready_take_turns():
    with contextlib.ExitStack() as stack:
        epoll, served = select.epoll(), Served()
        plane = SplicePlane(epoll, SplicedStreams(epoll, FakeLoop()), served)
        stack.callback(epoll.close)
        for _ in range(150):
            ours, peer = (stack.enter_context(sock) for sock in socket.socketpair(type=socket.SOCK_DGRAM))
            epoll.register(ours.fileno(), select.EPOLLIN)
            peer.send(b"x")
        most = 0
        for turn in range(1, 4):
            plane.on_ready(0.0)
            total = sum(served.counts.values())
            most = max(most, total / turn)
        assert len(served.counts) == 150 and most < 100
