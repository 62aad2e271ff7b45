"""A loop for tests: its clock stands still until it is moved, and it looks at descriptors when it is told to."""

import select
import signal

from pysplice.loop import Timer, Timers


class FakeLoop:
    """The Loop of pysplice/loop.py, driven by hand; `time` is its clock, seconds."""

    def __init__(self, time: float = 100.0) -> None:
        self.time = time
        self.timers = Timers(lambda when: None)
        self.watched: dict = {}
        self.stopped = False
        self.on_signal = lambda: None
        self.script = lambda: None  # what happens while run() runs

    def now(self) -> float:
        return self.time

    def watch(self, fd, call, hot=False) -> None:
        self.watched[fd] = call

    def unwatch(self, fd):
        return self.watched.pop(fd, None) is not None

    def timer(self, call) -> Timer:
        return Timer(self.timers, call)

    def at(self, when, call) -> Timer:
        timer = self.timer(call)
        timer.by(when)
        return timer

    def turn(self, wait: float = 0.0) -> int:
        """Call for every readable descriptor, waiting at most this many real seconds; returns how many it called."""
        poll = select.poll()
        for fd in self.watched:
            poll.register(fd, select.POLLIN)
        ready = poll.poll(wait * 1000)
        for fd, _ in ready:
            call = self.watched.get(fd)
            if call is not None:
                call()
        self.timers.expire(self.time)
        return len(ready)

    def settle(self) -> None:
        """Turn until nothing is readable."""
        for _ in range(1000):
            if not self.turn(0.02):
                return
        raise AssertionError("the loop does not come to rest")

    def advance(self, seconds: float) -> None:
        """Let time pass, making the calls that are due on the way."""
        until = self.time + seconds
        while self.timers.next() <= until:
            self.time = max(self.time, self.timers.next())
            self.timers.expire(self.time)
        self.time = until

    def run(self, signals, on_signal, started) -> None:
        assert set(signals) == {signal.SIGTERM, signal.SIGQUIT}
        self.on_signal = on_signal
        started()
        self.script()

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.watched.clear()
