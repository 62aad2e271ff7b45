"""ICMP errors: from the error queue of a socket (ip(7), IP_RECVERR) to the guest.

Owns nothing.  Imports the packet builders of `services`.
"""

# system calls (serve): recvmsg getsockopt

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..services import icmp

IP_RECVERR, IPV6_RECVERR = 11, 25
# struct sock_extended_err: errno, origin, type, code, pad, info, data; then the offender's address
EXTENDED = struct.Struct("=IBBBBII")
ORIGIN_LOCAL, ORIGIN_ICMP, ORIGIN_ICMP6 = 1, 2, 3
ICMP_FRAGMENTATION_NEEDED = (3, 4)
ICMPV6_TOO_BIG = (2, 0)
QUEUE_MAX = 16  # errors of one socket at a time
DATA_MAX = 1500
MAPPED = bytes(10) + b"\xff\xff"


class QueuedError(NamedTuple):
    """An error that the kernel has queued: where the datagram was sent to, as Python has addresses, and its data."""

    peer: tuple[Any, ...]
    extended: bytes
    data: bytes


def enable(sock: socket.socket) -> None:
    """Have the kernel queue what ICMP says about the socket's packets."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    # IPv4 in a socket of both versions goes by its own option
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)


def queued(sock: socket.socket) -> Iterator[QueuedError]:
    """The errors that wait, and a pending one that is not in the queue is forgotten: it would be reported for ever."""
    for _ in range(QUEUE_MAX):
        try:
            data, ancillary, _, peer = sock.recvmsg(
                DATA_MAX, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT
            )
        except OSError:
            break
        for level, kind, value in ancillary:
            if (level, kind) in ((socket.IPPROTO_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR)):
                yield QueuedError(peer, value, data)
    sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def frame(
    error: QueuedError, key: bytes, protocol: int, mac: bytes, guest_mac: bytes, host: bytes
) -> bytes | None:
    """What the guest is to be told: an Ethernet frame; None if the error is not for it.

    `key`: source and destination address of the guest's packet, then 4 bytes that it begins with (ports); the
    rest of UDP's header is made up.  `host`: where it went on the host, packed.  The error comes from who has sent
    it, or from the destination where the guest knows that by another address.
    """
    _, origin, kind, code, _, info, _ = EXTENDED.unpack_from(error.extended)
    ipv4 = len(key) == 12
    if origin == ORIGIN_LOCAL and info:
        kind, code = ICMP_FRAGMENTATION_NEEDED if ipv4 else ICMPV6_TOO_BIG
    elif origin not in (ORIGIN_ICMP, ORIGIN_ICMP6):
        return None
    source = _source(error.extended[EXTENDED.size :], key, host)
    if (kind, code) not in (ICMP_FRAGMENTATION_NEEDED, ICMPV6_TOO_BIG):
        info = 0
    return icmp.error_frame(
        quoted(key, protocol, error.data, guest_mac, mac), kind, code, info, mac, source
    )


def quoted(key: bytes, protocol: int, data: bytes, guest_mac: bytes, mac: bytes) -> bytes:
    """The guest's frame once more, as far as it is known."""
    if protocol == socket.IPPROTO_UDP:
        data = key[-4:] + struct.pack("!HH", 8 + len(data), 0) + data
    ipv4 = len(key) == 12
    addresses = key[:-4]
    if ipv4:
        packet = icmp.ipv4_packet(addresses[:4], addresses[4:], protocol, data)
    else:
        packet = struct.pack("!IHBB", 6 << 28, len(data), protocol, 255) + addresses + data
    return mac + guest_mac + (b"\x08\x00" if ipv4 else b"\x86\xdd") + packet


def _source(offender: bytes, key: bytes, host: bytes) -> bytes:
    """Who the guest hears it from, packed."""
    ipv4 = len(key) == 12
    destination = key[4:8] if ipv4 else key[16:32]
    (family,) = struct.unpack_from("=H", offender.ljust(2, b"\0"))
    packed = offender[4:8] if family == socket.AF_INET else offender[8:24]
    if packed.startswith(MAPPED):
        packed = packed[12:]
    # Where the destination is another address on the host, what is between is the host's too; and an address
    # that the guest has as well cannot be what it hears from
    if len(packed) != len(destination) or not any(packed) or host != destination:
        return destination
    return packed if packed not in (key[:4], key[:16]) else destination
