"""Small queues: what a connection may have unread in the ring of the tap, and who is resumed when."""

from typing import NamedTuple

import pytest

from pysplice.tcp import small_queue
from pysplice.tcp.doors import WRITABLE
from pysplice.tcp.small_queue import LARGE, SmallQueue

from .scene import Scene

RING = 16384
GIGA = 1e9


class Seen(NamedTuple):
    key: bytes
    length: int
    frames: int = 1


def queue(ring=RING, segment=LARGE, limit=None):
    return SmallQueue(ring, segment, limit)


def bulk(key=b"bulk", frames=20):
    return Seen(key, 47_000 * frames, frames)


@pytest.mark.parametrize(
    ("ring", "frame", "active", "expected"),
    (
        (1000, 1400, 1, 700_000),
        (1000, 1400, 0, 700_000),
        (1000, 1400, 10, 70_000),
        (16384, 100, 64, 12_800),
        (1000, 100, 6400, 200),
    ),
)
def test_share(ring, frame, active, expected):
    assert small_queue.share(ring, frame, active) == expected


def test_patience_is_time_but_at_least_two_segments():
    assert small_queue.patience(8.192 * GIGA, 1, LARGE) == 1_000_000
    assert small_queue.patience(8.192 * GIGA, 4, LARGE) == 250_000
    assert small_queue.patience(8.192 * GIGA, 100, LARGE) == 2 * LARGE
    assert small_queue.patience(0, 1, 1460) == 2920


def test_limit_that_somebody_chose():
    fixed = queue(limit=5000)
    assert (fixed.watching, fixed.budget) == (False, 5000)
    assert queue(limit=0).bound(1 << 30, 1460, None) == 1 << 30


def test_the_first_windows_are_as_if_frames_were_small():
    assert queue().budget == RING // 2 * small_queue.FRAME_BYTES_AT_FIRST
    assert queue(segment=500).budget == RING // 2 * 500


def test_small_frames_count_at_once_and_large_ones_have_to_last():
    q = queue()
    q.seen([Seen(b"a", 2000, 20)], 0.0)
    assert q.frame_bytes == 100
    q.seen([Seen(b"a", 20 * 47_000, 20)], 0.001)
    assert 100 < q.frame_bytes < 10_000
    for _ in range(100):
        q.seen([Seen(b"a", 20 * 47_000, 20)], 0.002)
    assert q.frame_bytes > 40_000


def test_the_ring_is_shared_among_those_who_queue():
    q = queue()
    q.seen([Seen(bytes([i]), 1000, 10) for i in range(64)], 0.0)
    assert q.budget == RING // 2 // 64 * 100
    # After two periods of silence it is one's own again
    q.seen([], 0.15)
    assert q.budget == RING // 2 // 64 * 100
    q.seen([Seen(b"x", 1000, 10)], 0.31)
    assert q.budget == RING // 2 * 100


def test_a_conversation_is_no_queue():
    """Frames that come one by one have nobody waiting behind them."""
    q = queue()
    before = q.budget
    q.seen([Seen(bytes([i]), 1) for i in range(64)], 0.0)
    assert q.budget == before


def test_bulk_is_brief_while_somebody_talks():
    q = queue()
    q.served(1_000_000, 0.0005)
    q.seen([bulk()], 0.0)
    alone = q.budget
    q.seen([bulk(), Seen(b"ssh", 40)], 0.01)
    assert q.budget == int(2 * GIGA * small_queue.QUEUE_SECONDS) < alone
    # ... and shares that with others of its kind
    q.seen([bulk(), bulk(b"other")], 0.02)
    assert q.budget == 2 * LARGE
    # Until nobody talked for a while
    for tenth in range(1, 15):
        q.seen([bulk()], 0.02 + tenth / 10)
    assert q.budget >= alone


def test_bulk_that_began_with_a_word_is_alone():
    q = queue()
    q.served(1_000_000, 0.0005)
    q.seen([Seen(b"bulk", 1)], 0.0)
    q.seen([bulk()], 0.001)
    assert q.budget > 1_000_000


def test_two_bulk_senders_do_not_hold_each_other_back():
    q = queue()
    q.served(1_000_000, 0.0005)
    q.seen([bulk(b"a"), bulk(b"b")], 0.0)
    assert q.budget > 1_000_000


def test_the_rate_is_not_learnt_from_small_batches():
    q = queue()
    q.served(1000, 0.0001)
    assert q.rate == 0
    q.served(1 << 20, 0.001)
    assert q.rate == (1 << 20) * 1000
    q.served(1 << 20, 0.01)
    assert (1 << 20) * 900 < q.rate < (1 << 20) * 1000


class Throttled:
    def __init__(self, seq=0, mss=1460):
        self.seq_from_tap = seq
        self.mss_from_tap = mss


def test_only_who_has_less_than_two_segments_is_listed():
    q = queue(limit=10_000)
    a, b = Throttled(), Throttled()
    assert q.bound(50_000, 5_000, a) == 10_000
    assert q.bound(5000, 20_000, a) == 5000
    assert not q.throttled
    assert q.bound(50_000, 5_001, b) == 10_000
    assert list(q.throttled) == [b]
    assert q.bound(500_000, 20_000, a, floor=65_536) == 65_536
    assert list(q.throttled) == [b]


def test_resumed_in_order_once_they_are_quiet():
    q = queue(limit=1000)
    waiting = [Throttled(i) for i in range(3)]
    for connection in waiting:
        q.bound(50_000, 1460, connection)
    assert list(q.resume(0.0005, empty=True)) == []
    waiting[1].seq_from_tap += 100  # it goes on by itself
    assert [c for c, _ in q.resume(0.0011, empty=True)] == [waiting[0], waiting[2]]
    assert q.resume_after(0.0011) == small_queue.RESUME_AFTER
    assert list(q.resume(0.002, empty=True)) == []
    assert [c for c, _ in q.resume(0.0022, empty=True)] == [waiting[1]]
    assert not q.throttled


def test_what_it_has_sent_may_be_behind_others():
    q = queue(limit=1000)
    waiting = Throttled()
    q.bound(50_000, 1460, waiting)
    assert list(q.resume(0.009, empty=False)) == []
    assert [c for c, _ in q.resume(0.011, empty=False)] == [waiting]


def test_not_all_are_resumed_at_once():
    """What is given back must fit the ring, in frames as small as they were."""
    q = queue()
    q.seen([Seen(bytes([i]), 1000, 10) for i in range(200)], 0.0)
    waiting = [Throttled(mss=65480) for _ in range(200)]
    for connection in waiting:
        q.bound(1 << 20, 65480, connection)
    resumed = list(q.resume(1.0, empty=True))
    assert [c for c, _ in resumed] == waiting[: len(resumed)]
    assert len(resumed) == RING // 2 * 100 // 65480 == 12
    assert {room for _, room in resumed} == {65480}
    assert list(q.throttled) == waiting[len(resumed) :]
    # The next ones after a period, and there is no point in asking before
    assert q.resume_after(1.02) == pytest.approx(0.08)
    assert list(q.resume(1.05, empty=True)) == []
    assert [c for c, _ in q.resume(1.11, empty=True)] == waiting[12:24]


# In a connection


def test_the_budget_bounds_the_window():
    scene = Scene(sndbuf=4 << 20, budget=50_000).established()
    scene.guest(b"x" * 65_000)
    (ack,) = scene.guest(b"x")
    assert ack.window << 7 <= 50_000 + 128
    assert scene.ready(WRITABLE) == []
    assert not scene.queue.throttled


def test_the_right_edge_does_not_move_left_for_the_budget():
    q = queue(limit=0)
    scene = Scene(sndbuf=4 << 20, queue=q).established()
    scene.guest(b"x" * 1000)
    edge = scene.connection.wnd_edge_to_tap
    q.budget = 2000
    (ack,) = scene.guest(b"x" * 1000)
    assert 0 <= scene.connection.wnd_edge_to_tap - edge < 128  # rounded up
    assert ack.window << 7 > 2000


def test_a_throttled_connection_is_resumed():
    """The guest has a large segment, and waits until the window takes all of it."""
    q = queue(limit=0)
    scene = Scene(mss=65480, guest_mss=65480, sndbuf=4 << 20, queue=q).established()
    q.budget = 1000
    scene.guest(b"x" * scene.connection._room_left())
    assert list(q.throttled) == [scene.connection]
    ((connection, room),) = q.resume(1.0, empty=True)
    connection.resume(room)
    (update,) = scene.tap.take()
    assert 65480 <= update.window << 7 <= room + 256
    assert not q.throttled
    # Said once, it is not said again
    connection.resume(room)
    assert scene.tap.take() == []


def test_who_is_gone_is_not_resumed():
    scene = Scene(sndbuf=4 << 20, budget=1000).established()
    scene.guest(b"x" * scene.connection._room_left())
    scene.connection.reset(0)
    scene.tap.take()
    for connection, room in scene.queue.resume(1.0, empty=True):
        connection.resume(room)
    assert scene.tap.take() == []
