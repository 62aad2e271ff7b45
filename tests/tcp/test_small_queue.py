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
    ("ring", "active", "expected"),
    ((1000, 1, 500), (1000, 0, 500), (1000, 10, 50), (8192, 64, 64), (1000, 6400, 2)),
)
def test_share(ring, active, expected):
    assert small_queue.share(ring, active) == expected


def test_patience_is_time_but_at_least_two_segments():
    assert small_queue.patience(8.192 * GIGA, 1, LARGE) == 1_000_000
    assert small_queue.patience(8.192 * GIGA, 4, LARGE) == 250_000
    assert small_queue.patience(8.192 * GIGA, 100, LARGE) == 2 * LARGE
    assert small_queue.patience(0, 1, 1460) == 2920


def test_limit_that_somebody_chose():
    fixed = queue(limit=5000)
    assert (fixed.watching, fixed.bound(1 << 30, 1)) == (False, 5000)
    assert queue(limit=0).bound(1 << 30, 1) == 1 << 30


def test_a_chosen_limit_does_not_follow_what_is_seen():
    fixed = queue(limit=5000)
    fixed.seen([Seen(bytes([i]), 1000, 10) for i in range(64)], 7.0)
    assert (fixed.budget, fixed.frames) == (5000, 0)
    # ... but time passes
    fixed.throttle(waiting := Throttled())
    assert list(fixed.resume(7.0005, empty=True)) == []
    assert list(fixed.resume(7.0011, empty=True)) == [waiting]


def test_the_first_windows_are_small():
    """In frames of 100 bytes, 64 of them fill not even two thirds of the ring."""
    assert queue().bound(1 << 30, 1400) == RING // 2 * 1400
    assert queue().bound(1 << 30, 0) == small_queue.FIRST_BYTES
    assert 64 * small_queue.FIRST_BYTES // 100 < RING * 2 / 3
    q = queue()
    scene = Scene(sndbuf=4 << 20, queue=q)
    assert scene.connected().window == small_queue.FIRST_BYTES
    # A few words do not change it, and nobody is listed for it; what fills the window does
    (ack,) = scene.guest(b"hello")
    assert ack.window << 7 <= small_queue.FIRST_BYTES + 128 and not q.throttled
    (ack,) = scene.guest(b"x" * 14_600)
    assert ack.window << 7 > 1 << 20


def test_small_frames_count_at_once_and_large_ones_have_to_last():
    frame = small_queue.bytes_per_frame(1400, 2000, 20)
    assert frame == 100
    frame = small_queue.bytes_per_frame(frame, 20 * 47_000, 20)
    assert 100 < frame < 10_000
    for _ in range(100):
        frame = small_queue.bytes_per_frame(frame, 47_000, 1)
    assert frame > 40_000


def test_a_small_frame_by_itself_says_nothing():
    assert small_queue.bytes_per_frame(1400, 1, 1) == 1400
    assert small_queue.bytes_per_frame(1400, 2, 2) == 1
    assert small_queue.bytes_per_frame(1, 1, 2) == 1
    assert small_queue.bytes_per_frame(0, 500, 1) == 0
    assert small_queue.bytes_per_frame(0, 1460, 1) == 1460
    assert small_queue.bytes_per_frame(0, 500, 5) == 100


def test_the_ring_is_shared_among_those_who_queue():
    q = queue()
    q.seen([Seen(bytes([i]), 1000, 10) for i in range(64)], 0.0)
    assert q.frames == RING // 2 // 64
    # After two periods of silence it is one's own again
    q.seen([], 0.15)
    assert q.frames == RING // 2 // 64
    q.seen([Seen(b"x", 1000, 10)], 0.31)
    assert q.frames == RING // 2


def test_a_conversation_is_no_queue():
    """Frames that come one by one have nobody waiting behind them."""
    q = queue()
    before = q.frames
    q.seen([Seen(bytes([i]), 1) for i in range(64)], 0.0)
    assert (q.frames, q.budget) == (before, 0)


def test_bulk_is_brief_while_somebody_talks():
    q = queue()
    q.served(1_000_000, 0.0005)
    q.seen([bulk()], 0.0)
    assert q.budget == 0
    q.seen([bulk(), Seen(b"ssh", 40)], 0.01)
    assert q.budget == q.bound(1 << 30, 47_000) == int(2 * GIGA * small_queue.QUEUE_SECONDS)
    # ... and shares that with others of its kind
    q.seen([bulk(), bulk(b"other")], 0.02)
    assert q.budget == 2 * LARGE
    # Until nobody talked for a while
    for tenth in range(1, 15):
        q.seen([bulk()], 0.02 + tenth / 10)
    assert q.budget == 0


def test_bulk_that_began_with_a_word_is_alone():
    q = queue()
    q.served(1_000_000, 0.0005)
    q.seen([Seen(b"bulk", 1)], 0.0)
    q.seen([bulk()], 0.001)
    assert q.budget == 0


def test_two_bulk_senders_do_not_hold_each_other_back():
    q = queue()
    q.served(1_000_000, 0.0005)
    q.seen([bulk(b"a"), bulk(b"b")], 0.0)
    assert q.budget == 0


def test_the_rate_is_not_learnt_from_small_batches():
    q = queue()
    q.served(1000, 0.0001)
    assert q.rate == 0
    q.served(1 << 20, 0.001)
    assert q.rate == (1 << 20) * 1000
    q.served(1 << 20, 0.01)
    assert (1 << 20) * 900 < q.rate < (1 << 20) * 1000


class Throttled:
    def __init__(self, seq=0, mss=1460, frame_bytes=100):
        self.receive = self
        self.seq_from_tap = seq
        self.mss = mss
        self.frame_bytes = frame_bytes


def test_resumed_in_order_once_they_are_quiet():
    q = queue()
    waiting = [Throttled(i) for i in range(3)]
    for connection in waiting:
        q.throttle(connection)
    assert list(q.resume(0.0005, empty=True)) == []
    waiting[1].seq_from_tap += 100  # it goes on by itself
    assert list(q.resume(0.0011, empty=True)) == [waiting[0], waiting[2]]
    assert q.resume_after(0.0011) == small_queue.RESUME_AFTER
    assert list(q.resume(0.002, empty=True)) == []
    assert list(q.resume(0.0022, empty=True)) == [waiting[1]]
    assert not q.throttled


def test_what_it_has_sent_may_be_behind_others():
    q = queue()
    waiting = Throttled()
    q.throttle(waiting)
    assert list(q.resume(0.009, empty=False)) == []
    assert list(q.resume(0.011, empty=False)) == [waiting]


def test_not_all_are_resumed_at_once():
    """What is given back must fit the ring, in frames as small as they were."""
    q = queue()
    waiting = [Throttled(mss=16384) for _ in range(200)]
    for connection in waiting:
        q.throttle(connection)
    resumed = list(q.resume(1.0, empty=True))
    assert len(resumed) == RING // 4 // 164
    assert resumed + list(q.throttled) == waiting
    # The next ones after a period, and there is no point in asking before
    assert q.resume_after(1.02) == pytest.approx(0.08)
    assert list(q.resume(1.05, empty=True)) == []
    assert list(q.resume(1.11, empty=True)) == waiting[len(resumed) : 2 * len(resumed)]


def test_tiny_frames_of_one_do_not_keep_the_others_waiting():
    q = queue()
    waiting = [Throttled(mss=65480, frame_bytes=1) for _ in range(100)]
    for connection in waiting:
        q.throttle(connection)
    assert len(list(q.resume(1.0, empty=True))) == RING // 4 // small_queue.RESUMED_FRAMES


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
    edge = scene.connection.receive.wnd_edge
    q.budget = 2000
    (ack,) = scene.guest(b"x" * 1000)
    assert 0 <= scene.connection.receive.wnd_edge - edge < 128  # rounded up
    assert ack.window << 7 > 2000


def test_small_frames_bound_their_own_connection_only():
    q = queue()
    scenes = [Scene(sndbuf=16 << 20, queue=q).established() for _ in range(2)]
    q.frames = 64
    scenes[0].guest(b"x" * 60_000, frames=600)
    scenes[1].guest(b"x" * 60_000, frames=1)
    windows = [scene.guest(b"x" * 5_000)[0].window << 7 for scene in scenes]
    assert windows[0] < 64 * 1400 < windows[1]


def throttled_scene(**more):
    """A guest whose window is used up, and left with less than its segment."""
    q = queue(limit=0)
    scene = Scene(mss=65480, guest_mss=65480, sndbuf=4 << 20, queue=q, **more).established()
    q.budget = 1000
    scene.guest(b"x" * scene.connection.receive.room_left())
    assert list(q.throttled) == [scene.connection]
    return scene, q


def test_a_throttled_connection_is_resumed():
    """The guest has a large segment, and waits until the window takes all of it."""
    scene, q = throttled_scene()
    (connection,) = q.resume(1.0, empty=True)
    connection.resume()
    (update,) = scene.tap.take()
    assert 65480 <= update.window << 7 < 65480 + 128
    assert not q.throttled
    # Once advertised, it is not advertised again
    connection.resume()
    assert scene.tap.take() == []


def test_a_unit_of_the_scale_may_be_more_than_the_budget():
    scene, q = throttled_scene()
    scene.connection.receive.ws_to_tap = 14
    for connection in q.resume(1.0, empty=True):
        connection.resume()
    (update,) = scene.tap.take()
    assert update.window << 14 >= 65480


def test_who_waits_for_the_socket_is_listed_when_it_is_writable():
    """The window is closed by the socket; when it may open, the small queue leaves less than a segment."""
    scene = Scene(sndbuf=60_000).established()
    scene.guest(b"x" * scene.connection.receive.room_left())
    scene.guest(b"x" * scene.connection.receive.room_left())
    assert scene.connection.receive.room_left() < 1460 and scene.host.armed
    scene.queue.budget = 1000
    scene.host.drain()
    assert scene.ready() == []
    assert list(scene.queue.throttled) == [scene.connection]


def test_who_is_gone_or_not_there_yet_is_not_listed():
    scene, q = throttled_scene()
    scene.connection.reset(0)
    assert not q.throttled
    q = queue(limit=1000)
    Scene(sndbuf=4 << 20, queue=q).connected()
    assert not q.throttled
