"""The doors: the few calls that a connection may make.

Owns nothing; imports no other room.  A door returns ints and never raises on the data path; a result below 0 is
-errno.  It never calls back.  `handle` names the payload of a run in the tap's batch, `stream` the bytes that
were taken from the host socket; both are opaque here.
"""

from typing import Any, Final, NamedTuple, Protocol

# TCP flags (RFC 9293, section 3.1)
FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10

# What a host socket is ready for: the bits of epoll(7)
READABLE: Final = 0x001
URGENT: Final = 0x002  # EPOLLPRI: a read stops short at the urgent mark
WRITABLE: Final = 0x004
ERROR: Final = 0x008
HANGUP: Final = 0x010
CLOSING: Final = 0x2000  # EPOLLRDHUP: the remote host will send no more


class Run(Protocol):
    """Segments of one flow that follow each other, as they came from the tap.

    `frames` counts the segments; for bare acknowledgements, how often the last one was repeated.  `last_seq` is
    the sequence number of the last segment.  `window` is not scaled.  `mss` (0: none) and `wscale` (-1: none)
    are the options of a SYN.
    """

    @property
    def seq(self) -> int: ...
    @property
    def ack(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def handle(self) -> int: ...
    @property
    def mss(self) -> int: ...
    @property
    def wscale(self) -> int: ...
    @property
    def last_seq(self) -> int: ...


class SocketFacts(NamedTuple):
    """One reading of a host socket, from which the window is computed; -1: the kernel does not say."""

    sndbuf: int  # SK_MEMINFO_SNDBUF, bytes of truesize
    wmem_queued: int  # SK_MEMINFO_WMEM_QUEUED, bytes of truesize
    outq: int  # SIOCOUTQ, bytes of payload unsent or unacknowledged
    snd_mss: int  # tcpi_snd_mss, bytes
    snd_wnd: int  # tcpi_snd_wnd, bytes
    rtt: int  # tcpi_rtt, microseconds
    last_data_sent: int  # tcpi_last_data_sent, milliseconds ago
    wmem_max: int  # tcp_wmem[2], bytes: what sndbuf may grow to by itself


class TapDoor(Protocol):
    """Segments towards the guest.  Results: 0 or a number of bytes, below 0 -errno."""

    def segment(self, seq: int, ack: int, window: int, flags: int, /) -> int:
        """A segment without payload; `window` as it goes on the wire."""

    def syn(self, seq: int, window: int, mss: int, wscale: int, /) -> int:
        """A SYN; a `wscale` below 0 leaves the option out."""

    def syn_ack(self, seq: int, ack: int, window: int, mss: int, wscale: int, /) -> int:
        """A SYN-ACK; a `wscale` below 0 leaves the option out."""

    def data(
        self,
        seq: int,
        ack: int,
        window: int,
        flags: int,
        mss: int,
        stream: Any,
        offset: int,
        length: int,
        /,
    ) -> int:
        """`length` bytes at `offset` of the stream in segments of `mss`; the bytes that went out."""

    def unreachable(self, errno: int, now: float, /) -> int:
        """The ICMP error that tells the guest why its SYN led nowhere."""


class HostDoor(Protocol):
    """The host socket of one connection."""

    stream: Any  # bytes that receive() took and discard() has not dropped yet; None while there are none
    capacity: int  # the most bytes that the stream can hold; may change while it is empty

    def error(self) -> int:
        """SO_ERROR: 0 or an errno; reading it clears it."""

    def send(self, handle: int, skip: int, length: int, /) -> int:
        """Queue `length` bytes of a run from `skip` on; the bytes that the kernel took."""

    def keep(self, handle: int, skip: int, length: int, room: int, /) -> int:
        """Hold bytes of a run that send() did not take; the bytes that are held.

        `room`: how many bytes in all may have to be held before everything is flushed.
        """

    def flush(self) -> int:
        """Queue kept bytes; the bytes that the kernel took."""

    def receive(self, limit: int, /) -> int:
        """Take up to `limit` bytes into the stream; 0 at the end of the remote host's data."""

    def discard(self, n: int, /) -> None:
        """Drop n bytes at the head of the stream: the guest has them."""

    def facts(self) -> SocketFacts:
        """Read what the window is computed from.

        While nothing is queued, `snd_wnd`, `rtt` and `last_data_sent` may be -1, and `snd_mss` that of the reading
        before: what a window needs then costs one system call.
        """

    def arm(self) -> None:
        """Report once when the socket becomes writable (again), at once if it is."""

    def shutdown(self) -> int:
        """Send nothing more to the remote host: it sees a FIN."""

    def close(self, reset: bool = False, /) -> None:
        """Give the socket back.  What is queued and kept is still delivered, then the remote host sees the end.

        With `reset` it sees a RST instead of the end.
        """

    def abort(self) -> None:
        """Give the socket back with a RST to the remote host, at once."""
