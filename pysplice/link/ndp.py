"""Neighbour discovery (RFC 4861): every neighbour is ours, and so is the router.

Pure; imports `wire` and the domain names of dhcp.py.
"""

import struct
from collections.abc import Collection
from typing import NamedTuple

from .. import wire
from .dhcp import domain_names

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
ALL_NODES_MAC = b"\x33\x33" + ALL_NODES[-4:]  # RFC 2464, section 7
UNSPECIFIED = bytes(16)

ROUTER_LIFETIME = 65535
MANAGED = 0x80
SEARCH_BYTES_MAX = 800  # fits into a packet of 1280 bytes, and into one option

# Solicitations carry an option or two; checking a longer one only costs time
SOLICITATION_MAX = 1024
FOREVER = 0xFFFFFFFF


class Router(NamedTuple):
    """What a router advertisement says; addresses are packed.  A `prefix` of None and an `mtu` of 0 are left out."""

    mac: bytes
    address: bytes
    prefix: bytes | None
    mtu: int
    managed: bool = False  # addresses come by DHCPv6
    dns: tuple[bytes, ...] = ()
    search: tuple[str, ...] = ()


def answer(
    frame: bytes, mac: bytes, guest_addresses: Collection[bytes], router: Router | None
) -> bytes | None:
    """The reply to an IPv6 frame, or None if it is not a solicitation that we answer.

    `mac` is our MAC address.  Without a `router`, router solicitations stay unanswered.
    """
    packet = frame[wire.ETHERNET :]
    # RFC 4861, 6.1.1 and 7.1.1: what makes a solicitation valid
    if len(packet) < wire.IPV6 + 8 or packet[6] != wire.PROTO_ICMPV6 or wire.hops(packet) != 255:
        return None
    (length,) = struct.unpack_from("!H", packet, 4)
    message = packet[wire.IPV6 : wire.IPV6 + length]
    if len(message) < max(8, length) or length > SOLICITATION_MAX or message[1] != 0:
        return None
    source = wire.packet_source(packet)
    if not wire.is_sum_valid(packet[8:40], wire.PROTO_ICMPV6, message):
        return None
    if message[0] == NEIGHBOUR_SOLICITATION:
        return _neighbour(frame, message, source, mac, guest_addresses)
    if message[0] == ROUTER_SOLICITATION and router is not None:
        if not _options_valid(message[8:]):
            return None
        if source == UNSPECIFIED:
            return unsolicited(router)
        ethernet = wire.ethernet(wire.frame_source(frame), mac, wire.ETHERTYPE_IPV6)
        return ethernet + wire.icmp_packet(router.address, source, advertisement(router))
    return None


def unsolicited(router: Router) -> bytes:
    """The frame with a router advertisement for all nodes (RFC 4861, 6.2.4)."""
    ethernet = wire.ethernet(ALL_NODES_MAC, router.mac, wire.ETHERTYPE_IPV6)
    return ethernet + wire.icmp_packet(router.address, ALL_NODES, advertisement(router))


def _options_valid(options: bytes) -> bool:
    """True if each option has a length in units of 8 bytes, and none has length 0 (RFC 4861, 4.6)."""
    while options:
        if len(options) < 2 or not options[1] or len(options) < options[1] * 8:
            return False
        options = options[options[1] * 8 :]
    return True


def _neighbour(
    frame: bytes, message: bytes, source: bytes, mac: bytes, guest_addresses: Collection[bytes]
) -> bytes | None:
    """The advertisement that answers a neighbour solicitation, or None."""
    target = message[8:24]
    if len(message) < 24 or target[0] == 0xFF or not _options_valid(message[24:]):
        return None
    # Without a source address it is duplicate address detection (RFC 4862, 5.4)
    if source == UNSPECIFIED or target == source or target in guest_addresses:
        return None
    flags = 0xE0000000  # router, solicited, override
    reply = struct.pack("!BBHI", NEIGHBOUR_ADVERTISEMENT, 0, 0, flags) + target
    reply += bytes((OPTION_TARGET_MAC, 1)) + mac
    ethernet = wire.ethernet(wire.frame_source(frame), mac, wire.ETHERTYPE_IPV6)
    return ethernet + wire.icmp_packet(target, source, reply)


def advertisement(router: Router) -> bytes:
    """The message of a router advertisement (RFC 4861, 4.2), by which a guest configures itself (RFC 4862)."""
    flags = MANAGED if router.managed else 0
    message = struct.pack("!BBHBBHII", ROUTER_ADVERTISEMENT, 0, 0, 255, flags, ROUTER_LIFETIME, 0, 0)
    if router.prefix is not None:
        # The flags L and A: on-link, and for autoconfiguration
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
