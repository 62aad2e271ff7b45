"""Exact numbers: what the parts of a connection give at their limits, one value below them and one above."""

import errno

import pytest

from pysplice.tcp import seq, small_queue, window
from pysplice.tcp.account import account
from pysplice.tcp.connection import KEEPALIVE_PROBES
from pysplice.tcp.doors import ACK, CLOSING, FIN, PSH, READABLE, RST, SYN, WRITABLE
from pysplice.tcp.events import CLOSED
from pysplice.tcp.receive import ROUNDED_UP_MAX, Receive
from pysplice.tcp.send import RETRANSMIT_MAX
from pysplice.tcp.small_queue import SmallQueue
from pysplice.tcp.timing import CHALLENGE_INTERVAL, RTO_MIN, Challenges, RoundTrip

from ..doors.fakes import FakeHost, FakeRun
from .scene import IRS, ISN, Scene

KIB = 1024


def facts(sndbuf=64 * KIB, queued=0, outq=0, mss=1448, peer=65535):
    return FakeHost(sndbuf=sndbuf, snd_mss=mss, snd_wnd=peer).facts()._replace(
        wmem_queued=queued, outq=outq
    )  # fmt: skip


# Sequence numbers


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    (
        (5, 3, 2),
        (3, 5, -2),
        (0, 0xFFFFFFFF, 1),
        (0xFFFFFFFF, 0, -1),
        (1 << 31, 0, -(1 << 31)),
        (0x7FFFFFFF, 0, 0x7FFFFFFF),
    ),
)
def test_differences(a, b, difference):
    assert seq.diff(a, b) == difference


def test_the_initial_number_is_a_clock_and_a_secret_of_the_flow():
    """RFC 9293, 3.4.1: M + F(flow, secret), M in steps of 4 us."""
    key, secret = b"key", b"s" * 32
    first = seq.isn(secret, key, 0.0)
    assert seq.isn(secret, key, 1.0) == seq.add(first, 250_000)
    assert seq.isn(secret, key, 4e-6) == seq.add(first, 1)
    assert len({seq.isn(secret, bytes([n]), 0.0) for n in range(50)}) == 50
    assert seq.isn(b"t" * 32, key, 0.0) != first
    assert all(0 <= seq.isn(secret, bytes([n]), 1e9) < 1 << 32 for n in range(50))
    assert max(seq.isn(secret, bytes([n]), 0.0) for n in range(50)) > 1 << 30, "it uses all the bits"


# Estimators at their limits


@pytest.mark.parametrize(
    ("name", "reading", "expected"),
    (
        # An empty queue, with the count of memory at 0 and not unknown
        ("linear", facts(queued=0, outq=0), window.scaled(64 * KIB)),
        ("segments", facts(queued=0, outq=0), window.scaled(64 * KIB)),
        # All of it is used, to the byte: nothing is left; one more is no different
        ("linear", facts(queued=64 * KIB, outq=60_000), 0),
        ("segments", facts(queued=64 * KIB, outq=60_000), 0),
        ("truesize", facts(queued=64 * KIB, outq=60_000), 0),
        ("linear", facts(queued=64 * KIB, outq=0), 0),
        ("segments-wmem", facts(queued=64 * KIB, outq=0), 0),
        # One byte is queued, and costs what can be seen
        ("linear", facts(queued=833, outq=1), (64 * KIB - 833) // 833),
        ("segments", facts(queued=833, outq=1), (64 * KIB - 833) // (1448 + 832) * 1448),
        # As much memory as payload: no price can be seen
        ("linear", facts(queued=1000, outq=1000), window.scaled(64 * KIB) - 1000),
        ("segments", facts(queued=1000, outq=1000), window.scaled(64 * KIB) - 1000),
        ("truesize", facts(queued=1000, outq=1000), (64 * KIB - 1000 - 128) * 1448 // (1448 + 832)),
        # The socket does not know its segment size yet, or it is the smallest
        ("segments", facts(queued=2000, outq=1000, mss=0), window.scaled(64 * KIB) - 1000),
        ("segments", facts(queued=2000, outq=1000, mss=1), (64 * KIB - 2000) // (1 + 1)),
        # More is queued than the half that is offered
        ("linear", facts(1024 * KIB, queued=1_000_000, outq=1_000_000), 0),
        ("segments", facts(1024 * KIB, queued=1_000_000, outq=1_000_000), 0),
    ),
)
def test_an_estimate_at_its_limits(name, reading, expected):
    assert window.ESTIMATORS[name](reading) == expected


def test_what_a_buffer_is_taken_for():
    small, big = window.SNDBUF_SMALL, window.SNDBUF_BIG
    assert window.scaled(small) == small
    assert window.scaled(small - 1) == small - 1
    assert window.scaled(big + 1) - window.scaled(big) <= 1, "no step where the rule changes"
    assert window.scaled(small + 1) - window.scaled(small) <= 1


def test_a_room_of_a_segment_is_one():
    estimate = 1460
    assert window.room(facts(), 1460, lambda _: estimate) == 1460
    assert window.room(facts(), 1461, lambda _: estimate) == 1461, "the socket is writable"
    full = facts(queued=64 * KIB, outq=60_000)
    assert window.room(full, 1460, lambda _: estimate) == 1460
    assert window.room(full, 1461, lambda _: estimate) == 0
    # Without a count of memory the payload stands for it
    assert window.writable(facts(queued=-1, outq=40_000)) and not window.writable(
        facts(queued=-1, outq=60_000)
    )
    assert not window.writable(facts(queued=60_000, outq=0)) and window.writable(
        facts(queued=0, outq=60_000)
    )


# The small queue


def test_shares_and_frames():
    assert [small_queue.share(ring, n) for ring, n in ((1000, 0), (1000, 1), (1000, 7), (999, 2), (6, 2))] == [
        500, 500, 71, 249, 2
    ]  # fmt: skip
    assert isinstance(small_queue.share(1001, 3), int)
    grown = small_queue.bytes_per_frame(1000, 9000, 1)
    assert grown == 1000 + 8000 // 8 + 1 and isinstance(grown, int)
    assert small_queue.bytes_per_frame(1000, 1000, 1) == 1000
    assert small_queue.bytes_per_frame(0, 1023, 1) == 0 and small_queue.bytes_per_frame(0, 1024, 1) == 1024
    assert small_queue.bytes_per_frame(1000, 500, 2) == 250
    assert small_queue.patience(81_920_000, 1, 1000) == 10_000
    assert small_queue.patience(81_920_000, 3, 1000) == 3333


def test_a_bound_to_the_byte():
    queue = SmallQueue(limit=5000)
    assert [queue.bound(room, 0) for room in (4999, 5000, 5001)] == [4999, 5000, 5000]
    queue = SmallQueue(ring=100, limit=None)
    assert queue.frames == 50
    assert [queue.bound(room, 100) for room in (4999, 5000, 5001)] == [4999, 5000, 5000]
    assert queue.bound(1 << 20, 0) == small_queue.FIRST_BYTES


class Seen:
    def __init__(self, key: bytes, length: int, frames: int = 1) -> None:
        self.key, self.length, self.frames = key, length, frames


def test_who_queues():
    """Two frames at a time, or a frame of half a segment; runs without data do not end the look at a batch."""
    segment = 10_001
    for length, frames, queues in ((5000, 1, True), (4999, 1, False), (10, 2, True)):
        queue = SmallQueue(ring=100, segment=segment, limit=None)
        queue.seen([Seen(b"a", 0), Seen(b"b", length, frames), Seen(b"c", 60_000)], 1.0)
        assert queue.frames == (25 if queues else 50), (length, frames)


def test_the_rate_is_a_mean():
    queue = SmallQueue(ring=100, limit=None)
    queue.served(small_queue.RATE_BYTES_MIN - 1, 0.001)
    assert queue.rate == 0
    queue.served(small_queue.RATE_BYTES_MIN, 0.001)
    first = small_queue.RATE_BYTES_MIN / 0.001
    assert queue.rate == first
    queue.served(1 << 20, 0.0)
    assert queue.rate == first
    queue.served(1 << 20, 0.001)
    assert queue.rate == first + ((1 << 20) / 0.001 - first) / 16


def test_keys_are_forgotten_after_one_to_two_periods():
    recent = small_queue.Recent(1.0)
    recent.turn(0.0)
    recent.add(b"k")
    assert len(recent) == 1 and b"k" in recent
    recent.turn(0.999)
    recent.turn(1.0)
    assert b"k" in recent and len(recent) == 1
    recent.add(b"k")
    assert len(recent) == 1
    recent.turn(2.0)
    assert b"k" in recent
    recent.turn(4.0)
    assert b"k" not in recent and len(recent) == 0


# The receiving half


def receive_of(trace=None, queue=None, mss=1460, estimate=window.segments_wmem, **host) -> Receive:
    made = Receive(FakeHost(**host), queue or SmallQueue(), mss, estimate, trace)
    made.start(FakeRun(IRS, flags=SYN, wscale=7))
    made.first_field(True)
    return made


def widened(made: Receive) -> Receive:
    """With a window of 50,000 bytes, whatever the socket holds."""
    made.wnd_edge = seq.add(made.seq_from_tap, 50_000)
    return made


def test_a_new_receiver_knows_nothing_yet():
    made = Receive(FakeHost(), SmallQueue(), 1460, window.segments_wmem, None)
    assert (made.irs, made.seq_from_tap, made.wnd_edge, made.ws_to_tap, made.rounded_up) == (0, 0, 0, 0, 0)
    assert (made.bytes_read, made.kept, made.frame_bytes, made.short_bytes) == (0, 0, 0, 0)
    assert (made.sends, made.short_sends) == (0, 0)
    assert not (made.ended or made.ack_due or made.armed or made.starved)
    assert made.wscale_ok


@pytest.mark.parametrize(("wscale", "ok"), ((-1, False), (0, True), (1, True)))
def test_a_scale_of_0_is_a_scale(wscale, ok):
    made = Receive(FakeHost(), SmallQueue(), 1460, window.segments_wmem, None)
    made.start(FakeRun(IRS, flags=SYN, wscale=wscale))
    assert made.wscale_ok is ok


def test_the_window_to_the_byte():
    made = receive_of()
    left = made.room_left()
    assert left > 1000
    inside = [made.in_window(seq.add(made.seq_from_tap, n)) for n in (-1, 0, 1, left - 1, left, left + 1)]
    assert inside == [False, True, True, True, False, False]


def test_what_a_short_send_counts():
    made = widened(receive_of(sndbuf=3000))
    host = made._host
    for n in range(2):
        run = host.offer(FakeRun(made.seq_from_tap, payload=b"x" * 2000))
        assert made.take(run, 0) == 0
        assert made.sends == n + 1
    assert (made.short_sends, made.short_bytes, made.kept, made.bytes_read) == (1, 1000, 1000, 4000)
    # While bytes are kept nothing else is tried
    run = host.offer(FakeRun(made.seq_from_tap, payload=b"y" * 100))
    made.take(run, 0)
    assert (made.sends, made.short_sends, made.short_bytes, made.kept) == (2, 1, 1000, 1100)
    assert made.armed and host.armed
    made.armed = False
    host.drain(600)
    assert made.flush() == 0 and made.kept == 500 and made.armed
    host.drain()
    assert made.flush() == 0 and made.kept == 0
    host.drain()
    assert bytes(host.wire) == b"x" * 4000 + b"y" * 100


def test_room_for_what_is_kept_is_what_the_guest_may_send():
    """A keeper holds all that the window permits, at most."""
    made = widened(receive_of(sndbuf=3000))
    left = made.room_left()
    run = made._host.offer(FakeRun(made.seq_from_tap, payload=b"x" * 4000))
    made.take(run, 0)
    assert made._host.keep_room == left - 3000 + 65536


@pytest.mark.parametrize("error", (errno.ECONNRESET, errno.EPIPE))
def test_errors_of_the_host_socket(error):
    made = receive_of()
    made._host.failure = error
    run = made._host.offer(FakeRun(made.seq_from_tap, payload=b"x"))
    assert made.take(run, 0) == error
    made._host.failure = 0
    made.take(run, 0)
    made.kept = 1
    made._host.failure = error
    assert made.flush() == error


def test_nothing_to_flush_is_no_error():
    made = receive_of()
    assert made.flush() == 0 and not made.armed


def test_a_full_socket_is_no_error():
    made = receive_of(sndbuf=3000)
    made._host.outbox += bytes(3000)
    run = made._host.offer(FakeRun(made.seq_from_tap, payload=b"x" * 10))
    assert made.take(run, 0) == 0 and made.kept == 10 and made.short_bytes == 10
    assert made.flush() == 0 and made.kept == 10 and made.armed


def test_a_fin_out_of_order_is_not_taken():
    made = receive_of()
    assert not made.take_fin(FakeRun(made.seq_from_tap, flags=ACK))
    assert not made.take_fin(FakeRun(seq.add(made.seq_from_tap, 1), flags=FIN | ACK))
    assert not made.ended
    before = made.seq_from_tap
    assert made.take_fin(FakeRun(before, flags=FIN | ACK))
    assert made.ended and made.seq_from_tap == seq.add(before, 1)


@pytest.mark.parametrize(("left", "after"), ((0, 0), (1, 0), (2, 1)))
def test_a_fin_and_the_edge(left, after):
    """It takes a number of the window; one beyond a closed window moves the edge."""
    made = receive_of()
    made.wnd_edge = seq.add(made.seq_from_tap, left)
    assert made.take_fin(FakeRun(made.seq_from_tap, flags=FIN | ACK))
    assert made.room_left() == after


@pytest.mark.parametrize(
    ("room", "left", "worth"),
    (
        (500 + 2 * 1460, 500, True),
        (500 + 2 * 1460 - 1, 500, True),  # it was closed for a whole segment, and is open now
        (1459, 0, False),
        (1460, 0, True),
        (1460, 1459, True),
        (2000, 1460, False),
        (1460 + 2919, 1460, False),
        (1460 + 2920, 1460, True),
        (1460 + 2921, 1460, True),
    ),
)
def test_which_windows_are_worth_a_segment(room, left, worth):
    assert receive_of().is_update(room, left) is worth


def test_the_edge_is_rounded_up_only_so_far():
    """By less than a unit of the scale at a time, until that adds up; then the field dips, and the edge stays."""
    made = receive_of()
    made.ws_to_tap = 7
    made.wnd_edge = seq.add(made.seq_from_tap, 128_000)
    moved = 0
    for _ in range(100_000):
        edge = made.wnd_edge
        made.seq_from_tap = seq.add(made.seq_from_tap, 1)
        left = made.room_left()
        field = made._move_edge(left, left)
        step = seq.diff(made.wnd_edge, edge)
        assert 0 <= step < 128
        moved += step
        assert moved <= ROUNDED_UP_MAX
        assert (field << 7) + 128 > left
        if made.rounded_up + 127 > ROUNDED_UP_MAX and not step:
            break
    assert moved > ROUNDED_UP_MAX - 128, "as far as it may"
    # Once the room grows, all of it is forgotten
    made._move_edge(made.room_left() + 1280, made.room_left())
    assert made.rounded_up == 0


def test_a_field_that_is_full_is_not_rounded_up():
    made = receive_of()
    made.ws_to_tap = 2
    full = window.WINDOW_FIELD_MAX << 2
    made.wnd_edge = seq.add(made.seq_from_tap, full + 3)
    edge = made.wnd_edge
    assert made._move_edge(full + 3, full + 3) == window.WINDOW_FIELD_MAX
    assert seq.diff(made.wnd_edge, edge) in (-3, 0)
    assert made.rounded_up == 0
    assert made._move_edge(full + 4, made.room_left()) == window.WINDOW_FIELD_MAX
    assert made._move_edge(1 << 30, made.room_left()) == window.WINDOW_FIELD_MAX


def test_a_starved_connection():
    """Less than two segments of room by the bound of the queue: it says so, or is left one."""
    queue = SmallQueue(limit=2000)
    made = receive_of(queue=queue)
    made.ws_to_tap = 0
    made.starved = False
    assert made.room(0) == 2000 and made.starved
    made.starved = False
    assert made.room(0, throttle=False) == 1460 and not made.starved
    assert made.room(5000) == 5000, "the edge does not move left"
    queue.budget = 2920
    made.starved = False
    assert made.room(0) == 2920 and not made.starved
    queue.budget = 2919
    assert made.room(0) == 2919 and made.starved


@pytest.mark.parametrize(
    ("mss", "scale", "segment"), ((1460, 0, 1460), (1460, 7, 1536), (1536, 7, 1536), (1537, 7, 1664))
)
def test_a_segment_as_the_scale_can_say_it(mss, scale, segment):
    made = receive_of(mss=mss, estimate=lambda _: 1)
    made.ws_to_tap = scale
    assert made.room(0) == segment


def test_a_socket_that_is_not_writable_is_waited_for():
    made = receive_of(sndbuf=30_000)
    made._host.outbox += bytes(29_000)
    assert made.room(0) == 0 and made.armed
    made.armed = False
    del made._host.outbox[:]
    assert made.room(0) > 0 and not made.armed
    made._host.outbox += bytes(25_000)  # there is room, but epoll says nothing below two thirds
    assert made.room(0) >= 1460 and made.armed


# The account of a window


def test_the_account_of_windows():
    said: list[dict] = []
    made = receive_of(trace=said.append, sndbuf=87040)
    (first,) = said
    assert first["by"] == "initial" and first["left"] == 0 and first["read"] == 1
    assert first["window"] == made.room_left()
    run = made._host.offer(FakeRun(made.seq_from_tap, payload=b"x" * 2000))
    made.take(run, 0)
    left = made.room_left()
    room = made.room(left)
    field = made.advertise(room, left)
    last = said[-1]
    assert len(said) == 2
    assert last["window"] == field << made.ws_to_tap
    assert last["left"] == left and last["read"] == 2001 and last["kept"] == 0
    assert last["sndbuf"] == 87040 and last["mss"] == 1460 and last["outq"] == 2000
    assert last["frame_bytes"] == 2000 and last["budget"] == 0 and last["budget_frames"] == 0
    assert last["field_max"] == 65535 << made.ws_to_tap
    assert last["estimate"] == window.segments_wmem(made._host.facts())
    assert last["writable"] is True and set(last["estimates"]) == set(window.ESTIMATORS)
    assert last["by"] in ("estimate", "edge")


def test_the_account_counts_what_was_short_once():
    said: list[dict] = []
    made = widened(receive_of(trace=said.append, sndbuf=3000))
    for payload in (b"x" * 2000, b"y" * 2000):
        made.take(made._host.offer(FakeRun(made.seq_from_tap, payload=payload)), 0)
    left = made.room_left()
    made.advertise(made.room(left), left)
    assert (said[-1]["short"], said[-1]["kept"], said[-1]["by"]) == (1000, 1000, "kept")
    assert "sndbuf" not in said[-1], "the socket was not asked"
    made.advertise(made.room(left), left)
    assert said[-1]["short"] == 0


def test_without_a_trace_nothing_is_explained():
    made = receive_of()
    made.short_bytes = 7
    made.advertise(made.room(0), made.room_left())
    assert made.short_bytes == 7 and made._reading is None


# The sending half


def test_a_silly_segment_is_not_sent():
    """RFC 9293, 3.8.6.2.1: whole segments, and less only if nothing is under way."""
    scene = Scene(guest_mss=1000, window_=1500).established()
    send = scene.connection.send
    assert [send._whole_segments(left, 0) for left in (-1, 0, 1, 999, 1000, 1999, 2000)] == [
        0, 0, 1, 999, 1000, 1000, 2000
    ]  # fmt: skip
    assert [send._whole_segments(left, 1) for left in (-1, 0, 1, 999, 1000, 1999)] == [
        0,
        0,
        0,
        0,
        1000,
        1000,
    ]


def test_the_last_segment_pushes():
    scene = Scene(guest_mss=1000, wscale=0, window_=65535).established()
    scene.guest(window=2000)
    (segment,) = scene.remote(b"a" * 3000)
    assert segment.flags == ACK and len(segment.payload) == 2000
    (segment,) = scene.ack(2000, window=2000)
    assert segment.flags == ACK | PSH and len(segment.payload) == 1000


def test_pushed_though_the_end_may_follow():
    scene = Scene(wscale=0).established()
    (segment,) = scene.remote(b"a" * 100)
    assert segment.flags == ACK | PSH


def test_bytes_acknowledged_are_counted():
    scene = Scene(wscale=0, window_=65535).established()
    for n in range(3):
        scene.guest(window=65535)
        scene.remote(b"a" * 700)
        scene.ack(700, window=65535)
        assert scene.connection.send.bytes_acked == 700 * (n + 1)


def test_repetitions_are_counted():
    scene = Scene(wscale=0, window_=65535).established()
    scene.guest(window=65535)
    scene.remote(b"a" * 700)
    for n in range(1, 4):
        while scene.connection.send.retransmissions < n:
            scene.advance(0.1)
        assert scene.connection.send.retransmissions == n


def test_what_is_repeated_is_no_more_than_is_under_way():
    """The rest of the stream was never sent, for want of a window."""
    scene = Scene(guest_mss=1000, wscale=0, window_=65535).established()
    scene.guest(window=1000)
    (sent,) = scene.remote(b"a" * 1000 + b"b" * 500)
    assert len(sent.payload) == 1000
    (again, *_) = scene.advance(0.3)
    assert again.payload == sent.payload and again.seq == sent.seq


def test_the_largest_window_is_remembered():
    scene = Scene(wscale=0, window_=1000)
    send = scene.connection.send
    assert (send.wnd_max, send.wnd_from_tap, send.wnd_seq) == (1000, 1000, IRS)
    scene.established()
    for wnd, most in ((3000, 3000), (2000, 3000), (3001, 3001)):
        scene.guest(window=wnd)
        assert (send.wnd_from_tap, send.wnd_max) == (wnd, most)


def test_a_duplicate_is_bare_and_says_the_same():
    scene = Scene(guest_mss=1000, wscale=0, window_=65535).established()
    scene.guest(window=20_000)
    scene.remote(b"a" * 5000)
    send = scene.connection.send
    scene.guest(b"data", window=20_000)
    scene.guest(window=20_001)
    assert send.dup_acks == 0
    scene.guest(window=20_001)
    assert send.dup_acks == 1
    scene.ack(1000, window=20_001)
    assert send.dup_acks == 0


def test_recovery_ends_with_what_was_sent_when_it_began():
    scene = Scene(guest_mss=1000, wscale=0, window_=65535).established()
    scene.guest(window=20_000)
    scene.remote(b"a" * 5000)
    send = scene.connection.send
    for _ in range(3):
        again = scene.guest(window=20_000)
    assert again[0].seq == send.seq_ack_from_tap and again[0].payload.startswith(b"a")
    assert send.recover == send.seq_to_tap
    before = send.retransmissions
    scene.ack(1000, window=20_000)
    assert send.retransmissions == before + 1, "a partial acknowledgement"
    scene.ack(4000, window=20_000)
    assert send.recover < 0 and send.retransmissions == before + 1


def test_a_recovery_may_end_at_number_0():
    """The mark of no recovery is no sequence number."""
    scene = Scene(guest_mss=1000, wscale=0, window_=65535, isn=(1 << 32) - 5001).established()
    scene.guest(window=20_000)
    scene.remote(b"a" * 5000)
    send = scene.connection.send
    assert send.seq_to_tap == 0
    for _ in range(4):
        scene.guest(window=20_000)
    assert send.recover == 0 and send.retransmissions == 1
    scene.ack(5000, window=20_000)
    assert send.recover == -1


def test_a_measurement_may_end_at_number_0():
    trip = RoundTrip()
    trip.sent(0, 1.0)
    trip.sent(50, 1.5)  # one at a time
    trip.acknowledged(0, 2.0)
    assert trip.rto == pytest.approx(1.0 + 4 * 0.5)
    trip.sent(100, 3.0)
    trip.resent()
    before = trip.rto
    trip.acknowledged(100, 9.0)
    assert trip.rto == before, "Karn: what was sent twice measures nothing"


def test_the_shortest_time_to_wait():
    trip = RoundTrip()
    for n in range(1, 40):
        trip.sent(n, float(n))
        trip.acknowledged(n, n + 0.001)
    assert trip.rto == RTO_MIN


def test_challenges_are_rare():
    challenges = Challenges()
    assert challenges.may_be(100.0)
    assert not challenges.may_be(100.0 + CHALLENGE_INTERVAL * 0.99)
    assert challenges.may_be(100.0 + CHALLENGE_INTERVAL)


# The connection


def test_a_reset_before_the_handshake_is_exact_or_nothing():
    scene = Scene()
    scene.connected()
    receive = scene.connection.receive
    assert scene.guest(at=10, flags=RST) and not scene.facts & CLOSED, "it may be forged: it is challenged"
    scene.now += 1
    assert scene.guest(at=receive.room_left() + 10, flags=RST) == []
    scene.guest(flags=RST)
    assert scene.facts & CLOSED
    early = Scene()
    assert early.guest(at=10, flags=RST) == [] and not early.facts & CLOSED, "nothing is on its way yet"


def test_resets_of_ours_have_the_number_that_was_asked_for():
    scene = Scene()
    scene.connected()
    (segment,) = scene.guest(ack=seq.add(ISN, 77))
    assert (segment.flags, segment.seq, segment.ack, segment.window) == (RST, seq.add(ISN, 77), 0, 0)
    scene = Scene(inbound=True)
    scene.tap.take()
    (segment,) = scene.answered(ack=seq.add(ISN, 77))
    assert (segment.flags, segment.seq, segment.ack, segment.window) == (RST, seq.add(ISN, 77), 0, 0)


def test_a_refusal_acknowledges_the_whole_syn():
    scene = Scene(connect_error=errno.ECONNREFUSED, syn_data=b"12345")
    (segment,) = scene.ready(WRITABLE | 8)
    assert (segment.flags, segment.seq, segment.window) == (RST | ACK, 0, 0)
    assert segment.ack == seq.add(IRS, 1 + 5)


def test_an_answer_without_a_syn_is_no_answer():
    scene = Scene(inbound=True)
    scene.tap.take()
    assert scene.answered(flags=ACK) == [] and scene.answered(flags=SYN, ack=0) is not None
    assert not scene.connection.send.wnd_from_tap


def test_why_a_connection_has_ended_is_kept():
    scene = Scene().established()
    assert scene.connection.error == 0
    scene.guest(flags=RST)
    assert scene.connection.error == errno.ECONNRESET
    scene = Scene().established()
    scene.host.failure = errno.EPIPE
    scene.guest(b"data")
    assert scene.connection.error == errno.EPIPE and scene.facts & CLOSED
    scene = Scene().established()
    scene.connection.reset(errno.ETIMEDOUT)
    assert scene.connection.error == errno.ETIMEDOUT
    scene = Scene().established()
    scene.host.failure = errno.EHOSTUNREACH
    scene.ready(READABLE)
    assert scene.connection.error == errno.EHOSTUNREACH
    scene = Scene(sndbuf=3000).established()
    scene.guest(b"x" * 4000)
    scene.host.drain()
    scene.host.failure = errno.ECONNRESET
    scene.ready(WRITABLE)
    assert scene.connection.error == errno.ECONNRESET
    scene = Scene().established()
    scene.host.failure = errno.ENOTCONN
    scene.guest(flags=FIN | ACK)
    assert scene.connection.error == errno.ENOTCONN


def test_a_good_end_is_no_error():
    scene = Scene().established()
    scene.guest(flags=FIN | ACK)
    scene.remote(eof=True)
    scene.ready(CLOSING)
    scene.ack(1)
    assert scene.facts & CLOSED and scene.connection.error == 0


# Which rule has decided about a window


class Reader:
    irs, seq_from_tap, ws_to_tap, mss = 100, 1101, 2, 1460
    kept = short_bytes = frame_bytes = 0


def account_of(
    room: int, reading=None, initial: bool = False, kept: int = 0, estimate=lambda _: 10_000
) -> dict:
    reader = Reader()
    reader.kept = kept
    return account(reader, SmallQueue(limit=777), estimate, reading, 5000, room, 4096, initial)


def test_the_rule_that_has_decided():
    read = facts()
    assert account_of(10_000, read)["by"] == "estimate"
    assert account_of(10_001, read)["by"] == "edge", "it would have been less: the edge does not move left"
    assert account_of(9999, read)["by"] == "queue"
    assert account_of(9999, read, initial=True)["by"] == "initial"
    assert account_of(9999)["by"] == "edge" and account_of(9999, kept=1)["by"] == "kept"
    most = 65535 << 2
    assert account_of(most, read, estimate=lambda _: most)["by"] == "estimate"
    assert account_of(most + 1, read, estimate=lambda _: most + 1)["by"] == "field"


def test_what_an_account_says_beside_that():
    said = account_of(9999, facts(outq=3), kept=4)
    assert (said["window"], said["left"], said["kept"], said["read"]) == (4096, 5000, 4, 1001)
    assert (said["budget"], said["budget_frames"], said["field_max"]) == (777, 0, 65535 << 2)
    assert said["outq"] == 3 and said["mss"] == 1460 and said["room"] == 10_000


def test_windows_that_are_silly_or_a_segment_by_courtesy():
    full = facts(queued=64 * KIB, outq=60_000)
    assert window.bounds(full, 1460, lambda _: 1000)["by"] == "silly"
    assert window.bounds(facts(), 1460, lambda _: 1000)["by"] == "writable"
    assert window.bounds(facts(), 1460, lambda _: 1460)["by"] == "estimate"


@pytest.mark.parametrize(
    ("name", "reading", "expected"),
    (
        # The queue has grown, or drained, between the two readings
        ("linear", facts(queued=0, outq=500), window.scaled(64 * KIB)),
        ("linear", facts(queued=100, outq=0), window.scaled(64 * KIB) - 100),
        ("segments", facts(queued=0, outq=500), window.scaled(64 * KIB) - 500),
        ("segments", facts(queued=100, outq=0), window.scaled(64 * KIB)),
        ("segments-wmem", facts(queued=0, outq=500), window.scaled(64 * KIB)),
        ("segments-wmem", facts(queued=100, outq=0), window.scaled(64 * KIB) - 100),
    ),
)
def test_readings_that_do_not_fit_each_other(name, reading, expected):
    assert window.ESTIMATORS[name](reading) == expected


# Time-outs of the connection


def test_silence_is_borne_for_so_many_probes():
    """RFC 9293, 3.8.4: the guest is asked, and given up after KEEPALIVE_PROBES without an answer."""
    scene = Scene().established()
    probes = 0
    while not scene.facts & CLOSED:
        sent = scene.advance(10)
        probes += sum(segment.flags == ACK for segment in sent)
        assert probes <= KEEPALIVE_PROBES
    assert probes == KEEPALIVE_PROBES
    assert sent[-1].flags == RST | ACK and sent[-1].window == 0 and sent[-1].ack == scene.next


def test_what_holds_a_sender_up():
    """Nothing is under way, and yet something should be."""
    scene = Scene(guest_mss=1000, wscale=0, window_=65535).established()
    send = scene.connection.send
    assert not send.held_up()
    send.host_readable = True
    assert send.held_up()
    send.host_readable = False
    send.stream_len = 1
    assert send.held_up()
    send.stream_len = 0
    scene.guest(window=20_000)
    scene.remote(b"a" * 500)
    send.host_readable = True
    assert not send.held_up(), "it is under way"


def test_what_is_repeated_has_a_bound():
    scene = Scene(guest_mss=1000, wscale=7, window_=65535).established()
    scene.guest(window=4000)
    (sent, *_) = scene.remote(b"a" * (RETRANSMIT_MAX + 50_000))
    send = scene.connection.send
    assert send.in_flight() > RETRANSMIT_MAX
    scene.tap.take()
    send.retransmit()
    (again,) = scene.tap.take()
    assert len(again.payload) == RETRANSMIT_MAX and again.seq == sent.seq


def test_nothing_under_way_cannot_be_repeated():
    scene = Scene().established()
    send = scene.connection.send
    assert send.expired() is False and send.recover == -1
    scene.remote(b"data")
    assert send.expired() is True and send.recover == send.seq_to_tap


def test_a_window_that_is_resumed_is_a_segment_and_no_more():
    queue = SmallQueue(limit=1000)
    scene = Scene(queue=queue, wscale=0, sndbuf=87040).established()
    scene.connection.receive.ws_to_tap = 0
    for _ in range(60):
        scene.guest(b"x" * 1000)
        scene.host.drain()
    scene.tap.take()
    scene.connection.resume()
    sent = scene.tap.take()
    assert all(segment.window <= 65535 for segment in sent)
    assert scene.connection.receive.room_left() >= 1460
