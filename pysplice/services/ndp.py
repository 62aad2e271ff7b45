"""Neighbour discovery (RFC 4861): neighbours and the router are us.

Owns nothing; imports the packet builder of icmp.py and the names of dhcp.py.
"""

import struct
from collections.abc import Collection
from typing import NamedTuple

from .dhcp import domain_names
from .icmp import checksum, icmpv6_packet

ROUTER_SOLICITATION = 133
ROUTER_ADVERTISEMENT = 134
NEIGHBOUR_SOLICITATION = 135
NEIGHBOUR_ADVERTISEMENT = 136

OPTION_SOURCE_MAC = 1
OPTION_TARGET_MAC = 2
OPTION_PREFIX = 3
OPTION_MTU = 5
OPTION_RDNSS = 25
OPTION_DNSSL = 31

ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")
UNSPECIFIED = bytes(16)

ROUTER_LIFETIME = 65535
MANAGED = 0x80
SEARCH_BYTES_MAX = 800  # what fits into a packet of 1280 bytes, and an option

# Solicitations have an option or two; longer ones only cost time
SOLICITATION_MAX = 1024
FOREVER = 0xFFFFFFFF


class Router(NamedTuple):
    """What is advertised: packed addresses; `prefix` None and `mtu` 0 are left out."""

    mac: bytes
    address: bytes
    prefix: bytes | None
    mtu: int
    managed: bool = False  # there is a DHCPv6 server
    dns: tuple[bytes, ...] = ()
    search: tuple[str, ...] = ()


def answer(
    frame: bytes, mac: bytes, guest_addresses: Collection[bytes], router: Router | None
) -> bytes | None:
    """The reply to a frame of ethertype IPv6, or None where it is no solicitation to us.

    With `router` None, router solicitations stay unanswered.
    """
    packet = frame[14:]
    # RFC 4861, 6.1.1 and 7.1.1: what makes a solicitation valid
    if len(packet) < 48 or packet[6] != 58 or packet[7] != 255:
        return None
    (length,) = struct.unpack_from("!H", packet, 4)
    message = packet[40 : 40 + length]
    if len(message) < max(8, length) or length > SOLICITATION_MAX or message[1] != 0:
        return None
    source, destination = packet[8:24], packet[24:40]
    if checksum(source + destination + struct.pack("!II", length, 58) + message) != b"\0\0":
        return None
    if message[0] == NEIGHBOUR_SOLICITATION:
        return _neighbour(frame, message, source, mac, guest_addresses)
    if message[0] == ROUTER_SOLICITATION and router is not None:
        if not _options_valid(message[8:]):
            return None
        if source == UNSPECIFIED:
            return unsolicited(router)
        ethernet = frame[6:12] + mac + frame[12:14]
        return ethernet + icmpv6_packet(router.address, source, advertisement(router))
    return None


def unsolicited(router: Router) -> bytes:
    """The frame with an advertisement for everybody (RFC 4861, 6.2.4)."""
    ethernet = b"\x33\x33\0\0\0\x01" + router.mac + b"\x86\xdd"
    return ethernet + icmpv6_packet(router.address, ALL_NODES, advertisement(router))


def _options_valid(options: bytes) -> bool:
    """RFC 4861, 4.6: each has its length in units of 8 bytes, none is 0."""
    while options:
        if len(options) < 2 or not options[1] or len(options) < options[1] * 8:
            return False
        options = options[options[1] * 8 :]
    return True


def _neighbour(
    frame: bytes, message: bytes, source: bytes, mac: bytes, guest_addresses: Collection[bytes]
) -> bytes | None:
    target = message[8:24]
    if len(message) < 24 or target[0] == 0xFF or not _options_valid(message[24:]):
        return None
    # Without a source it is the guest's duplicate address detection (RFC 4862, 5.4)
    if source == UNSPECIFIED or target == source or target in guest_addresses:
        return None
    flags = 0xE0000000  # router, solicited, override
    reply = struct.pack("!BBHI", NEIGHBOUR_ADVERTISEMENT, 0, 0, flags) + target
    reply += bytes((OPTION_TARGET_MAC, 1)) + mac
    return frame[6:12] + mac + frame[12:14] + icmpv6_packet(target, source, reply)


def advertisement(router: Router) -> bytes:
    """A router advertisement (RFC 4861, 4.2) that lets a guest configure itself (RFC 4862)."""
    flags = MANAGED if router.managed else 0
    message = struct.pack("!BBHBBHII", ROUTER_ADVERTISEMENT, 0, 0, 255, flags, ROUTER_LIFETIME, 0, 0)
    if router.prefix is not None:
        # On-link and autonomous
        message += struct.pack("!BBBBIII", OPTION_PREFIX, 4, 64, 0xC0, FOREVER, FOREVER, 0)
        message += router.prefix[:8] + bytes(8)
    if router.mtu:
        message += struct.pack("!BBHI", OPTION_MTU, 1, 0, router.mtu)
    if router.dns:
        # RFC 8106, 5.1 and 5.2
        message += struct.pack("!BBHI", OPTION_RDNSS, 1 + 2 * len(router.dns), 0, FOREVER)
        message += b"".join(router.dns)
    if router.search:
        names = domain_names(router.search, SEARCH_BYTES_MAX)
        names += bytes(-len(names) % 8)
        message += struct.pack("!BBHI", OPTION_DNSSL, 1 + len(names) // 8, 0, FOREVER) + names
    return message + bytes((OPTION_SOURCE_MAC, 1)) + router.mac
