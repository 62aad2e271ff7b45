"""The whole boundary to C: it moves bytes, it decides nothing.

A result below 0 is -errno; what a caller could only get wrong raises
ValueError.  Payload stays in memory that Python never sees: a Stream, or
the batch of a Tap, where `handle` names a run until the next drain().
"""

from typing import NamedTuple

class Run(NamedTuple):
    """Segments of one flow that follow each other; fields as on the wire."""

    key: bytes  # source and destination address, source and destination port
    seq: int
    ack: int
    window: int  # not scaled
    flags: int
    length: int  # bytes of payload
    frames: int  # segments; for bare ACKs, how often the last was repeated
    handle: int
    mss: int  # option of a SYN, 0: none
    wscale: int  # option of a SYN, -1: none
    last_seq: int  # of the last segment

class Datagrams(NamedTuple):
    """UDP datagrams of one flow that follow each other."""

    key: bytes
    frames: int
    length: int  # bytes of payload in all
    ttl: int
    handle: int
    mac: bytes  # whom the first came from

class SocketFacts(NamedTuple):
    """One reading of a host socket; -1 where the kernel does not say."""

    sndbuf: int
    wmem_queued: int
    outq: int
    snd_mss: int
    snd_wnd: int
    rtt: int
    last_data_sent: int
    wmem_max: int  # as passed in

class Stream:
    """A ring of at most `capacity` bytes; len() is what it holds."""

    def __init__(self, capacity: int) -> None: ...
    def __len__(self) -> int: ...
    def receive(self, fd: int, limit: int, /) -> int: ...
    def send(self, fd: int, /) -> int: ...
    def discard(self, n: int, /) -> None: ...
    def trim(self) -> None: ...

class Tap:
    """Drains and fills a tap; the descriptor stays the caller's."""

    def __init__(self, fd: int, vnet: bool) -> None: ...
    @property
    def dropped(self) -> int: ...
    def drain(self) -> tuple[list[Run], list[Datagrams], list[bytes]]: ...
    def headers(self, handle: int, /) -> bytes: ...
    def frame(self, handle: int, /) -> bytes: ...
    def capture(self, fd: int, /) -> None: ...
    def send(self, handle: int, fd: int, skip: int, length: int, /) -> int: ...
    def store(self, handle: int, stream: Stream, skip: int, length: int, /) -> None: ...
    def emit(
        self, template: bytes, seq: int, ack: int, window: int, flags: int, options: bytes, /
    ) -> int: ...
    def emit_data(
        self,
        template: bytes,
        seq: int,
        ack: int,
        window: int,
        flags: int,
        mss: int,
        stream: Stream,
        offset: int,
        length: int,
        /,
    ) -> int: ...
    def emit_frame(self, frame: bytes, /) -> int: ...

class Packets:
    """Moves batches of datagrams; `skip` and results count frames of a run,
    or what recvmmsg(2) gives."""

    def __init__(self) -> None: ...
    def send(self, tap: Tap, handle: int, fd: int, skip: int, /) -> int: ...
    def relay(self, source: int, target: int, /) -> tuple[int, int]: ...
    def forward(self, tap: Tap, template: bytes, fd: int, mtu: int, uso: bool, /) -> int: ...
    def emit(self, tap: Tap, template: bytes, payload: bytes, mtu: int, /) -> int: ...

def bound_ports(fd: int, family: int, protocol: int, without: int, /) -> bytes:
    """A bit for each local port that is listened on, or bound without a peer
    (UDP), but by sockets bound to the interface `without` (an index; 0: all)."""

def socket_facts(fd: int, wmem_max: int, /) -> SocketFacts: ...
