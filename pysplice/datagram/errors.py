"""ICMP errors: from the error queue of a socket (ip(7), IP_RECVERR) to the guest.

Owns nothing.  Imports `wire` and the ICMP errors of `link`.
"""

# system calls (serve): recvmsg getsockopt

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from .. import wire
from ..link import icmp

IP_RECVERR, IPV6_RECVERR = 11, 25
# struct sock_extended_err: errno, origin, type, code, pad, info, data; then the address of the host that reports
EXTENDED = struct.Struct("=IBBBBII")
ORIGIN_LOCAL, ORIGIN_ICMP, ORIGIN_ICMP6 = 1, 2, 3
ICMP_FRAGMENTATION_NEEDED = (3, 4)
ICMPV6_TOO_BIG = (2, 0)
QUEUE_MAX: Final = 16  # errors of one socket at a time
DATA_MAX: Final = 1500


class QueuedError(NamedTuple):
    """An error that the kernel has queued.

    `peer`: where the datagram was sent to, as Python has addresses.  `extended`: struct sock_extended_err.
    `data`: what was sent.
    """

    peer: tuple[Any, ...]
    extended: bytes
    data: bytes


def enable(sock: socket.socket) -> None:
    """Have the kernel queue ICMP errors about the socket's packets."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    # In a socket of both versions, IPv4 has an option of its own
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)


def queued(sock: socket.socket) -> Iterator[QueuedError]:
    """The errors in the queue.  A pending error that is not in it is cleared, because it would be reported for ever."""
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
    """The Ethernet frame with an ICMP error for the guest; None if the error does not concern the guest.

    `key` is the flow key of the packet that caused the error, `host` (packed) where it went on the host.  The frame
    comes from the host that has reported the error, or from the destination where the guest knows that by another
    address.
    """
    _, origin, kind, code, _, info, _ = EXTENDED.unpack_from(error.extended)
    ipv4 = len(key) == wire.KEY4_LEN
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
    """The guest's frame once more, as far as it is known; a UDP header is made up."""
    if protocol == wire.PROTO_UDP:
        data = key[-4:] + struct.pack("!HH", wire.UDP + len(data), 0) + data
    source, destination = wire.key_source(key), wire.key_destination(key)
    ethernet = wire.ethernet(mac, guest_mac, wire.ip_ethertype(source))
    return ethernet + wire.ip_packet(source, destination, protocol, data)


def _source(offender: bytes, key: bytes, host: bytes) -> bytes:
    """The packed address that the guest hears the error from; `offender` is a struct sockaddr."""
    destination = wire.key_destination(key)
    (family,) = struct.unpack_from("=H", offender.ljust(2, b"\0"))
    packed = offender[4:8] if family == socket.AF_INET else offender[8:24]
    if packed.startswith(wire.V4_MAPPED):
        packed = packed[12:]
    # Where the destination has another address on the host, the routers on the way are the host's own business; and
    # the guest cannot hear from an address that it has itself
    if len(packed) != len(destination) or not any(packed) or host != destination:
        return destination
    return packed if packed != wire.key_source(key) else destination
