"""What waits for its turn: the first packets of flows, and packets that cost as much.

Owns nothing.  Imports `loop`.

To open a flow takes as long as to pass on a hundred segments.  If a batch from the tap opened all the flows that it
asks for, a flood of SYNs would hold every other connection up.  So a batch begins a few, and the others wait here in
their order; each turn of the loop has a millisecond for them.  What finds no room is lost, as in any full queue on the
way; there is room for more than any program asks for at once.
"""

from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from .loop import Loop

Item = TypeVar("Item")

AT_ONCE: Final = 4  # in a batch
TURN_SECONDS: Final = 0.001
TURN_MAX: Final = 64  # items
FLOWS_MAX: Final = 4096  # that wait


class Backlog(Generic[Item]):
    """A queue of at most `most` items; `serve(item, now)` is called for some of them in each turn of the loop.

    Once three quarters of the room are taken, that is a flood, and one is served in a turn.  Times are those of
    Loop.now().  All that a batch brings has the same time.
    """

    def __init__(self, loop: Loop, serve: Callable[[Item, float], object], most: int = FLOWS_MAX) -> None:
        self._loop = loop
        self._serve = serve
        self._most = most
        self._items: dict[Hashable, Item] = {}
        self._timer = loop.timer(self.turn)
        self._at = -1.0
        self._left = 0  # may be served at once in this batch

    def __len__(self) -> int:
        return len(self._items)

    def passes(self, now: float) -> bool:
        """True if what has come need not wait: nothing does, and this batch has not begun its share yet."""
        if self._items:
            return False
        if now != self._at:
            self._at, self._left = now, AT_ONCE
        if not self._left:
            return False
        self._left -= 1
        return True

    @property
    def full(self) -> bool:
        """True if there is room for no other item."""
        return len(self._items) >= self._most

    def get(self, key: Hashable) -> Item | None:
        """The item with this key that waits, or None."""
        return self._items.get(key)

    def put(self, key: Hashable, item: Item) -> bool:
        """Have an item wait, in the place of one with the same key; False if there is no room for it."""
        if key not in self._items:
            if self.full:
                return False
            self._timer.by(self._loop.now())
        self._items[key] = item
        return True

    def pop(self, key: Hashable) -> Item | None:
        """The item with this key, which waits no longer; None if there is none."""
        return self._items.pop(key, None)

    def turn(self) -> None:
        """Serve some of what waits."""
        now = self._loop.now()
        until = now + TURN_SECONDS
        try:
            for _ in range(1 if 4 * len(self._items) > 3 * self._most else TURN_MAX):
                if not self._items:
                    break
                self._serve_first(now)
                if self._loop.now() >= until:
                    break
        finally:
            if self._items:
                self._timer.by(now)

    def _serve_first(self, now: float) -> None:
        self._serve(self._items.pop(next(iter(self._items))), now)

    def finish(self) -> None:
        """Serve all that waits: nothing comes after it."""
        while self._items:
            self._serve_first(self._loop.now())
