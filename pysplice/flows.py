"""The table of TCP flows.

The only writer of key -> flow: birth, lookup, death and limits.  Imports `tcp`; opens no socket.
"""

import heapq
import itertools
from collections.abc import Callable

from .tcp.connection import Connection
from .tcp.events import CLOSED, ESTABLISHED
from .tcp.timing import NEVER


class Flow:
    """A connection and what the loop has to know about it."""

    __slots__ = ("connection", "counted", "half_open", "inbound", "key", "wake_at")

    def __init__(self, key: bytes, connection: Connection, inbound: bool) -> None:
        self.key = key
        self.inbound = inbound  # it comes from the host
        self.connection = connection
        self.half_open = True
        self.counted = True  # among those of its direction
        self.wake_at = NEVER  # when the heap of timers will look at it


class Flows:
    """All flows by key: addresses and ports as they stand in the guest's segments."""

    def __init__(self, outbound_max: int, inbound_max: int, half_open_max: int) -> None:
        self._table: dict[bytes, Flow] = {}
        self._heap: list[tuple[float, int, Flow]] = []
        self._order = itertools.count()
        self.inbound = 0  # how many of them come from the host
        self.outbound_max = outbound_max
        self.inbound_max = inbound_max
        self._half_open_max = half_open_max
        # Those that are not established yet, oldest first: of the guest's, and of clients
        self._opening: dict[Flow, None] = {}
        self._waiting: dict[Flow, None] = {}
        self.opened = 0
        self.refused = 0
        self.gave_way = 0
        self.lookup = self._table.get

    def __len__(self) -> int:
        return len(self._table)

    @property
    def half_open(self) -> int:
        """Those that the guest opens."""
        return len(self._opening)

    def has_room(self, inbound: bool = False) -> bool:
        """False if one flow more would be one too many of its direction; counts those."""
        held, most = (self.inbound, self.inbound_max) if inbound else (self.outbound, self.outbound_max)
        if held < most:
            return True
        self.refused += 1
        return False

    @property
    def outbound(self) -> int:
        return len(self._table) - self.inbound

    def longest_waiting(self, inbound: bool) -> Flow | None:
        """The flow that has waited longest for an answer, if so many wait that it has to give way; counts those."""
        waiting = self._waiting if inbound else self._opening
        if len(waiting) < min(self._half_open_max, self.inbound_max if inbound else self.outbound_max):
            return None
        self.gave_way += 1
        return next(iter(waiting))

    def add(self, key: bytes, connection: Connection, inbound: bool = False) -> Flow:
        """A flow more: from the guest's SYN, or `inbound` from a client on the host."""
        flow = Flow(key, connection, inbound)
        self._table[key] = flow
        if inbound:
            self.inbound += 1
            self._waiting[flow] = None
        else:
            self._opening[flow] = None
        self.opened += 1
        return flow

    def settle(self, flow: Flow) -> None:
        """After each event of a flow: bury it if it ended, else see to its timer."""
        connection = flow.connection
        if flow.half_open and connection.facts & (ESTABLISHED | CLOSED):
            flow.half_open = False
            del (self._waiting if flow.inbound else self._opening)[flow]
        if connection.facts & CLOSED:
            if self._table.get(flow.key) is flow:
                del self._table[flow.key]
            if flow.counted:
                flow.counted = False
                self.inbound -= flow.inbound
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
