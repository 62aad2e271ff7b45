"""Where the guest's addresses are on the link.

Owns the table of stations and the address of last resort.  Imports `wire`.

A guest may have several addresses with several MAC addresses, and a MAC address may change while connections live (a
bridge, a restored container).  So a flow refers to a `Station`, whose MAC address is looked up for each frame.
"""

from collections.abc import Callable
from typing import Final

from .. import wire

STATIONS_MAX: Final = 1024


class Station:
    """One address of the guest's; `mac` may change."""

    __slots__ = ("mac",)

    def __init__(self, mac: bytes) -> None:
        self.mac = mac


class Neighbours:
    """The guest's addresses and their MAC addresses.

    `mac`: the destination of frames that answer no frame of the guest's; broadcast until an address is known.
    `learn(address)` is called with each packed address that the guest is seen to have.
    """

    def __init__(self, mac: bytes, learn: Callable[[bytes], None]) -> None:
        self.mac = mac or wire.BROADCAST_MAC
        self._learn = learn
        self._stations: dict[bytes, Station] = {}

    def station(self, address: bytes, mac: bytes) -> Station:
        """The station of a packed address; it starts with `mac` if the address is new."""
        station = self._stations.get(address)
        if station is None:
            station = Station(mac)
            if len(self._stations) < STATIONS_MAX:
                self._stations[address] = station
        return station

    def heard(self, mac: bytes, address: bytes) -> None:
        """The guest has sent the first packet of a flow, from this MAC address and packed address."""
        if not wire.is_group_mac(mac):
            self.mac = mac
        self._learn(address)

    def asked(self, mac: bytes, address: bytes) -> None:
        """The guest has asked for a neighbour (ARP or NDP): from now on its connections are at this MAC address.

        `address` is empty where the request does not say who asks.
        """
        self.mac = mac
        if wire.is_link_local(address):
            self._learn(address)
        if address:
            self.moved(address, mac)

    def moved(self, address: bytes, mac: bytes) -> None:
        """The packed address is at this MAC address now."""
        if not wire.is_group_mac(mac):
            station = self.station(address, mac)
            if station.mac != mac:
                station.mac = mac
