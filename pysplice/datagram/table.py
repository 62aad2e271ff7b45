"""Flows by key, in the order of their last use, with a share for each direction.

Owns the table.  Imports `loop`; time is given to it.

The side that sends first decides about a flow's share: datagrams from other hosts to the guest's ports take no room
away from the flows that the guest begins, and the other way round.  Within a share a flow that was never answered
gives way first, so a flood from ever-changing sources cannot end a conversation.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

from ..loop import NEVER

OUTBOUND, INBOUND, SPLICED = range(3)  # shares
SHARES: Final = 3


class Expiring:
    """What the table has to know about a flow: its share, when it was used last, and whether it was answered."""

    __slots__ = ("answered", "closed", "forgotten", "key", "share", "used")

    def __init__(self, key: bytes, now: float, share: int = OUTBOUND) -> None:
        self.key = key
        self.share = share
        self.used = now
        self.answered = False
        self.closed = False
        self.forgotten: Callable[[Any], None] | None = None  # called with the flow when it ends

    def close(self) -> None:
        """End the flow."""
        self.closed = True
        if self.forgotten is not None:
            self.forgotten(self)


Flow = TypeVar("Flow", bound=Expiring)


class Table(Generic[Flow]):
    """At most `most` flows of each share.

    A flow is closed `timeout` seconds after its last use, or `dialogue` seconds if it was answered.
    """

    def __init__(self, most: int | tuple[int, ...], timeout: float, dialogue: float) -> None:
        self._flows: dict[bytes, Flow] = {}
        self.most = [max(n, 1) for n in ((most,) * SHARES if isinstance(most, int) else most)]
        # By share, and by whether they were answered; the least recently used flow first
        self._orders: list[tuple[OrderedDict[bytes, Flow], OrderedDict[bytes, Flow]]] = [
            (OrderedDict(), OrderedDict()) for _ in self.most
        ]
        self._timeout = timeout
        self._dialogue = max(dialogue, timeout)
        self.opened = 0
        self.evicted = 0
        self.get = self._flows.get

    def __len__(self) -> int:
        return len(self._flows)

    def of_share(self, share: int) -> int:
        """How many flows there are of a share."""
        return sum(map(len, self._orders[share]))

    def add(self, flow: Flow) -> None:
        """Add a flow; if its share is used up, another flow of that share gives way."""
        if self.of_share(flow.share) >= self.most[flow.share]:
            self.evict(flow.share)
        self._flows[flow.key] = flow
        self._orders[flow.share][flow.answered][flow.key] = flow
        self.opened += 1

    def oldest(self, share: int) -> Flow | None:
        """The flow of a share that gives way first, or None."""
        for order in self._orders[share]:
            for flow in order.values():
                return flow
        return None

    def unanswered(self, share: int) -> Iterator[Flow]:
        """The flows of a share that were never answered, the least recently used first."""
        return iter(self._orders[share][False].values())

    def evict(self, share: int) -> bool:
        """Close the flow of a share that gives way first; False if there is none."""
        flow = self.oldest(share)
        if flow is None:
            return False
        self.remove(flow)
        self.evicted += 1
        return True

    def touch(self, flow: Flow, now: float) -> None:
        """The flow was used by the side that has begun it."""
        flow.used = now
        order = self._orders[flow.share][flow.answered]
        if flow.key in order:
            order.move_to_end(flow.key)

    def answer(self, flow: Flow, now: float) -> None:
        """The flow was used by the other side."""
        if not flow.answered:
            unanswered, answered = self._orders[flow.share]
            flow.answered = True
            if unanswered.pop(flow.key, None) is not None:
                answered[flow.key] = flow
        self.touch(flow, now)

    def remove(self, flow: Flow) -> None:
        """Close a flow."""
        if self._flows.get(flow.key) is flow:
            del self._flows[flow.key]
            self._orders[flow.share][flow.answered].pop(flow.key, None)
        if not flow.closed:
            flow.close()

    def expire(self, now: float) -> float:
        """Close the flows that have timed out; when to look again, `NEVER` if there are none left."""
        soonest = NEVER
        for orders in self._orders:
            for order, timeout in zip(orders, (self._timeout, self._dialogue), strict=True):
                while order:
                    oldest = next(iter(order.values()))
                    at = oldest.used + timeout
                    if at > now:
                        soonest = min(soonest, at)
                        break
                    self.remove(oldest)
        return soonest

    def __iter__(self) -> Iterator[Flow]:
        return iter(list(self._flows.values()))

    def close(self) -> None:
        """Close all flows."""
        for flow in self:
            self.remove(flow)
