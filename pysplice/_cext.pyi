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
    df: int  # 1: not to be fragmented (DF, or IPv6)
    group: int  # 1: sent to a multicast or broadcast MAC

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

    def __init__(self, fd: int, vnet: bool, mac: bytes = b"") -> None:
        """`mac`: frames for other stations are dropped; empty: none are."""

    @property
    def dropped(self) -> dict[str, int]:
        """Frames of the guest's that were dropped, by what was wrong: length, checksum, flags, port, address,
        fragment or mac (enum drop_reason in frame.h)."""

    @property
    def capturing(self) -> bool:
        """False once a capture has ended, because it could not be written."""

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
    """Moves batches of datagrams.

    `address` is a struct sockaddr in bytes, empty for a connected socket, and `control` what ancillary() makes.
    `first` and `count` name datagrams of the batch that the last receive() took.
    """

    def __init__(self) -> None: ...
    def send(self, tap: Tap, handle: int, fd: int, skip: int, address: bytes, control: bytes, /) -> int:
        """The datagrams of a run of the tap's, from `skip` on: how many went out, or -errno of the first."""

    def send_bytes(self, payload: bytes, fd: int, address: bytes, control: bytes, /) -> int:
        """One datagram: 0 or -errno."""

    def receive(self, fd: int, /) -> list[tuple[bytes, bytes, int, int, int]] | int:
        """Up to 64 datagrams (recvmmsg(2)): peer, local address, interface, first and count of those that
        are alike in these; or -errno.

        The peer is a struct sockaddr; the local address is packed, and empty with 0 for the interface where the
        socket does not ask for them (IP_PKTINFO, IPV6_RECVPKTINFO).
        """

    def payload(self, index: int, /) -> list[bytes]: ...
    def relay(self, first: int, count: int, fd: int, address: bytes, control: bytes, /) -> int:
        """Send them by another socket: 0 or the last -errno."""

    def emit(self, tap: Tap, template: bytes, first: int, count: int, mtu: int, uso: bool, /) -> int:
        """Send them to the guest: 0 or the last -errno."""

def ancillary(family: int, source: bytes, interface: int, hops: int, /) -> bytes:
    """Ancillary data (cmsg(3)) that has datagrams leave from an address (packed, empty: any), by an interface
    (its index, 0: any), and with a hop limit (0: the socket's)."""

def bound_ports(fd: int, family: int, protocol: int, without: int, /) -> bytes:
    """A bit for each local port that is listened on, or bound without a peer
    (UDP), but by sockets bound to the interface `without` (an index; 0: all)."""

def socket_facts(fd: int, wmem_max: int, /) -> SocketFacts: ...
