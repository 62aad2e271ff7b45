"""Packets out of fragments (RFC 791, RFC 8200 section 4.5), and fragments out of packets.

Owns what waits to be whole.  Imports the checksum of `services`; time is given to it.

A guest writes what it likes: memory, number and time are bounded, and a packet whose fragments overlap is dropped
with all of them (RFC 5722, which we follow for IPv4 too).
"""

import struct

from ..services.icmp import checksum

TIMEOUT = 30.0  # seconds; net.ipv4.ipfrag_time of Linux
PACKETS_MAX = 256
BYTES_MAX = 4 << 20
PIECES_MAX = 1024  # of one packet
PACKET_MAX = 65535

IPV4_HEADER, IPV6_HEADER, FRAGMENT_HEADER = 20, 40, 8
PROTO_UDP, PROTO_FRAGMENT = 17, 44
# ::/96 and ::ffff:0:0/96, as in frame.c
LOW6 = (bytes(12), bytes(10) + b"\xff\xff")
MORE4, MORE6 = 0x2000, 0x0001


class _Partial:
    """The fragments of a packet so far: offset -> bytes; `total` is its length once the last is there."""

    __slots__ = ("held", "pieces", "since", "total")

    def __init__(self, now: float) -> None:
        self.pieces: dict[int, bytes] = {}
        self.held = 0
        self.total = -1
        self.since = now


class Reassembler:
    """Feeds on fragments, gives packets."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, _Partial] = {}
        self.held = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def feed(self, packet: bytes, now: float) -> bytes | None:
        """Take a fragment; the whole packet, headers included, if this was the last that was missing."""
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
            return None  # the same once more
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
        """False if the fragment contradicts what is there."""
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


def is_fragment(packet: bytes) -> bool:
    """True for an IP packet that is a part of one."""
    if packet[:1] and packet[0] >> 4 == 4:
        return len(packet) >= IPV4_HEADER and bool(struct.unpack_from("!H", packet, 6)[0] & 0x3FFF)
    return len(packet) >= IPV6_HEADER + FRAGMENT_HEADER and packet[6] == PROTO_FRAGMENT


def _fragment(packet: bytes) -> tuple[bytes, int, bool, bytes] | None:
    """Whose fragment it is, its offset, whether more follow, its bytes; None if it is none."""
    if not is_fragment(packet):
        return None
    if packet[0] >> 4 == 4:
        header = (packet[0] & 0x0F) * 4
        (total,) = struct.unpack_from("!H", packet, 2)
        if header < IPV4_HEADER or not header <= total <= len(packet):
            return None
        (word,) = struct.unpack_from("!H", packet, 6)
        key = packet[12:20] + packet[4:6] + packet[9:10]
        return key, (word & 0x1FFF) * 8, bool(word & MORE4), packet[header:total]
    (length,) = struct.unpack_from("!H", packet, 4)
    if length < FRAGMENT_HEADER or IPV6_HEADER + length > len(packet):
        return None
    (word,) = struct.unpack_from("!H", packet, 42)
    key = packet[8:40] + packet[44:48]
    return key, word & 0xFFF8, bool(word & MORE6), packet[48 : IPV6_HEADER + length]


def _whole(fragment: bytes, payload: bytes) -> bytes:
    """The packet, with the addresses of one of its fragments; IPv4 options are not kept."""
    if fragment[0] >> 4 == 4:
        header = bytes((0x45, fragment[1])) + struct.pack("!H", (IPV4_HEADER + len(payload)) & 0xFFFF)
        return header + fragment[4:6] + bytes(2) + fragment[8:10] + bytes(2) + fragment[12:20] + payload
    header = fragment[:4] + struct.pack("!H", len(payload)) + fragment[40:41] + fragment[7:40]
    return header + payload


def datagram(packet: bytes) -> tuple[bytes, bytes, int] | None:
    """Key, payload and hop limit of a whole UDP packet, to a host or a group; None if it is none, or not valid."""
    if packet[0] >> 4 == 4:
        protocol, ttl, header, addresses = packet[9], packet[8], IPV4_HEADER, packet[12:20]
        bad = any(addresses[i] in (0, 127) for i in (0, 4)) or addresses[0] >= 224
        # To a group, or to everybody; as in frame.c
        bad = bad or (addresses[4] >= 240 and addresses[4:] != b"\xff" * 4)
    else:
        protocol, ttl, header, addresses = packet[6], packet[7], IPV6_HEADER, packet[8:40]
        bad = any(addresses[i : i + 12] in LOW6 for i in (0, 16)) or addresses[0] == 0xFF
        bad = bad or (addresses[16] == 0xFF and addresses[17] & 0xF <= 1)
    udp = packet[header:]
    if protocol != PROTO_UDP or bad or len(udp) < 8:
        return None
    source, destination, length, sum_ = struct.unpack_from("!HHHH", udp)
    if not source or not destination or not 8 <= length <= len(udp):
        return None
    pseudo = addresses + struct.pack("!II", length, PROTO_UDP)
    if (sum_ or len(addresses) == 32) and checksum(pseudo + udp[:length]) != b"\0\0":
        return None
    return addresses + udp[:4], udp[8:length], ttl


def split(packet: bytes, mtu: int, ident: int) -> list[bytes]:
    """An IP packet without options as packets of at most `mtu` bytes; IPv4 checksums are left 0."""
    if len(packet) <= mtu:
        return [packet]
    ipv4 = packet[0] >> 4 == 4
    header = IPV4_HEADER if ipv4 else IPV6_HEADER
    payload = packet[header:]
    most = (mtu - header - (0 if ipv4 else FRAGMENT_HEADER)) & ~7
    parts = []
    for at in range(0, len(payload), most):
        part = payload[at : at + most]
        more = at + most < len(payload)
        if ipv4:
            word = at // 8 | (MORE4 if more else 0)
            head = packet[:2] + struct.pack("!HHH", header + len(part), ident & 0xFFFF, word)
            parts.append(head + packet[8:10] + bytes(2) + packet[12:20] + part)
        else:
            head = packet[:4] + struct.pack("!HB", FRAGMENT_HEADER + len(part), PROTO_FRAGMENT)
            word = at | (MORE6 if more else 0)
            extra = packet[6:7] + struct.pack("!BHI", 0, word, ident)
            parts.append(head + packet[7:40] + extra + part)
    return parts
