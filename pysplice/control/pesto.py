"""pesto(1): shows and changes the forwarded ports of a running pasta, or of a pysplice that runs with -c.

Owns nothing.  Imports `config`, `forward`, `observe` and tables.py.

The options, what is printed and the exit status are pesto's.  Two things are better: an update is over when this
process ends, since it waits for the server to close; and a reason that the server gives is printed, with status 1.
"""

import getopt
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from .. import __version__
from ..config import ConfigError, pages, usage
from ..config.ports import GUEST, OPTIONS, SPELLED, Rule, parse
from ..forward.scan import bits, ephemeral_ports, ranges
from ..observe.log import print_text
from . import tables
from .tables import Table

TIMEOUT = 10.0  # seconds without anything from the server
GREETING_TIMEOUT = 4.0  # it may have other clients first
ANSWER_MAX = 4096

ADD, DELETE = "add", "delete"

CAPABILITIES = ("IPv4", "IPv6", "TCP", "UDP", "scan", "ifname")


class Failure(Exception):
    """What ends this process with status 1; printed."""


class Line(NamedTuple):
    """The fields of a rule as it is sent (tables.RULE)."""

    address: bytes
    target: bytes
    interface: bytes
    first: int
    last: int
    to_first: int
    protocol: int
    flags: int

    @classmethod
    def of(cls, text: bytes) -> "Line":
        return cls._make(tables.RULE.unpack(text))

    def __str__(self) -> str:
        """The rule as pesto(1) prints it."""
        name = {6: "TCP", 17: "UDP"}.get(self.protocol, "<unknown protocol>")
        where = "*" if self.flags & tables.DUAL_STACK else str(tables.unpacked(self.address))
        interface = tables.printable(self.interface.partition(b"\0")[0].decode("latin-1"))
        target = f"{tables.unpacked(self.target)}:" if self.target != tables.ANY else ""
        return (
            f"{name} [{where}]{'%' if interface else ''}{interface}:{_range(self.first, self.last)}  =>  "
            f"{target}{_range(self.to_first, self.to_first + self.last - self.first)} "
            f"{' (best effort)' if self.flags & tables.WEAK else ''}"
            f"{' (auto-scan)' if self.flags & tables.SCAN else ''}"
        )

    def conflicts(self, other: "Line") -> bool:
        """True if both rules would listen at the same address and port."""
        if self.protocol != other.protocol or self.last < other.first or other.last < self.first:
            return False
        if any(self.interface) and any(other.interface) and self.interface != other.interface:
            return False
        if (self.flags | other.flags) & tables.DUAL_STACK:
            return True
        one, two = tables.unpacked(self.address), tables.unpacked(other.address)
        return one.version == two.version and (one == two or one.is_unspecified or two.is_unspecified)


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def main(words: Sequence[str]) -> int:
    """Run the words after `pesto`; the exit status."""
    try:
        options, paths = getopt.gnu_getopt(list(words), *_getopt_options())
    except getopt.GetoptError as e:
        return _fail(f"pesto: {e.msg}; try --help")
    names = [name for name, _ in options]
    if "-h" in names or "--help" in names:
        return print_text(_help())
    if "--version" in names:
        return print_text(f"pesto (pysplice) {__version__}\nLicence: GPL-2.0-or-later\n")
    if len(paths) != 1:
        return _fail("pesto: the PATH of one control socket is needed; try --help")
    said: list[str] = []
    problem = ""
    try:
        _run(options, paths[0], said)
    except (Failure, ConfigError) as e:
        problem = str(e)
    status = print_text("".join(said), "pesto")
    return _fail(problem) if problem else status


def _getopt_options() -> tuple[str, list[str]]:
    """The short and the long options, as getopt has them."""
    rows = [
        (name, ":" if len(name) == 2 else "=", row.metavar)
        for row in pages.PESTO.switches
        for name in row.names
    ]
    short = "".join(name[1] + (mark if metavar else "") for name, mark, metavar in rows if len(name) == 2)
    return short, [name[2:] + (mark if metavar else "") for name, mark, metavar in rows if len(name) > 2]


def _help() -> str:
    page = pages.PESTO
    return (
        f"Usage: {page.name} {page.synopsis[0]}\n\n{page.about}\n\n{usage.switches_text(page.switches)}\n"
        f"PORTS is written {pages.PORTS_NOTE}.\n"
    )


def _fail(problem: str) -> int:
    sys.stderr.write(f"{problem}\n")
    return 1


def _run(options: list[tuple[str, str]], path: str, said: list[str]) -> None:
    """Do what the options say, and add to `said` what is to be printed; raises Failure."""
    names = {name for name, _ in options}
    debug, show = bool(names & {"-d", "--debug"}), bool(names & {"-s", "--show"})
    asks = bool(names - {"-d", "--debug", "-s", "--show"})
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        # A server that is busy has a full backlog: with a timeout of Python's connect() would not wait for it
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(TIMEOUT), 0))
        try:
            sock.connect(path)
        except (OSError, ValueError) as e:
            raise Failure(f"Failed to connect to {path}: {getattr(e, 'strerror', None) or e}") from None
        if debug:
            sys.stderr.write("Connected to passt/pasta control socket\n")
        shown = _greeting(sock)
        if debug:
            for table in shown:
                can = " ".join(name for n, name in enumerate(CAPABILITIES) if table.capabilities >> n & 1)
                sys.stderr.write(
                    f"PIF {table.pif}: {table.name}, {len(table.rules)} rules, "
                    f"capabilities {table.capabilities:#x}: {can}\n"
                )
        if not asks:
            said.append(_text("passt/pasta configuration", path, shown))
            return
        if show:
            said.append(_text("Previous configuration", path, shown))
        changed = _Tables(shown)
        changed.obey(options)
        if show:
            said.append(_text("Updated configuration", path, shown))
        _send(sock, shown)


def _text(title: str, path: str, shown: list[Table]) -> str:
    """The tables, as pesto(1) prints them."""
    lines = [f"{title} ({os.fsencode(path).decode(errors='replace')})"]
    for table in shown:
        lines += [f"  {table.name}", *(f"    {Line.of(rule)}" for rule in table.rules)]
    return "".join(f"{line}\n" for line in lines)


def _greeting(sock: socket.socket) -> list[Table]:
    """The tables of the server; raises Failure."""
    reading = tables.read_greeting()
    wanted = next(reading)
    started, until = False, time.monotonic() + GREETING_TIMEOUT
    try:
        while True:
            part = b""
            while len(part) < wanted:
                sock.settimeout(max(until - time.monotonic(), 0.001))
                data = sock.recv(wanted - len(part))
                if not data:
                    end = "Error reading from control socket"
                    raise Failure(end if started else "Couldn't read server greeting: No data available")
                part += data
            started = True
            wanted = reading.send(part)
    except StopIteration as stop:
        shown: list[Table] = stop.value
        return shown
    except TimeoutError:
        raise Failure(
            "No greeting from the server; if it is the socket of pysplice's --control: pesto takes that of -c"
        ) from None
    except OSError as e:
        raise Failure(f"Error reading from control socket: {e.strerror or e}") from None


def _send(sock: socket.socket, shown: list[Table]) -> None:
    """Have the server use these tables, and wait until it does; raises Failure."""
    try:
        sock.sendall(tables.write_update([(table.pif, table.rules) for table in shown]))
        answer, until = b"", time.monotonic() + TIMEOUT
        while len(answer) < ANSWER_MAX:
            sock.settimeout(max(until - time.monotonic(), 0.001))
            data = sock.recv(ANSWER_MAX)
            if not data:
                break
            answer += data
    except TimeoutError:
        raise Failure("No answer from the server: the update may not have been made") from None
    except ConnectionError:
        raise Failure("The server has refused the update") from None
    except OSError as e:
        raise Failure(f"Error writing to control socket: {e.strerror or e}") from None
    if answer:
        raise Failure(tables.printable(answer.decode(errors="replace").strip()))


class _Tables:
    """The tables, as the options change them one after the other."""

    def __init__(self, shown: list[Table]) -> None:
        self._by_pif = {table.pif: table for table in shown}
        self._ephemeral = ephemeral_ports()
        self._mode = ""
        self._cleared: set[int] = set()
        self._given: set[str] = set()

    def obey(self, options: list[tuple[str, str]]) -> None:
        """Change the tables as the options say; raises Failure."""
        for name, text in options:
            if name in ("-A", "--add"):
                self._mode = ADD
            elif name in ("-D", "--delete"):
                self._mode = DELETE
            elif name in ("-C", "--clear"):
                self._clear(text)
            elif SPELLED.get(name, name) in OPTIONS:
                self._ports(SPELLED.get(name, name), text)

    def _clear(self, name: str) -> None:
        table = next((table for table in self._by_pif.values() if table.name == name), None)
        if table is None:
            raise Failure(f"Unsupported pif name {name}")
        table.rules.clear()

    def _ports(self, option: str, text: str) -> None:
        """One of -t, -u, -T and -U."""
        side, protocol = OPTIONS[option]
        table = self._by_pif.get(tables.PIFS[side])
        if table is None:
            raise Failure(f"Can't use {option}, no {'outbound' if side == GUEST else 'inbound'} interface")
        if text == "none":
            if self._mode or option in self._given:
                raise Failure(f"{option} none conflicts with previous options")
        else:
            self._given.add(option)
        if not self._mode and table.pif not in self._cleared:
            self._cleared.add(table.pif)
            table.rules.clear()
        for rule in () if text == "none" else self._parsed(option, side, protocol, text):
            for line in self._lines(table, rule):
                (_delete if self._mode == DELETE else _add)(table, line)

    def _parsed(self, option: str, side: str, protocol: str, text: str) -> list[Rule]:
        if side == GUEST and "/" in text.partition(":")[0]:
            raise Failure(f"Listening address not allowed for {option} {text}")
        try:
            rules = parse(option, side, protocol, text)
        except ConfigError as e:
            reason = str(e).partition("' (")[2]
            raise Failure(f"Invalid port specifier '{text}'" + (f" ({reason}" if reason else "")) from None
        if any(rule.path for rule in rules):
            raise Failure(f"Invalid port specifier '{text}' (pysplice ctl takes UNIX sockets)")
        return rules

    def _lines(self, table: Table, rule: Rule) -> list[bytes]:
        """A rule as it is sent: one for each range, without ephemeral ports where all others are meant."""
        can = table.capabilities
        if rule.auto and not can & tables.CAN_SCAN:
            raise Failure("'auto' port forwarding is only allowed for pasta")
        if rule.interface and not can & tables.CAN_IFNAME:
            raise Failure(f"Device binding for '{rule}' unsupported (requires kernel 5.7+)")
        ports = bits(rule.first, rule.last) & ~(self._ephemeral if rule.weak else 0)
        lines = []
        for first, last in ranges(ports):
            piece = rule._replace(first=first, last=last, to_first=rule.target(first))
            text = tables.write_rule(piece)
            if rule.address is None and not can & tables.IPV6:
                text = tables.write_rule(piece._replace(address=tables.unpacked(tables.ANY4)))
            elif rule.address is None and not can & tables.IPV4:
                text = tables.write_rule(piece._replace(address=tables.unpacked(tables.ANY)))
            if rule.side == GUEST and not can & tables.CAN_IFNAME:
                text = text[:32] + bytes(tables.IFNAME_BYTES) + text[32 + tables.IFNAME_BYTES :]
            lines.append(text)
        return lines


def _add(table: Table, text: bytes) -> None:
    """Add a rule; raises Failure if it conflicts with another."""
    line = Line.of(text)
    name, bit = ("TCP", tables.CAN_TCP) if line.protocol == 6 else ("UDP", tables.CAN_UDP)
    why = ""
    if not table.capabilities & bit:
        why = f"Can't add {name} forwarding rule, {name} not enabled"
    other = next((Line.of(rule) for rule in table.rules if line.conflicts(Line.of(rule))), None)
    if other is not None:
        why = f"Forwarding configuration conflict: {line} versus {other}"
    if len(table.rules) >= tables.RULES_MAX:
        why = f"Too many forwarding rules (maximum {tables.RULES_MAX})"
    if why:
        raise Failure(f"{why}\nUnable to add rule {line}")
    table.rules.append(text)


def _delete(table: Table, text: bytes) -> None:
    """Delete a rule; raises Failure if there is none like it."""
    line = Line.of(text)
    if text in table.rules:
        table.rules.remove(text)
        return
    other = next((Line.of(rule) for rule in table.rules if line.conflicts(Line.of(rule))), None)
    if other is not None:
        why = f"Specifier {line} conflicts with rule {other}, but doesn't match it, can't delete"
    else:
        why = f"Couldn't find forwarding rule to delete: {line}"
    raise Failure(f"{why}\nUnable to delete rule {line}")
