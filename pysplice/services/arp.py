"""ARP (RFC 826): every address on the link is ours, but the guest's own.

Owns nothing, imports nothing but `struct`.
"""

import struct
from collections.abc import Collection

ETHERTYPE = 0x0806
REQUEST = 1
REPLY = 2
# Ethernet, IPv4, lengths of their addresses
HEADER = struct.pack("!HHBB", 1, 0x0800, 6, 4)
UNSPECIFIED = bytes(4)


def answer(frame: bytes, mac: bytes, guest_addresses: Collection[bytes]) -> bytes | None:
    """The reply to a request, or None where there is none.

    `frame` is an Ethernet frame of this ethertype, `mac` our address; `guest_addresses` are packed
    addresses that the guest has itself.  Gratuitous requests and probes (RFC 5227) are for
    conflicts, and we have none.
    """
    if len(frame) < 14 + 28 or frame[14:20] != HEADER:
        return None
    (operation,) = struct.unpack_from("!H", frame, 20)
    sender_mac, sender, target = frame[22:28], frame[28:32], frame[38:42]
    if operation != REQUEST or sender in (UNSPECIFIED, target) or target in guest_addresses:
        return None
    if sender_mac[0] & 1:
        return None
    return (
        sender_mac
        + mac
        + struct.pack("!H", ETHERTYPE)
        + HEADER
        + struct.pack("!H", REPLY)
        + mac
        + target
        + sender_mac
        + sender
    )
