"""The loop: timers in order and once, a heap that does not grow, exceptions, and busy polling."""

import itertools
import os
import signal
import socket
import time

import pytest

from pysplice import _cext
from pysplice.loop import MISSES_MAX, NEVER, STALE_MAX, BusyPoll, EventLoop

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


# Busy polling


def test_looks_that_find_nothing_become_rare():
    busy_poll = BusyPoll(20, adaptive=True)
    looks = []
    for turn in range(1000):
        if busy_poll.next():
            looks.append(turn)
            busy_poll.looked(False)
    assert looks[:6] == [0, 1, 4, 11, 26, 57]
    assert {b - a for a, b in itertools.pairwise(looks[7:])} == {2**MISSES_MAX - 1}


def test_one_that_finds_something_starts_again():
    busy_poll = BusyPoll(20, adaptive=True)
    for _ in range(1000):
        if busy_poll.next():
            busy_poll.looked(False)
    while not busy_poll.next():
        pass
    busy_poll.looked(True)
    assert busy_poll.next() == 20
    busy_poll.looked(False)
    assert busy_poll.next() == 20


def test_a_time_that_the_user_has_chosen_is_kept():
    busy_poll = BusyPoll(7)
    for _ in range(100):
        assert busy_poll.next() == 7
        busy_poll.looked(False)


@pytest.fixture
def hot():
    """A loop that polls busily for long enough, and three pairs of sockets."""
    failed: list[BaseException] = []
    loop = EventLoop(failed.append, BusyPoll(500_000))
    pairs = [socket.socketpair(type=socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) for _ in range(3)]
    yield loop, pairs
    loop.close()
    assert not failed
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_what_follows_soon_is_served_in_the_same_turn(hot):
    """Before a descriptor that is not hot; on a busy machine the turn may be over too soon, now and then."""
    loop, ((first, sender), (second, other), (cold, third)) = hot
    said = []

    def on_first():
        said.append(first.recv(10))
        third.send(b"cold")
        other.send(b"second")

    def on_other(sock):
        said.append(sock.recv(10))
        if len(said) == 3:
            loop.stop()

    loop.watch(cold.fileno(), lambda: on_other(cold))
    loop.watch(first.fileno(), on_first, hot=True)
    loop.watch(second.fileno(), lambda: on_other(second), hot=True)
    for _ in range(50):
        sender.send(b"first")
        loop.run((), lambda: None, lambda: None)
        if said == [b"first", b"second", b"cold"]:
            return
        said.clear()
    raise AssertionError("it never was")


def test_hot_ones_leave_the_others_their_turn(hot):
    """Whatever comes meanwhile: a descriptor that is not hot waits for a bounded time, and so does a timer."""
    loop, ((first, sender), _, (cold, third)) = hot
    said = []

    def on_first():
        said.append(loop.now())
        first.recv(10)
        sender.send(b"again")
        if loop.now() > said[0] + 10:
            loop.stop()

    def on_cold():
        said.append("cold")
        cold.recv(10)
        loop.at(loop.now() + 0.002, loop.stop)

    loop.watch(first.fileno(), on_first, hot=True)
    loop.watch(cold.fileno(), on_cold)
    sender.send(b"first")
    third.send(b"cold")
    loop.run((), lambda: None, lambda: None)
    assert "cold" in said


def test_one_that_is_watched_no_longer_is_not_called(hot):
    loop, ((first, sender), (second, other), _) = hot
    said = []

    def on_first():
        said.append("first")
        first.recv(10)
        other.send(b"for nobody")
        loop.unwatch(second.fileno())
        loop.at(loop.now() + 0.02, loop.stop)

    loop.watch(first.fileno(), on_first, hot=True)
    loop.watch(second.fileno(), lambda: said.append("second"), hot=True)
    sender.send(b"first")
    other.send(b"too late")
    loop.run((), lambda: None, lambda: None)
    assert said.count("first") == 1 and "second" not in said[said.index("first") :]


def test_bits_by_position():
    pairs = [socket.socketpair() for _ in range(8)]
    fds = tuple(ours.fileno() for ours, _ in pairs)
    assert _cext.busy_poll(fds, 0) == 0
    for n in (1, 7):
        pairs[n][1].send(b"x")
    assert _cext.busy_poll(fds, 10**6) == 1 << 1 | 1 << 7
    assert _cext.busy_poll((), 0) == 0
    with pytest.raises(ValueError):
        _cext.busy_poll((*fds, fds[0]), 0)
    with pytest.raises(TypeError):
        _cext.busy_poll(("0",), 0)
    for pair in pairs:
        for sock in pair:
            sock.close()
