"""Who answers which frame: ARP, NDP, DHCP and DHCPv6 in one place.

Owns nothing that changes; imports the other files of this room.  A frame that nobody answers (IGMP and MLD reports
among them: every group is joined here) has no reply.
"""

import struct
from collections.abc import Collection
from typing import NamedTuple

from . import arp, dhcp, dhcpv6
from . import ndp as neighbours

DHCP_PORTS = struct.pack("!HH", dhcp.CLIENT_PORT, dhcp.SERVER_PORT)
DHCPV6_PORTS = struct.pack("!HH", dhcpv6.CLIENT_PORT, dhcpv6.SERVER_PORT)


class Desk(NamedTuple):
    """What is offered on the link; None: it is not.  `mac` is ours, `guest_addresses` are packed."""

    mac: bytes
    guest_addresses: Collection[bytes]
    arp: bool
    ndp: bool
    router: neighbours.Router | None
    dhcp: dhcp.Lease | None
    dhcpv6: dhcpv6.Lease | None

    def claims(self, key: bytes) -> bool:
        """True for a datagram (addresses and ports) that is for one of ours, whoever else could take it."""
        if self.dhcp is not None and key[-4:] == DHCP_PORTS:
            return key[4:8] in (self.dhcp.gateway, dhcp.BROADCAST)
        if self.dhcpv6 is None or key[-4:] != DHCPV6_PORTS:
            return False
        return key[16:32] in (self.dhcpv6.source, dhcpv6.ALL_SERVERS)

    def asker(self, frame: bytes) -> bytes:
        """The packed address of who sent a frame that was answered; empty where it does not say."""
        if frame[12:14] == b"\x08\x06":
            return frame[28:32]
        source = frame[22:38]
        return source if frame[12:14] == b"\x86\xdd" and any(source) else b""

    def answer(self, frame: bytes) -> bytes | None:
        """The reply to an Ethernet frame that is neither TCP nor a datagram for a host, or None."""
        ethertype, packet = frame[12:14], frame[14:]
        if ethertype == b"\x08\x06":
            return arp.answer(frame, self.mac, self.guest_addresses) if self.arp else None
        if ethertype == b"\x08\x00":
            return dhcp.answer(frame, self.mac, self.dhcp) if self.dhcp is not None else None
        if ethertype != b"\x86\xdd" or len(packet) < 48:
            return None
        if packet[6] == 17:
            return dhcpv6.answer(frame, self.mac, self.dhcpv6) if self.dhcpv6 is not None else None
        return neighbours.answer(frame, self.mac, self.guest_addresses, self.router) if self.ndp else None
