"""Sockets whose guest is gone: what was acknowledged still arrives, then the end, or a reset."""

import select
import socket
import time

import pytest

from pysplice import _cext
from pysplice.stream.host import EVENTS
from pysplice.stream.linger import PATIENCE, Lingerers, Lingering, unsent

from .support.loops import FakeLoop

pytestmark = pytest.mark.usefixtures("isolated")


class Pair:
    """A socket that lingers, and its peer."""

    def __init__(self, most: int = 10) -> None:
        self.epoll = select.epoll()
        self.loop = FakeLoop()
        self.lingerers = Lingerers(self.epoll, most, lambda fd: self.epoll.modify(fd, EVENTS), self.loop)

    def connection(self, queued: int) -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.socket()
            ours.connect(listener.getsockname())
            peer, _ = listener.accept()
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        sent = full = 0
        while sent < queued and full < 3:
            try:
                sent += ours.send(bytes(min(queued - sent, 1 << 16)))
                full = 0
            except BlockingIOError:
                full += 1
                time.sleep(0.05)  # the peer's buffer may grow
        self.sent = sent
        self.epoll.register(ours.fileno(), EVENTS)
        peer.settimeout(5)
        return ours, peer

    def turn(self) -> None:
        for fd, ready in self.epoll.poll(0.05):
            self.lingerers.on_ready(fd, ready)
        self.loop.advance(1)

    def read(self, peer: socket.socket) -> bytes:
        """All that the peer gets."""
        got = bytearray()
        peer.setblocking(False)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            self.turn()
            try:
                part = peer.recv(1 << 20)
            except BlockingIOError:
                continue
            if not part:
                return bytes(got)
            got += part
        raise AssertionError("no end")


def kept(data: bytes) -> _cext.Stream:
    """Bytes in a stream."""
    here, there = socket.socketpair()
    stream = _cext.Stream(len(data))
    here.sendall(data)
    assert stream.receive(there.fileno(), len(data)) == len(data)
    here.close()
    there.close()
    return stream


def test_a_peer_that_reads_late_and_still_speaks():
    """Input that nobody reads would have the kernel reset the connection, with all that is queued."""
    pair = Pair()
    ours, peer = pair.connection(1 << 30)
    pair.lingerers.add(Lingering(ours, kept(b"the end"), False))
    peer.sendall(b"more" * 1000)
    for _ in range(20):
        pair.turn()
    assert len(pair.lingerers) == 1 and pair.lingerers.kept == 7
    got = pair.read(peer)
    assert len(got) == pair.sent + 7 and got.endswith(b"the end")
    pair.turn()
    assert len(pair.lingerers) == 0


def test_a_reset_comes_behind_what_was_queued():
    pair = Pair()
    ours, peer = pair.connection(3 << 20)
    pair.lingerers.add(Lingering(ours, None, True))
    got = bytearray()
    with pytest.raises(ConnectionResetError):
        while True:
            pair.turn()
            got += peer.recv(1 << 20)
    assert len(got) == pair.sent


def test_nobody_waits_for_ever_to_reset():
    pair = Pair()
    ours, peer = pair.connection(6 << 20)
    pair.lingerers.add(Lingering(ours, None, True))
    for _ in range(int(PATIENCE) + 10):
        pair.turn()
    assert len(pair.lingerers) == 0
    peer.close()


def test_where_there_are_too_many_the_kernel_finishes_the_oldest():
    pair = Pair(most=1)
    first, peer = pair.connection(1 << 16)
    pair.connection(0)
    pair.lingerers.add(Lingering(first, None, False))
    held, other = pair.connection(6 << 20)
    pair.lingerers.add(Lingering(held, None, False))
    assert len(pair.lingerers) == 1
    assert len(pair.read(peer)) == 1 << 16
    other.close()


def test_what_the_kernel_has_goes_on_without_us():
    pair = Pair()
    ours, peer = pair.connection(6 << 20)
    assert unsent(ours) > 0
    pair.lingerers.add(Lingering(ours, None, False))
    sent = pair.sent
    pair.lingerers.close()
    assert len(pair.read(peer)) == sent


def test_a_peer_that_resets():
    pair = Pair()
    ours, peer = pair.connection(6 << 20)
    pair.lingerers.add(Lingering(ours, None, False))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    pair.turn()
    assert len(pair.lingerers) == 0
