"""Reassembly of fragments (RFC 791, RFC 8200 section 4.5), and fragmentation of packets.

Owns the fragments of packets that are not complete.  Imports `wire`; time is given to it.

A guest may send anything, so memory, number and time are bounded; and if fragments of a packet overlap, the packet is
dropped with all of them (RFC 5722, which we follow for IPv4 too).
"""

import struct
from typing import Final

from .. import wire
from ..wire import FRAGMENT, IPV4, IPV6, PROTO_FRAGMENT, PROTO_UDP

TIMEOUT: Final = 30.0  # seconds; net.ipv4.ipfrag_time of Linux
PACKETS_MAX: Final = 256
BYTES_MAX: Final = 4 << 20
PIECES_MAX: Final = 1024  # of one packet
PACKET_MAX: Final = 65535


class _Partial:
    """The fragments of one packet: offset -> bytes; `total` is its length once the last fragment is there."""

    __slots__ = ("held", "pieces", "since", "total")

    def __init__(self, now: float) -> None:
        self.pieces: dict[int, bytes] = {}
        self.held = 0
        self.total = -1
        self.since = now


class Reassembler:
    """Takes fragments, gives packets."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, _Partial] = {}
        self.held = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def feed(self, packet: bytes, now: float) -> bytes | None:
        """Take a packet with a fragment.

        The result: the whole packet, headers included, if no fragment is missing now; else None.
        """
        self._expire(now)
        parsed = _fragment(packet)
        if parsed is None:
            return None
        key, offset, more, data = parsed
        partial = self._waiting.get(key)
        if partial is None:
            if len(self._waiting) >= PACKETS_MAX:
                self._drop(next(iter(self._waiting)))
            self._waiting[key] = partial = _Partial(now)
        if not self._fits(partial, offset, more, data):
            self._drop(key)
            return None
        if offset in partial.pieces:
            return None  # it was sent twice
        partial.pieces[offset] = data
        partial.held += len(data)
        self.held += len(data)
        if not more:
            partial.total = offset + len(data)
        while self.held > BYTES_MAX:
            self._drop(next(iter(self._waiting)))
        if partial.held != partial.total or key not in self._waiting:
            return None
        payload = b"".join(partial.pieces[at] for at in sorted(partial.pieces))
        self._forget(key)
        return _whole(packet, payload)

    def _fits(self, partial: _Partial, offset: int, more: bool, data: bytes) -> bool:
        """False if the fragment contradicts the others."""
        end = offset + len(data)
        if partial.pieces.get(offset) == data:
            return True
        if end > PACKET_MAX or not data or (more and len(data) % 8) or len(partial.pieces) >= PIECES_MAX:
            return False
        if partial.total >= 0 and (end > partial.total or not more):
            return False
        if not more and any(at + len(piece) > end for at, piece in partial.pieces.items()):
            return False
        return all(end <= at or at + len(piece) <= offset for at, piece in partial.pieces.items())

    def _forget(self, key: bytes) -> None:
        self.held -= self._waiting.pop(key).held

    def _drop(self, key: bytes) -> None:
        self.dropped += 1
        self._forget(key)

    def _expire(self, now: float) -> None:
        while self._waiting:
            key, oldest = next(iter(self._waiting.items()))
            if now - oldest.since < TIMEOUT:
                return
            self._drop(key)


def _fragment(packet: bytes) -> tuple[bytes, int, bool, bytes] | None:
    """Which packet a fragment belongs to, its offset, whether more follow, and its bytes; None if it is malformed."""
    if not wire.is_fragment(packet):
        return None
    if wire.is_ipv4(packet):
        header = (packet[0] & 0x0F) * 4
        (total,) = struct.unpack_from("!H", packet, 2)
        if header < IPV4 or not header <= total <= len(packet):
            return None
        (word,) = struct.unpack_from("!H", packet, 6)
        key = packet[12:20] + packet[4:6] + packet[9:10]
        return (
            key,
            (word & wire.IPV4_OFFSET) * 8,
            bool(word & wire.IPV4_MORE_FRAGMENTS),
            packet[header:total],
        )
    (length,) = struct.unpack_from("!H", packet, 4)
    if length < FRAGMENT or IPV6 + length > len(packet):
        return None
    (word,) = struct.unpack_from("!H", packet, 42)
    key = packet[8:40] + packet[44:48]
    return (
        key,
        word & wire.IPV6_OFFSET,
        bool(word & wire.IPV6_MORE_FRAGMENTS),
        packet[IPV6 + FRAGMENT : IPV6 + length],
    )


def _whole(fragment: bytes, payload: bytes) -> bytes:
    """The packet, with the header of one of its fragments; IPv4 options are left out."""
    if wire.is_ipv4(fragment):
        header = bytes((0x45, fragment[1])) + struct.pack("!H", (IPV4 + len(payload)) & 0xFFFF)
        return header + fragment[4:6] + bytes(2) + fragment[8:10] + bytes(2) + fragment[12:20] + payload
    header = fragment[:4] + struct.pack("!H", len(payload)) + fragment[40:41] + fragment[7:40]
    return header + payload


def datagram(packet: bytes) -> tuple[bytes, bytes, int] | None:
    """Flow key, payload and hop limit of a whole UDP packet; None if it is not one, or is not valid."""
    ipv4 = wire.is_ipv4(packet)
    addresses = packet[12:20] if ipv4 else packet[8:40]
    protocol, header = (packet[9], IPV4) if ipv4 else (packet[6], IPV6)
    udp = packet[header:]
    if protocol != PROTO_UDP or len(udp) < wire.UDP or not wire.may_pass(addresses, to_group=True):
        return None
    source, destination, length, sum_ = struct.unpack_from("!HHHH", udp)
    if not source or not destination or not wire.UDP <= length <= len(udp):
        return None
    if (sum_ or not ipv4) and not wire.is_sum_valid(addresses, PROTO_UDP, udp[:length]):
        return None
    return addresses + udp[:4], udp[wire.UDP : length], wire.hops(packet)


def split(packet: bytes, mtu: int, ident: int) -> list[bytes]:
    """An IP packet without options as packets of at most `mtu` bytes; the checksum of an IPv4 header is left 0."""
    if len(packet) <= mtu:
        return [packet]
    ipv4 = wire.is_ipv4(packet)
    header = IPV4 if ipv4 else IPV6
    payload = packet[header:]
    most = (mtu - header - (0 if ipv4 else FRAGMENT)) & ~7
    parts = []
    for at in range(0, len(payload), most):
        part = payload[at : at + most]
        more = at + most < len(payload)
        if ipv4:
            word = at // 8 | (wire.IPV4_MORE_FRAGMENTS if more else 0)
            head = packet[:2] + struct.pack("!HHH", header + len(part), ident & 0xFFFF, word)
            parts.append(head + packet[8:10] + bytes(2) + packet[12:20] + part)
        else:
            head = packet[:4] + struct.pack("!HB", FRAGMENT + len(part), PROTO_FRAGMENT)
            word = at | (wire.IPV6_MORE_FRAGMENTS if more else 0)
            extra = packet[6:7] + struct.pack("!BHI", 0, word, ident)
            parts.append(head + packet[7:40] + extra + part)
    return parts
