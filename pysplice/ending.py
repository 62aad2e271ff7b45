"""The orderly end: what the guest has said goes out, and nothing else is waited for.

Owns nothing.  Imports `flows`, `host`, `splice` and the facts of `tcp`.

What the remote host says counts no more, and what the host's kernel has goes out without this process.
"""

import time
from collections.abc import Callable
from typing import Any

from .flows import Flows
from .host import HostSockets
from .splice import Splices
from .tcp.events import ESTABLISHED, SOCK_FIN_SENT

MOST = 300.0  # seconds in all
LOOK = 0.5  # seconds between two looks


class Ending:
    """Calls `stop` once all is said, or no progress is made any more; `later` is the loop's timer."""

    def __init__(
        self,
        flows: Flows,
        hosts: HostSockets | None,
        splices: Splices,
        later: Callable[[float, Callable[[], None]], Any],
        stop: Callable[[], None],
    ) -> None:
        self.begun = False
        self._flows = flows
        self._hosts = hosts
        self._splices = splices
        self._later = later
        self._stop = stop
        self._patience = 0.0
        self._began = self._moved = 0.0
        self._left: object = None

    def begin(self, patience: float) -> None:
        """The guest says no more; `patience`: seconds without progress."""
        self.begun = True
        self._patience = patience
        self._began = self._moved = time.monotonic()
        self._later(0, self._tick)

    def _unsaid(self) -> object:
        """What the guest has said and is not in the host's kernel yet, to be compared; empty if all is."""
        connections = (flow.connection for flow in self._flows.all())
        waiting = [
            (connection.seq_from_tap, connection.kept)
            for connection in connections
            if connection.facts & (ESTABLISHED | SOCK_FIN_SENT) == ESTABLISHED
        ]
        kept = self._hosts.lingering.kept if self._hosts is not None else 0
        spliced = self._splices.unsaid()
        return (waiting, kept, spliced) if waiting or kept or spliced else ()

    def look(self) -> None:
        """Something has happened."""
        now = time.monotonic()
        left = self._unsaid()
        if left != self._left:
            self._left, self._moved = left, now
        if not left or now - self._moved >= self._patience or now - self._began >= MOST:
            self._stop()

    def _tick(self) -> None:
        self.look()
        self._later(LOOK, self._tick)
