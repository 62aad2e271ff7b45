"""What addresses mean: the guest's words for the host, and the guest's names for who calls from there.

Owns nothing; only own.py changes it, where the host has moved.  Imports no other room; opens no socket.
"""

import ipaddress
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

KEY4_LEN = 12

DNS_PORTS = (53, 853)  # RFC 1035, RFC 7858

NOTHING: dict[bytes, Any] = MappingProxyType({})  # type: ignore[assignment]

V4_MAPPED = bytes(10) + b"\xff\xff"

Pair = tuple[str, str]


class Target(NamedTuple):
    """Where a flow of the guest's goes on the host; arguments of socket.socket and connect."""

    family: int
    address: tuple[Any, ...]
    source: tuple[Any, ...] | None
    interface: str


class Translation(NamedTuple):
    """Addresses are packed where the guest uses them, text where the host does.

    `dns`: addresses of name servers as the guest knows them, to those of the host's, for ports 53 and 853.
    `redirect`: addresses that lead to an address of the host's.  `source4`, `source6`, `interface4`,
    `interface6`: where connections to anywhere else start from; `scope`: the index of the interface that
    link-local destinations are reached by.

    The other way: `callers` has what the guest knows an address of the host's by, `own` are those that it has itself;
    `fallback4` and `fallback6` stand for callers that it cannot answer.
    """

    redirect: dict[bytes, str] = NOTHING
    dns: Mapping[bytes, str] = NOTHING
    source4: str = ""
    source6: str = ""
    interface4: str = ""
    interface6: str = ""
    scope: int = 0
    callers: dict[bytes, bytes] = NOTHING
    own: frozenset[bytes] = frozenset()
    fallback4: bytes = b""
    fallback6: bytes = b""

    def move(self, guest: bytes, before: bytes, now: bytes) -> None:
        """An address of the guest's leads to another one of the host's from now on; all are packed."""
        self.redirect[guest] = unpack(now)
        if self.callers.get(before) == guest:
            del self.callers[before]
        self.callers[now] = guest

    def target(self, key: bytes) -> Target:
        """Where the flow `key` leads: addresses and ports as they stand in the guest's packets."""
        port = int.from_bytes(key[-2:], "big")
        ipv4 = len(key) == KEY4_LEN
        family = socket.AF_INET if ipv4 else socket.AF_INET6
        packed = key[4:8] if ipv4 else key[16:32]
        mapped = self.dns.get(packed) if port in DNS_PORTS else None
        if mapped is None:
            mapped = self.redirect.get(packed)
            if mapped is not None:
                return Target(family, (mapped, port), None, "")
        elif ipaddress.ip_address(mapped).is_loopback:
            return Target(family, (mapped, port), None, "")
        address = mapped if mapped is not None else socket.inet_ntop(family, packed)
        if ipv4:
            return Target(
                family, (address, port), (self.source4, 0) if self.source4 else None, self.interface4
            )
        scope = self.scope if ipaddress.IPv6Address(address).is_link_local else 0
        source = (self.source6, 0) if self.source6 else None
        return Target(family, (address, port, 0, scope), source, self.interface6)

    def caller(self, address: bytes, guest: bytes) -> bytes:
        """What the guest is to see of somebody who calls from `address`; `guest` is its own (both packed).

        Empty if there is no address that it could answer to.
        """
        known = self.callers.get(address)
        if known is not None:
            return known
        ipv4 = len(address) == 4
        loopback = address[0] == 127 if ipv4 else address == bytes(15) + b"\x01"
        if not loopback and address != guest and address not in self.own and any(address):
            return address
        return self.fallback4 if ipv4 else self.fallback6


def pack(address: str) -> bytes:
    """An address as accept() or recvmsg() gives it, packed; IPv4 as such, also where IPv6 has it in it."""
    address = address.partition("%")[0]
    if ":" not in address:
        return socket.inet_pton(socket.AF_INET, address)
    packed = socket.inet_pton(socket.AF_INET6, address)
    return packed[12:] if packed.startswith(V4_MAPPED) else packed


def unpack(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
