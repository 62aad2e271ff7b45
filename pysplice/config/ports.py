"""Which ports are forwarded: the grammar of -t, -u, -T and -U (pasta(1)); text in, rules out.

Pure.  Imports values.py and the types of this room.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from . import ConfigError, IPAddress
from .values import SHOWN, parse_ifname

PORT_MAX = 65535
UNIX = "unix:"
UNIX_PATH_MAX = 107  # sockaddr_un, unix(7)

HOST, GUEST = "host", "guest"
TCP, UDP = "tcp", "udp"

# The side on which an option listens, and the protocol
OPTIONS = {"-t": (HOST, TCP), "-u": (HOST, UDP), "-T": (GUEST, TCP), "-U": (GUEST, UDP)}
SPELLED = {"--tcp-ports": "-t", "--udp-ports": "-u", "--tcp-ns": "-T", "--udp-ns": "-U"}


_Fail = Callable[[str], ConfigError]

_INTERFACE = re.compile(r"[a-z]+[0-9]*")

# 127.0.0.1:8080:80 and 8080/tcp, as podman and docker write them
_PUBLISHED = re.compile(
    r"(?P<address>[0-9]+\.[0-9.]+|\[[0-9a-fA-F:]+\]):(?P<ports>[0-9]+(-[0-9]+)?(:[0-9]+(-[0-9]+)?)?)"
)
_WITH_PROTOCOL = re.compile(r"(?P<ports>[0-9a-fA-F:.,/\[\]-]+)/(?P<protocol>tcp|udp)")


class Rule(NamedTuple):
    """Ports `first` to `last` of one side lead to the port `to_first` and those after it on the other side.

    `address` None: all addresses of both versions.  `interface`: only what arrives there.  `auto`: a port is open only
    while a socket listens on its target.  `weak`: ports that cannot be bound are left out, and ephemeral ones, too, if
    it is not for `every` port.  `path`: a UNIX socket instead of ports; then `first` and `last` are 0.
    """

    side: str
    protocol: str
    first: int
    last: int
    to_first: int
    address: IPAddress | None = None
    interface: str = ""
    to_address: IPAddress | None = None
    auto: bool = False
    weak: bool = False
    path: str = ""
    every: bool = False

    def target(self, port: int) -> int:
        """The port on the other side."""
        return self.to_first + port - self.first

    @property
    def is_at_all_addresses(self) -> bool:
        """True for ports of the host's that are open at all of its addresses and lead to the guest's own."""
        return self.side == HOST and not (self.to_address or self.address or self.interface)

    def has_part(self, part: "Rule") -> bool:
        """True if `part` is this rule, or leads some of its ports to the same targets."""
        whole = self._replace(
            first=part.first, last=part.last, to_first=part.to_first, weak=part.weak, every=part.every
        )
        inside = self.first <= part.first <= part.last <= self.last
        return whole == part and inside and self.target(part.first) == part.to_first

    def at(self, port: int) -> "Rule":
        """This rule for one of its ports alone."""
        return self._replace(first=port, last=port, to_first=self.target(port))

    def without(self, part: "Rule") -> tuple["Rule", "Rule"]:
        """What is left of this rule before and behind a part; a rule whose `last` is before `first` is empty."""
        after = part.last + 1
        return (
            self._replace(last=part.first - 1),
            self._replace(first=after, to_first=self.target(after)),
        )

    def __str__(self) -> str:
        """The rule as an option has it."""
        if self.path:
            return f"{UNIX}{self.path}:{self.to_first}"
        where = f"{self.address or ''}{'%' + self.interface if self.interface else ''}"
        text = f"{where}/" if where else ""
        if self.weak and (self.first, self.last, self.to_first) == (1, PORT_MAX, 1):
            return text + ("auto" if self.auto else "all")
        text += f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        if self.to_address is not None or self.to_first != self.first:
            last = self.to_first + self.last - self.first
            text += f":{self.to_address}/" if self.to_address is not None else ":"
            text += f"{self.to_first}" if last == self.to_first else f"{self.to_first}-{last}"
        return text + (",auto" if self.auto else "")


def parse_all(options: Sequence[tuple[str, str]], default: str = "auto") -> tuple[Rule, ...]:
    """The rules of all these options (name, value) in their order; raises ConfigError.

    `default` is for the options that do not occur.  Rules that overlap are refused, unless one of them follows (`auto`)
    and the other does not; so is `none` after another value of the same option.
    """
    rules: list[Rule] = []
    for name, (side, protocol) in OPTIONS.items():
        mine: list[Rule] = []
        values = [value for option, value in options if option == name]
        for value in values or [default]:
            if value == "none":
                if mine:
                    raise ConfigError(f"option {name}: 'none' after other ports")
                continue
            for rule in parse(name, side, protocol, value):
                other = next((o for o in mine if overlap(rule, o) and o.auto == rule.auto), None)
                if other is not None:
                    raise ConfigError(f"option {name} {value}: '{rule}' overlaps '{other}'")
                mine.append(rule)
        rules += mine
    return tuple(rules)


def parse(option: str, side: str, protocol: str, text: str) -> list[Rule]:
    """The rules of one value other than `none`; raises ConfigError."""

    def fail(why: str) -> ConfigError:
        return ConfigError(f"invalid ports for {option}: '{text[: 2 * SHOWN]}' ({why})")

    hint = _hint(text, option)
    if hint:
        raise fail(hint)
    if text.startswith(UNIX):
        return [_unix(text, side, protocol, fail)]
    where, slash, chunks = text.partition("/")
    if not slash:
        where, chunks = "", text
    address, interface = _where(where, option, fail) if slash else (None, "")
    if slash and side == GUEST:
        raise fail("it listens on the loopback interface, so it takes no address")

    ranges: list[tuple[int, int, IPAddress | None, int]] = []
    excluded: list[tuple[int, int]] = []
    auto = everything = False
    all_to: IPAddress | None = None
    for chunk in chunks.split(","):
        if chunk == "auto":
            auto = True
        elif chunk == "all" or chunk.startswith("all:"):
            everything = True
            if chunk != "all":
                all_to = _address(chunk[4:], fail)
        elif chunk.startswith("~"):
            excluded.append(_range(chunk[1:], fail))
        else:
            ranges.append(_chunk(chunk, fail))
    weak = not ranges
    if weak:
        if not (auto or everything or excluded):
            raise fail("no ports")
        ranges.append((1, PORT_MAX, all_to, 1))

    rules = []
    for first, last, to_address, to_first in ranges:
        if to_address is not None and (address is None or address.version != to_address.version):
            raise fail("a target address needs a listening address of the same version of IP")
        if to_address is not None and side == GUEST:
            raise fail("no target address here")
        for low, high in _without(first, last, excluded):
            to = to_first + low - first
            rules.append(Rule(side, protocol, low, high, to, address, interface, to_address, auto, weak))
    if not rules:
        raise fail("all of them are excluded")
    return rules


def _hint(text: str, option: str) -> str:
    """What to write instead of a port mapping of podman's or docker's; empty if the text is none."""
    match = _PUBLISHED.fullmatch(text)
    if match:
        address, ports = match["address"].strip("[]"), match["ports"]
        return f"an address goes before a slash: {option} {address}/{ports}"
    match = _WITH_PROTOCOL.fullmatch(text)
    if match:
        right = ("-t" if match["protocol"] == TCP else "-u") if option in ("-t", "-u") else option
        ports = match["ports"]
        published = _PUBLISHED.fullmatch(ports)
        if published:
            ports = f"{published['address'].strip('[]')}/{published['ports']}"
        return f"the option says the protocol, -t for TCP and -u for UDP: {right} {ports}"
    if f",{UNIX}" in text:
        return "a UNIX socket takes an option of its own"
    if text[:1] in ("/", ".") and ":" in text:
        return f"a UNIX socket is written {UNIX}{text}"
    return ""


def _where(where: str, option: str, fail: _Fail) -> tuple[IPAddress | None, str]:
    """[ADDR][%IF], with * for any address."""
    text, percent, interface = where.partition("%")
    if percent:
        parse_ifname(interface, option)
    if text == "*" or (percent and not text):
        return None, interface
    return _address(text, fail), interface


def _address(text: str, fail: _Fail) -> IPAddress:
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        if re.match(r"[0-9]+(-[0-9]+)?:", text):
            raise fail("a target address needs a listening address of the same version of IP") from None
        if _INTERFACE.fullmatch(text):
            raise fail(
                f"'{text}' is neither a port nor an address; an interface is written %{text}"
            ) from None
        raise fail(f"'{text}' is neither a port nor an address") from None


def _port(text: str, fail: _Fail) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= PORT_MAX):
        raise fail(f"'{text}' is not a port")
    return int(text)


def _range(text: str, fail: _Fail) -> tuple[int, int]:
    """N or N-M."""
    low, dash, high = text.partition("-")
    first = _port(low, fail)
    last = _port(high, fail) if dash else first
    if last < first:
        raise fail(f"'{text}' runs backwards")
    return first, last


def _chunk(text: str, fail: _Fail) -> tuple[int, int, IPAddress | None, int]:
    """N[-M], N[-M]:TO[-TOLAST], N[-M]:ADDR[/TO[-TOLAST]]: first, last, target's address and first port."""
    ports, colon, target = text.partition(":")
    first, last = _range(ports, fail)
    if not colon:
        return first, last, None, first
    address, slash, to_ports = target.partition("/")
    if slash or not re.fullmatch(r"[0-9]+(-[0-9]+)?", target):
        to_address: IPAddress | None = _address(address, fail)
        if not slash:
            return first, last, to_address, first
    else:
        to_address, to_ports = None, target
    to_first, to_last = _range(to_ports, fail)
    if to_last - to_first != last - first:
        raise fail(f"'{ports}' and '{to_ports}' are not the same length")
    return first, last, to_address, to_first


def _without(first: int, last: int, excluded: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of a range without others."""
    pieces = [(first, last)]
    for low, high in excluded:
        cut = []
        for start, end in pieces:
            cut += [(start, min(end, low - 1)), (max(start, high + 1), end)]
        pieces = [(start, end) for start, end in cut if start <= end]
    return pieces


def _unix(text: str, side: str, protocol: str, fail: _Fail) -> Rule:
    """unix:PATH:PORT."""
    path, colon, port = text[len(UNIX) :].rpartition(":")
    if not colon and port:
        raise fail("the port is missing, as in unix:/run/web.sock:80")
    if side != HOST or protocol != TCP:
        raise fail("a UNIX socket goes with -t only")
    if not path or "\0" in path or len(os.fsencode(path)) > UNIX_PATH_MAX:
        raise fail(f"a path of 1 to {UNIX_PATH_MAX} bytes is needed, as in unix:/run/web.sock:80")
    return Rule(side, protocol, 0, 0, _port(port, fail), path=path)


def overlap(one: Rule, other: Rule) -> bool:
    """True if two rules would listen at the same address and port."""
    if one.side != other.side or one.protocol != other.protocol or one.path != other.path:
        return False
    if one.last < other.first or other.last < one.first:
        return False
    if one.interface and other.interface and one.interface != other.interface:
        return False
    a, b = one.address, other.address
    if a is None or b is None:
        return True
    return a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)
