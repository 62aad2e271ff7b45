"""What waits for its turn: how much a batch begins at once, how much a turn of the loop serves, and what is lost."""

import pytest

from pysplice.backlog import Backlog

from .support.loops import FakeLoop


def queue(per_turn: int = 2, most: int = 8) -> tuple[Backlog, FakeLoop, list]:
    loop, served = FakeLoop(1.0), []
    return Backlog(loop, lambda item, now: served.append((item, now)), per_turn, most), loop, served


def test_a_batch_begins_its_share_at_once():
    backlog, _, _ = queue()
    assert [backlog.passes(1.0) for _ in range(3)] == [True, True, False]
    assert backlog.passes(1.1), "the next batch has a share of its own"


def test_nothing_overtakes_what_waits():
    backlog, loop, served = queue()
    assert backlog.put("a", "A")
    assert not backlog.passes(5.0)
    loop.advance(0)
    assert served == [("A", 1.0)] and not len(backlog)
    assert backlog.passes(6.0)


def test_a_turn_serves_a_few_in_their_order():
    backlog, loop, served = queue(per_turn=2, most=40)
    for n in range(5):
        assert backlog.put(n, n)
    loop.turn()
    assert [item for item, _ in served] == [0, 1]
    loop.turn()
    assert [item for item, _ in served] == [0, 1, 2, 3]
    loop.turn()
    loop.turn()
    assert [item for item, _ in served] == [0, 1, 2, 3, 4]


def test_in_a_flood_a_turn_serves_one():
    backlog, loop, served = queue(per_turn=2, most=8)
    for n in range(4):
        backlog.put(n, n)
    counts = []
    for _ in range(4):
        loop.turn()
        counts.append(len(served))
    assert counts == [1, 2, 4, 4], "until a quarter of the room is taken, and no more"


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


def test_an_item_can_be_forgotten():
    backlog, loop, served = queue()
    backlog.put(1, "one")
    backlog.remove(1)
    backlog.remove(2)
    loop.turn()
    assert not served and not len(backlog)


def test_an_item_that_raises_holds_no_other_up():
    loop, served = FakeLoop(1.0), []

    def serve(item, now):
        if item == "bad":
            raise RuntimeError
        served.append(item)

    backlog = Backlog(loop, serve, 2, 100)
    for item in ("bad", "good"):
        backlog.put(item, item)
    with pytest.raises(RuntimeError):
        loop.turn()
    loop.turn()
    assert served == ["good"]


def test_nothing_is_served_twice():
    """A timer of an empty queue does nothing, and one that is put while another is served waits."""
    backlog, loop, served = queue()
    backlog.put(1, "one")
    backlog.finish()
    loop.turn()
    assert served == [("one", 1.0)]
