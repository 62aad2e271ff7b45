"""The orderly end: what the guest has sent still goes out, and nothing else is waited for.

Owns nothing.  Imports `loop`, `splice` and `stream`.

Data from remote hosts no longer counts, and what the host's kernel has goes out without this process.
"""

from collections.abc import Callable

from .loop import Loop
from .splice.streams import SplicedStreams
from .stream.plane import Streams

MOST = 300.0  # seconds in all
LOOK = 0.5  # seconds between two looks


class Ending:
    """Calls `stop` once everything is delivered, or nothing moves any more."""

    def __init__(
        self, streams: Streams, splices: SplicedStreams, loop: Loop, stop: Callable[[], None]
    ) -> None:
        self.begun = False
        self._streams = streams
        self._splices = splices
        self._loop = loop
        self._stop = stop
        self._timer = loop.timer(self._on_timer)
        self._patience = 0.0
        self._began = self._moved = 0.0
        self._left: object = None

    def begin(self, patience: float) -> None:
        """The guest will send nothing more; give up after `patience` seconds in which nothing has moved."""
        self.begun = True
        self._patience = patience
        self._began = self._moved = now = self._loop.now()
        self._timer.by(now)

    def look(self) -> None:
        """Stop if it is time to; called after each event."""
        now = self._loop.now()
        left = (*self._streams.undelivered(), *self._splices.undelivered())
        if left != self._left:
            self._left, self._moved = left, now
        if not left or now - self._moved >= self._patience or now - self._began >= MOST:
            self._stop()

    def _on_timer(self) -> None:
        self.look()
        self._timer.by(self._loop.now() + LOOK)
