"""The link's services as one: ARP, neighbour discovery, DHCP and DHCPv6.

Owns nothing; only host_changes.py changes a `Responder`.  Imports `wire` and the protocols of this room.  A frame that
no service answers gets no reply; IGMP and MLD reports are among these, because every group counts as joined here.
"""

import struct
from collections.abc import Collection
from dataclasses import dataclass, fields

from .. import wire
from . import arp, dhcp, dhcpv6
from . import ndp as discovery

DHCP_PORTS = struct.pack("!HH", dhcp.CLIENT_PORT, dhcp.SERVER_PORT)
DHCPV6_PORTS = struct.pack("!HH", dhcpv6.CLIENT_PORT, dhcpv6.SERVER_PORT)


@dataclass(slots=True)
class Responder:
    """Which services there are; None or False: that one is switched off.

    `mac` is our MAC address, `guest_addresses` (packed) are the addresses that the guest has itself.
    """

    mac: bytes
    guest_addresses: Collection[bytes]
    arp: bool
    ndp: bool
    router: discovery.Router | None
    dhcp: dhcp.Lease | None
    dhcpv6: dhcpv6.Lease | None

    def become(self, other: "Responder") -> None:
        """Offer what another one offers."""
        for part in fields(self):
            setattr(self, part.name, getattr(other, part.name))

    def claims(self, key: bytes) -> bool:
        """True for a datagram with this flow key that is a request to DHCP or DHCPv6."""
        if self.dhcp is not None and key[-4:] == DHCP_PORTS:
            return wire.key_destination(key) in (self.dhcp.gateway, wire.BROADCAST4)
        if self.dhcpv6 is None or key[-4:] != DHCPV6_PORTS:
            return False
        return wire.key_destination(key) in (self.dhcpv6.source, dhcpv6.ALL_SERVERS)

    def asker(self, frame: bytes) -> bytes:
        """The packed address of the host that has sent a request; empty if the request does not say."""
        if wire.ethertype(frame) == wire.ETHERTYPE_ARP:
            return arp.sender_address(frame)
        source = wire.packet_source(frame[wire.ETHERNET :])
        return source if wire.ethertype(frame) == wire.ETHERTYPE_IPV6 and any(source) else b""

    def answer(self, frame: bytes) -> bytes | None:
        """The reply to an Ethernet frame that is neither TCP nor a datagram for another host, or None."""
        ethertype, packet = wire.ethertype(frame), frame[wire.ETHERNET :]
        if ethertype == wire.ETHERTYPE_ARP:
            return arp.answer(frame, self.mac, self.guest_addresses) if self.arp else None
        if ethertype == wire.ETHERTYPE_IPV4:
            return dhcp.answer(frame, self.mac, self.dhcp) if self.dhcp is not None else None
        if ethertype != wire.ETHERTYPE_IPV6 or not wire.is_ipv6(packet) or len(packet) < wire.IPV6 + 8:
            return None
        if packet[6] == wire.PROTO_UDP:
            return dhcpv6.answer(frame, self.mac, self.dhcpv6) if self.dhcpv6 is not None else None
        return discovery.answer(frame, self.mac, self.guest_addresses, self.router) if self.ndp else None
