"""A small language for tests of one connection: a guest, a host socket, and what passes between.

scene = Scene()                 the guest's SYN has arrived, connect() is under way
scene.connected()               connect() succeeds: takes and returns the SYN-ACK
scene.established()             ... and the guest acknowledges it
Scene(inbound=True)             the other way round: a client was accepted, and the guest is asked
scene.answered()                the guest's SYN-ACK: takes and returns what it gets for it
scene.guest(b"data", flags=)    the guest sends a segment in order; what it gets in return
scene.remote(b"data")           the remote host sends; what the guest gets
scene.ack(n)                    the guest acknowledges n bytes more
"""

from pysplice.tcp import seq, window
from pysplice.tcp.connection import Connection, Terms
from pysplice.tcp.doors import ACK, SYN, WRITABLE
from pysplice.tcp.events import ESTABLISHED
from pysplice.tcp.small_queue import SmallQueue

from ..doors.fakes import FakeHost, FakeRun, FakeTap, Segment

IRS = 0xFFFFF000  # so that the guest's numbers wrap early
ISN = 0xFFFFFF00


class Scene:
    def __init__(
        self,
        mss: int = 1460,
        guest_mss: int = 1460,
        wscale: int = 7,
        window_: int = 64240,
        queue: SmallQueue | None = None,
        budget: int = 0,
        estimate: window.Estimator = window.segments_wmem,  # it offers a small empty buffer whole
        trace=None,
        irs: int = IRS,
        isn: int = ISN,
        inbound: bool = False,
        syn_data: bytes = b"",
        **host,
    ) -> None:
        self.now = 1000.0
        self.tap = FakeTap()
        self.host = FakeHost(**host)
        self.queue = queue or SmallQueue(limit=budget)
        self.next = seq.add(irs, 1)  # what the guest sends next
        self.acked = seq.add(isn, 1)  # what the guest has acknowledged
        self.isn = isn
        self.syn = FakeRun(irs, 0, window_, SYN, syn_data, mss=guest_mss, wscale=wscale)
        self.connection = Connection(
            self.tap, self.host, None if inbound else self.syn,
            Terms(isn, mss, self.queue, estimate, trace), self.now,
        )  # fmt: skip
        if inbound:
            self.connection.open(self.now)

    @property
    def facts(self) -> int:
        return self.connection.facts

    def advance(self, seconds: float) -> list[Segment]:
        """Let time pass, firing timers as they are due."""
        until = self.now + seconds
        while self.connection.deadline() <= until:
            self.now = max(self.now, self.connection.deadline())
            self.connection.on_timer(self.now)
        self.now = until
        return self.tap.take()

    def connected(self) -> Segment:
        self.connection.on_host(WRITABLE, self.now)
        (syn_ack,) = self.tap.take()
        return syn_ack

    def established(self) -> "Scene":
        self.connected()
        self.guest(b"", window=512)
        assert self.facts & ESTABLISHED
        return self

    def answered(self, **fields) -> list[Segment]:
        fields = {"ack": self.acked, "window": self.syn.window, "flags": SYN | ACK} | fields
        run = FakeRun(self.syn.seq, mss=self.syn.mss, wscale=self.syn.wscale, **fields)
        self.connection.on_tap(run, self.now)
        return self.tap.take()

    def guest(self, payload: bytes = b"", flags: int = ACK, at: int = 0, **fields) -> list[Segment]:
        """A segment, `at` bytes off what is due; a segment in order moves that on."""
        fields.setdefault("ack", self.acked)
        fields.setdefault("window", 512)
        run = FakeRun(seq.add(self.next, at), flags=flags, payload=payload, **fields)
        if at == 0:
            self.next = seq.add(self.next, len(payload) + (flags & 1))
        self.connection.on_tap(self.host.offer(run), self.now)
        self.connection.acknowledge()
        return self.tap.take()

    def ack(self, n: int, **fields) -> list[Segment]:
        self.acked = seq.add(self.acked, n)
        return self.guest(**fields)

    def remote(self, data: bytes = b"", eof: bool = False, **fields) -> list[Segment]:
        self.host.inbox += data
        self.host.eof = self.host.eof or eof
        return self.ready()

    def ready(self, more: int = 0) -> list[Segment]:
        self.connection.on_host(self.host.ready() | more, self.now)
        return self.tap.take()
