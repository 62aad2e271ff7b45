"""The tap: drains it into runs, fills it with frames.

Owns the descriptor of the tap, and is the only room that reads or writes it.  Imports `_cext`, the
constants of `tcp.doors` and the ICMP errors of `services`.
"""

# system calls (serve): poll ppoll

import os
import select
import struct
from collections.abc import Callable
from typing import Any

from . import _cext
from .services import icmp
from .tcp.doors import ACK, SYN

STATIONS_MAX = 1024

TTL = 255
BROADCAST = b"\xff" * 6

PROTO_TCP = 6

# Microseconds, version 2.4, Ethernet, frames whole
PCAP_HEADER = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)

TCP_OPTION_MSS = 2
TCP_OPTION_NOP = 1
TCP_OPTION_WSCALE = 3


class Station:
    """Where an address of the guest's is on the link: its MAC address, which may change."""

    __slots__ = ("mac",)

    def __init__(self, mac: bytes) -> None:
        self.mac = mac


class TapDevice:
    """A tap in the guest's namespace; `vnet`: frames carry a virtio header (offloads are on)."""

    def __init__(self, fd: int, vnet: bool, mac: bytes, guest_mac: bytes = b"", uso: bool = False) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self.raw = self._tap = _cext.Tap(fd, vnet, mac)
        self.clock: Callable[[], float] = lambda: 0.0
        self._errors = icmp.RateLimit()
        self.uso = uso
        self.guest_mac = guest_mac or BROADCAST  # where what is not asked for goes
        self.source4 = self.source6 = b""
        self._stations: dict[bytes, Station] = {}
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self.vnet = vnet
        self.mac = mac
        self.drain = self._tap.drain
        self.send_run = self._tap.send
        self.store_run = self._tap.store
        self.headers = self._tap.headers
        self.frame = self._tap.frame
        self.emit = self._tap.emit
        self.emit_data = self._tap.emit_data
        self.emit_frame = self._tap.emit_frame

    def fileno(self) -> int:
        return self._fd

    def station(self, address: bytes, mac: bytes) -> Station:
        """Where a packed address is; `mac` if that is not known yet."""
        station = self._stations.get(address)
        if station is None:
            station = Station(mac)
            if len(self._stations) < STATIONS_MAX:
                self._stations[address] = station
        return station

    def readable(self) -> bool:
        """True if the ring holds a frame."""
        return bool(self._poll.poll(0))

    @property
    def dropped(self) -> dict[str, int]:
        """Frames from the guest that were not valid, by what was wrong with them."""
        return self._tap.dropped

    @property
    def errors_held_back(self) -> int:
        """ICMP errors that would have been too many."""
        return self._errors.held_back

    def emit_error(self, frame: bytes) -> None:
        """A frame with an ICMP error for the guest, if that does not make too many (RFC 4443, section 2.4 (f))."""
        if self._errors.allows(self.clock()):
            self.emit_frame(frame)

    def reset(self, key: bytes, guest_mac: bytes, seq: int, ack: int, flags: int) -> None:
        """A segment for a flow that does not exist."""
        self.emit(template(guest_mac, self.mac, key), seq, ack, 0, flags, b"")

    def unreachable(self, frame: bytes, error: int) -> None:
        """Tell the guest by ICMP why its frame (at least the headers) led nowhere; `error` is an errno."""
        ipv4 = frame[12:14] == b"\x08\x00"
        source = (self.source4 or frame[30:34]) if ipv4 else (self.source6 or frame[38:54])
        message = icmp.unreachable(frame, error, self.mac, source)
        if message is not None:
            self.emit_error(message)

    def expired(self, frame: bytes) -> None:
        """Tell the guest that its packet has no hop left (RFC 792, RFC 4443: time exceeded in transit)."""
        ipv4 = frame[12:14] == b"\x08\x00"
        source = (self.source4 or frame[30:34]) if ipv4 else (self.source6 or frame[38:54])
        message = icmp.error_frame(frame, 11 if ipv4 else 3, 0, 0, self.mac, source)
        if message is not None:
            self.emit_error(message)

    def capture(self, fd: int) -> None:
        """Write all frames to a pcap file from now on."""
        os.write(fd, PCAP_HEADER)
        self._tap.capture(fd)

    def close(self) -> None:
        os.close(self._fd)


def template(guest_mac: bytes, mac: bytes, key: bytes, protocol: int = PROTO_TCP) -> bytes:
    """The constant start of all frames of a flow towards the guest, to the ports.

    `key` is that of the guest's segments: source and destination change places.
    """
    ports = key[-2:] + key[-4:-2]
    if len(key) == 12:
        # RFC 791; DF is set, as it is for everybody who knows the path's MTU
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0x4000, TTL, protocol, 0) + key[4:8] + key[:4]
        return guest_mac + mac + b"\x08\x00" + ip + ports
    ip = struct.pack("!IHBB", 6 << 28, 0, protocol, TTL) + key[16:32] + key[:16]
    return guest_mac + mac + b"\x86\xdd" + ip + ports


def _syn_options(mss: int, wscale: int) -> bytes:
    options = struct.pack("!BBH", TCP_OPTION_MSS, 4, mss)
    if wscale >= 0:
        options += bytes((TCP_OPTION_NOP, TCP_OPTION_WSCALE, 3, wscale))
    return options


class TapEnd:
    """The TapDoor of one connection: a template, and the tap behind it."""

    __slots__ = ("_emit", "_emit_data", "_mac", "_station", "_template", "_unreachable")

    def __init__(
        self, tap: TapDevice, guest_mac: bytes, key: bytes, unreachable: Callable[[int], Any]
    ) -> None:
        self._station = tap.station(key[:4] if len(key) == 12 else key[:16], guest_mac)
        self._mac = self._station.mac
        self._template = template(self._mac, tap.mac, key)
        self._emit = tap.emit
        self._emit_data = tap.emit_data
        self._unreachable = unreachable

    def _start(self) -> bytes:
        """The start of a frame, to where the guest is now."""
        if self._mac is not self._station.mac:
            self._mac = self._station.mac
            self._template = self._mac + self._template[6:]
        return self._template

    def segment(self, seq: int, ack: int, window: int, flags: int) -> int:
        return self._emit(self._start(), seq, ack, window, flags, b"")

    def syn(self, seq: int, window: int, mss: int, wscale: int) -> int:
        return self._emit(self._start(), seq, 0, window, SYN, _syn_options(mss, wscale))

    def syn_ack(self, seq: int, ack: int, window: int, mss: int, wscale: int) -> int:
        return self._emit(self._start(), seq, ack, window, SYN | ACK, _syn_options(mss, wscale))

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
        return self._emit_data(self._start(), seq, ack, window, flags, mss, stream, offset, length)

    def unreachable(self, errno: int) -> int:
        self._unreachable(errno)
        return 0
