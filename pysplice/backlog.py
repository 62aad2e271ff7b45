"""What waits for its turn: the first packets of flows, and frames that cost as much.

Owns nothing.  Imports `loop`.

To open a flow takes as long as to pass on a hundred segments.  If a batch from the tap opened all the flows that it
asks for, a flood of SYNs would hold every other connection up.  So a batch begins a few, and the others wait here in
their order, a few for each turn of the loop.  What finds no room is lost, as in any full queue on the way.
"""

from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from .loop import Loop

Item = TypeVar("Item")

FLOWS_PER_TURN: Final = 4
FLOWS_MAX: Final = 256  # that wait


class Backlog(Generic[Item]):
    """A queue of at most `most` items; `serve(item, now)` is called for `per_turn` of them in each turn of the loop.

    Once more than a quarter of the room is taken, that is a flood, and one is served in a turn.  Times are those of
    Loop.now().  All that a batch brings has the same time.
    """

    def __init__(
        self, loop: Loop, serve: Callable[[Item, float], object], per_turn: int, most: int
    ) -> None:
        self._loop = loop
        self._serve = serve
        self._per_turn = per_turn
        self._most = most
        self._items: dict[Hashable, Item] = {}
        self._timer = loop.timer(self._turn)
        self._at = -1.0
        self._left = 0  # may be served at once in this batch

    def __len__(self) -> int:
        return len(self._items)

    def passes(self, now: float) -> bool:
        """True if what has come need not wait: nothing does, and this batch has not begun its share yet."""
        if self._items:
            return False
        if now != self._at:
            self._at, self._left = now, self._per_turn
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

    def remove(self, key: Hashable) -> None:
        """Forget an item, if there is one with this key."""
        self._items.pop(key, None)

    def _turn(self) -> None:
        now = self._loop.now()
        try:
            flood = len(self._items) > self._most // 4
            for _ in range(1 if flood else min(self._per_turn, len(self._items))):
                self._serve_first(now)
        finally:
            if self._items:
                self._timer.by(now)

    def _serve_first(self, now: float) -> None:
        self._serve(self._items.pop(next(iter(self._items))), now)

    def finish(self) -> None:
        """Serve all that waits: nothing comes after it."""
        while self._items:
            self._serve_first(self._loop.now())
