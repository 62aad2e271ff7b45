"""A guest that speaks TCP, a link to it that loses and repeats, and a remote host behind FakeHost.

The guest is as plain as RFC 9293 lets it be, and written apart from the code under test: it sends what
the window allows in segments of any size, retransmits on a timer, keeps what comes too early, and
checks on the way what a peer may rely on.
"""

import random

from pysplice.tcp import seq
from pysplice.tcp.connection import Connection, Terms
from pysplice.tcp.doors import ACK, FIN, PSH, RST, SYN, WRITABLE
from pysplice.tcp.events import CLOSED
from pysplice.tcp.small_queue import SmallQueue

from ..doors.fakes import FakeHost, FakeRun, FakeTap, Segment

STEP = 0.01


class Guest:
    """One TCP endpoint; `out` collects what it sends."""

    def __init__(self, rng: random.Random, data: bytes, mss: int, wscale: int, buffer: int) -> None:
        self.rng, self.data, self.mss = rng, data, mss
        self.wscale, self.buffer = wscale, buffer
        self.irs_seen = False
        self.iss = rng.choice((0, 0xFFFFFF00, rng.getrandbits(32)))
        self.una = self.nxt = seq.add(self.iss, 1)
        self.end = seq.add(self.nxt, len(data))  # the FIN's number
        self.edge: int | None = None  # right edge of the peer's window
        self.scale = 0
        self.received = bytearray()
        self.early: dict[int, bytes] = {}
        self.unread = 0
        self.rcv_nxt = 0
        self.fin_at: int | None = None
        self.fin_received = self.reset = False
        self.timer = 0.0
        self.out: list[FakeRun] = []
        self._granted: int

    def window(self) -> int:
        free = max(self.buffer - self.unread, 0)
        return min(free >> self.wscale if self.wscale >= 0 else free, 65535)

    def syn(self) -> FakeRun:
        return FakeRun(self.iss, 0, min(self.buffer, 65535), SYN, mss=self.mss, wscale=self.wscale)

    def send(self, flags: int, number: int, payload: bytes = b"") -> None:
        self.out.append(FakeRun(number, self.rcv_nxt, self.window(), flags, payload))

    def ack(self) -> None:
        self.send(ACK, self.nxt)

    def payload(self, number: int, length: int) -> bytes:
        at = seq.diff(number, seq.add(self.iss, 1))
        return self.data[at : at + length]

    def on_segment(self, segment: Segment, now: float) -> None:
        if segment.flags & RST:
            self.reset = True
            return
        if segment.flags & SYN:
            if not self.irs_seen:
                self.irs_seen = True
                self.rcv_nxt = seq.add(segment.seq, 1)
                self.scale = max(segment.wscale, 0)
                self.edge = seq.add(segment.ack, segment.window)
            self.ack()
            return
        assert seq.diff(segment.ack, self.nxt) <= 0, "acknowledges what was not sent"
        edge = seq.add(segment.ack, segment.window << self.scale)
        # Segments overtake each other on the link: only the newest says what the edge is
        if seq.diff(segment.ack, self.una) >= 0:
            if self.edge is None or seq.diff(edge, self.edge) > 0:
                self.edge = edge
            if seq.diff(segment.ack, self.una) > 0:
                self.una = segment.ack
                self.timer = now + 0.3
        self.accept(segment)

    def accept(self, segment: Segment) -> None:
        limit = seq.add(self.rcv_nxt, self.buffer - self.unread)
        if segment.payload:
            last = seq.add(segment.seq, len(segment.payload))
            assert seq.diff(last, limit) <= 0 or seq.diff(last, self.granted) <= 0, "beyond the window"
            self.early.setdefault(segment.seq, b"")
            if len(segment.payload) > len(self.early[segment.seq]):
                self.early[segment.seq] = segment.payload
        if segment.flags & FIN:
            self.fin_at = seq.add(segment.seq, len(segment.payload))
        moved = True
        while moved:
            moved = False
            for number in sorted(self.early, key=lambda n: seq.diff(n, self.rcv_nxt)):
                skip = seq.diff(self.rcv_nxt, number)
                if skip < 0:
                    break
                payload = self.early.pop(number)
                if skip < len(payload):
                    self.received += payload[skip:]
                    self.unread += len(payload) - skip
                    self.rcv_nxt = seq.add(self.rcv_nxt, len(payload) - skip)
                    moved = True
        if self.fin_at == self.rcv_nxt and not self.fin_received:
            self.fin_received = True
            self.rcv_nxt = seq.add(self.rcv_nxt, 1)
        # A bare ACK that is in order needs no answer; a probe, data or a FIN does
        if segment.payload or segment.flags & FIN or seq.diff(segment.seq, self.rcv_nxt) < 0:
            self.ack()

    @property
    def granted(self) -> int:
        """The furthest right edge that was ever said."""
        return self._granted

    def remember(self) -> None:
        edge: int = seq.add(self.rcv_nxt, self.window() << max(self.wscale, 0))
        if not hasattr(self, "_granted") or seq.diff(edge, self._granted) > 0:
            self._granted = edge

    def act(self, now: float) -> None:
        """Send, read, retransmit: what an endpoint does by itself."""
        if not self.irs_seen:
            return
        if self.unread and self.rng.random() < 0.5:
            was = self.window()
            self.unread -= self.rng.randint(0, self.unread)
            if not was and self.window():
                self.ack()
        for _ in range(self.rng.randint(0, 4)):
            room = min(seq.diff(self.edge, self.nxt), seq.diff(self.end, self.nxt))
            if room <= 0:
                break
            length = self.rng.randint(1, min(room, self.mss * 3))
            self.send(ACK | PSH, self.nxt, self.payload(self.nxt, length))
            self.nxt = seq.add(self.nxt, length)
            self.timer = max(self.timer, now + 0.3)
        if self.nxt == self.end and self.rng.random() < 0.3:
            self.send(FIN | ACK, self.end)
            self.nxt = seq.add(self.end, 1)
            self.timer = now + 0.3
        if now >= self.timer and self.una != self.nxt:
            self.timer = now + 0.3
            room = seq.diff(self.end, self.una)
            if room > 0:
                length = self.rng.randint(1, min(room, self.mss, max(seq.diff(self.nxt, self.una), 1)))
                self.send(ACK, self.una, self.payload(self.una, length))
            else:
                self.send(FIN | ACK, self.una)
        elif now >= self.timer and seq.diff(self.end, self.nxt) > 0:
            self.timer = now + 0.3
            self.send(ACK, seq.add(self.nxt, -1))  # window probe


class World:
    """A connection with a guest and a remote host around it, driven until both have all."""

    def __init__(self, seed: int, up: bytes, down: bytes, loss: float, repeat: float, **kw) -> None:
        rng = self.rng = random.Random(seed)
        self.loss, self.repeat = loss, repeat
        self.up, self.down = up, down
        mss = rng.choice((536, 1460, 65480))
        self.guest = Guest(rng, up, mss, rng.choice((-1, 0, 7)), rng.choice((2000, 60_000, 1_000_000)))
        self.tap = FakeTap()
        self.host = FakeHost(
            sndbuf=rng.choice((4608, 30_000, 87_040, 1 << 20)),
            overhead=rng.choice((1.0, 1.3, 2.0)),
            capacity=rng.choice((65_536, 1 << 20)),
            meminfo=rng.random() < 0.8,
        )
        self.to_remote = bytearray(down)
        self.now = 10.0
        self.guest.remember()
        self.connection = Connection(
            self.tap, self.host, self.guest.syn(),
            Terms(rng.getrandbits(32), mss, SmallQueue(limit=rng.choice((0, 0, 5000)))), self.now,
        )  # fmt: skip
        self.connection.on_host(WRITABLE, self.now)
        self.back: list[Segment] = []
        self.edge: int | None = None
        self.dips = 0

    def lossy(self, items: list) -> list:
        arrived = []
        for item in items:
            if self.rng.random() < self.loss:
                continue
            arrived.append(item)
            while self.rng.random() < self.repeat:
                arrived.append(item)
        return arrived

    def check_edge(self, segments: list[Segment]) -> None:
        for s in segments:
            if s.flags & RST:
                continue
            ws = 0 if s.flags & SYN else self.connection.receive.ws_to_tap
            edge = seq.add(s.ack, s.window << ws)
            # After much rounding up it may dip by less than the scale can say
            moved = 0 if self.edge is None else seq.diff(edge, self.edge)
            assert moved > -(1 << ws), "right edge moved left"
            self.dips += moved < 0
            if self.edge is None or moved > 0:
                self.edge = edge

    def step(self) -> None:
        self.now += STEP
        rng, connection, host = self.rng, self.connection, self.host
        self.guest.act(self.now)
        runs, self.guest.out = self.guest.out, []
        for run in self.lossy(runs):
            if connection.facts & CLOSED:
                break
            connection.on_tap(host.offer(run), self.now)
            if rng.random() < 0.5:
                connection.acknowledge()
        if not connection.facts & CLOSED:
            if self.to_remote and rng.random() < 0.5:
                n = rng.randint(1, min(len(self.to_remote), 100_000))
                host.inbox += self.to_remote[:n]
                del self.to_remote[:n]
            if not self.to_remote and rng.random() < 0.3:
                host.eof = True
            if rng.random() < 0.7:
                host.drain(rng.randint(0, len(host.outbox)))
            ready = host.ready()
            if ready:
                connection.on_host(ready, self.now)
        if not connection.facts & CLOSED and connection.deadline() <= self.now:
            connection.on_timer(self.now)
        connection.acknowledge()
        segments = self.tap.take()
        self.check_edge(segments)
        for segment in self.lossy(segments):
            # What is longer than a segment is cut, as the kernel does with a frame that asks for it
            payload = segment.payload
            size = max(segment.mss, 1)
            for at in range(0, max(len(payload), 1), size):
                part = segment._replace(seq=seq.add(segment.seq, at), payload=payload[at : at + size])
                self.guest.on_segment(part, self.now)
                self.guest.remember()

    def finished(self) -> bool:
        return bool(self.connection.facts & CLOSED)
