"""The plane of spliced flows.

Owns the epoll instance that watches their sockets.  Imports the files of this room.
"""

import select
from typing import Final

from .datagrams import SplicedDatagrams
from .streams import SplicedStreams

SOCKETS_PER_TURN: Final = 64


class SplicePlane:
    """Spliced connections, and spliced datagrams."""

    def __init__(self, epoll: select.epoll, streams: SplicedStreams, datagrams: SplicedDatagrams) -> None:
        self._epoll = epoll
        self.streams = streams
        self.datagrams = datagrams

    def fileno(self) -> int:
        """The descriptor that is readable while a spliced socket is ready."""
        return self._epoll.fileno()

    def on_ready(self, now: float) -> None:
        """Some sockets are ready."""
        ready = self._epoll.poll(
            0, SOCKETS_PER_TURN
        )  # the kernel lets those that are left have the next turn
        streams = [event for event in ready if not self.datagrams.owns(event[0])]
        if streams:
            self.streams.on_ready(streams)
        if len(streams) < len(ready):
            self.datagrams.on_ready(ready, now)

    def close(self) -> None:
        """End all of them."""
        self.streams.close()
        self.datagrams.close()
        self._epoll.close()
