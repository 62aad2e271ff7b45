"""A tap without a kernel: one end of a pair of datagram sockets, each datagram a frame."""

import socket

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

VNET = bytes(10)
GUEST_MAC, OUR_MAC = "02:00:00:00:00:01", "9a:55:9a:55:9a:55"
ADDRESSES = {4: ("10.0.2.15", "192.0.2.7"), 6: ("fd00::15", "2001:db8::7")}


def tap_pair() -> tuple[socket.socket, socket.socket]:
    """What the proxy reads and writes, and what the guest does."""
    ours, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for sock in (ours, guest):
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    return ours, guest


def segment(version: int = 4, payload: bytes = b"", sport: int = 40000, dport: int = 80, **fields) -> bytes:
    """A frame from the guest, checksums and all; fields are scapy's for TCP."""
    src, dst = ADDRESSES[version]
    ip = IP(src=src, dst=dst) if version == 4 else IPv6(src=src, dst=dst)
    fields.setdefault("flags", "A")
    tcp = TCP(sport=sport, dport=dport, **fields)
    return bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / ip / tcp / payload)


def key(version: int = 4, sport: int = 40000, dport: int = 80) -> bytes:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    packed = b"".join(socket.inet_pton(family, address) for address in ADDRESSES[version])
    return packed + sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
