"""The account of a window: which numbers it came from and which rule decided, for the trace.

Pure.  Imports the files of this room.
"""

from collections.abc import Callable
from typing import Any, Protocol

from . import seq, window
from .doors import SocketFacts
from .small_queue import SmallQueue

Account = Callable[[dict[str, Any]], None]


class Reader(Protocol):
    """What the account reads of the receiving half of a connection."""

    irs: int
    seq_from_tap: int
    ws_to_tap: int
    mss: int
    kept: int
    short_bytes: int
    frame_bytes: int


def account(
    receive: Reader,
    queue: SmallQueue,
    estimate: window.Estimator,
    facts: SocketFacts | None,
    left: int,
    room: int,
    advertised: int,
    initial: bool,
) -> dict[str, Any]:
    """How a window came about, bytes; `read` counts from the guest's SYN, modulo 2**32.

    `facts` are those of the host socket, None where they were not read.  `by` is the rule that decided:

    - `estimate`, `silly`, `writable`: see window.bounds();
    - `queue`: the small queue;
    - `edge`: the right edge does not move left, and not at all after the guest's FIN;
    - `kept`: it does not move while bytes are kept;
    - `field`: the scale cannot express more;
    - `initial`: select_initial_window().
    """
    field_max = window.WINDOW_FIELD_MAX << receive.ws_to_tap
    lines: dict[str, Any] = {
        "window": advertised,
        "by": "kept" if receive.kept else "edge",
        "read": seq.add(receive.seq_from_tap, -receive.irs),
        "left": left,
        "kept": receive.kept,
        "short": receive.short_bytes,
        "budget": queue.budget,
        "budget_frames": queue.frames,
        "frame_bytes": receive.frame_bytes,
        "field_max": field_max,
    }
    if facts is not None:
        lines |= {name: getattr(facts, name) for name in SocketFacts._fields}
        lines["mss"] = receive.mss
        lines |= window.bounds(facts, receive.mss, estimate)
        if room > lines["room"]:
            lines["by"] = "edge"
        elif room < lines["room"]:
            lines["by"] = "initial" if initial else "queue"
    if room > field_max:
        lines["by"] = "field"
    return lines
