"""ICMP errors towards the guest (RFC 792, RFC 4443).

Owns nothing, imports no other room.
"""

import errno
import struct

ICMP_UNREACHABLE = 3
ICMPV6_UNREACHABLE = 1

# errno of connect() -> code of ICMP, code of ICMPv6: the reverse of icmp_err_convert[] and
# icmpv6_err_convert() in the kernel, so that the guest's connect() fails as ours did
CODES = {
    errno.ENETUNREACH: (0, 0),  # network unreachable; no route to destination
    errno.ENETDOWN: (0, 0),
    errno.EHOSTUNREACH: (1, 3),  # host unreachable; address unreachable
    errno.EACCES: (13, 1),  # communication administratively prohibited
    errno.EPERM: (13, 1),
}


# The bucket of icmp_msgs_burst and icmp_msgs_per_sec, smaller: a guest is one host
ERRORS_BURST, ERRORS_PER_SECOND = 256, 512


class RateLimit:
    """A token bucket; `held_back` counts what it has refused."""

    def __init__(self, burst: float = ERRORS_BURST, rate: float = ERRORS_PER_SECOND) -> None:
        self._burst = self._tokens = burst
        self._rate = rate
        self._at = 0.0
        self.held_back = 0

    def allows(self, now: float) -> bool:
        """Take a token; False if there is none."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            self.held_back += 1
            return False
        self._tokens -= 1
        return True


def checksum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071) of `data` as two bytes; 0 over data that carries its own."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def unreachable(frame: bytes, error: int, mac: bytes, source: bytes) -> bytes | None:
    """The error frame for `frame`, the guest's Ethernet frame (at least its headers).

    `error` is the errno met on the host; `mac` ours, `source` the packed address that we speak as.
    None where the error has no ICMP message or the frame is no IP.
    """
    codes = CODES.get(error)
    if codes is None:
        return None
    if frame[12:14] == b"\x08\x00":
        return error_frame(frame, ICMP_UNREACHABLE, codes[0], 0, mac, source)
    return error_frame(frame, ICMPV6_UNREACHABLE, codes[1], 0, mac, source)


def error_frame(frame: bytes, kind: int, code: int, info: int, mac: bytes, source: bytes) -> bytes | None:
    """An ICMP or ICMPv6 error of this type and code that quotes `frame`; None if that is no IP.

    `info`: the word behind the checksum, an MTU for instance; see unreachable() for the rest.
    """
    ethernet = frame[6:12] + mac + frame[12:14]
    packet = frame[14:]
    if frame[12:14] == b"\x08\x00" and len(packet) >= 28:
        # RFC 1812, 4.3.2.3: as much as fits into 576 bytes
        message = struct.pack("!BBHI", kind, code, 0, info) + packet[: 576 - 28]
        message = message[:2] + checksum(message) + message[4:]
        return ethernet + ipv4_packet(source, packet[12:16], 1, message)
    if frame[12:14] == b"\x86\xdd" and len(packet) >= 48:
        message = struct.pack("!BBHI", kind, code, 0, info) + packet[:1232]
        return ethernet + icmpv6_packet(source, packet[8:24], message)
    return None


def ipv4_packet(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    """An IPv4 packet with `payload`."""
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 255, protocol, 0) + source + destination
    return ip[:10] + checksum(ip) + ip[12:] + payload


def icmpv6_packet(source: bytes, destination: bytes, message: bytes) -> bytes:
    """An IPv6 packet with `message`, whose checksum field (bytes 2 and 3) is 0."""
    pseudo = source + destination + struct.pack("!II", len(message), 58)
    message = message[:2] + checksum(pseudo + message) + message[4:]
    header = struct.pack("!IHBB", 6 << 28, len(message), 58, 255)
    return header + source + destination + message
