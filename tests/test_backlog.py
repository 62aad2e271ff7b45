"""What waits for its turn: how much a batch begins at once, how much a turn of the loop serves, and what is lost."""

import pytest

from pysplice.backlog import AT_ONCE, TURN_MAX, TURN_SECONDS, Backlog

from .support.loops import FakeLoop


def queue(most: int = 8, takes: float = 0.0) -> tuple[Backlog, FakeLoop, list]:
    """A backlog whose items take so many seconds to serve."""
    loop, served = FakeLoop(1.0), []

    def serve(item, now):
        served.append((item, now))
        loop.time += takes

    return Backlog(loop, serve, most), loop, served


def test_a_batch_begins_its_share_at_once():
    backlog, _, _ = queue()
    assert [backlog.passes(1.0) for _ in range(AT_ONCE + 1)] == [True] * AT_ONCE + [False]
    assert backlog.passes(1.1), "the next batch has a share of its own"


def test_nothing_overtakes_what_waits():
    backlog, loop, served = queue()
    assert backlog.put("a", "A")
    assert not backlog.passes(5.0)
    loop.advance(0)
    assert served == [("A", 1.0)] and not len(backlog)
    assert backlog.passes(6.0)


def test_a_turn_is_as_long_as_it_may_be():
    backlog, loop, served = queue(most=40, takes=TURN_SECONDS / 2.5)
    for n in range(7):
        assert backlog.put(n, n)
    counts = []
    for _ in range(4):
        loop.turn()
        counts.append(len(served))
    assert counts == [3, 6, 7, 7]
    assert [item for item, _ in served] == list(range(7)), "in their order"
    assert served[0][1] == served[2][1] < served[3][1], "a turn has one time"


def test_a_turn_serves_so_many_at_most_and_one_at_least():
    backlog, loop, served = queue(most=1000)
    for n in range(TURN_MAX + 1):
        backlog.put(n, n)
    loop.turn()
    assert len(served) == TURN_MAX
    backlog, loop, served = queue(takes=1.0)
    backlog.put(1, "slow")
    loop.turn()
    assert len(served) == 1


def test_in_a_flood_a_turn_serves_one():
    backlog, loop, served = queue(most=8)
    for n in range(8):
        backlog.put(n, n)
    counts = []
    for _ in range(4):
        loop.turn()
        counts.append(len(served))
    assert counts == [1, 2, 8, 8], "until three quarters of the room are taken, and no more"


def test_what_finds_no_room_is_lost():
    backlog, _, _ = queue(most=2)
    assert backlog.put(1, "one") and not backlog.full
    assert backlog.put(2, "two") and backlog.full
    assert not backlog.put(3, "three") and backlog.get(3) is None


def test_a_repetition_takes_the_place_of_the_first():
    backlog, loop, served = queue(most=2)
    backlog.put(1, "one")
    backlog.put(2, "two")
    assert backlog.put(1, "again") and backlog.get(1) == "again" and len(backlog) == 2
    backlog.finish()
    assert [item for item, _ in served] == ["again", "two"]


def test_an_item_can_be_taken_back():
    backlog, loop, served = queue()
    backlog.put(1, "one")
    assert backlog.pop(1) == "one" and backlog.pop(2) is None
    loop.turn()
    assert not served and not len(backlog)


def test_an_item_that_raises_holds_no_other_up():
    loop, served = FakeLoop(1.0), []

    def serve(item, now):
        if item == "bad":
            raise RuntimeError
        served.append(item)

    backlog = Backlog(loop, serve, 100)
    for item in ("bad", "good"):
        backlog.put(item, item)
    with pytest.raises(RuntimeError):
        loop.turn()
    loop.turn()
    assert served == ["good"]


def test_nothing_is_served_twice():
    """A timer of an empty queue does nothing, and none is set then."""
    backlog, loop, served = queue()
    backlog.put(1, "one")
    backlog.finish()
    loop.turn()
    assert served == [("one", 1.0)] and loop.timers.next() == float("inf")
