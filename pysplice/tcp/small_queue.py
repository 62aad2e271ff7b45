"""Small queues: what each connection may have unread in the ring of the tap.

Owns the estimates of one tap and its list of throttled connections.  It knows no clock and no device: time and runs are
fed to it.  Imports no other room.

The kernel bounds what a socket may have in the queues below it (TCP small queues, tcp_small_queue_check()), by
its memory.  skb_orphan() takes that memory off the socket's account.  tun calls it in its transmit path, so behind a
tap the guest's kernel is blind.  Only the reader of the ring can do the job, and the window is its tool: the right
edge may lie only so far beyond what was read.
"""

from collections.abc import Iterable
from typing import Final, Protocol

# A connection counts as queueing for one to two of these periods, seconds
QUEUEING_PERIOD: Final = 0.1

# A connection that sends small messages makes the others keep their queues short for this long after each, seconds
TALKING_SECONDS: Final = 1.0

# How much may wait before another connection's small message, as the time that it takes to be read.  The kernel
# allows a socket a millisecond at its pacing rate (sk_pacing_shift).  Here one process reads everything that is
# ahead in the ring, and it competes with the senders and the receivers for the processor, which multiplies the
# time.
QUEUE_SECONDS: Final = 1 / 8192

# What a connection may have unread before it has shown what its frames carry, bytes: about what a TCP stack sends at
# first (RFC 6928), and even in tiny frames few enough for many connections.  A window cannot be taken back.
FIRST_BYTES: Final = 16 * 1024

# A single frame with less than this is part of a conversation, and shows nothing
FRAME_BYTES_SMALL: Final = 1024

# The largest frame; a bulk sender is always left with two of them
LARGE: Final = 64 * 1024

# Batches below this say little about how fast the ring is read
RATE_BYTES_MIN: Final = 64 * 1024

# How many frames a connection that is resumed is assumed to put into the ring, at most
RESUMED_FRAMES: Final = 512

# How long a throttled connection has to be quiet before it is resumed, seconds: while the ring is empty, and while it
# holds frames of others, behind which its own may be
RESUME_AFTER: Final = 0.001
RESUME_AFTER_BUSY: Final = 0.01


def share(ring: int, active: int) -> int:
    """What one of `active` connections may have in a ring of `ring` frames, frames.

    Half of the ring is shared out.  The rest is for frames that no window bounds, and for windows that were advertised
    while fewer connections shared the ring.  At least two frames, as the kernel leaves a socket two segments.
    """
    return max(ring // 2 // max(active, 1), 2)


def bytes_per_frame(before: int, length: int, frames: int) -> int:
    """What a connection's frames carry, after `frames` more with `length` bytes in all; 0: not shown yet.

    Small frames count at once, large ones only if they persist.  A single small frame says nothing: no frame waits
    behind it.
    """
    mean = max(length // frames, 1)
    if frames == 1 and mean < (before or FRAME_BYTES_SMALL):
        return before
    if not before:
        return mean
    return min(mean, before + (mean - before) // 8 + 1)


def patience(rate: float, active: int, segment: int) -> int:
    """What one of `active` bulk senders may have unread while others wait behind it, bytes.

    `rate`: how fast the ring is read, bytes a second.  At least two segments of `segment` bytes.
    """
    return max(int(rate * QUEUE_SECONDS) // max(active, 1), 2 * segment)


class Seen(Protocol):
    """The part of a run that is used here (see doors.Run, and the flow key)."""

    @property
    def key(self) -> bytes: ...
    @property
    def length(self) -> int: ...
    @property
    def frames(self) -> int: ...


class Reading(Protocol):
    """The part of the receiving half of a connection that is used here."""

    seq_from_tap: int
    mss: int
    frame_bytes: int
    starved: bool


class Resumable(Protocol):
    """The part of a connection that is used here."""

    @property
    def receive(self) -> Reading: ...

    def resume(self) -> None: ...


class Recent:
    """Keys that were named within the last one to two periods; len() counts them."""

    __slots__ = ("_before", "_count", "_now", "_period", "_until")

    def __init__(self, period: float) -> None:
        self._period = period
        self._until = 0.0
        self._now: set[bytes] = set()
        self._before: set[bytes] = set()
        self._count = 0

    def turn(self, now: float) -> None:
        """Forget what is older."""
        if now >= self._until:
            self._before = self._now if now < self._until + self._period else set()
            self._now = set()
            self._count = len(self._before)
            self._until = now + self._period

    def add(self, key: bytes) -> None:
        if key not in self._now:
            self._now.add(key)
            self._count += key not in self._before

    def __contains__(self, key: bytes) -> bool:
        return key in self._now or key in self._before

    def __len__(self) -> int:
        return self._count


class SmallQueue:
    """What all connections of one tap are held to; they share it.

    `ring`: how many frames the tap holds.  `segment`: the largest payload of a frame, bytes.  `limit`: the user's bound
    (`--limit-output`), bytes; 0: none at all; None: work it out.

    A connection may have `frames` frames unread, of the size that it has sent so far, and `budget` bytes; 0: no bound.
    `throttled`: connections that this has left with too little, in order, each with what had been read of it and when.
    """

    __slots__ = (
        "_exhausted",
        "_granted",
        "_granted_until",
        "_limit",
        "_now",
        "_queueing",
        "_ring",
        "_segment",
        "_talker",
        "_talking_until",
        "budget",
        "frames",
        "rate",
        "throttled",
    )

    def __init__(self, ring: int = 0, segment: int = LARGE, limit: int | None = 0) -> None:
        self._ring = ring
        self._segment = min(segment, LARGE)
        self._limit = limit
        self._queueing = Recent(QUEUEING_PERIOD)
        self._talker = b""
        self._talking_until = 0.0
        self.rate = 0.0
        self._now = 0.0
        self._granted = 0  # frames that may come from the connections that were resumed within a period
        self._granted_until = 0.0
        self._exhausted = False
        self.throttled: dict[Resumable, tuple[int, float]] = {}
        self.budget = limit or 0
        self.frames = share(ring, 1) if limit is None else 0

    @property
    def watching(self) -> bool:
        """True if the bounds follow what is observed."""
        return self._limit is None

    def seen(self, runs: Iterable[Seen], now: float) -> None:
        """A batch was read at `now`: find out which connections share the ring."""
        self._now = now
        if not self.watching:
            return
        queueing = self._queueing
        queueing.turn(now)
        large = self._segment // 2
        for run in runs:
            length = run.length
            if not length:
                continue
            # A single small frame is a conversation; two at a time, or a large one, are a queue
            if run.frames > 1 or length >= large:
                queueing.add(run.key)
            elif run.key not in queueing:
                self._talker = run.key
                self._talking_until = now + TALKING_SECONDS
        active = len(queueing)
        self.frames = share(self._ring, active)
        # A talker that has itself begun to queue no longer counts
        others = active and now < self._talking_until and self._talker not in queueing
        self.budget = patience(self.rate, active, self._segment) if others and self.rate else 0

    def served(self, total: int, seconds: float) -> None:
        """A batch of `total` bytes of payload took `seconds` to be read and passed on."""
        if total >= RATE_BYTES_MIN and seconds > 0:
            rate = total / seconds
            self.rate += (rate - self.rate) / 16 if self.rate else rate

    def bound(self, room: int, frame_bytes: int) -> int:
        """What is left of `room` for a connection whose frames carry `frame_bytes`."""
        if self.budget and room > self.budget:
            room = self.budget
        if self.frames:
            most = self.frames * frame_bytes if frame_bytes else FIRST_BYTES
            if room > most:
                room = most
        return room

    def throttle(self, connection: Resumable) -> None:
        """A connection was left with less than a segment, and may stop: it is to be resumed."""
        connection.receive.starved = False
        self.throttled[connection] = (connection.receive.seq_from_tap, self._now)

    def resume_after(self, now: float) -> float:
        """How long to wait before resume() is called again, seconds."""
        return max(self._granted_until - now, RESUME_AFTER) if self._exhausted else RESUME_AFTER

    def resume(self, now: float, empty: bool) -> Iterable[Resumable]:
        """The connections that are to be resumed with a segment's room; those that went on by themselves wait.

        `empty`: the ring holds nothing.  They come in order, and within a period no more than would fill a
        quarter of the ring if each used its room for frames as small as before.  tcp_tsq_handler() does the
        same for the sockets on the list of TSQ.
        """
        if now >= self._granted_until:
            self._granted_until = now + QUEUEING_PERIOD
            self._granted = 0
        since = now - (RESUME_AFTER if empty else RESUME_AFTER_BUSY)
        waiting, self.throttled = self.throttled, {}
        self._exhausted = False
        for connection, (seq, at) in waiting.items():
            receive = connection.receive
            frames = min(receive.mss // (receive.frame_bytes or FRAME_BYTES_SMALL) + 1, RESUMED_FRAMES)
            if receive.seq_from_tap != seq:
                self.throttled[connection] = (receive.seq_from_tap, now)
            elif at > since:
                self.throttled[connection] = (seq, at)
            elif self._granted and self._granted + frames > self._ring // 4:
                self._exhausted = True
                self.throttled[connection] = (seq, at)
            else:
                self._granted += frames
                yield connection
