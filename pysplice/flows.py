"""The table of TCP flows.

The only writer of key -> flow: birth, lookup, death and limits.  Imports `tcp`; opens no socket.
"""

import heapq
import itertools
from collections.abc import Callable

from .tcp.connection import Connection
from .tcp.events import CLOSED, ESTABLISHED
from .tcp.timing import NEVER

# Connections that are not established yet: enough for a burst, few enough that a guest which sends
# nothing but SYNs leaves descriptors to the others
HALF_OPEN_MAX = 1024


class Flow:
    """A connection and what the loop has to know about it."""

    __slots__ = ("connection", "half_open", "inbound", "key", "wake_at")

    def __init__(self, key: bytes, connection: Connection, inbound: bool) -> None:
        self.key = key
        self.inbound = inbound  # it comes from the host
        self.connection = connection
        self.half_open = True
        self.wake_at = NEVER  # when the heap of timers will look at it


class Flows:
    """All flows by key: addresses and ports as they stand in the guest's segments."""

    def __init__(self, flow_max: int, half_open_max: int = HALF_OPEN_MAX) -> None:
        self._table: dict[bytes, Flow] = {}
        self._heap: list[tuple[float, int, Flow]] = []
        self._order = itertools.count()
        self.flow_max = flow_max
        self._half_open_max = half_open_max
        self.half_open = 0  # of those that the guest opens
        self._waiting: dict[Flow, None] = {}  # for the guest's answer, oldest first
        self.opened = 0
        self.refused = 0
        self.lookup = self._table.get

    def __len__(self) -> int:
        return len(self._table)

    def has_room(self, inbound: bool = False) -> bool:
        """False if one flow more would be one too many; counts those."""
        if len(self._table) < self.flow_max and (inbound or self.half_open < self._half_open_max):
            return True
        self.refused += 1
        return False

    def longest_waiting(self) -> Flow | None:
        """The client that has waited longest for the guest's answer, if so many wait that it has to give way."""
        return next(iter(self._waiting)) if len(self._waiting) >= self._half_open_max else None

    def add(self, key: bytes, connection: Connection, inbound: bool = False) -> Flow:
        """A flow is born: from the guest's SYN, or `inbound` from a client on the host."""
        flow = Flow(key, connection, inbound)
        self._table[key] = flow
        if inbound:
            self._waiting[flow] = None
        else:
            self.half_open += 1
        self.opened += 1
        return flow

    def settle(self, flow: Flow) -> None:
        """After each event of a flow: bury it if it ended, else see to its timer."""
        connection = flow.connection
        if flow.half_open and connection.facts & (ESTABLISHED | CLOSED):
            flow.half_open = False
            if flow.inbound:
                del self._waiting[flow]
            else:
                self.half_open -= 1
        if connection.facts & CLOSED:
            if self._table.get(flow.key) is flow:
                del self._table[flow.key]
            flow.wake_at = NEVER
            return
        at = connection.deadline()
        # A deadline that moved back is found out when the timer fires: that is cheaper than to
        # move it for each segment
        if at < flow.wake_at:
            self._schedule(flow, at)

    def _schedule(self, flow: Flow, at: float) -> None:
        flow.wake_at = at
        heapq.heappush(self._heap, (at, next(self._order), flow))
        if len(self._heap) > 64 + 4 * len(self._table):
            self._heap = [entry for entry in self._heap if entry[2].wake_at == entry[0]]
            heapq.heapify(self._heap)

    def next_deadline(self) -> float:
        """When the first timer fires."""
        return self._heap[0][0] if self._heap else NEVER

    def expire(self, now: float, failed: Callable[[Flow, Exception], None]) -> None:
        """Run the timers that are due; `failed` hears of a flow whose timer raised."""
        while self._heap and self._heap[0][0] <= now:
            at, _, flow = heapq.heappop(self._heap)
            if flow.wake_at != at:
                continue
            flow.wake_at = NEVER
            if flow.connection.deadline() <= now:
                try:
                    flow.connection.on_timer(now)
                except Exception as e:
                    failed(flow, e)
            self.settle(flow)

    def all(self) -> list[Flow]:
        return list(self._table.values())
