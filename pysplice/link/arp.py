"""ARP (RFC 826): every address on the link is ours, except the guest's own.

Pure; imports `wire`.
"""

import struct
from collections.abc import Collection

from .. import wire

REQUEST, REPLY = 1, 2
# Hardware and protocol: Ethernet and IPv4, with the lengths of their addresses
PREFIX = struct.pack("!HHBB", 1, 0x0800, 6, 4)
LENGTH = 28
UNSPECIFIED = bytes(4)


def answer(frame: bytes, mac: bytes, guest_addresses: Collection[bytes]) -> bytes | None:
    """The reply to an ARP request, or None if it gets none.

    `frame` is an Ethernet frame of this ethertype, `mac` our address; `guest_addresses` are packed.  Gratuitous
    requests and probes (RFC 5227) look for conflicts, so they get no answer.
    """
    message = frame[wire.ETHERNET :]
    if len(message) < LENGTH or message[:6] != PREFIX:
        return None
    (operation,) = struct.unpack_from("!H", message, 6)
    sender_mac, sender, target = message[8:14], message[14:18], message[24:28]
    if operation != REQUEST or sender in (UNSPECIFIED, target) or target in guest_addresses:
        return None
    if wire.is_group_mac(sender_mac):
        return None
    reply = PREFIX + struct.pack("!H", REPLY) + mac + target + sender_mac + sender
    return wire.ethernet(sender_mac, mac, wire.ETHERTYPE_ARP) + reply


def sender_address(frame: bytes) -> bytes:
    """The IPv4 address of the host that has sent an ARP message."""
    return frame[wire.ETHERNET + 14 : wire.ETHERNET + 18]
