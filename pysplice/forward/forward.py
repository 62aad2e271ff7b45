"""The rules of forwarded ports: added, removed, and followed.

Owns the rules.  Imports `config`, `loop`, `observe`, `sockets` and the files of this room.

With `auto`, a port is open on one side while a socket listens on its target on the other.  The kernel is asked about
that once a second.
"""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..config import ConfigError
from ..config.ports import GUEST, HOST, TCP, UDP, Rule, overlap
from ..loop import NEVER, Loop
from ..observe.log import Log
from ..sockets.request import Maker
from .listeners import Addressing, Listeners, Takers
from .scan import Scan, bits, ephemeral_ports, ones, ranges

RULES_MAX = 1024
OPEN_PER_TURN = 64  # ports, while we serve
FOLLOW_PER_TURN = 256  # ports that are opened or closed before everything else gets its turn
SCAN_EVERY = 1.0  # seconds, as pasta
SOON = 0.01
OPEN_EVERY = 0.001  # seconds between turns

UNPRIVILEGED_PATH = "/proc/sys/net/ipv4/ip_unprivileged_port_start"


def unprivileged_port_start() -> int:
    """The first port that an ordinary user may bind."""
    try:
        with open(UNPRIVILEGED_PATH) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 1024


class Forward:
    """All rules.

    `listeners` are the sockets of the rules, at most `most` (the budget changes it); `guest` makes sockets in the
    namespace; `takers` know our other UDP sockets.  `changed` is called when listeners may have come or gone.
    """

    def __init__(
        self,
        listeners: Listeners,
        scan: Scan,
        guest: Maker,
        addressing: Addressing,
        takers: Takers,
        most: int,
        loop: Loop,
        log: Log,
    ) -> None:
        self.rules: list[Rule] = []
        self.listeners = listeners
        self._scan = scan
        self._guest = guest
        self._addressing = addressing
        self._takers = takers
        self._most = most
        self._loop = loop
        self._log = log
        self._ephemeral = ephemeral_ports()
        self._unprivileged = unprivileged_port_start()  # read now: later this process has no files
        self._wanted: dict[Rule, int] = {}
        self._opening: dict[Rule, int] = {}  # ports that are still to be opened, as bits
        self._open_timer = loop.timer(self._open_some)
        self._scan_timer = loop.timer(self.scan)
        # During a change: what has to wait for its end
        self._late: list[Callable[[], object]] | None = None
        self._unfinished = False  # the last scan has left ports for the next one
        self._asked: set[tuple[str, int]] = set()  # of the agent: protocol and port
        self._complained: set[tuple[Rule, int]] = set()
        self.changed: Callable[[], object] = lambda: None

    def fileno(self) -> int:
        """The descriptor that is readable while a listener has clients."""
        return self.listeners.fileno()

    def on_ready(self, now: float) -> None:
        """Some listeners have clients."""
        self.listeners.on_ready(now)

    # Rules

    @property
    def addressing(self) -> Addressing:
        """How listeners are bound."""
        return self._addressing

    def change(self, changes: Sequence[tuple[bool, Rule]]) -> list[str]:
        """Make all of these changes, in order (True: add the rule), or none; what the user should know about them.

        A port that is both removed and added is open all the time.  Raises ConfigError.
        """
        before = self.rules.copy(), self._wanted.copy(), self._opening.copy()
        notes = []
        self.listeners.begin()
        late: list[Callable[[], object]] = []
        self._late = late
        try:
            for adds, rule in changes:
                if adds:
                    notes.append(self.add(rule, running=True))
                else:
                    self.remove(rule)
        except BaseException:
            self.rules, self._wanted, self._opening = before
            self.listeners.roll_back()
            raise
        else:
            self.listeners.commit()
        finally:
            # What the agent has made meanwhile, for rules as they are now
            self._late = None
            for call in late:
                call()
            self._changed()
        return list(filter(None, notes))

    def pieces(self) -> list[Rule]:
        """All rules that have ports; those for all ports as what they listen on, without ephemeral ports."""
        return [piece for rule in self.rules for piece in self._pieces_of(rule)]

    def _pieces_of(self, rule: Rule) -> Iterator[Rule]:
        if rule.weak and not (rule.every or rule.path):
            for first, last in ranges(self._ports(rule)):
                yield rule._replace(first=first, last=last, to_first=rule.target(first))
        elif not rule.path:
            yield rule

    def arrange(self, pieces: Sequence[Rule]) -> None:
        """Put the rules into the order of these pieces; others go behind them."""
        position = {piece: n for n, piece in reversed(list(enumerate(pieces)))}
        first = {rule: next(self._pieces_of(rule), rule) for rule in self.rules}
        self.rules.sort(key=lambda rule: position.get(first[rule], len(pieces)))

    def add(self, rule: Rule, running: bool = False) -> str:
        """Follow a rule from now on; raises ConfigError if its ports cannot be bound.

        With `running`, optional ports (`all`) are opened a few at a time.  The result: what the user should know about
        them, or nothing.
        """
        how = self._addressing
        if rule.address is not None and not (how.ipv4 if rule.address.version == 4 else how.ipv6):
            raise ConfigError(f"'{rule}': IPv{rule.address.version} is switched off")
        if rule.protocol not in how.protocols:
            raise ConfigError(f"'{rule}': {rule.protocol.upper()} is switched off")
        for other in self.rules:
            if not overlap(rule, other) or not self._ports(rule) & self._ports(other):
                continue
            if other == rule:
                raise ConfigError(f"'{rule}' is forwarded already")
            if other.auto == rule.auto:
                raise ConfigError(f"'{rule}' overlaps '{other}'")
            # Ports that are written out go before those that follow
            for port in range(rule.first, rule.last + 1) if other.auto else ():
                if (other, port) in self.listeners:
                    self.listeners.close_port(other, port)
        if len(self.rules) >= RULES_MAX:
            raise ConfigError(f"'{rule}': there are {RULES_MAX} rules already; use ranges of ports")
        if rule.side == GUEST and not self._guest.available:
            raise ConfigError("there is no process in the namespace that could listen there")
        note = ""
        if not rule.auto and running and rule.weak:
            for port in ones(self._ports(rule) & self.listeners.spare(rule)):
                self.listeners.add(rule, port, self.listeners.bind(rule, port))
            ports = self._ports(rule) & ~self.listeners.open.get(rule, 0)
            note = self._left_out(rule, ports.bit_count() - max(self._most - len(self.listeners), 0))
            self._opening[rule] = ports
            self._open_timer.by(self._loop.now())
        elif not rule.auto:
            note = self._open_all(rule)
        self.rules.append(rule)
        self._changed()
        return note

    def _left_out(self, rule: Rule, ports: int) -> str:
        """Warn of ports that there are no descriptors for; the warning, or nothing."""
        if ports <= 0:
            return ""
        text = f"'{rule}': {ports} ports are left out for lack of descriptors"
        self._log.warning(text)
        return text

    def remove(self, rule: Rule) -> None:
        """Close the listeners of a rule, or of a part of a rule; connections stay.

        Raises ConfigError if no rule has these ports.
        """
        whole = next((other for other in self.rules if other.has_part(rule)), None)
        if whole is None:
            near = next((other for other in self.rules if not other.auto and overlap(rule, other)), None)
            raise ConfigError(f"'{rule}' is not forwarded" + (f", but '{near}' is" if near else ""))
        place = self.rules.index(whole)
        self._wanted.pop(whole, None)
        opening = self._opening.pop(whole, 0)
        rest = [part for part in whole.without(rule) if part.first <= part.last and self._ports(part)]
        for port in ones(self.listeners.open.get(whole, 0)):
            part = next((part for part in rest if part.first <= port <= part.last), None)
            if part is None:
                self.listeners.close_port(whole, port)
            else:
                self.listeners.move(whole, port, part)
        self.rules[place : place + 1] = rest
        for part in rest:
            if opening & bits(part.first, part.last):
                self._opening[part] = opening & bits(part.first, part.last)
        self._changed()

    def _ports(self, rule: Rule) -> int:
        """The ports that a rule may listen on, as bits."""
        wanted = self._wanted.get(rule)
        if wanted is None:
            wanted = bits(rule.first, rule.last)
            self._wanted[rule] = wanted = (
                wanted if rule.every or not rule.weak else wanted & ~self._ephemeral
            )
        return wanted

    def _changed(self) -> None:
        """Listeners have come or gone, or rules."""
        self.changed()
        if self._scan_timer.when == NEVER and any(rule.auto for rule in self.rules):
            self._scan_timer.by(self._loop.now())

    def _open_some(self) -> None:
        """Open a few of the ports that are still to be opened, then give everything else its turn."""
        turn = OPEN_PER_TURN
        for rule, ports in list(self._opening.items()):
            for port in ones(ports):
                if len(self.listeners) >= self._most:
                    del self._opening[rule]
                    break
                if not turn:
                    self._opening[rule] = ports
                    self._open_timer.by(self._loop.now() + OPEN_EVERY)
                    self.changed()
                    return
                turn -= 1
                ports &= ports - 1
                self._open_later(rule, port)
            else:
                del self._opening[rule]
        self.changed()

    def _open_all(self, rule: Rule) -> str:
        """Open all ports of a rule, now, and return what the user should know; raises ConfigError."""
        error: OSError | None = None
        failed = 0
        note = ""
        for port in ones(self._ports(rule)):
            if len(self.listeners) >= self._most:
                if not rule.weak:
                    error = OSError(errno.EMFILE, "too many ports for this limit of descriptors")
                    failed = port
                    break
                note = self._left_out(rule, (self._ports(rule) >> port).bit_count())
                break
            try:
                self.listeners.add(rule, port, self.listeners.bind(rule, port))
            except OSError as e:
                error, failed = e, port
                if not rule.weak or e.errno in (errno.EMFILE, errno.ENFILE):
                    break
        opened = self.listeners.open.get(rule, 0)
        if error is not None and (not rule.weak or not opened):
            for port in ones(opened):
                self.listeners.close_port(rule, port)
            raise ConfigError(_cannot_listen(rule, failed, error, self._unprivileged))
        return note

    # Ports that follow others

    def scan(self) -> None:
        """Open and close listeners as their targets have been bound and released; then wait for the next scan."""
        self._scan_timer.cancel()
        self._unfinished = False
        seen: dict[tuple[str, str], int] = {}
        for rule in self.rules:
            if not rule.auto:
                continue
            other = GUEST if rule.side == HOST else HOST
            try:
                bound = self._bound(other, TCP, seen)
                if rule.protocol == UDP:
                    # UDP ports follow TCP ports too, as with pasta
                    bound |= self._bound(other, UDP, seen)
            except OSError as e:
                text = f"cannot read the ports of the {other}: {e.strerror or e}"
                self._log.once(text, text)
                break
            self._follow(rule, bound & ~self.listeners.ours[other, rule.protocol])
        self.changed()
        if any(rule.auto for rule in self.rules):
            self._scan_timer.by(self._loop.now() + (SOON if self._unfinished else SCAN_EVERY))

    def _bound(self, side: str, protocol: str, seen: dict[tuple[str, str], int]) -> int:
        """The ports that sockets other than ours listen on, as bits; `seen` has those of this scan."""
        if (side, protocol) not in seen:
            ours = self.listeners.ours[side, protocol]
            if protocol == UDP:
                ours |= self._takers.ports(side)
            seen[side, protocol] = self._scan.bound(side, protocol) & ~ours
        return seen[side, protocol]

    def _follow(self, rule: Rule, bound: int) -> None:
        """Have a rule listen on the ports whose targets are `bound`."""
        wanted = self._ports(rule) & (bound >> rule.to_first << rule.first)
        have = self.listeners.open.get(rule, 0)
        # Other rules keep their ports
        wanted &= ~(self.listeners.ours[rule.side, rule.protocol] & ~have)
        turn = FOLLOW_PER_TURN
        for port in ones(have & ~wanted):
            self.listeners.close_port(rule, port)
            turn -= 1
            if not turn:
                self._unfinished = True
                return
        for port in ones(wanted & ~have):
            turn -= 1
            if not turn:
                self._unfinished = True
                break
            if len(self.listeners) >= self._most:
                self._complain((rule, port), errno.EMFILE)
                break
            self._open_later(rule, port)
        if self._complained:
            self._complained -= {
                (held, port) for held, port in self._complained if held == rule and not wanted >> port & 1
            }

    def _open_later(self, rule: Rule, port: int) -> None:
        """Open an optional port, without waiting for the agent."""
        key = (rule, port)
        if rule.side == HOST:
            try:
                self.listeners.add(rule, port, self.listeners.bind(rule, port))
            except OSError as e:
                if rule.auto:  # others are opened where that is possible
                    self._complain(key, e.errno or errno.EIO)
        elif (rule.protocol, port) not in self._asked:
            self._asked.add((rule.protocol, port))

            def done(socks: list[socket.socket], error: int) -> None:
                if self._late is not None:
                    self._late.append(partial(done, socks, error))
                    return
                self._asked.discard((rule.protocol, port))
                # The rule may be a smaller one by now (remove())
                owner = next((other for other in self.rules if other.has_part(rule.at(port))), None)
                if error:
                    self._complain(key, error)
                elif owner is not None and (owner, port) not in self.listeners:
                    self.listeners.add(owner, port, socks[0])
                else:
                    socks[0].close()

            self.listeners.ask(rule, port, done)

    def _complain(self, key: tuple[Rule, int], error: int) -> None:
        if key not in self._complained:
            self._complained.add(key)
            rule, port = key
            self._log.warning(f"cannot follow {rule.protocol} port {port}: {os.strerror(error)}")

    def end(self) -> None:
        """Close all listeners and follow no ports; what was accepted goes on."""
        self.rules.clear()
        self._opening.clear()
        self._scan_timer.cancel()
        self.listeners.close_all()

    def close(self) -> None:
        """Close everything."""
        self.end()
        self.listeners.close()
        self._scan.close()


def _cannot_listen(rule: Rule, port: int, error: OSError, unprivileged: int) -> str:
    """Why a port cannot be bound, and what helps; `unprivileged` is the first port that takes no privileges."""
    where = f"{rule.address or ''}{'%' + rule.interface if rule.interface else ''}"
    what = rule.path or f"{where} port {port} ({rule.protocol})".strip()
    text = f"cannot listen on {what}: {error.strerror or error}"
    if error.errno == errno.EACCES and not rule.path and rule.side == HOST and port < unprivileged:
        text += f"; ports below {unprivileged} (net.ipv4.ip_unprivileged_port_start) require privileges"
    return text
