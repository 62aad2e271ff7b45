"""Updates of the forwarded ports by pesto(1).

Owns what one client was shown, and what it has sent so far.  Imports `config`, `observe` and tables.py.

A client takes the tables that it was shown, changes them, and sends all of them back.  What we do is the difference:
so two clients at once lose nothing of each other's, and a rule that stays keeps its listeners.  An update is made as a
whole or not at all.

The protocol has no answer, so pesto(1) never learns that a port could not be had.  We log it, and send the reason as
a line of text before we close: pesto(1) does not read it, ours does (pesto.py).
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol

from ..config import ConfigError
from ..config.ports import GUEST, HOST, TCP, UDP, Rule
from ..observe.log import Log
from . import tables
from .tables import Table

# Seconds for a client in all, and how long others wait for it.  pesto(1) takes some milliseconds; what it sends
# replaces what it was shown, so it had better be shown what the one before it has made.
PATIENCE, ALONE = 5.0, 0.1


class Forwarding(Protocol):
    """What is controlled."""

    def pieces(self) -> list[Rule]:
        """The rules that have ports."""

    def change(self, changes: Sequence[tuple[bool, Rule]]) -> list[str]:
        """Add these rules (True) and remove those, all or none; lines for the user.  Raises ConfigError."""

    def arrange(self, pieces: Sequence[Rule]) -> None:
        """Put the rules into this order."""


def capabilities(ipv4: bool, ipv6: bool, protocols: Sequence[str]) -> int:
    """What our tables can, as bits."""
    can = tables.CAN_SCAN | tables.CAN_IFNAME
    parts = (ipv4, tables.IPV4), (ipv6, tables.IPV6), (TCP in protocols, tables.CAN_TCP)
    for has, bit in (*parts, (UDP in protocols, tables.CAN_UDP)):
        can |= bit if has else 0
    return can


class Update:
    """The session of a client; `can` are the capabilities of our tables.  Reasons to refuse go to `refusals`."""

    patience = PATIENCE
    alone = ALONE

    def __init__(self, forwarding: Forwarding, can: int, refusals: deque[str], log: Log) -> None:
        self._refusals = refusals
        self._forwarding = forwarding
        self._can = can
        self._log = log
        self._shown: dict[tuple[int, bytes], Rule] = {}
        self._feeder = tables.Feeder(tables.read_update())

    def greeting(self) -> bytes:
        shown: dict[int, list[bytes]] = {tables.PIFS[side]: [] for side in (HOST, GUEST)}
        for rule in self._forwarding.pieces():
            pif, text = tables.PIFS[rule.side], tables.write_rule(rule)
            shown[pif].append(text)
            self._shown[pif, text] = rule
        return tables.write_greeting(
            [Table(pif, tables.NAMES[tables.SIDES[pif]], self._can, rules) for pif, rules in shown.items()]
        )

    def take(self, data: bytes) -> tuple[bytes, bool]:
        try:
            if not self._feeder.feed(data):
                return b"", True
            self._apply(self._feeder.result or [])
        except tables.NoUpdate as e:
            # Not from pesto at all: pysplice ctl at the wrong socket, for instance, which says so itself
            self._log.debug(f"pesto: {e}")
            return f"{e}\n".encode(), False
        except (ConfigError, OSError) as e:
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            self._log.warning(f"pesto: {reason}; no port was changed")
            self._refusals.append(reason)
            return f"{reason}\n".encode(), False
        return b"", False

    def _apply(self, wanted: list[tuple[int, list[bytes]]]) -> None:
        """Make the difference between what the client was shown and what it wants; raises ConfigError."""
        asked = Counter((pif, text) for pif, rules in wanted for text in rules)
        twice = next((key for key, times in asked.items() if times > 1), None)
        if twice is not None:
            raise ConfigError(f"'{tables.read_rule(*twice)}' is there twice")
        # Another client may have removed it meanwhile
        there = {(tables.PIFS[rule.side], tables.write_rule(rule)) for rule in self._forwarding.pieces()}
        changes = [(False, rule) for key, rule in self._shown.items() if key not in asked and key in there]
        rules = {key: self._shown.get(key) or tables.read_rule(*key) for key in asked}
        changes += [(True, rule) for key, rule in rules.items() if key not in self._shown]
        if changes:
            for note in self._forwarding.change(changes):
                self._log.warning(f"pesto: {note}")
            self._forwarding.arrange(list(rules.values()))
