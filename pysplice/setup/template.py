"""What the guest's namespace is to have: read off the host, sent from process to process as JSON.

Owns nothing.  Imports config.py.
"""

import ipaddress
from typing import Any, NamedTuple

from ..config import IPAddress

IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class Route(NamedTuple):
    """A route of the template interface: destination, gateway or None, metric or None."""

    destination: str
    gateway: str | None
    metric: int | None
    scope: int


class Family(NamedTuple):
    """What one version of IP gets in the guest's namespace."""

    interface: str
    ifindex: int
    addresses: tuple[IPInterface, ...]
    gateway: IPAddress | None
    routes: tuple[Route, ...]
    host_address: IPAddress | None

    def to_words(self) -> dict[str, Any]:
        return {
            "interface": self.interface,
            "ifindex": self.ifindex,
            "addresses": [str(address) for address in self.addresses],
            "gateway": str(self.gateway) if self.gateway else None,
            "routes": [route._asdict() for route in self.routes],
            "host_address": str(self.host_address) if self.host_address else None,
        }

    @staticmethod
    def from_words(words: dict[str, Any]) -> "Family":
        gateway, host_address = words["gateway"], words["host_address"]
        return Family(
            words["interface"],
            words["ifindex"],
            tuple(ipaddress.ip_interface(text) for text in words["addresses"]),
            ipaddress.ip_address(gateway) if gateway else None,
            tuple(Route(**route) for route in words["routes"]),
            ipaddress.ip_address(host_address) if host_address else None,
        )


class Template(NamedTuple):
    """Both versions; None where it is switched off or the host has none."""

    ipv4: Family | None
    ipv6: Family | None

    @property
    def interface(self) -> str:
        """The name of the host's interface, empty if there is none."""
        return next((f.interface for f in (self.ipv4, self.ipv6) if f is not None and f.interface), "")

    def to_words(self) -> dict[str, Any]:
        """What json.dumps() takes."""
        return {
            "ipv4": self.ipv4.to_words() if self.ipv4 else None,
            "ipv6": self.ipv6.to_words() if self.ipv6 else None,
        }

    @staticmethod
    def from_words(words: dict[str, Any]) -> "Template":
        ipv4, ipv6 = words["ipv4"], words["ipv6"]
        return Template(
            Family.from_words(ipv4) if ipv4 else None, Family.from_words(ipv6) if ipv6 else None
        )
