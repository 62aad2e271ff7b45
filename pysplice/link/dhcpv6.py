"""DHCPv6 (RFC 8415): a server with one address.

Pure; imports `wire` and the domain names of dhcp.py.
"""

import struct
from typing import NamedTuple

from .. import wire
from .dhcp import domain_name, domain_names

CLIENT_PORT, SERVER_PORT = 546, 547
ALL_SERVERS = bytes.fromhex("ff020000000000000000000000010002")

SOLICIT, ADVERTISE, REQUEST, CONFIRM, RENEW, REBIND, REPLY, RELEASE, DECLINE = range(1, 10)
INFORMATION_REQUEST = 11

OPTION_CLIENT_ID, OPTION_SERVER_ID, OPTION_IA_NA, OPTION_IA_TA, OPTION_ADDRESS = 1, 2, 3, 4, 5
OPTION_STATUS, OPTION_RAPID_COMMIT = 13, 14
OPTION_DNS, OPTION_SEARCH, OPTION_FQDN = 23, 24, 39

STATUS_NOT_ON_LINK = 4
ADDRESSES_MAX = 8
OPTIONS_MAX = 256  # in a message, or in one of its options
FOREVER = 0xFFFFFFFF
REPLY_MAX = 800  # bytes of addresses, and of names: no real client asks for more


class Lease(NamedTuple):
    """What a guest is given.

    `source` is our link-local address.  All addresses are packed, empty fields are left out.
    """

    source: bytes
    address: bytes
    dns: tuple[bytes, ...] = ()
    search: tuple[str, ...] = ()
    fqdn: str = ""


def answer(frame: bytes, mac: bytes, lease: Lease) -> bytes | None:
    """The reply to an Ethernet frame with a DHCPv6 request, or None; `mac` is our MAC address."""
    packet = frame[wire.ETHERNET :]
    if len(packet) < wire.IPV6 + wire.UDP + 4 or wire.ethertype(frame) != wire.ETHERTYPE_IPV6:
        return None
    if packet[6] != wire.PROTO_UDP:
        return None
    client, udp = wire.packet_source(packet), packet[wire.IPV6 :]
    if udp[:4] != struct.pack("!HH", CLIENT_PORT, SERVER_PORT):
        return None
    if wire.packet_destination(packet) != ALL_SERVERS:
        return None  # RFC 8415, 16 and 18.4: no client was told that this server takes unicast
    (length,) = struct.unpack_from("!H", udp, 4)
    message = udp[wire.UDP : length]
    if len(message) < 4:
        return None
    options = parse_options(message[4:])
    if options is None:
        return None
    answer_message = reply(message, options, lease, mac)
    if answer_message is None:
        return None
    ethernet = wire.ethernet(wire.frame_source(frame), mac, wire.ETHERTYPE_IPV6)
    return ethernet + wire.udp_packet(lease.source, client, (SERVER_PORT, CLIENT_PORT), answer_message)


def parse_options(data: bytes) -> list[tuple[int, bytes]] | None:
    """Options in their order; None if they are malformed, or more than any client sends."""
    options: list[tuple[int, bytes]] = []
    at = 0
    while at < len(data):
        if len(data) < at + 4:
            return None
        code, length = struct.unpack_from("!HH", data, at)
        at += 4
        if len(data) < at + length or len(options) >= OPTIONS_MAX:
            return None
        options.append((code, data[at : at + length]))
        at += length
    return options


def option(code: int, value: bytes) -> bytes:
    """One option as it goes on the wire."""
    return struct.pack("!HH", code, len(value)) + value


def server_id(mac: bytes) -> bytes:
    """The DUID-LL of a MAC address (RFC 8415, section 11.4)."""
    return struct.pack("!HH", 3, 1) + mac


def reply(message: bytes, options: list[tuple[int, bytes]], lease: Lease, mac: bytes) -> bytes | None:
    """The message that answers a request; None if the RFC says to discard the request (section 16)."""
    kind = message[0]
    first = dict(reversed(options))
    client, server = first.get(OPTION_CLIENT_ID), first.get(OPTION_SERVER_ID)
    names_server = kind in (REQUEST, RENEW, RELEASE, DECLINE)
    if client is None and kind != INFORMATION_REQUEST:
        return None
    if names_server != (server is not None) and not (kind == INFORMATION_REQUEST and server is not None):
        return None
    if server is not None and server != server_id(mac):
        return None
    if kind == INFORMATION_REQUEST and OPTION_IA_NA in first:
        return None
    if kind == SOLICIT:
        answer_kind = REPLY if OPTION_RAPID_COMMIT in first else ADVERTISE
    elif kind in (REQUEST, CONFIRM, RENEW, REBIND, RELEASE, DECLINE, INFORMATION_REQUEST):
        answer_kind = REPLY
    else:
        return None

    body = bytes((answer_kind,)) + message[1:4]
    body += option(OPTION_SERVER_ID, server_id(mac))
    if client is not None:
        body += option(OPTION_CLIENT_ID, client)
    if kind == SOLICIT and answer_kind == REPLY:
        body += option(OPTION_RAPID_COMMIT, b"")
    if kind in (RELEASE, DECLINE):
        return body + option(OPTION_STATUS, struct.pack("!H", 0))
    if kind == CONFIRM:
        asked = [value[:16] for code, ia in options if code == OPTION_IA_NA for value in _addresses(ia)]
        if not asked:
            return None
        on_link = all(address == lease.address for address in asked)
        return body + option(OPTION_STATUS, struct.pack("!H", 0 if on_link else STATUS_NOT_ON_LINK))
    for code, value in options:
        if len(body) > REPLY_MAX:
            break
        if code == OPTION_IA_NA and len(value) >= 12:
            given = option(OPTION_ADDRESS, lease.address + struct.pack("!II", FOREVER, FOREVER))
            for other in _addresses(value)[:ADDRESSES_MAX]:
                if other[:16] != lease.address and kind in (RENEW, REBIND):
                    given += option(OPTION_ADDRESS, other[:16] + bytes(8))
            body += option(OPTION_IA_NA, value[:4] + struct.pack("!II", FOREVER, FOREVER) + given)
    if lease.dns:
        body += option(OPTION_DNS, b"".join(lease.dns))
    if lease.search:
        body += option(OPTION_SEARCH, domain_names(lease.search, REPLY_MAX))
    if lease.fqdn:
        # RFC 4704: neither the client nor the server updates DNS records
        body += option(OPTION_FQDN, bytes((0x04,)) + domain_name(lease.fqdn))
    return body


def _addresses(ia: bytes) -> list[bytes]:
    """The addresses in an IA_NA that a client sends, with their lifetimes."""
    found = parse_options(ia[12:]) or []
    return [value for code, value in found if code == OPTION_ADDRESS and len(value) >= 24]
