"""Name servers and search domains, as the host has them.

Owns nothing.  Imports `config`.
"""

import contextlib
import ipaddress
import os
import re
import stat
from typing import Any, NamedTuple

from ..config import Config, ConfigError, IPAddress
from ..config.values import parse_name

PATH = "/etc/resolv.conf"
SERVERS_MAX = 3  # resolv.conf(5), for each version of IP
SEARCH_MAX = 32
LISTED_MAX = 32  # servers of a resolv.conf that are looked at
NAME_MAX = 254  # characters of a search domain
SIZE_MAX = 1 << 20  # of resolv.conf, characters


class HostNames(NamedTuple):
    """What the host's resolv.conf(5) has."""

    servers: tuple[IPAddress, ...] = ()
    search: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What json.dumps() takes."""
        return {"servers": [str(server) for server in self.servers], "search": self.search}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "HostNames":
        """The inverse of to_json()."""
        return HostNames(tuple(map(ipaddress.ip_address, fields["servers"])), tuple(fields["search"]))


class Names(NamedTuple):
    """What the guest is told about name servers, and where its queries go.

    `servers` and `search` are for the guest.  `forward`: addresses as the guest uses them (packed) to name servers as
    the host does.  `found`: False if the host was asked and has no name server.
    """

    servers: tuple[IPAddress, ...]
    search: tuple[str, ...]
    forward: dict[bytes, str]
    found: bool

    def resolv_conf(self, forward: tuple[IPAddress, ...]) -> str:
        """The text of a resolv.conf(5) with the addresses of --dns-forward, or else the name servers; never empty."""
        lines = [f"nameserver {server}" for server in forward or self.servers]
        if self.search:
            lines.append("search " + " ".join(self.search))
        return "\n".join([*lines, ""]) or "\n"


def parse(text: str) -> HostNames:
    """Name servers and search domains of a resolv.conf(5)."""
    servers: list[IPAddress] = []
    search: list[str] = []
    for line in text.splitlines():
        words = re.split(r"[#;]", line)[0].split()
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                server = ipaddress.ip_address(words[1].partition("%")[0])
            except ValueError:
                continue
            mapped = server.ipv4_mapped if server.version == 6 else None
            if not (server.is_unspecified or server.is_multicast or mapped):
                servers.append(server)
        elif words[:1] in (["search"], ["domain"]):
            search = [name for name in words[1:] if len(name) <= NAME_MAX]
    return HostNames(tuple(servers[:LISTED_MAX]), tuple(search[:SEARCH_MAX]))


def read_host(config: Config) -> HostNames:
    """What the host's resolv.conf has, if that matters with these options."""
    if (config.dns is None or config.search is None) and not config.splice_only:
        with contextlib.suppress(OSError):
            # A FIFO would have us wait
            fd = os.open(PATH, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, encoding="utf-8", errors="replace") as file:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    return parse(file.read(SIZE_MAX))
    return HostNames()


def choose(config: Config, host: HostNames, loopback: dict[int, IPAddress]) -> Names:
    """What the guest is told, and where its questions go, from the options and what the host has.

    `loopback`: the addresses that lead to the host's loopback address, by version.  The guest cannot reach a
    name server on the host's loopback interface, nor one with such an address; it is told that address instead.
    """
    enabled = [4] * config.ipv4 + [6] * config.ipv6
    servers = [server for server in host.servers if server.version in enabled]
    hosts = {server.version: server for server in reversed(servers)}
    chosen = {server.version: server for server in config.dns_host}
    hosts |= chosen

    forward: dict[bytes, str] = {}
    told: list[IPAddress] = []
    for server in servers:
        mapped = loopback.get(server.version)
        if server.is_loopback:
            if mapped is None:
                continue
            forward.setdefault(mapped.packed, str(chosen.get(server.version, server)))
            told.append(mapped)
        else:
            if server == mapped:
                forward.setdefault(server.packed, str(chosen.get(server.version, server)))
            told.append(server)
    for address in config.dns_forward:
        server_there = hosts.get(address.version)
        if server_there is not None:
            forward[address.packed] = str(server_there)
    if config.dns is not None:
        told = list(config.dns)
    listed = [
        server
        for version in enabled
        for server in list(dict.fromkeys(s for s in told if s.version == version))[:SERVERS_MAX]
    ]
    domains = config.search if config.search is not None else _valid(host.search)
    return Names(tuple(listed), tuple(domains[:SEARCH_MAX]), forward, bool(told) or config.dns is not None)


def _valid(search: tuple[str, ...]) -> tuple[str, ...]:
    """The names that are well-formed."""
    names = []
    for name in search:
        try:
            names.append(parse_name(name, "search"))
        except ConfigError:
            continue
    return tuple(names)
