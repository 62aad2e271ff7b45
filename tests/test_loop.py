"""The loop: timers in order and once, a heap that does not grow, and a loop that goes on after an exception."""

import os
import signal
import time

import pytest

from pysplice.loop import NEVER, STALE_MAX, EventLoop

from .support.loops import FakeLoop


def test_timers_fire_in_order_and_once():
    loop, fired = FakeLoop(0.0), []
    loop.at(2.0, lambda: fired.append((2, loop.now())))
    loop.at(1.0, lambda: fired.append((1, loop.now())))
    again = loop.timer(lambda: fired.append(("again", loop.now())))
    again.by(3.0)
    again.by(1.5)
    again.by(2.5)  # later: it stays as it is
    loop.advance(10)
    assert fired == [(1, 1.0), ("again", 1.5), (2, 2.0)]
    assert loop.timers.next() == NEVER


def test_a_timer_that_is_cancelled_can_be_set_again():
    loop, fired = FakeLoop(0.0), []
    timer = loop.timer(lambda: fired.append(loop.now()))
    timer.by(1.0)
    timer.cancel()
    assert loop.timers.next() == NEVER
    timer.by(1.0)
    loop.advance(2)
    assert fired == [1.0]


def test_a_timer_that_is_set_by_a_call_waits():
    """A call that asks for the next turn lets everything else have its turn first."""
    loop, order = FakeLoop(0.0), []

    def again() -> None:
        order.append("first")
        timer.by(loop.now())

    timer = loop.timer(again)
    timer.by(0.0)
    loop.at(0.0, lambda: order.append("other"))
    loop.timers.expire(0.0)
    assert order == ["first", "other"]
    loop.timers.expire(0.0)
    assert order == ["first", "other", "first"]


def test_the_heap_does_not_grow():
    loop = FakeLoop(0.0)
    timer = loop.timer(lambda: None)
    kept = [loop.at(1000.0 + n, lambda: None) for n in range(10)]
    for n in range(10_000):
        timer.by(500.0 - n / 1000)
        timer.cancel()
    assert len(loop.timers._heap) <= 2 * STALE_MAX + len(kept) + 1
    assert loop.timers.next() == 1000.0


@pytest.fixture
def real():
    failed: list[BaseException] = []
    loop = EventLoop(failed.append)
    yield loop, failed
    loop.close()


def test_the_real_loop_goes_on_after_an_exception(real):
    loop, failed = real
    fired = []

    def fail():
        fired.append("failed")
        raise RuntimeError("once")

    loop.at(0.0, fail)
    loop.at(0.0, lambda: fired.append("at the same time"))
    loop.at(loop.now() + 0.01, lambda: fired.append("later"))
    loop.at(loop.now() + 0.02, loop.stop)
    loop.run((), lambda: None, lambda: None)
    assert fired == ["failed", "at the same time", "later"] and [str(e) for e in failed] == ["once"]


@pytest.mark.pure
def test_the_real_loop_is_never_early_and_not_busy(real):
    """A timer is due at its time or later, and until then the loop sleeps."""
    loop, _ = real
    begun, fired = loop.now(), []
    wakeups = 0
    expire = loop._timers.expire

    def count(now):
        nonlocal wakeups
        wakeups += 1
        expire(now)

    loop._timers.expire = count
    for n in range(1, 11):
        loop.at(begun + n * 0.0107, lambda n=n: fired.append(loop.now() - begun - n * 0.0107))
    loop.at(begun + 0.15, loop.stop)
    loop.run((), lambda: None, lambda: None)
    assert len(fired) == 10 and min(fired) >= 0
    assert wakeups <= 3 * 11


def test_the_real_loop_watches_and_hears_signals(real):
    loop, _ = real
    readable, writable = os.pipe()
    got = []
    loop.watch(readable, lambda: (got.append(os.read(readable, 1)), loop.unwatch(readable)))
    os.write(writable, b"x")
    loop.at(loop.now() + 0.05, lambda: os.kill(os.getpid(), signal.SIGQUIT))
    before = time.monotonic()
    loop.run((signal.SIGQUIT,), lambda: (got.append("signal"), loop.stop()), lambda: None)
    assert got == [b"x", "signal"] and time.monotonic() >= before
    for fd in (readable, writable):
        os.close(fd)
