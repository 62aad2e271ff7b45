"""Header layouts: where the fields of Ethernet, IPv4, IPv6, UDP and ICMP are, and how to build the headers.

Pure functions over bytes; imports no other room.  cext/wire.h, cext/frame_parse.c and cext/frame_build.c have the
same layouts for the frames that Python does not look into.

A flow key is what the guest's packets carry: source address, destination address, then two ports of two bytes each
(12 bytes for IPv4, 36 for IPv6).  Addresses are packed everywhere, in network byte order.
"""

import socket
import struct
from typing import Final

# Ethertypes as a frame has them (IEEE 802 numbers)
ETHERTYPE_IPV4, ETHERTYPE_ARP, ETHERTYPE_IPV6 = b"\x08\x00", b"\x08\x06", b"\x86\xdd"

# Lengths of headers, bytes
ETHERNET, IPV4, IPV6, FRAGMENT, TCP, UDP, ICMP = 14, 20, 40, 8, 20, 8, 8

# Protocol numbers of IPv4, next headers of IPv6
PROTO_ICMP, PROTO_TCP, PROTO_UDP, PROTO_FRAGMENT, PROTO_ICMPV6 = 1, 6, 17, 44, 58

IPV4_MORE_FRAGMENTS, IPV4_DONT_FRAGMENT, IPV4_OFFSET = 0x2000, 0x4000, 0x1FFF
IPV6_MORE_FRAGMENTS, IPV6_OFFSET = 0x0001, 0xFFF8

HOPS: Final = 255  # hop limit of packets that are made here; neighbour discovery asks for it (RFC 4861)

BROADCAST_MAC = b"\xff" * 6
BROADCAST4 = b"\xff" * 4
LOOPBACK6 = bytes(15) + b"\x01"
LINK_LOCAL6 = b"\xfe\x80"
V4_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96

KEY4_LEN: Final = 12


# Addresses


def pack(text: str) -> bytes:
    """A numeric address as accept() or recvmsg() gives it, packed; an IPv4-mapped one as IPv4."""
    text = text.partition("%")[0]
    if ":" not in text:
        return socket.inet_pton(socket.AF_INET, text)
    packed = socket.inet_pton(socket.AF_INET6, text)
    return packed[12:] if packed.startswith(V4_MAPPED) else packed


def unpack(packed: bytes) -> str:
    """A packed address as text."""
    return socket.inet_ntop(family(packed), packed)


def family(packed: bytes) -> socket.AddressFamily:
    """The address family of a packed address."""
    return socket.AF_INET if len(packed) == 4 else socket.AF_INET6


def is_loopback(address: bytes) -> bool:
    """True for 127.0.0.0/8 and ::1."""
    return address[0] == 127 if len(address) == 4 else address == LOOPBACK6


def is_link_local(address: bytes) -> bool:
    """True for an IPv6 link-local address (fe80::/16, as hosts use it)."""
    return len(address) == 16 and address[:2] == LINK_LOCAL6


def is_group(address: bytes) -> bool:
    """True for a multicast address and for 255.255.255.255."""
    if len(address) == 4:
        return address[0] & 0xF0 == 0xE0 or address == BROADCAST4
    return address[0] == 0xFF


def link_local(mac: bytes) -> bytes:
    """The IPv6 link-local address of a MAC address (RFC 4291, appendix A)."""
    return LINK_LOCAL6 + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]


def _is_host(address: bytes) -> bool:
    """True for an address that a packet on the link can come from (RFC 1122, 3.2.1.3; RFC 4291, 2.5)."""
    if len(address) == 4:
        return address[0] not in (0, 127) and address[0] < 224
    # Neither ::/96 (with :: and ::1) nor IPv4-mapped, nor multicast
    return address[:12] not in (bytes(12), V4_MAPPED) and address[0] != 0xFF


def may_pass(source_and_destination: bytes, *, to_group: bool) -> bool:
    """True if a packet with these addresses may leave the link.

    With `to_group` the destination may also be a multicast or broadcast address that reaches beyond one host
    (RFC 4291, 2.7: the scopes 0 and 1 do not).  cext/frame_parse.c has the same rule.
    """
    half = len(source_and_destination) // 2
    source, destination = source_and_destination[:half], source_and_destination[half:]
    if not _is_host(source):
        return False
    if to_group and is_group(destination):
        return len(destination) == 4 or destination[1] & 0x0F > 1
    return _is_host(destination)


# Keys


def key_source(key: bytes) -> bytes:
    """The guest's address in a flow key."""
    return key[:4] if len(key) == KEY4_LEN else key[:16]


def key_destination(key: bytes) -> bytes:
    """The address that the guest sends to."""
    return key[4:8] if len(key) == KEY4_LEN else key[16:32]


def key_source_port(key: bytes) -> int:
    """The guest's port."""
    return int.from_bytes(key[-4:-2], "big")


def key_destination_port(key: bytes) -> int:
    """The port that the guest sends to."""
    return int.from_bytes(key[-2:], "big")


def make_key(source: bytes, destination: bytes, source_port: int, destination_port: int) -> bytes:
    """A flow key."""
    return source + destination + source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")


# Frames


def ethertype(frame: bytes) -> bytes:
    """The two bytes of an Ethernet frame that name what it carries."""
    return frame[12:14]


def frame_source(frame: bytes) -> bytes:
    """The MAC address that a frame comes from."""
    return frame[6:12]


def is_to_group(frame: bytes) -> bool:
    """True for a frame that is sent to a multicast or broadcast MAC address."""
    return bool(frame[0] & 1)


def is_group_mac(mac: bytes) -> bool:
    """True for a multicast or broadcast MAC address."""
    return bool(mac[0] & 1)


def is_ipv4(packet: bytes) -> bool:
    """True for an IP packet of version 4, by its first byte."""
    return packet[:1] != b"" and packet[0] >> 4 == 4


def is_ipv6(packet: bytes) -> bool:
    """True for an IP packet of version 6, by its first byte."""
    return packet[:1] != b"" and packet[0] >> 4 == 6


def is_fragment(packet: bytes) -> bool:
    """True for an IP packet that carries a fragment."""
    if is_ipv4(packet):
        return len(packet) >= IPV4 and bool(struct.unpack_from("!H", packet, 6)[0] & 0x3FFF)
    return len(packet) >= IPV6 + FRAGMENT and packet[6] == PROTO_FRAGMENT


def packet_source(packet: bytes) -> bytes:
    """The source address of an IP packet."""
    return packet[12:16] if is_ipv4(packet) else packet[8:24]


def packet_destination(packet: bytes) -> bytes:
    """The destination address of an IP packet."""
    return packet[16:20] if is_ipv4(packet) else packet[24:40]


def hops(packet: bytes) -> int:
    """The hop limit (TTL) of an IP packet; -1 where the packet is too short to have one."""
    if len(packet) < IPV4:
        return -1
    return packet[8] if is_ipv4(packet) else packet[7]


def ethernet(destination: bytes, source: bytes, kind: bytes) -> bytes:
    """An Ethernet header."""
    return destination + source + kind


def ip_ethertype(address: bytes) -> bytes:
    """The ethertype of packets with this address."""
    return ETHERTYPE_IPV4 if len(address) == 4 else ETHERTYPE_IPV6


# Checksums


def checksum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071) of `data`, two bytes; zero for data that includes its own correct checksum."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def pseudo_header(addresses: bytes, length: int, protocol: int) -> bytes:
    """What a transport checksum covers besides the transport's own bytes (RFC 9293, 3.1; RFC 8200, 8.1).

    `addresses`: source, then destination.  The sums of the IPv4 and the IPv6 layout are the same.
    """
    return addresses + struct.pack("!II", length, protocol)


def is_sum_valid(addresses: bytes, protocol: int, segment: bytes) -> bool:
    """True if a transport segment carries the right checksum for these addresses."""
    return checksum(pseudo_header(addresses, len(segment), protocol) + segment) == b"\0\0"


# Packets


def ipv4_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    """An IPv4 header without options for `length` bytes of payload."""
    words = struct.pack("!BBHHHBBH", 0x45, 0, IPV4 + length, 0, 0, HOPS, protocol, 0)
    header = words + source + destination
    return header[:10] + checksum(header) + header[12:]


def ipv6_header(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    """An IPv6 header for `length` bytes of payload."""
    return struct.pack("!IHBB", 6 << 28, length, protocol, HOPS) + source + destination


def ip_packet(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    """An IP packet, of the same version as the addresses."""
    header = ipv4_header if len(source) == 4 else ipv6_header
    return header(source, destination, protocol, len(payload)) + payload


def udp_packet(source: bytes, destination: bytes, ports: tuple[int, int], payload: bytes) -> bytes:
    """An IP packet with one UDP datagram; `ports`: source and destination.

    A sum of zero goes out as ffff: zero says that there is none (RFC 768).
    """
    length = UDP + len(payload)
    datagram = struct.pack("!HHHH", *ports, length, 0) + payload
    sum_ = checksum(pseudo_header(source + destination, length, PROTO_UDP) + datagram)
    datagram = datagram[:6] + (sum_ if sum_ != b"\0\0" else b"\xff\xff") + datagram[8:]
    return ip_packet(source, destination, PROTO_UDP, datagram)


def icmp_packet(source: bytes, destination: bytes, message: bytes) -> bytes:
    """An IP packet with an ICMP or ICMPv6 message, whose checksum field (bytes 2 and 3) is zero."""
    if len(source) == 4:
        message = message[:2] + checksum(message) + message[4:]
        return ip_packet(source, destination, PROTO_ICMP, message)
    pseudo = pseudo_header(source + destination, len(message), PROTO_ICMPV6)
    message = message[:2] + checksum(pseudo + message) + message[4:]
    return ip_packet(source, destination, PROTO_ICMPV6, message)


def frame_start(guest_mac: bytes, our_mac: bytes, key: bytes, protocol: int = PROTO_TCP) -> bytes:
    """The constant start of all frames of a flow towards the guest: Ethernet, IP and the two ports.

    `key` is that of the guest's packets, so source and destination change places.  Lengths and checksums are zero:
    the C code fills them in (cext/frame.h).
    """
    ports = key[-2:] + key[-4:-2]
    source, destination = key_destination(key), key_source(key)
    if len(key) == KEY4_LEN:
        # DF is set, as it is by every sender that discovers the path's MTU (RFC 1191)
        words = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, IPV4_DONT_FRAGMENT, HOPS, protocol, 0)
        return ethernet(guest_mac, our_mac, ETHERTYPE_IPV4) + words + source + destination + ports
    header = ipv6_header(source, destination, protocol, 0)
    return ethernet(guest_mac, our_mac, ETHERTYPE_IPV6) + header + ports
