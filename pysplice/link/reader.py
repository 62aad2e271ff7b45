"""Reads the tap, one batch at a time, and passes it to the plane of TCP and to the plane of everything else.

Owns nothing.  Imports `loop`, `observe`, `_cext` and the files of this room.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from .. import _cext
from ..loop import Loop
from ..observe import describe
from ..observe.log import Log
from .plane import LinkPlane
from .tap import TapDevice

LAST_BATCHES: Final = 16


class TapGone(Exception):
    """The tap cannot be read any more: often its namespace has ended."""


class Runs(Protocol):
    """The stream plane, as far as it is called here."""

    def on_batch(self, runs: Sequence[_cext.Run], now: float) -> None:
        """The runs of TCP segments of one batch."""


class Reader(Protocol):
    """What the proxy asks of a reader."""

    def fileno(self) -> int: ...
    def on_ready(self, now: float) -> None: ...
    def read_last(self) -> None: ...
    @property
    def invalid(self) -> int: ...
    @property
    def lost(self) -> int: ...
    def close(self) -> None: ...


class NoReader:
    """Without a tap nothing is read."""

    invalid: int = 0
    lost: int = 0

    def fileno(self) -> int:
        return -1

    def on_ready(self, now: float) -> None:
        pass

    def read_last(self) -> None:
        pass

    def close(self) -> None:
        pass


class TapReader:
    """The reader of a tap.  `complain` is told, once, that a capture has ended because it cannot be written."""

    def __init__(
        self,
        tap: TapDevice,
        streams: Runs,
        link: LinkPlane,
        loop: Loop,
        log: Log,
        complain: Callable[[str], None],
    ) -> None:
        self._tap = tap
        self._streams = streams
        self._link = link
        self._loop = loop
        self._log = log
        self._complain = complain
        self._described: dict[str, int] = {}
        self._capturing = tap.raw.capturing

    def fileno(self) -> int:
        """The tap's descriptor."""
        return self._tap.fileno()

    @property
    def invalid(self) -> int:
        """How many frames were dropped as invalid."""
        return sum(self._tap.dropped.values())

    @property
    def lost(self) -> int:
        """How many packets had no hops left, or found no room."""
        return self._link.expired + self._link.overrun

    def on_ready(self, now: float) -> None:
        """The tap holds frames; raises TapGone once it cannot be read."""
        if self._link.is_behind:
            self._link.catch_up()
            return
        try:
            runs, datagrams, frames = self._tap.drain()
        except OSError as e:
            raise TapGone(e.strerror) from e
        if self._log.trace_on:
            for line in describe.batch(runs, datagrams, frames):
                self._log.trace(line)
        if self._log.debug_on:
            self._describe_dropped(now)
        if self._capturing and not self._tap.raw.capturing:
            self._capturing = False
            self._complain("the capture ends: its file can no longer be written")
        if datagrams or frames:
            self._link.on_batch(datagrams, frames, now)
        self._streams.on_batch(runs, now)

    def read_last(self) -> None:
        """Read what the guest sent before it ended, as far as that can be read at once."""
        with contextlib.suppress(OSError):
            for _ in range(LAST_BATCHES):
                # First what waits already: the tap may be gone
                self._link.finish()
                runs, datagrams, frames = self._tap.drain()
                if not (runs or datagrams or frames):
                    return
                now = self._loop.now()
                self._link.on_batch(datagrams, frames, now)
                self._streams.on_batch(runs, now)
        self._link.finish()

    def _describe_dropped(self, now: float) -> None:
        """Say which frames were dropped without being looked at."""
        dropped = self._tap.dropped
        if dropped != self._described:
            self._described = dropped
            causes = ", ".join(f"{why} {count}" for why, count in dropped.items())
            self._log.flow("dropped", f"frames so far, by what is wrong: {causes}", now)

    def close(self) -> None:
        """Close the tap."""
        self._tap.close()
