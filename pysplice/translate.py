"""What an address means on the other side of the tap.

Owns nothing: `Translation` is made once, and only host_changes.py changes it, when the host changes.
Imports `wire`; opens no socket.
"""

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from . import wire
from .wire import KEY4_LEN

DNS_PORTS = (53, 853)  # RFC 1035, RFC 7858


class Target(NamedTuple):
    """Where a flow of the guest's leads on the host: arguments of socket(2), connect(2) and bind(2).

    `address` and `source` are socket addresses as Python has them; `source` is None and `interface` empty where the
    host's routes decide.
    """

    family: socket.AddressFamily
    address: tuple[Any, ...]
    source: tuple[Any, ...] | None
    interface: str


@dataclass(slots=True)
class Translation:
    """Addresses are packed where the guest uses them, text where the host does.

    From the guest to the host:
    - `redirect`: addresses that lead to one of the host's own addresses;
    - `dns`: addresses that lead to a name server of the host's, for ports 53 and 853;
    - `source4`, `source6`, `interface4`, `interface6`: where connections to any other address come from;
    - `scope`: the index of the interface by which link-local destinations are reached.

    From the host to the guest:
    - `callers`: by which address the guest knows one of the host's addresses (packed both);
    - `own`: the guest's own addresses;
    - `fallback4`, `fallback6`: stand in for a caller that the guest could not answer.
    """

    redirect: Mapping[bytes, str] = field(default_factory=dict)
    dns: Mapping[bytes, str] = field(default_factory=dict)
    source4: str = ""
    source6: str = ""
    interface4: str = ""
    interface6: str = ""
    scope: int = 0
    callers: Mapping[bytes, bytes] = field(default_factory=dict)
    own: frozenset[bytes] = frozenset()
    fallback4: bytes = b""
    fallback6: bytes = b""

    def become(self, other: "Translation") -> None:
        """Take over everything from another one."""
        for part in fields(self):
            setattr(self, part.name, getattr(other, part.name))

    def target(self, key: bytes) -> Target:
        """Where the flow with this key leads."""
        port = wire.key_destination_port(key)
        packed = wire.key_destination(key)
        family = wire.family(packed)
        mapped = self.dns.get(packed) if port in DNS_PORTS else None
        if mapped is None:
            mapped = self.redirect.get(packed)
            if mapped is not None:
                return Target(family, (mapped, port), None, "")
        elif ipaddress.ip_address(mapped).is_loopback:
            return Target(family, (mapped, port), None, "")
        address = mapped if mapped is not None else socket.inet_ntop(family, packed)
        if len(key) == KEY4_LEN:
            source = (self.source4, 0) if self.source4 else None
            return Target(family, (address, port), source, self.interface4)
        scope = self.scope if ipaddress.IPv6Address(address).is_link_local else 0
        source = (self.source6, 0) if self.source6 else None
        return Target(family, (address, port, 0, scope), source, self.interface6)

    def caller(self, address: bytes, guest: bytes) -> bytes:
        """The address by which the guest sees a client with `address`; `guest` is the guest's own (all packed).

        Empty if there is no address that the guest could answer.
        """
        known = self.callers.get(address)
        if known is not None:
            return known
        if not wire.is_loopback(address) and address != guest and address not in self.own and any(address):
            return address
        return self.fallback4 if len(address) == 4 else self.fallback6
