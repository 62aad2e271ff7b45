"""Flows by key, in the order of their last use.

Owns the table.  Imports no other room; time is given to it.
"""

import select
import socket
from typing import Any, Generic, TypeVar

NEVER = float("inf")


class Expiring:
    """What a flow has to know for the table: when it was used, whether it was answered, and its sockets.

    `owners` is where its sockets are looked up when they are ready.
    """

    __slots__ = ("_names", "_owners", "_socks", "answered", "closed", "key", "used")

    def __init__(self, key: bytes, now: float, owners: dict[int, Any]) -> None:
        self.key = key
        self.used = now
        self.answered = False
        self.closed = False
        self._owners = owners
        self._socks: list[socket.socket] = []
        self._names: list[tuple[dict[Any, Any], Any]] = []

    def watch(self, sock: socket.socket, epoll: select.epoll) -> None:
        """The socket is ours, and to be read."""
        self._socks.append(sock)
        self._owners[sock.fileno()] = self
        epoll.register(sock.fileno(), select.EPOLLIN)

    def register(self, table: dict[Any, Any], name: Any) -> None:
        """Be found by another name too, as long as this lives."""
        table[name] = self
        self._names.append((table, name))

    def close(self) -> None:
        """Give everything back."""
        self.closed = True
        for table, name in self._names:
            if table.get(name) is self:
                del table[name]
        for sock in self._socks:
            self._owners.pop(sock.fileno(), None)
            sock.close()


Flow = TypeVar("Flow", bound=Expiring)


class Table(Generic[Flow]):
    """At most `most` flows; `timeout` seconds after its last use one is closed, `dialogue` if it was answered."""

    def __init__(self, most: int, timeout: float, dialogue: float) -> None:
        self._flows: dict[bytes, Flow] = {}
        self._most = max(most, 1)
        self._timeout = timeout
        self._dialogue = max(dialogue, timeout)
        self.opened = 0

    def __len__(self) -> int:
        return len(self._flows)

    def get(self, key: bytes) -> Flow | None:
        return self._flows.get(key)

    def add(self, flow: Flow) -> None:
        """One flow more; where there are too many the one that was used least lately goes."""
        if len(self._flows) >= self._most:
            self.evict()
        self._flows[flow.key] = flow
        self.opened += 1

    def evict(self) -> bool:
        """Close the one that was used least lately; False if there is none."""
        for flow in self._flows.values():
            self.remove(flow)
            return True
        return False

    def touch(self, flow: Flow, now: float) -> None:
        """The flow was used."""
        flow.used = now
        if self._flows.get(flow.key) is flow:
            del self._flows[flow.key]
            self._flows[flow.key] = flow

    def remove(self, flow: Flow) -> None:
        if self._flows.get(flow.key) is flow:
            del self._flows[flow.key]
        if not flow.closed:
            flow.close()

    def expire(self, now: float) -> float:
        """Close what has had its time; when to look again, `NEVER` if nothing is left."""
        soonest = NEVER
        for flow in list(self._flows.values()):
            if now - flow.used < self._timeout:
                # All that follow were used later
                return min(soonest, flow.used + self._timeout)
            at = flow.used + (self._dialogue if flow.answered else self._timeout)
            if at <= now:
                self.remove(flow)
            else:
                soonest = min(soonest, at)
        return soonest

    def all(self) -> list[Flow]:
        return list(self._flows.values())

    def close(self) -> None:
        for flow in self.all():
            self.remove(flow)
