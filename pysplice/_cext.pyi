"""The whole boundary to C: it moves bytes, it decides nothing.

Sizes are bytes.  A result below 0 is -errno, from the system call.  An error that only a caller's mistake can cause
raises ValueError.  Payload stays in memory that Python never sees: in a Stream, or in the batch of a Tap, where
`handle` names a run until the next drain().  No call blocks.
"""

from typing import NamedTuple

class Run(NamedTuple):
    """TCP segments of one flow that follow each other (runs.c says which are joined); fields as on the wire."""

    key: bytes  # flow key: source and destination address, source and destination port
    seq: int  # sequence number of the first byte
    ack: int  # the latest acknowledgement
    window: int  # the latest window, not scaled
    flags: int  # all flags that occur
    length: int  # bytes of payload
    frames: int  # segments; for bare acknowledgements, how often the last one was repeated
    handle: int  # names the payload until the next drain()
    mss: int  # option of a SYN; 0: none
    wscale: int  # option of a SYN; -1: none
    last_seq: int  # sequence number of the last segment

class Datagrams(NamedTuple):
    """UDP datagrams of one flow that follow each other; each keeps its boundaries."""

    key: bytes  # flow key
    frames: int  # how many frames; one may carry several datagrams (UDP segmentation offload)
    length: int  # bytes of payload in all
    ttl: int  # hop limit
    handle: int  # names the payload until the next drain()
    mac: bytes  # MAC address that the first came from
    df: int  # 1: not to be fragmented (DF, or IPv6)
    group: int  # 1: sent to a multicast or broadcast MAC address

class SocketFacts(NamedTuple):
    """One reading of a host socket; -1 where the kernel does not say."""

    sndbuf: int  # SK_MEMINFO_SNDBUF, truesize
    wmem_queued: int  # SK_MEMINFO_WMEM_QUEUED, truesize
    outq: int  # SIOCOUTQ: payload that is unsent or unacknowledged
    snd_mss: int  # tcpi_snd_mss
    snd_wnd: int  # tcpi_snd_wnd, scaled
    rtt: int  # tcpi_rtt, microseconds
    last_data_sent: int  # tcpi_last_data_sent, milliseconds ago
    wmem_max: int  # as passed in

class Stream:
    """A ring of bytes; len() is how many it holds."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: how many bytes it can hold, 1 to 2**30.  Raises MemoryError."""

    def __len__(self) -> int: ...
    def receive(self, fd: int, limit: int, /) -> int:
        """recvmsg(2) up to `limit` bytes from a socket to the end of the ring.

        The result: how many bytes, 0 at the end of the peer's data, or -errno.  Raises ValueError unless
        `limit` is 1 to what the ring has room for.
        """

    def send(self, fd: int, /) -> int:
        """sendmsg(2) all bytes to a socket, and drop those that it takes; their number, or -errno."""

    def discard(self, n: int, /) -> None:
        """Drop `n` bytes at the head; raises ValueError if there are fewer."""

    def trim(self) -> None:
        """Give memory back to the kernel, except for a little; raises ValueError unless the ring is empty."""

class Tap:
    """Drains and fills a tap; the descriptor stays the caller's."""

    def __init__(self, fd: int, vnet: bool, mac: bytes = b"") -> None:
        """`fd`: a non-blocking descriptor.  `vnet`: each frame has a virtio header before it.

        `mac`: frames for other stations are dropped; empty: none are.  Raises ValueError unless it has 6 bytes or none.
        """

    @property
    def dropped(self) -> dict[str, int]:
        """How many frames were dropped, by what was wrong with them (enum drop_reason in frame.h).

        That is length, checksum, flags, port, address, fragment or mac; reasons that did not occur are left out.
        """

    @property
    def capturing(self) -> bool:
        """True while a capture is being written; False too once one has ended because it cannot be written."""

    def drain(self) -> tuple[list[Run], list[Datagrams], list[bytes]]:
        """Read frames until the tap is empty or the batch is full (256 frames, 1 MiB), and forget the batch before.

        The result: runs of TCP segments; runs of UDP datagrams; and all other frames that are worth looking at,
        whole.  Raises OSError if the tap cannot be read, unless frames were read before.
        """

    def headers(self, handle: int, /) -> bytes:
        """The headers of a run's first frame, from Ethernet to TCP or UDP; raises ValueError for an old handle."""

    def frame(self, handle: int, /) -> bytes:
        """A run's first frame, whole; raises ValueError for an old handle."""

    def payloads(self, handle: int, /) -> list[bytes]:
        """The payloads of a run, a datagram each; raises ValueError for an old handle.

        Frames that say they hold more than 128 datagrams are left out.
        """

    def capture(self, fd: int, /) -> None:
        """Write a pcap record for each frame to `fd` from now on; a negative one ends that."""

    def send(self, handle: int, fd: int, skip: int, length: int, /) -> int:
        """sendmsg(2) `length` bytes of a run's payload from `skip` on: how many the socket took, or -errno.

        Raises ValueError for an old handle, or beyond the run.
        """

    def store(self, handle: int, stream: Stream, skip: int, length: int, /) -> None:
        """Append such bytes to a stream; raises ValueError also if it has no room for them."""

    def emit(self, template: bytes, seq: int, ack: int, window: int, flags: int, options: bytes, /) -> int:
        """Write a TCP segment without payload: 0 or -errno.

        `template`: the frame up to and including the ports (wire.frame_start()).  `options`: at most 40 bytes,
        whole words.  Raises ValueError for others.
        """

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
    ) -> int:
        """Write `length` bytes at `offset` of a stream as segments of `mss`, which stay in the stream.

        With a virtio header a frame carries up to 64 KiB, and the guest cuts it.  PSH is left to the last segment.  The
        result: how many bytes went out, or -errno if none did.  Raises ValueError beyond the stream.
        """

    def emit_frame(self, frame: bytes, /) -> int:
        """Write a whole Ethernet frame, checksums and all: 0 or -errno."""

class Packets:
    """Moves batches of datagrams: 64 at a time, each up to 64 KiB and possibly joined (UDP_GRO).

    `address` is a struct sockaddr in bytes, empty for a connected socket; `control` is what ancillary() makes,
    or empty; both raise ValueError if they are too long.  `first` and `count` name datagrams of the batch that
    the last receive() took, and raise ValueError beyond it.
    """

    def __init__(self) -> None:
        """Raises MemoryError."""

    def send(self, tap: Tap, handle: int, fd: int, skip: int, address: bytes, control: bytes, /) -> int:
        """Send the frames of a run of datagrams from `skip` on: how many went out, or -errno of the first.

        Raises ValueError for an old handle, or one of a run of segments.
        """

    def send_bytes(self, payload: bytes, fd: int, address: bytes, control: bytes, /) -> int:
        """Send one datagram: 0 or -errno."""

    def receive(self, fd: int, /) -> list[tuple[bytes, bytes, int, int, int]] | int:
        """Receive up to 64 datagrams (recvmmsg(2)): a list of groups, or -errno.

        A group is datagrams that follow each other with the same peer, local address and interface: these three, then
        first and count.  The peer is a struct sockaddr; the local address is packed.  Local address and interface are
        empty and 0 unless the socket asks for them (IP_PKTINFO, IPV6_RECVPKTINFO).
        """

    def payload(self, index: int, /) -> list[bytes]:
        """One datagram of the batch; several if the kernel has joined them."""

    def relay(self, first: int, count: int, fd: int, address: bytes, control: bytes, /) -> int:
        """Send datagrams of the batch by another socket: 0 or the last -errno."""

    def emit(self, tap: Tap, template: bytes, first: int, count: int, mtu: int, uso: bool, /) -> int:
        """Send datagrams of the batch to the guest: 0 or the last -errno.

        Those that are larger than `mtu` (at least 68) go in fragments.  `uso`: joined ones may go in one frame,
        which the guest cuts.
        """

def ancillary(family: int, source: bytes, interface: int, hops: int, /) -> bytes:
    """Ancillary data (cmsg(3)) for sending a datagram of AF_INET or AF_INET6.

    It leaves from `source` (packed; empty: any address), by `interface` (an index; 0: any), with the hop limit
    `hops` (0: the socket's).  Raises ValueError for another family, or a source that does not fit it.
    """

def busy_poll(fds: tuple[int, ...], microseconds: int, /) -> int:
    """Look for readable descriptors, at most 8, until one is or the time has passed; it does not sleep.

    Returns bits by position in `fds`, 0 if none has become readable.  Raises ValueError for more descriptors.
    """

def bound_ports(fd: int, family: int, protocol: int, without: int, /) -> bytes:
    """A bit for each local port (8192 bytes, least significant first) that a socket listens on, or is bound to (UDP).

    `fd`: a NETLINK_SOCK_DIAG socket.  A UDP socket with a peer does not count, nor does a socket that is bound to the
    interface `without` (an index; 0: all count).  Raises OSError.
    """

def socket_facts(fd: int, wmem_max: int, snd_mss: int, /) -> SocketFacts:
    """Read the state of a TCP socket; `wmem_max` is passed through.  Raises OSError.

    `snd_mss`: that of an earlier reading, bytes; then an empty queue costs one system call, and `snd_wnd`, `rtt` and
    `last_data_sent` are -1.  0: read everything.
    """
