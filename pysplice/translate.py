"""What an address means on the other side of the tap.

Owns nothing: `Translation` is made once, and only host_address.py changes it, when the host's own address changes.
Imports `wire`; opens no socket.
"""

import ipaddress
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from . import wire
from .wire import KEY4_LEN, unpack

DNS_PORTS = (53, 853)  # RFC 1035, RFC 7858

_EMPTY: dict[bytes, Any] = MappingProxyType({})  # type: ignore[assignment]


class Target(NamedTuple):
    """Where a flow of the guest's leads on the host: arguments of socket(2), connect(2) and bind(2).

    `address` and `source` are socket addresses as Python has them; `source` is None and `interface` empty where the
    host's routes decide.
    """

    family: socket.AddressFamily
    address: tuple[Any, ...]
    source: tuple[Any, ...] | None
    interface: str


class Translation(NamedTuple):
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

    redirect: dict[bytes, str] = _EMPTY
    dns: Mapping[bytes, str] = _EMPTY
    source4: str = ""
    source6: str = ""
    interface4: str = ""
    interface6: str = ""
    scope: int = 0
    callers: dict[bytes, bytes] = _EMPTY
    own: frozenset[bytes] = frozenset()
    fallback4: bytes = b""
    fallback6: bytes = b""

    def move(self, guest: bytes, before: bytes, now: bytes) -> None:
        """Have the guest's address `guest` lead to the host's address `now` instead of `before` (all packed)."""
        self.redirect[guest] = unpack(now)
        if self.callers.get(before) == guest:
            del self.callers[before]
        self.callers[now] = guest

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
