"""The table of TCP flows: lookup, limits, timers and removal.

The only writer of the table.  Imports `loop` and `tcp`; opens no socket.
"""

from collections.abc import Callable
from functools import partial

from ..loop import Loop, Timer
from ..tcp.connection import Connection
from ..tcp.events import CLOSED, ESTABLISHED, TAP_SYN_ACK_SENT


def _nothing() -> None:
    """What the timer of a flow calls that has ended."""


class Flow:
    """A connection, and what the plane has to know about it.

    `key` is its flow key; `inbound` says that a client on the host has begun it; `timer` is due when the connection
    may have something to do.
    """

    __slots__ = ("agreed", "connection", "counted", "half_open", "inbound", "key", "timer")

    def __init__(self, key: bytes, connection: Connection, inbound: bool, timer: Timer) -> None:
        self.key = key
        self.inbound = inbound
        self.connection = connection
        self.timer = timer
        self.half_open = True
        self.agreed = False  # our SYN-ACK is on its way
        self.counted = True  # among the flows of its direction


class Flows:
    """All flows by key.

    `outbound_max`, `inbound_max` and `half_open_max` bound the flows of the guest's, those of clients, and those of
    each kind that are not established yet.  `failed(flow, error)` is told about a timer that has raised.
    """

    def __init__(
        self,
        loop: Loop,
        outbound_max: int,
        inbound_max: int,
        half_open_max: int,
        failed: Callable[[Flow, Exception], None],
    ) -> None:
        self._loop = loop
        self._table: dict[bytes, Flow] = {}
        self.inbound = 0  # how many flows were begun by clients
        self.outbound_max = outbound_max
        self.inbound_max = inbound_max
        self._half_open_max = half_open_max
        self._failed = failed
        # Flows that are not established yet, oldest first: the guest's, and those of clients
        self._opening: dict[Flow, None] = {}
        self._waiting: dict[Flow, None] = {}
        self.opened = 0
        self.refused = 0
        self.gave_way = 0
        self._bytes_from_guest = self._bytes_to_guest = 0  # of flows that have ended
        self.lookup = self._table.get

    def __len__(self) -> int:
        return len(self._table)

    @property
    def half_open(self) -> int:
        """How many flows the guest is opening."""
        return len(self._opening)

    @property
    def outbound(self) -> int:
        """How many flows the guest has begun."""
        return len(self._table) - self.inbound

    def has_room(self, inbound: bool = False) -> bool:
        """True if there may be one more flow in this direction; otherwise the flow is counted as refused."""
        held, most = (self.inbound, self.inbound_max) if inbound else (self.outbound, self.outbound_max)
        if held < most:
            return True
        self.refused += 1
        return False

    def longest_waiting(self, inbound: bool) -> Flow | None:
        """The flow that has waited longest to be established, if so many are waiting that it has to give way."""
        waiting = self._waiting if inbound else self._opening
        if len(waiting) < min(self._half_open_max, self.inbound_max if inbound else self.outbound_max):
            return None
        self.gave_way += 1
        return next(iter(waiting))

    def add(self, key: bytes, connection: Connection, inbound: bool = False) -> Flow:
        """Add a flow: from the guest's SYN, or `inbound` from a client on the host."""
        flow = Flow(key, connection, inbound, self._loop.timer(_nothing))
        flow.timer.call = partial(self._on_timer, flow)
        self._table[key] = flow
        if inbound:
            self.inbound += 1
            self._waiting[flow] = None
        else:
            self._opening[flow] = None
        self.opened += 1
        return flow

    def settle(self, flow: Flow) -> None:
        """After each event of a flow: remove it if its connection has closed, else set its timer."""
        connection = flow.connection
        if flow.half_open:
            self._settle_half_open(flow)
        if connection.facts & CLOSED:
            if self._table.get(flow.key) is flow:
                del self._table[flow.key]
            if flow.counted:
                flow.counted = False
                self.inbound -= flow.inbound
                self._bytes_from_guest += connection.receive.bytes_read
                self._bytes_to_guest += connection.send.bytes_acked
            flow.timer.cancel()
            flow.timer.call = _nothing  # or the two would refer to each other for ever
            return
        # A deadline that has moved back is noticed when the timer is due: that is cheaper than moving the timer
        # for each segment
        at = connection.deadline()
        if at < flow.timer.when:
            flow.timer.by(at)

    def _settle_half_open(self, flow: Flow) -> None:
        facts, waiting = flow.connection.facts, self._waiting if flow.inbound else self._opening
        if facts & (ESTABLISHED | CLOSED):
            flow.half_open = False
            del waiting[flow]
        elif facts & TAP_SYN_ACK_SENT and not flow.agreed:
            # The guest's answer may be in the ring, behind a flood of SYNs: others give way first
            flow.agreed = True
            del waiting[flow]
            waiting[flow] = None

    def _on_timer(self, flow: Flow) -> None:
        now = self._loop.now()
        if flow.connection.deadline() <= now:
            try:
                flow.connection.on_timer(now)
            except Exception as e:
                self._failed(flow, e)
        self.settle(flow)

    def bytes_moved(self) -> tuple[int, int]:
        """How many bytes were read from the guest, and how many it has acknowledged, in all flows so far."""
        connections = [flow.connection for flow in self._table.values()]
        return (
            self._bytes_from_guest + sum(connection.receive.bytes_read for connection in connections),
            self._bytes_to_guest + sum(connection.send.bytes_acked for connection in connections),
        )

    def all(self) -> list[Flow]:
        """All flows, in the order in which they were opened."""
        return list(self._table.values())
