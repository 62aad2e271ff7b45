"""Small queues: what each connection may have unread in the ring of the tap.

Owns the estimate of one tap and its list of throttled connections; knows no clock and no device: time and
runs are fed to it.  Imports nothing.

The kernel bounds what a socket may have in the queues below it (TCP small queues, tcp_small_queue_check()),
by memory that skb_orphan() takes off its account.  tun calls that in its transmit path, so behind a tap the
guest's kernel is blind.  Whoever reads the ring is the only one who can do the job, and the window is the
means: its right edge is bounded by how far it may be beyond what was read.
"""

from collections.abc import Iterable
from typing import Protocol

# A connection counts as queueing for one to two of these periods, seconds
QUEUEING_PERIOD = 0.1

# And as talking, which asks the others to be brief, for so long after a small message, seconds
TALKING_SECONDS = 1.0

# What waits before somebody else's small message, in the time that it takes to be read.  The kernel allows
# a socket a millisecond at its pacing rate (sk_pacing_shift); here all that is ahead in the ring is read by one
# process which the sender, the receiver and the other one compete with, and that multiplies.
QUEUE_SECONDS = 1 / 8192

# What a connection may have unread before it has shown what its frames carry, bytes: about what a TCP sends at
# first (RFC 6928), and in tiny frames still few enough for many of them.  A window cannot be taken back.
FIRST_BYTES = 16 * 1024

# A frame by itself with less than this is a conversation, and shows nothing
FRAME_BYTES_SMALL = 1024

# The largest frame; two of them are the least that a bulk sender is left with
LARGE = 64 * 1024

# Batches below this say little about how fast the ring is read
RATE_BYTES_MIN = 64 * 1024

# What one connection that is resumed is taken to put into the ring at most, frames
RESUMED_FRAMES = 512

# How long a throttled connection has to be quiet before it is resumed, seconds: with the ring empty, and with
# others in it, when what it has sent may be behind theirs
RESUME_AFTER = 0.001
RESUME_AFTER_BUSY = 0.01


def share(ring: int, active: int) -> int:
    """What one of `active` connections may have in a ring of `ring` frames, frames.

    Half of the ring is shared out; the rest is for what no window bounds, and for windows that were said
    when fewer shared it.  At least two, as the kernel leaves a socket two segments.
    """
    return max(ring // 2 // max(active, 1), 2)


def bytes_per_frame(before: int, length: int, frames: int) -> int:
    """What a connection's frames carry, after `frames` more with `length` bytes in all; 0: not shown yet.

    Small ones count at once, large ones have to last.  A small one by itself says nothing: nobody waits
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
    """What is asked of a run (see doors.Run)."""

    @property
    def key(self) -> bytes: ...
    @property
    def length(self) -> int: ...
    @property
    def frames(self) -> int: ...


class Reading(Protocol):
    """What is asked of the receiving half of a connection."""

    seq_from_tap: int
    mss: int
    frame_bytes: int


class Resumable(Protocol):
    """What is asked of a connection."""

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

    `ring`: frames that the tap holds.  `segment`: the largest payload of a frame, bytes.  `limit`: a bound
    that somebody chose, bytes; 0 for none at all, None to find it out (`--limit-output`).

    A connection may have `frames` frames unread, of the size that its own have had, and `budget` bytes; 0 for
    no bound.  `throttled`: connections that this left with too little, in order, with what had been read of
    each and when.
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
        self._granted = 0  # frames that may come of what resume() gave back within a period
        self._granted_until = 0.0
        self._exhausted = False
        self.throttled: dict[Resumable, tuple[int, float]] = {}
        self.budget = limit or 0
        self.frames = share(ring, 1) if limit is None else 0

    @property
    def watching(self) -> bool:
        """True if the bounds follow what is seen."""
        return self._limit is None

    def seen(self, runs: Iterable[Seen], now: float) -> None:
        """A batch was read: who shares the ring."""
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
            # A small frame by itself is a conversation; two at a time, or a large one, are a queue
            if run.frames > 1 or length >= large:
                queueing.add(run.key)
            elif run.key not in queueing:
                self._talker = run.key
                self._talking_until = now + TALKING_SECONDS
        active = len(queueing)
        self.frames = share(self._ring, active)
        # Who talked first and queues now was no other
        others = active and now < self._talking_until and self._talker not in queueing
        self.budget = patience(self.rate, active, self._segment) if others and self.rate else 0

    def served(self, total: int, seconds: float) -> None:
        """A batch of `total` bytes of payload took so long to be read and passed on."""
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
        """It was left with too little: it is to be resumed."""
        self.throttled[connection] = (connection.receive.seq_from_tap, self._now)

    def resume_after(self, now: float) -> float:
        """How long to wait before resume() is asked again, seconds."""
        return max(self._granted_until - now, RESUME_AFTER) if self._exhausted else RESUME_AFTER

    def resume(self, now: float, empty: bool) -> Iterable[Resumable]:
        """Connections to be resumed with a segment's room; those that went on by themselves wait.

        `empty`: nothing is in the ring.  In order, and within a period no more than a quarter of the ring takes
        if each of them fills its room with frames as small as it had.  tcp_tsq_handler() does as much for the
        sockets on the list of TSQ.
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
