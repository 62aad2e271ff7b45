"""One contract for fake and real doors: a fake cannot lie.

The real HostDoor is a HostSocket connected over loopback, the real TapDoor a TapEnd on a pair of datagram
sockets.  Each side of the suite has the few things that a test needs to do behind the door.
"""

import errno
import select
import socket
import struct
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from pysplice import _cext
from pysplice.budget import STREAM_SIZES, STREAMS_BYTES
from pysplice.link.neighbours import Station
from pysplice.link.tap import TapEnd
from pysplice.sockets.request import HostMaker
from pysplice.stream.host import HostSockets
from pysplice.tcp import window
from pysplice.tcp.doors import ACK, CLOSING, ERROR, PSH, READABLE, RST, SYN, WRITABLE

from ..support.loops import FakeLoop
from ..support.taps import GUEST_MAC, OUR_MAC, key, segment, tap_pair
from .fakes import FakeHost, FakeRun, FakeTap, Segment

PAYLOAD = bytes(range(256)) * 200


class Payload(NamedTuple):
    """What moves the bytes of runs."""

    send_run: Any
    store_run: Any


class Fake:
    """A FakeHost with a remote host that is a few lines."""

    def __init__(self) -> None:
        self.door = FakeHost(sndbuf=100_000)

    def run(self, payload: bytes) -> int:
        return self.door.offer(FakeRun(1, payload=payload)).handle

    def remote_sends(self, data: bytes) -> None:
        self.door.inbox += data

    def remote_closes(self) -> None:
        self.door.eof = True

    def remote_resets(self) -> None:
        self.door.failure = errno.ECONNRESET

    def remote_reads(self) -> bytes:
        self.door.drain()
        return bytes(self.door.wire)

    def remote_reads_all(self) -> bytes:
        """After the door was closed."""
        return bytes(self.door.wire + self.door.outbox + self.door.kept)

    def remote_sees_reset(self) -> bool:
        return self.door.closed in ("aborted", "reset at the end")

    def remote_sees_end(self) -> bool:
        return self.door.shut

    def ready(self) -> int:
        return self.door.ready()

    def close(self) -> None:
        pass


class Real:
    """A HostSocket; the runs come through a real Tap."""

    was_reset = False

    def __init__(self) -> None:
        self.tap_fd, self.guest = tap_pair()
        self.tap = _cext.Tap(self.tap_fd.fileno(), False)
        self.loop = FakeLoop()
        payload = Payload(self.tap.send, self.tap.store)
        self.hosts = HostSockets(payload, HostMaker(), self.loop)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.door = self.hosts.connect(socket.AF_INET, listener.getsockname())
            self.remote, _ = listener.accept()
        self.hosts.own(self.door, "owner")
        # Small, so that it can be filled
        self.door._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
        self.remote.settimeout(5)
        assert self.ready() & WRITABLE
        assert self.door.error() == 0

    def run(self, payload: bytes) -> int:
        at = 1
        for start in range(0, len(payload), 60_000):
            part = payload[start : start + 60_000]
            self.guest.send(segment(4, part, seq=at))
            at += len(part)
        ((run,), _, _) = self.tap.drain()
        assert run.length == len(payload)
        return run.handle

    def remote_sends(self, data: bytes) -> None:
        self.remote.sendall(data)
        time.sleep(0.05)

    def remote_closes(self) -> None:
        self.remote.shutdown(socket.SHUT_WR)
        time.sleep(0.05)

    def remote_resets(self) -> None:
        self.remote.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.remote.close()
        time.sleep(0.05)

    def remote_reads(self) -> bytes:
        self.remote.settimeout(0.3)
        got = b""
        try:
            while part := self.remote.recv(1 << 20):
                got += part
        except TimeoutError:
            pass
        return got

    def remote_reads_all(self) -> bytes:
        """After the door was closed: what arrives before the end, or a reset."""
        self.remote.settimeout(0.05)
        got = b""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            for fd, ready in self.hosts.poll():
                self.hosts.lingering.on_ready(fd, ready)
            self.loop.advance(0.1)
            try:
                part = self.remote.recv(1 << 20)
            except TimeoutError:
                continue
            except ConnectionResetError:
                self.was_reset = True
                return got
            if not part:
                return got
            got += part
        raise AssertionError("no end")

    def remote_sees_reset(self) -> bool:
        if self.was_reset:
            return True
        try:
            return self.remote.recv(1) == b"never"
        except ConnectionResetError:
            return True

    def remote_sees_end(self) -> bool:
        return self.remote.recv(1) == b""

    def ready(self) -> int:
        select.select([self.hosts.fileno()], [], [], 0.5)
        return sum(bits for fd, bits in self.hosts.poll() if self.hosts.owners[fd] == "owner")

    def close(self) -> None:
        self.remote.close()
        self.hosts.close()
        self.tap_fd.close()
        self.guest.close()


@pytest.fixture(params=(Fake, Real), ids=("fake", "real"))
def host(request, isolated):
    side = request.param()
    yield side
    side.close()


def test_send(host):
    handle = host.run(PAYLOAD)
    assert host.door.send(handle, 10, 1000) == 1000
    assert host.remote_reads() == PAYLOAD[10:1010]


def test_a_full_socket_takes_part_and_then_nothing(host):
    """Short, then EAGAIN; what is kept comes out in order when there is room."""
    payload = PAYLOAD * 18  # 920 kB
    handle = host.run(payload)
    taken = host.door.send(handle, 0, len(payload))
    assert 0 < taken < len(payload)
    while (n := host.door.send(handle, taken, len(payload) - taken)) > 0:
        taken += n
    assert n == -errno.EAGAIN
    facts = host.door.facts()
    assert facts.wmem_queued >= facts.sndbuf or facts.outq > 0
    rest = len(payload) - taken
    assert host.door.keep(handle, taken, rest, rest) == rest
    host.door.arm()
    got = host.remote_reads()
    for _ in range(100):
        if host.ready() & WRITABLE:
            n = host.door.flush()
            assert n > 0 or n == -errno.EAGAIN
            rest -= max(n, 0)
        got = got + host.remote_reads() if isinstance(host, Real) else host.remote_reads()
        if not rest:
            break
        host.door.arm()
    assert got == payload


def test_keep_is_bounded(host):
    """The slack is for windows that were rounded up; beyond it bytes are refused, not stored."""
    handle = host.run(PAYLOAD * 6)
    assert host.door.keep(handle, 0, 1000, 2000) == 1000
    assert host.door.keep(handle, 0, 300_000, 2000) == 66_536
    assert host.door.keep(handle, 0, 10, 2000) == 0


def test_flush_of_nothing(host):
    assert host.door.flush() == 0


def test_receive(host):
    assert host.door.receive(100) == -errno.EAGAIN
    host.remote_sends(b"0123456789")
    assert host.ready() & READABLE
    assert host.door.receive(4) == 4
    assert host.door.receive(100) == 6
    assert len(host.door.stream) == 10
    host.door.discard(4)
    assert len(host.door.stream) == 6
    assert host.door.receive(100) == -errno.EAGAIN
    host.door.discard(6)


def test_end_of_stream(host):
    host.remote_sends(b"bye")
    host.remote_closes()
    ready = host.ready()
    assert ready & READABLE and ready & CLOSING
    assert host.door.receive(100) == 3
    assert host.door.receive(100) == 0


def test_data_before_a_reset_or_not_but_then_the_error(host):
    host.remote_resets()
    assert host.ready() & (READABLE | ERROR)
    assert host.door.receive(100) == -errno.ECONNRESET
    if isinstance(host, Fake):
        assert host.door.send(host.run(b"x"), 0, 1) == -errno.ECONNRESET
    else:
        assert host.door.send(host.run(b"x"), 0, 1) == -errno.EPIPE


def test_capacity_is_the_streams(host):
    assert host.door.capacity >= 65536
    if isinstance(host, Real):
        assert host.door.capacity == STREAM_SIZES[0]


def test_many_streams_are_small_ones(isolated):
    """What 300 connections hold for their guests is bounded; what is given back is used again."""
    hosts = HostSockets(Payload(None, None), HostMaker(), FakeLoop())
    lent = [(hosts.borrow(size), size) for size in (hosts.share() for _ in range(2000))]
    sizes = [size for _, size in lent]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == set(STREAM_SIZES)
    assert sum(sizes) < 5 * STREAMS_BYTES  # the later ones are smaller
    for stream, size in lent:
        hosts.give_back(stream, size)
    assert hosts.share() == STREAM_SIZES[0]
    assert hosts.borrow(STREAM_SIZES[0]) in [stream for stream, _ in lent]
    hosts.close()


def test_shutdown(host):
    assert host.door.shutdown() == 0
    assert host.remote_sees_end()
    host.remote_sends(b"still")
    assert host.door.receive(10) == 5


def test_close(host):
    host.door.close()
    assert isinstance(host, Fake) or host.remote.recv(1) == b""


def test_close_with_much_that_is_queued(host):
    """All of it arrives, then the end; what the remote host says meanwhile changes nothing."""
    payload = PAYLOAD * 18
    handle = host.run(payload)
    taken = host.door.send(handle, 0, len(payload))
    kept = host.door.keep(handle, taken, len(payload) - taken, len(payload))
    host.remote_sends(b"more")
    host.door.close()
    got = host.remote_reads_all()
    assert got == payload[: taken + kept]


def test_a_reset_behind_what_is_queued(host):
    handle = host.run(PAYLOAD)
    taken = host.door.send(handle, 0, len(PAYLOAD))
    host.door.close(True)
    got = host.remote_reads_all()
    assert got == PAYLOAD[:taken] and host.remote_sees_reset()


def test_abort(host):
    host.door.abort()
    assert host.remote_sees_reset()


def test_arm_reports_once(host):
    host.ready()
    host.door.arm()
    assert host.ready() & WRITABLE


def test_facts(host):
    facts = host.door.facts()
    assert facts.sndbuf > 0 and facts.wmem_queued == 0 and facts.outq == 0
    assert facts.snd_mss > 0
    # Again, when little of it is read: the window is the same
    again = host.door.facts()
    assert again[:4] == facts[:4]
    assert window.room(again, 1460) == window.room(facts, 1460)
    handle = host.run(PAYLOAD * 18)
    while host.door.send(handle, 0, len(PAYLOAD) * 18) > 0:
        pass
    full = host.door.facts()
    assert full.wmem_queued > 0 and full.outq > 0 and full.snd_wnd >= 0 and full.rtt >= 0


def test_connect_errors(isolated):
    hosts = HostSockets(Payload(None, None), HostMaker(), FakeLoop())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()
    door = hosts.connect(socket.AF_INET, closed)
    hosts.own(door, "owner")
    select.select([hosts.fileno()], [], [], 1)
    assert hosts.poll()
    assert door.error() == errno.ECONNREFUSED
    door.close()
    with pytest.raises(OSError) as caught:
        hosts.connect(socket.AF_INET, ("198.51.100.1", 80))
    assert caught.value.errno == errno.ENETUNREACH
    with pytest.raises(OSError):
        hosts.connect(socket.AF_INET, ("127.0.0.1", 80), ("198.51.100.1", 0))
    hosts.close()


# The tap


class FakeTapSide:
    def __init__(self) -> None:
        self.door = FakeTap()

    def stream(self, data: bytes):
        return bytearray(data)

    def sent(self) -> list[Segment]:
        return [s._replace(mss=0) if s.payload else s for s in self.door.take()]

    def errors(self) -> list[tuple[int, float]]:
        return self.door.errors

    def close(self) -> None:
        pass


class RealTapSide:
    def __init__(self) -> None:
        self.ours, self.guest = tap_pair()
        self.tap = _cext.Tap(self.ours.fileno(), True)
        self._errors: list[tuple[int, float]] = []
        device = SimpleNamespace(
            mac=bytes.fromhex(OUR_MAC.replace(":", "")), emit=self.tap.emit, emit_data=self.tap.emit_data
        )

        guest_mac = bytes.fromhex(GUEST_MAC.replace(":", ""))
        self.station = Station(guest_mac)
        self.door = TapEnd(device, self.station, key(), lambda *error: self._errors.append(error))

    def stream(self, data: bytes):
        stream = _cext.Stream(len(data) or 1)
        a, b = socket.socketpair()
        with a, b:
            a.sendall(data)
            stream.receive(b.fileno(), len(data))
        return stream

    def sent(self) -> list[Segment]:
        segments: list[Segment] = []
        while True:
            try:
                frame = self.guest.recv(70_000)[10:]
            except BlockingIOError:
                return segments
            tcp = Ether(frame)[TCP]
            options = dict(o for o in tcp.options if o[0] != "NOP")
            segments.append(
                Segment(
                    tcp.seq, tcp.ack, tcp.window, int(tcp.flags), bytes(tcp.payload),
                    options.get("MSS", 0), options.get("WScale", -1),
                )
            )  # fmt: skip

    def errors(self) -> list[tuple[int, float]]:
        return self._errors

    def close(self) -> None:
        self.ours.close()
        self.guest.close()


@pytest.fixture(params=(FakeTapSide, RealTapSide), ids=("fake", "real"))
def tap(request):
    side = request.param()
    yield side
    side.close()


def test_segment(tap):
    assert tap.door.segment(1, 2, 3, RST | ACK) == 0
    assert tap.sent() == [Segment(1, 2, 3, RST | ACK)]


def test_syn(tap):
    assert tap.door.syn(2**32 - 1, 65535, 1460, 7) == 0
    assert tap.sent() == [Segment(2**32 - 1, 0, 65535, SYN, b"", 1460, 7)]


@pytest.mark.parametrize("wscale", (-1, 0, 14))
def test_syn_ack(tap, wscale):
    assert tap.door.syn_ack(2**32 - 1, 2, 65535, 1460, wscale) == 0
    assert tap.sent() == [Segment(2**32 - 1, 2, 65535, SYN | ACK, b"", 1460, wscale)]


def test_data(tap):
    stream = tap.stream(PAYLOAD)
    assert tap.door.data(7, 8, 9, ACK | PSH, 1000, stream, 500, 3000) == 3000
    assert tap.sent() == [Segment(7, 8, 9, ACK | PSH, PAYLOAD[500:3500])]


def test_unreachable(tap):
    tap.door.unreachable(errno.EHOSTUNREACH, 5.0)
    assert tap.errors() == [(errno.EHOSTUNREACH, 5.0)]
