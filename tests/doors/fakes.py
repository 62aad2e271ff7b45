"""Doors without a kernel behind them, for tests of the protocol room.

test_contract.py holds them to what real sockets and a real tap do.
"""

import errno
from dataclasses import dataclass, field
from typing import NamedTuple

from pysplice.tcp.doors import ACK, CLOSING, HANGUP, READABLE, SYN, WRITABLE, SocketFacts

WMEM_MAX = 4 << 20


@dataclass
class FakeRun:
    """Segments as they would come from the tap; the payload is reached by the handle."""

    seq: int
    ack: int = 0
    window: int = 65535
    flags: int = ACK
    payload: bytes = b""
    frames: int = 1
    mss: int = 0
    wscale: int = -1
    handle: int = 0
    last: int = 0  # where the last segment of several begins, counted from the first

    @property
    def last_seq(self) -> int:
        return (self.seq + self.last) & 0xFFFFFFFF

    @property
    def length(self) -> int:
        return len(self.payload)


class Segment(NamedTuple):
    """What went to the guest."""

    seq: int
    ack: int
    window: int
    flags: int
    payload: bytes = b""
    mss: int = 0
    wscale: int = -1


def on_the_wire(seq: int, ack: int, window: int) -> None:
    """Numbers that do not fit their fields are a defect, not something to cut off."""
    assert 0 <= seq < 1 << 32 and 0 <= ack < 1 << 32 and 0 <= window < 1 << 16


class FakeTap:
    """A TapDoor that writes down what it is given; `down` makes it refuse."""

    def __init__(self) -> None:
        self.sent: list[Segment] = []
        self.errors: list[tuple[int, float]] = []
        self.down = False

    def take(self) -> list[Segment]:
        sent, self.sent = self.sent, []
        return sent

    def segment(self, seq, ack, window, flags):
        if self.down:
            return -errno.EIO
        on_the_wire(seq, ack, window)
        self.sent.append(Segment(seq, ack, window, flags))
        return 0

    def syn(self, seq, window, mss, wscale):
        if self.down:
            return -errno.EIO
        self.sent.append(Segment(seq, 0, window, SYN, b"", mss, wscale))
        return 0

    def syn_ack(self, seq, ack, window, mss, wscale):
        if self.down:
            return -errno.EIO
        self.sent.append(Segment(seq, ack, window, SYN | ACK, b"", mss, wscale))
        return 0

    def data(self, seq_, ack, window, flags, mss, stream, offset, length):
        if self.down:
            return -errno.EIO
        assert offset >= 0 and offset + length <= len(stream), "beyond the stream"
        payload = bytes(stream[offset : offset + length])
        self.sent.append(Segment(seq_, ack, window, flags, payload, mss))
        return length

    def unreachable(self, error, now):
        self.errors.append((error, now))
        return 0


@dataclass
class FakeHost:
    """A HostDoor: a socket whose send buffer holds `sndbuf` bytes of payload and overhead.

    `wire` is what the remote host got, `outbox` what waits in the send buffer, `inbox` what came from
    the remote host.  `ready()` gives the readiness an edge-triggered epoll would report now.
    """

    sndbuf: int = 87040
    overhead: float = 1.0  # truesize per byte of payload
    snd_mss: int = 1448
    snd_wnd: int = 65535
    wire: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)
    inbox: bytearray = field(default_factory=bytearray)
    kept: bytearray = field(default_factory=bytearray)
    stream: bytearray = field(default_factory=bytearray)
    capacity: int = 1 << 20
    connect_error: int = 0
    failure: int = 0
    eof: bool = False
    armed: bool = False
    shut: bool = False
    closed: str = ""
    meminfo: bool = True
    keep_room: int = 0

    def __post_init__(self) -> None:
        self.payloads: dict[int, bytes] = {}
        self._handle = 0

    # What a test does

    def offer(self, run: FakeRun) -> FakeRun:
        """Make the payload of a run known by a handle, as a batch of the tap does."""
        self._handle += 1
        run.handle = self._handle
        self.payloads = {run.handle: run.payload}
        return run

    def drain(self, n: int | None = None) -> None:
        """The remote host acknowledges n bytes, or all."""
        n = len(self.outbox) if n is None else min(n, len(self.outbox))
        self.wire += self.outbox[:n]
        del self.outbox[:n]

    def queued(self) -> int:
        return int(len(self.outbox) * self.overhead)

    def writable(self) -> bool:
        return 3 * self.queued() <= 2 * self.sndbuf

    def ready(self) -> int:
        bits = READABLE if self.inbox or self.eof or self.failure else 0
        bits |= CLOSING if self.eof else 0
        bits |= HANGUP if self.eof and self.shut else 0
        if self.armed and self.writable():
            self.armed = False
            bits |= WRITABLE
        return bits

    # The door

    def error(self):
        error, self.connect_error = self.connect_error, 0
        return error

    def send(self, handle, skip, length):
        if self.failure:
            return -self.failure
        assert not self.shut and not self.closed
        payload = self.payloads[handle][skip : skip + length]
        assert len(payload) == length, "beyond the run"
        free = int((self.sndbuf - self.queued()) / self.overhead)
        if free <= 0:
            return -errno.EAGAIN
        self.outbox += payload[:free]
        return min(free, length)

    def keep(self, handle, skip, length, room):
        if not self.kept:
            self.keep_room = room + 65536
        length = min(length, self.keep_room - len(self.kept))
        self.kept += self.payloads[handle][skip : skip + length]
        return length

    def flush(self):
        if self.failure:
            return -self.failure
        free = int((self.sndbuf - self.queued()) / self.overhead)
        if free <= 0 and self.kept:
            return -errno.EAGAIN
        n = min(free, len(self.kept))
        self.outbox += self.kept[:n]
        del self.kept[:n]
        return n

    def receive(self, limit):
        assert limit > 0 and len(self.stream) + limit <= self.capacity
        if self.inbox:
            part = self.inbox[:limit]
            self.stream += part
            del self.inbox[:limit]
            return len(part)
        if self.failure:
            return -self.failure
        return 0 if self.eof else -errno.EAGAIN

    def discard(self, n):
        assert 0 <= n <= len(self.stream)
        del self.stream[:n]

    def facts(self):
        assert not self.closed
        queued = self.queued() if self.meminfo else -1
        return SocketFacts(
            self.sndbuf, queued, len(self.outbox), self.snd_mss, self.snd_wnd, 100, 0, WMEM_MAX
        )

    def arm(self):
        assert not self.closed
        self.armed = True

    def shutdown(self):
        assert not self.shut and not self.kept
        self.shut = True
        return -self.failure

    def close(self, reset=False):
        assert not self.closed
        if reset:
            self.closed = "reset at the end" if self.outbox or self.kept else "aborted"
        else:
            self.closed = "closed"

    def abort(self):
        assert not self.closed
        self.closed = "aborted"
