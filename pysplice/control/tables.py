"""pasta's control protocol, of pesto(1): tables of rules, as bytes.

Pure.  Imports `config`.

A UNIX stream; numbers are big-endian.  The server speaks first: a greeting, its tables, and a byte 0.  A client that
wants other tables answers with all of them, and a byte 0; a table that it leaves out is empty then.  Neither side
says more, so a client is not told whether its tables could be had.

    greeting   magic (8 bytes), version, length of a name, length of an interface's name (4 bytes each)
    table      interface (1 byte), its name (128), what it can (4), number of rules (4), the rules
    answer     interface (1 byte), number of rules (4), the rules
    rule       address, target's address (16 each, IPv4 mapped), interface's name (16), first and last port, first
               port of the target (2 each), protocol (1), flags (1)

An interface (pif) is where a rule listens: on the host (1), or on the loopback interface of the namespace (3).
"""

import ipaddress
import struct
from collections.abc import Generator, Sequence
from typing import NamedTuple, TypeVar

from ..config import ConfigError, IPAddress
from ..config.ports import GUEST, HOST, PORT_MAX, TCP, UDP, Rule

MAGIC = b"basil:s\0"
VERSION = 2
NAME_BYTES = 128
IFNAME_BYTES = 16  # IFNAMSIZ
GREETING = struct.Struct("!8sIII")
TABLE = struct.Struct(f"!{NAME_BYTES}sII")
COUNT = struct.Struct("!I")
RULE = struct.Struct(f"!16s16s{IFNAME_BYTES}sHHHBB")

SIDES = {1: HOST, 3: GUEST}
NAMES = {HOST: "HOST", GUEST: "SPLICE"}
PIFS = {side: pif for pif, side in SIDES.items()}

# What a table can
IPV4, IPV6, CAN_TCP, CAN_UDP, CAN_SCAN, CAN_IFNAME = (1 << n for n in range(6))

# Flags of a rule: at all addresses of both versions; ports that cannot be bound are left out; `auto`
DUAL_STACK, WEAK, SCAN = 1, 2, 4

PROTOCOLS = {6: TCP, 17: UDP}
NUMBERS = {name: number for number, name in PROTOCOLS.items()}

RULES_MAX = 1024  # in a table; pasta takes 255
TABLES_MAX = 8

ANY = bytes(16)
ANY4 = bytes(10) + b"\xff\xff" + bytes(4)
LOOPBACK = "lo"


class NoUpdate(ConfigError):
    """What a client says is none of this protocol."""


class Table(NamedTuple):
    """The rules of one side, as a server shows them; `capabilities` are bits."""

    pif: int
    name: str
    capabilities: int
    rules: list[bytes]


Result = TypeVar("Result")
# Takes the bytes it has asked for by their number, and returns what they are
Reading = Generator[int, bytes, Result]


class Feeder:
    """Gives a Reading the bytes it asks for, as they come; `result` is there at the end."""

    def __init__(self, reading: "Reading[list[tuple[int, list[bytes]]]]") -> None:
        self._reading = reading
        self._held = bytearray()
        self._wanted = next(reading)
        self.result: list[tuple[int, list[bytes]]] | None = None

    def feed(self, data: bytes) -> bool:
        """True when all is read; raises ConfigError for bytes that are no message."""
        self._held += data
        at = 0
        try:
            while len(self._held) - at >= self._wanted:
                part = bytes(self._held[at : at + self._wanted])
                at += self._wanted
                self._wanted = self._reading.send(part)
        except StopIteration as stop:
            self.result = stop.value
        del self._held[:at]
        return self.result is not None


def write_greeting(tables: Sequence[Table]) -> bytes:
    """What a server says first."""
    parts = [GREETING.pack(MAGIC, VERSION, NAME_BYTES, IFNAME_BYTES)]
    for table in tables:
        parts.append(bytes([table.pif]))
        parts.append(TABLE.pack(table.name.encode(), table.capabilities, len(table.rules)))
        parts += table.rules
    return b"".join((*parts, b"\0"))


def read_greeting() -> Reading[list[Table]]:
    """Read what a server says first; raises ConfigError."""
    magic, version, name_bytes, ifname_bytes = GREETING.unpack((yield GREETING.size))
    if magic != MAGIC:
        raise ConfigError("Bad magic number from server")
    if version != VERSION:
        relation = ">" if version > VERSION else "<"
        raise ConfigError(f"Unknown server protocol version {version} {relation} {VERSION}")
    if name_bytes != NAME_BYTES:
        raise ConfigError(f"Server has unexpected pif name size ({name_bytes} not {NAME_BYTES})")
    if ifname_bytes != IFNAME_BYTES:
        raise ConfigError(f"Server has unexpected IFNAMSIZ ({ifname_bytes} not {IFNAME_BYTES})")
    tables: list[Table] = []
    while pif := (yield 1)[0]:
        if len(tables) == TABLES_MAX:
            raise ConfigError("Too many forwarding tables")
        name, capabilities, count = TABLE.unpack((yield TABLE.size))
        if b"\0" not in name:
            raise ConfigError("Interface name was not NULL terminated")
        rules = yield from _read_rules(count)
        tables.append(
            Table(pif, printable(name.partition(b"\0")[0].decode("latin-1")), capabilities, rules)
        )
    return tables


def write_update(tables: Sequence[tuple[int, Sequence[bytes]]]) -> bytes:
    """A client's answer: pairs of a pif and its rules."""
    parts = []
    for pif, rules in tables:
        parts += [bytes([pif]), COUNT.pack(len(rules)), *rules]
    return b"".join((*parts, b"\0"))


def read_update() -> Reading[list[tuple[int, list[bytes]]]]:
    """Read a client's answer; raises ConfigError."""
    tables: list[tuple[int, list[bytes]]] = []
    while pif := (yield 1)[0]:
        if pif not in SIDES:
            raise NoUpdate(f"there is no table {pif}")
        if len(tables) == TABLES_MAX:
            raise ConfigError("too many tables")
        (count,) = COUNT.unpack((yield COUNT.size))
        tables.append((pif, (yield from _read_rules(count))))
    return tables


def _read_rules(count: int) -> Reading[list[bytes]]:
    if count > RULES_MAX:
        raise ConfigError("Too many forwarding rules")
    rules = []
    for _ in range(count):
        rules.append((yield RULE.size))
    return rules


# Rules


def write_rule(rule: Rule) -> bytes:
    """A rule that has ports; of a GUEST rule, that it listens on the loopback interface."""
    anywhere = rule.address is None
    interface = LOOPBACK if rule.side == GUEST else rule.interface
    flags = DUAL_STACK * anywhere | WEAK * rule.weak | SCAN * rule.auto
    return RULE.pack(
        _packed(rule.address),
        _packed(rule.to_address),
        interface.encode(),
        rule.first,
        rule.last,
        rule.to_first,
        NUMBERS[rule.protocol],
        flags,
    )


def read_rule(pif: int, text: bytes) -> Rule:
    """The rule that a server is asked for; raises ConfigError if that is none."""
    packed, target, name, first, last, to_first, number, flags = RULE.unpack(text)
    side, protocol = SIDES[pif], PROTOCOLS.get(number)
    if protocol is None:
        raise ConfigError(f"protocol {number} cannot be forwarded")
    if flags & ~(DUAL_STACK | WEAK | SCAN):
        raise ConfigError(f"flags {flags:#x} of a rule are not known")
    if not (0 < first <= last and 0 < to_first <= PORT_MAX - (last - first)):
        raise ConfigError(f"'{first}-{last}:{to_first}' are no ports")
    interface = _interface(name)
    address = None if flags & DUAL_STACK else unpacked(packed)
    to_address = unpacked(target) if target != ANY else None
    if flags & DUAL_STACK and packed != ANY:
        raise ConfigError(f"'{unpacked(packed)}' is not all addresses")
    if to_address is not None and (address is None or address.version != to_address.version):
        raise ConfigError("a target address needs a listening address of the same version of IP")
    if side == GUEST:
        if address is not None or to_address is not None or interface not in ("", LOOPBACK):
            raise ConfigError("a port of the guest is on its loopback interface, so it takes no address")
        interface = ""
    auto, weak = bool(flags & SCAN), bool(flags & WEAK)
    # Its ephemeral ports are meant, too: who asks for all others leaves them out
    return Rule(
        side, protocol, first, last, to_first, address, interface, to_address, auto, weak, every=weak
    )


def _interface(name: bytes) -> str:
    text, _, rest = name.partition(b"\0")
    if len(text) == IFNAME_BYTES or any(rest):
        raise ConfigError("the name of an interface has no end")
    decoded = text.decode("latin-1")
    if decoded != printable(decoded) or "/" in decoded or " " in decoded:
        raise ConfigError("the name of an interface has other characters than names have")
    return decoded


def _packed(address: IPAddress | None) -> bytes:
    if address is None:
        return ANY
    return address.packed if address.version == 6 else ANY4[:12] + address.packed


def unpacked(packed: bytes) -> IPAddress:
    """An address as it is sent; an IPv4-mapped one as IPv4."""
    address = ipaddress.IPv6Address(packed)
    return address.ipv4_mapped or address


def printable(text: str) -> str:
    """A text of the other side's, without what a terminal might obey."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
