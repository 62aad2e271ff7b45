"""The tap: drained into runs of segments, and filled with frames.

Owns the tap's descriptor; no other room reads or writes it. Imports `_cext`, `budget`, `wire`, the constants of
`tcp.doors` and the ICMP errors of this room.
"""

# system calls (serve): poll ppoll

import os
import select
import struct
from collections.abc import Callable
from typing import Any, Protocol

from .. import _cext, wire
from ..budget import RateLimit
from ..tcp.doors import ACK, SYN
from . import icmp
from .neighbours import Station

# struct pcap_file_header: microseconds, version 2.4, whole frames, Ethernet
PCAP_HEADER = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)

TCP_OPTION_NOP, TCP_OPTION_MSS, TCP_OPTION_WSCALE = 1, 2, 3


class TapDevice:
    """A tap in the guest's namespace.

    `fd` is its descriptor, which is closed by close().  With `vnet` frames carry a virtio header (offloads are on),
    with `uso` that header may ask for UDP segmentation.  `mac` is our MAC address; frames for other stations are
    dropped.  `source4` and `source6` (packed, empty: the address that the guest has called) are what ICMP errors
    come from.
    """

    def __init__(self, fd: int, vnet: bool, mac: bytes, uso: bool = False) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self.raw = _cext.Tap(fd, vnet, mac)
        self.vnet = vnet
        self.uso = uso
        self.mac = mac
        self.source4 = self.source6 = b""
        self._errors = RateLimit(icmp.ERRORS_BURST, icmp.ERRORS_PER_SECOND)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        # The methods of _cext.Tap that other rooms call directly, without a Python call in between
        self.drain = self.raw.drain
        self.send_run = self.raw.send
        self.store_run = self.raw.store
        self.headers = self.raw.headers
        self.frame = self.raw.frame
        self.payloads = self.raw.payloads
        self.emit = self.raw.emit
        self.emit_data = self.raw.emit_data
        self.emit_frame = self.raw.emit_frame

    def fileno(self) -> int:
        """The tap's descriptor."""
        return self._fd

    def readable(self) -> bool:
        """True if the ring holds a frame."""
        return bool(self._poll.poll(0))

    @property
    def dropped(self) -> dict[str, int]:
        """How many frames of the guest's were dropped as invalid, by what was wrong with them."""
        return self.raw.dropped

    @property
    def errors_held_back(self) -> int:
        """How many ICMP errors the rate limit has suppressed."""
        return self._errors.held_back

    def emit_error(self, frame: bytes | None, now: float) -> None:
        """Send a frame with an ICMP error, if there is one and the rate limit allows it (RFC 4443, 2.4 (f))."""
        if frame is not None and self._errors.allows(now):
            self.emit_frame(frame)

    def reset(self, key: bytes, guest_mac: bytes, seq: int, ack: int, flags: int) -> None:
        """Send a reset for a flow that does not exist."""
        self.emit(wire.frame_start(guest_mac, self.mac, key), seq, ack, 0, flags, b"")

    def unreachable(self, frame: bytes, error: int, now: float) -> None:
        """Tell the guest by ICMP that its frame (at least the headers) led nowhere; `error` is an errno."""
        self.emit_error(icmp.unreachable(frame, error, self.mac, self._speaker(frame)), now)

    def time_exceeded(self, frame: bytes, now: float) -> None:
        """Tell the guest by ICMP that its packet has no hops left."""
        self.emit_error(icmp.time_exceeded(frame, self.mac, self._speaker(frame)), now)

    def _speaker(self, frame: bytes) -> bytes:
        """The packed address that an error about this frame comes from."""
        packet = frame[wire.ETHERNET :]
        own = self.source4 if wire.ethertype(frame) == wire.ETHERTYPE_IPV4 else self.source6
        return own or wire.packet_destination(packet)

    def capture(self, fd: int) -> None:
        """Write all frames to a pcap file from now on; raises OSError."""
        os.write(fd, PCAP_HEADER)
        self.raw.capture(fd)

    def close(self) -> None:
        """Close the tap."""
        os.close(self._fd)


def _syn_options(mss: int, wscale: int) -> bytes:
    """The options of a SYN, padded to whole words; a `wscale` below 0 is left out."""
    options = struct.pack("!BBH", TCP_OPTION_MSS, 4, mss)
    if wscale >= 0:
        options += bytes((TCP_OPTION_NOP, TCP_OPTION_WSCALE, 3, wscale))
    return options


class Emitter(Protocol):
    """What a TapEnd asks of the tap."""

    mac: bytes
    emit: Callable[[bytes, int, int, int, int, bytes], int]
    emit_data: Callable[..., int]


class TapEnd:
    """The TapDoor of one connection: the start of its frames, and the tap.

    `station` is where the guest's end is, `key` the flow key.  `unreachable(errno, now)` sends the ICMP error for the
    SYN.
    """

    __slots__ = ("_emit", "_emit_data", "_mac", "_start", "_station", "_unreachable")

    def __init__(
        self, tap: Emitter, station: Station, key: bytes, unreachable: Callable[[int, float], Any]
    ) -> None:
        self._station = station
        self._mac = station.mac
        self._start = wire.frame_start(self._mac, tap.mac, key)
        self._emit = tap.emit
        self._emit_data = tap.emit_data
        self._unreachable = unreachable

    def _frame_start(self) -> bytes:
        """The start of a frame to where the guest is now."""
        if self._mac is not self._station.mac:
            self._mac = self._station.mac
            self._start = self._mac + self._start[6:]
        return self._start

    def segment(self, seq: int, ack: int, window: int, flags: int) -> int:
        return self._emit(self._frame_start(), seq, ack, window, flags, b"")

    def syn(self, seq: int, window: int, mss: int, wscale: int) -> int:
        return self._emit(self._frame_start(), seq, 0, window, SYN, _syn_options(mss, wscale))

    def syn_ack(self, seq: int, ack: int, window: int, mss: int, wscale: int) -> int:
        return self._emit(self._frame_start(), seq, ack, window, SYN | ACK, _syn_options(mss, wscale))

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
    ) -> int:
        return self._emit_data(self._frame_start(), seq, ack, window, flags, mss, stream, offset, length)

    def unreachable(self, errno: int, now: float) -> int:
        self._unreachable(errno, now)
        return 0
