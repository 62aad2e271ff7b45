"""What the guest's namespace is to have: read from the host, and sent from process to process as JSON.

Pure.  Imports `config`.
"""

import ipaddress
from typing import Any, NamedTuple

from ..config import IPAddress

IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class Route(NamedTuple):
    """A route of the host's interface: destination (ADDR/LEN), gateway or None, metric or None, and scope."""

    destination: str
    gateway: str | None
    metric: int | None
    scope: int


class Family(NamedTuple):
    """What one version of IP gets in the guest's namespace.

    `interface` and `ifindex`: of the host's interface, empty and 0 if there is none.  `host_address`: an address of the
    host's own, or None.
    """

    interface: str
    ifindex: int
    addresses: tuple[IPInterface, ...]
    gateway: IPAddress | None
    routes: tuple[Route, ...]
    host_address: IPAddress | None

    @property
    def online(self) -> bool:
        """True if the host had an address of this version."""
        return bool(self.ifindex) and self.host_address is not None

    def to_json(self) -> dict[str, Any]:
        """What json.dumps() takes."""
        return {
            "interface": self.interface,
            "ifindex": self.ifindex,
            "addresses": [str(address) for address in self.addresses],
            "gateway": str(self.gateway) if self.gateway else None,
            "routes": [route._asdict() for route in self.routes],
            "host_address": str(self.host_address) if self.host_address else None,
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Family":
        """The inverse of to_json()."""
        gateway, host_address = fields["gateway"], fields["host_address"]
        return Family(
            fields["interface"],
            fields["ifindex"],
            tuple(ipaddress.ip_interface(text) for text in fields["addresses"]),
            ipaddress.ip_address(gateway) if gateway else None,
            tuple(Route(**route) for route in fields["routes"]),
            ipaddress.ip_address(host_address) if host_address else None,
        )


class Template(NamedTuple):
    """Both versions of IP; None for one that is switched off."""

    ipv4: Family | None
    ipv6: Family | None

    @property
    def interface(self) -> str:
        """The name of the host's interface, empty if there is none."""
        return next((f.interface for f in (self.ipv4, self.ipv6) if f is not None and f.interface), "")

    def without_routes(self, most: int) -> "Template":
        """The same without routes, and with at most so many addresses of each version."""

        def brief(family: Family | None) -> Family | None:
            return family and family._replace(routes=(), addresses=family.addresses[:most])

        return Template(brief(self.ipv4), brief(self.ipv6))

    def family(self, version: int) -> Family | None:
        """One version of IP."""
        return self.ipv4 if version == 4 else self.ipv6

    def replaced(self, version: int, family: Family) -> "Template":
        """The same with another family."""
        return self._replace(ipv4=family) if version == 4 else self._replace(ipv6=family)

    def to_json(self) -> dict[str, Any]:
        """What json.dumps() takes."""
        return {
            "ipv4": self.ipv4.to_json() if self.ipv4 else None,
            "ipv6": self.ipv6.to_json() if self.ipv6 else None,
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Template":
        """The inverse of to_json()."""
        ipv4, ipv6 = fields["ipv4"], fields["ipv6"]
        return Template(Family.from_json(ipv4) if ipv4 else None, Family.from_json(ipv6) if ipv6 else None)
