"""ICMP errors towards the guest (RFC 792, RFC 4443).

Pure.  Imports `wire`.
"""

import errno
import struct

from .. import wire

UNREACHABLE4, UNREACHABLE6 = 3, 1
TIME_EXCEEDED4, TIME_EXCEEDED6 = 11, 3

# errno of connect() -> code of ICMP, code of ICMPv6: the reverse of icmp_err_convert[] and icmpv6_err_convert() in
# the kernel, so that the guest's connect() fails as ours did
CODES = {
    errno.ENETUNREACH: (0, 0),  # network unreachable; no route to destination
    errno.ENETDOWN: (0, 0),
    errno.EHOSTUNREACH: (1, 3),  # host unreachable; address unreachable
    errno.EACCES: (13, 1),  # communication administratively prohibited
    errno.EPERM: (13, 1),
}

# RFC 1812, 4.3.2.3: as much of the packet as fits into 576 bytes; RFC 4443, 2.4 (c): into 1280
QUOTED4 = 576 - wire.IPV4 - wire.ICMP
QUOTED6 = 1280 - wire.IPV6 - wire.ICMP

# The bucket of net.ipv4.icmp_msgs_burst and icmp_msgs_per_sec, smaller: a guest is one host
ERRORS_BURST, ERRORS_PER_SECOND = 256, 512


def unreachable(frame: bytes, error: int, mac: bytes, source: bytes) -> bytes | None:
    """The "destination unreachable" frame for a frame of the guest's (at least its headers).

    `error` is the errno that the host met, `mac` our MAC address, `source` the packed address that speaks.  None if
    the error has no ICMP message or the frame carries no IP packet.
    """
    codes = CODES.get(error)
    if codes is None:
        return None
    if wire.ethertype(frame) == wire.ETHERTYPE_IPV4:
        return error_frame(frame, UNREACHABLE4, codes[0], 0, mac, source)
    return error_frame(frame, UNREACHABLE6, codes[1], 0, mac, source)


def time_exceeded(frame: bytes, mac: bytes, source: bytes) -> bytes | None:
    """The "time exceeded in transit" frame for a frame of the guest's."""
    ipv4 = wire.ethertype(frame) == wire.ETHERTYPE_IPV4
    return error_frame(frame, TIME_EXCEEDED4 if ipv4 else TIME_EXCEEDED6, 0, 0, mac, source)


def error_frame(frame: bytes, kind: int, code: int, info: int, mac: bytes, source: bytes) -> bytes | None:
    """An ICMP or ICMPv6 error of this type and code that quotes `frame`; None if the frame carries no IP packet.

    `info`: the word behind the checksum, for instance an MTU.
    """
    packet = frame[wire.ETHERNET :]
    ipv4 = wire.ethertype(frame) == wire.ETHERTYPE_IPV4
    if len(packet) < (wire.IPV4 if ipv4 else wire.IPV6) + 8:
        return None
    if not ipv4 and wire.ethertype(frame) != wire.ETHERTYPE_IPV6:
        return None
    guest = packet[12:16] if ipv4 else packet[8:24]
    message = struct.pack("!BBHI", kind, code, 0, info) + packet[: QUOTED4 if ipv4 else QUOTED6]
    ethernet = wire.ethernet(wire.frame_source(frame), mac, wire.ethertype(frame))
    return ethernet + wire.icmp_packet(source, guest, message)
