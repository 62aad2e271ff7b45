"""The event loop: readable descriptors, and one heap of timers.

Owns the uvloop event loop; no other room uses uvloop or keeps a timer of its own.  Imports `_cext`.

Rooms depend on `Loop`, a small interface; tests drive them with a loop whose clock stands still until a test moves it.
Times are seconds of a clock that never goes back.
"""

# system calls (serve): eventfd2 socketpair signalfd4 epoll_create1 rt_sigprocmask rt_sigaction

import heapq
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import uvloop

from . import _cext

NEVER: Final = float("inf")

# libuv counts in whole milliseconds.  A delay is rounded up to these, unless it lies so little above one.
TICK, TOLERANCE = 0.001, 0.05

STALE_MAX: Final = 64  # entries of the heap

# Busy polling: microseconds; how often in a row nothing was found, which bounds the turns that go without; and for
# how long other descriptors and timers wait, seconds
BUSY_POLL_AUTO: Final = 20
MISSES_MAX: Final = 6
BUSY_MAX: Final = 0.001

Call = Callable[[], object]


class Timer:
    """A call that is due at `when`, once; `NEVER` while it is not set.  Made by Loop.timer() and Loop.at()."""

    __slots__ = ("_timers", "call", "when")

    def __init__(self, timers: "Timers", call: Call) -> None:
        self._timers = timers
        self.call = call
        self.when = NEVER

    def by(self, when: float) -> None:
        """Have the call made at `when` at the latest: a timer that is due sooner stays as it is."""
        if when < self.when:
            self._timers.stale += self.when != NEVER
            self.when = when
            self._timers.push(self)

    def cancel(self) -> None:
        """Do not make the call; the timer can be set again."""
        self._timers.stale += self.when != NEVER
        self.when = NEVER


class Timers:
    """A heap of timers.  `changed(when)` is called when the first of them is due sooner than before.

    An entry of a timer that was cancelled or set anew stays in the heap, `stale`, until its time comes or until such
    entries are the larger part.
    """

    def __init__(self, changed: Callable[[float], object]) -> None:
        self._changed = changed
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self.stale = 0

    def push(self, timer: Timer) -> None:
        """Called by a Timer that was set."""
        if self.stale > STALE_MAX and self.stale > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[2].when == entry[0]]
            heapq.heapify(self._heap)
            self.stale = 0
        heap = self._heap
        first = heap[0][0] if heap else NEVER
        heapq.heappush(heap, (timer.when, next(self._order), timer))
        if timer.when < first:
            self._changed(timer.when)

    def next(self) -> float:
        """When the first timer is due, or `NEVER`."""
        heap = self._heap
        while heap and heap[0][2].when != heap[0][0]:
            heapq.heappop(heap)
            self.stale -= 1
        return heap[0][0] if heap else NEVER

    def expire(self, now: float) -> None:
        """Make the calls that are due, in their order.  A timer that one of them sets waits for the next time."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap))
        for n, (when, _, timer) in enumerate(due):
            if timer.when != when:
                self.stale -= 1
                continue
            timer.when = NEVER
            try:
                timer.call()
            except BaseException:
                # The others are due all the same
                for entry in due[n + 1 :]:
                    heapq.heappush(self._heap, entry)
                raise


class Loop(Protocol):
    """What rooms may ask of the loop."""

    def now(self) -> float:
        """Seconds of a clock that never goes back."""

    def watch(self, fd: int, call: Call, hot: bool = False) -> None:
        """Call whenever a descriptor is readable, from now on.

        `hot`: messages may follow each other within microseconds, and the call does not wait if there is none.
        """

    def unwatch(self, fd: int) -> object:
        """Watch a descriptor no longer."""

    def timer(self, call: Call) -> Timer:
        """A timer that is not set yet."""

    def at(self, when: float, call: Call) -> Timer:
        """Call once at `when`, or as soon as possible if that has passed."""


class MainLoop(Loop, Protocol):
    """What the owner of the loop may ask beside that."""

    def run(self, signals: Iterable[signal.Signals], on_signal: Call, started: Call) -> None:
        """Serve until stop().  `on_signal` is called for each of `signals`, `started` once when the loop runs."""

    def stop(self) -> None:
        """Have run() return."""

    def close(self) -> None:
        """Give everything back."""


class BusyPoll:
    """For how long to look for more on hot descriptors before the loop sleeps, `time` microseconds at most.

    To be woken costs more than a look of this length, for us and for the program that wakes us.  A look that finds
    nothing wastes it: if it is `adaptive`, each of several in a row doubles the number of turns that go without.
    """

    def __init__(self, time: int, adaptive: bool = False) -> None:
        self._time = time
        self._adaptive = adaptive
        self._misses = 0
        self._pause = 0  # turns

    def next(self) -> int:
        """Microseconds to look for now; 0: go to sleep."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._time

    def looked(self, found: bool) -> None:
        """A look has found something, or nothing."""
        if found:
            self._misses = 0
        elif self._adaptive:
            self._misses = min(self._misses + 1, MISSES_MAX)
            self._pause = (1 << self._misses) - 2


class EventLoop:
    """The MainLoop that serves.  `failed` is told about an exception that a call has raised; the loop goes on."""

    def __init__(
        self, failed: Callable[[BaseException], object], busy_poll: BusyPoll | None = None
    ) -> None:
        self._loop: Any = uvloop.new_event_loop()
        self._timers = Timers(self._arm)
        self._failed = failed
        self._busy_poll = busy_poll
        self._hot: dict[int, Call] = {}
        self._hot_fds: tuple[int, ...] = ()
        self._handle: Any = None
        self._armed = NEVER
        self.now = time.monotonic
        self._loop.set_exception_handler(self._on_exception)

    def _on_exception(self, _: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self._failed(error if error is not None else RuntimeError(context.get("message", "")))

    def watch(self, fd: int, call: Call, hot: bool = False) -> None:
        if hot and self._busy_poll is not None:
            self._hot[fd] = call
            self._hot_fds = tuple(self._hot)
            self._loop.add_reader(fd, self._on_hot, call)
        else:
            self._loop.add_reader(fd, call)

    def unwatch(self, fd: int) -> bool:
        if self._hot.pop(fd, None) is not None:
            self._hot_fds = tuple(self._hot)
        return bool(self._loop.remove_reader(fd))

    def _on_hot(self, call: Call) -> None:
        """A hot descriptor is readable: serve it, and what becomes readable soon after."""
        call()
        busy_poll = self._busy_poll
        if busy_poll is None:
            return
        time_ = busy_poll.next()
        until = min(time.monotonic() + BUSY_MAX, self._armed)
        while time_ and time.monotonic() < until:
            fds = self._hot_fds
            ready = _cext.busy_poll(fds, time_)
            busy_poll.looked(ready != 0)
            if not ready:
                break
            for n, fd in enumerate(fds):
                if ready >> n & 1 and fd in self._hot:
                    self._hot[fd]()

    def timer(self, call: Call) -> Timer:
        return Timer(self._timers, call)

    def at(self, when: float, call: Call) -> Timer:
        timer = Timer(self._timers, call)
        timer.by(when)
        return timer

    def _arm(self, when: float) -> None:
        if when < self._armed:
            if self._handle is not None:
                self._handle.cancel()
            self._armed = when
            ticks = math.ceil((when - time.monotonic()) / TICK - TOLERANCE)
            self._handle = self._loop.call_later(max(ticks, 0) * TICK, self._expire)

    def _expire(self) -> None:
        self._handle, self._armed = None, NEVER
        try:
            self._timers.expire(time.monotonic())
        finally:
            when = self._timers.next()
            if when != NEVER:
                self._arm(when)

    def run(self, signals: Iterable[signal.Signals], on_signal: Call, started: Call) -> None:
        signals = set(signals)
        # A signal that comes before the loop runs would be lost in it
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        for number in signals:
            self._loop.add_signal_handler(number, on_signal)
        self._loop.call_soon(signal.pthread_sigmask, signal.SIG_UNBLOCK, signals)
        self._loop.call_soon(started)
        self._loop.run_forever()

    def stop(self) -> None:
        self._loop.stop()

    def close(self) -> None:
        self._loop.close()
