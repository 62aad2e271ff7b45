"""DHCP (RFC 2131, options by RFC 2132): a server with one lease.

Pure; imports `wire`.
"""

import struct
from collections.abc import Iterable
from typing import NamedTuple

from .. import wire

CLIENT_PORT, SERVER_PORT = 68, 67
BOOTREQUEST, BOOTREPLY = 1, 2
MAGIC = bytes((99, 130, 83, 99))
HEADER = 236
# A BOOTP client accepts nothing shorter (RFC 951), and every DHCP client accepts this much (RFC 2131, section 2)
MESSAGE_MIN, MESSAGE_MAX = 300, 576 - 28

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)

OPTION_PAD, OPTION_MASK, OPTION_ROUTER, OPTION_DNS, OPTION_HOSTNAME = 0, 1, 3, 6, 12
OPTION_MTU, OPTION_REQUESTED, OPTION_LEASE, OPTION_TYPE, OPTION_SERVER = 26, 50, 51, 53, 54
OPTION_RAPID_COMMIT, OPTION_FQDN, OPTION_SEARCH, OPTION_ROUTES, OPTION_END = 80, 81, 119, 121, 255

FOREVER = 0xFFFFFFFF
OPTION_BYTES_MAX = 255
SEARCH_BYTES_MAX = 160  # which leaves room for the other options


class Lease(NamedTuple):
    """What a guest is given; addresses are packed.  Empty fields and an `mtu` of 0 are left out of the reply."""

    address: bytes
    prefix_len: int
    gateway: bytes
    mtu: int = 0
    dns: tuple[bytes, ...] = ()
    search: tuple[str, ...] = ()
    hostname: str = ""
    fqdn: str = ""


def domain_name(name: str) -> bytes:
    """A domain name as labels (RFC 1035, section 3.1), not compressed."""
    labels = [label.encode() for label in name.strip(".").split(".") if label]
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def domain_names(names: Iterable[str], most: int) -> bytes:
    """Domain names one after another, as many as fit into `most` bytes."""
    made = b""
    for name in names:
        packed = domain_name(name)
        if len(made) + len(packed) > most:
            break
        made += packed
    return made


def answer(frame: bytes, mac: bytes, lease: Lease) -> bytes | None:
    """The reply to an Ethernet frame with a DHCP or BOOTP request, or None; `mac` is our MAC address."""
    packet = frame[wire.ETHERNET :]
    if wire.ethertype(frame) != wire.ETHERTYPE_IPV4 or not wire.is_ipv4(packet):
        return None
    if len(packet) < wire.IPV4 + wire.UDP or packet[9] != wire.PROTO_UDP:
        return None
    udp = packet[(packet[0] & 0x0F) * 4 :]
    if len(udp) < wire.UDP or udp[:4] != struct.pack("!HH", CLIENT_PORT, SERVER_PORT):
        return None
    (length,) = struct.unpack_from("!H", udp, 4)
    request = udp[wire.UDP : length]
    if len(request) < HEADER or request[0] != BOOTREQUEST or request[1:3] != b"\x01\x06":
        return None
    if any(request[24:28]):
        return None  # it came by a relay, and there is none on this link
    options = parse_options(request[HEADER:])
    if options is None:
        return None
    message = reply(request, options, lease)
    if message is None:
        return None

    ciaddr, flags = request[12:16], request[10]
    chaddr = request[28:34]
    # RFC 2131, section 4.1: which address a reply goes to
    unicast = ciaddr if any(ciaddr) else lease.address
    destination = wire.BROADCAST4 if flags & 0x80 and not any(ciaddr) else unicast
    if message[16:20] == bytes(4) and not any(ciaddr):
        destination = wire.BROADCAST4  # a NAK: the client has no address
    packet = wire.udp_packet(lease.gateway, destination, (SERVER_PORT, CLIENT_PORT), message)
    guest_mac = wire.BROADCAST_MAC if destination == wire.BROADCAST4 else chaddr
    return wire.ethernet(guest_mac, mac, wire.ETHERTYPE_IPV4) + packet


def parse_options(data: bytes) -> dict[int, bytes] | None:
    """The options by number; {} for BOOTP, None if they are malformed."""
    if data[:4] != MAGIC:
        return {}
    options: dict[int, bytes] = {}
    at = 4
    while at < len(data) and data[at] != OPTION_END:
        code = data[at]
        if code == OPTION_PAD:
            at += 1
            continue
        if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
            return None
        # RFC 3396: an option that occurs again continues
        options[code] = options.get(code, b"") + data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    return options


def reply(request: bytes, options: dict[int, bytes], lease: Lease) -> bytes | None:
    """The message (without UDP header) that answers a request, or None if the request gets no answer."""
    kind = options.get(OPTION_TYPE, b"")
    rapid = OPTION_RAPID_COMMIT in options
    answers = {
        b"": 0,
        bytes((DISCOVER,)): ACK if rapid else OFFER,
        bytes((REQUEST,)): ACK,
        bytes((INFORM,)): ACK,
    }
    if kind not in answers:
        return None
    answer_kind = answers[kind]
    address = lease.address
    if kind == bytes((INFORM,)):
        address = bytes(4)
    elif kind == bytes((REQUEST,)):
        wanted = options.get(OPTION_REQUESTED, request[12:16])
        if options.get(OPTION_SERVER, lease.gateway) != lease.gateway:
            return None  # the client has chosen another server
        # A client that names no address takes the one that it is given, as with pasta
        if wanted not in (lease.address, bytes(4)):
            answer_kind, address = NAK, bytes(4)

    head = bytes((BOOTREPLY, 1, 6, 0)) + request[4:8] + bytes(2) + request[10:12]
    head += (bytes(4) if answer_kind == NAK else request[12:16]) + address
    head += (bytes(4) if answer_kind == NAK else lease.gateway) + request[24:28] + request[28:44]
    head += bytes(64 + 128) + MAGIC
    given: list[tuple[int, bytes]] = []
    if answer_kind:
        given += [(OPTION_TYPE, bytes((answer_kind,))), (OPTION_SERVER, lease.gateway)]
        if rapid and kind == bytes((DISCOVER,)):
            given.append((OPTION_RAPID_COMMIT, b""))
    if answer_kind != NAK:
        given += _settings(lease, inform=kind == bytes((INFORM,)))
    message = head
    for code, value in given:
        # An option goes in whole or not at all
        if len(value) <= OPTION_BYTES_MAX and len(message) + 2 + len(value) < MESSAGE_MAX:
            message += bytes((code, len(value))) + value
    return (message + bytes((OPTION_END,))).ljust(MESSAGE_MIN, b"\0")


def _settings(lease: Lease, inform: bool) -> list[tuple[int, bytes]]:
    """The options that configure a client; `inform`: it has an address already (DHCPINFORM)."""
    mask = (0xFFFFFFFF << (32 - lease.prefix_len)) & 0xFFFFFFFF
    given = [(OPTION_MASK, struct.pack("!I", mask))]
    if not inform:
        given.append((OPTION_LEASE, struct.pack("!I", FOREVER)))
    address, gateway = (int.from_bytes(packed, "big") for packed in (lease.address, lease.gateway))
    if (address ^ gateway) & mask:
        # RFC 3442: a route to the gateway itself, then the default route.  A client that knows this option
        # ignores option 3.
        routes = bytes((32,)) + lease.gateway + bytes(4) + bytes((0,)) + lease.gateway
        given.append((OPTION_ROUTES, routes))
    given.append((OPTION_ROUTER, lease.gateway))
    if lease.mtu:
        given.append((OPTION_MTU, struct.pack("!H", lease.mtu)))
    if lease.dns:
        given.append((OPTION_DNS, b"".join(lease.dns)))
    if lease.hostname:
        given.append((OPTION_HOSTNAME, lease.hostname.encode()))
    if lease.fqdn:
        # RFC 4702: canonical wire format; the server updates no DNS record
        given.append((OPTION_FQDN, bytes((0x0C, 255, 255)) + domain_name(lease.fqdn)))
    if lease.search:
        given.append((OPTION_SEARCH, domain_names(lease.search, SEARCH_BYTES_MAX)))
    return given
