"""One connection, step by step, without a kernel."""

import errno
import hashlib

import pytest

from pysplice.tcp import seq, window
from pysplice.tcp.connection import RETRIES, SYN_ACK_RETRIES
from pysplice.tcp.doors import ACK, CLOSING, ERROR, FIN, HANGUP, PSH, READABLE, RST, SYN, WRITABLE
from pysplice.tcp.events import CLOSED, ESTABLISHED, TAP_FIN_SENT
from pysplice.tcp.send import DUP_ACKS
from pysplice.tcp.timing import NEVER

from ..doors.fakes import FakeRun, Segment
from .scene import IRS, ISN, Scene

# Handshake


def test_syn_ack_only_when_the_host_connection_stands():
    scene = Scene()
    assert scene.tap.take() == []
    syn_ack = scene.connected()
    assert syn_ack.flags == SYN | ACK
    assert syn_ack.seq == ISN
    assert syn_ack.ack == scene.next
    assert syn_ack.mss == 1460
    assert syn_ack.wscale == 7  # 4 MiB
    assert syn_ack.window == 65535


def test_a_guest_that_does_not_scale_is_not_scaled_to():
    scene = Scene(wscale=-1)
    assert scene.connected().wscale == -1
    scene.guest(window=65535)
    (ack,) = scene.guest(b"x" * 100)
    assert ack.window == 65535
    assert scene.connection.send.wnd_from_tap == 512


@pytest.mark.parametrize(
    ("error", "icmp", "reset"),
    (
        (errno.ECONNREFUSED, False, True),
        (errno.EHOSTUNREACH, True, False),
        (errno.ENETUNREACH, True, False),
        (errno.EACCES, True, False),
        (errno.ETIMEDOUT, False, False),
    ),
)
def test_connect_fails(error, icmp, reset):
    scene = Scene(connect_error=error)
    scene.now += 20  # the rate limit of errors counts from now, not from the SYN
    sent = scene.ready(ERROR | HANGUP)
    assert scene.facts & CLOSED
    assert scene.host.closed == "closed"
    assert scene.tap.errors == ([(error, scene.now)] if icmp else [])
    assert [s.flags for s in sent] == ([RST | ACK] if reset else [])


def test_repeated_syn():
    scene = Scene()
    scene.connection.on_tap(scene.syn, scene.now)
    assert scene.tap.take() == []
    first = scene.connected()
    scene.connection.on_tap(scene.syn, scene.now)
    assert scene.tap.take() == [first]


def test_the_remote_host_speaks_first():
    """Its data and its end come with the very event that ends connect()."""
    scene = Scene()
    scene.host.inbox += b"220 ready"
    scene.host.eof = True
    scene.connection.on_host(WRITABLE | READABLE | CLOSING, scene.now)
    scene.tap.take()
    data, fin = scene.guest()
    assert data.payload == b"220 ready"
    assert fin.flags == FIN | ACK


def test_another_syn_on_the_same_ports_ends_the_attempt():
    scene = Scene()
    scene.syn.seq += 12345
    scene.connection.on_tap(scene.syn, scene.now)
    assert scene.facts & CLOSED
    assert scene.host.closed == "aborted"


def test_syn_ack_is_repeated_and_given_up():
    scene = Scene()
    first = scene.connected()
    sent = scene.advance(200)
    assert sent[:-1] == [first] * SYN_ACK_RETRIES
    assert sent[-1].flags & RST
    assert scene.facts & CLOSED
    assert scene.host.closed == "aborted"


def test_wrong_ack_of_the_handshake_is_reset():
    scene = Scene()
    scene.connected()
    (reset,) = scene.guest(ack=seq.add(ISN, 77))
    assert (reset.flags, reset.seq) == (RST, seq.add(ISN, 77))
    assert not scene.facts & ESTABLISHED


def test_reset_during_the_handshake():
    scene = Scene()
    scene.connected()
    scene.guest(flags=RST, at=5)
    assert not scene.facts & CLOSED
    scene.guest(flags=RST)
    assert scene.host.closed == "aborted"


# From the guest


def test_data_is_acknowledged_with_a_window():
    scene = Scene().established()
    (ack,) = scene.guest(b"hello")
    assert scene.host.outbox == b"hello"
    assert (ack.flags, ack.ack, ack.payload) == (ACK, scene.next, b"")
    assert ack.window << 7 >= 80000


def test_right_edge_counts_from_what_was_read():
    """The room belongs after what was read, also while the remote host has acknowledged nothing."""
    scene = Scene(sndbuf=1 << 20).established()
    (ack,) = scene.guest(b"x" * 100_000)
    edge = seq.diff(seq.add(ack.ack, ack.window << 7), scene.next)
    assert edge >= 0.8 * ((1 << 20) - 100_000)


def test_right_edge_never_moves_left():
    scene = Scene(sndbuf=100_000, overhead=1.7).established()
    edge = None
    for size in (1, 1000, 20_000, 3, 14_000, 9_999, 1, 1):
        (ack,) = scene.guest(b"x" * size)
        right = seq.add(ack.ack, ack.window << 7)
        assert edge is None or seq.diff(right, edge) >= 0
        edge = right


def test_duplicate_and_overlap():
    scene = Scene().established()
    scene.guest(b"abcdef")
    (ack,) = scene.guest(b"abcdef", at=-6)
    assert ack.ack == scene.next
    scene.guest(b"efGH", at=-2)
    assert scene.host.outbox == b"abcdefGH"


def test_segment_that_came_too_early():
    """Each is answered with a duplicate ACK, so that the guest's fast retransmit works."""
    scene = Scene().established()
    acks = scene.guest(b"later", at=1000, frames=4)
    assert [a.ack for a in acks] == [scene.next] * 4
    assert scene.host.outbox == b""


def test_short_send_is_kept_and_flushed():
    scene = Scene(sndbuf=50_000).established()
    scene.host.sndbuf = 10_000  # as if the kernel came under memory pressure
    (ack,) = scene.guest(b"a" * 30_000)
    assert len(scene.host.outbox) == 10_000
    assert len(scene.host.kept) == 20_000
    # All of it is acknowledged: nothing that the guest was allowed to send is sent twice
    assert ack.ack == scene.next
    scene.guest(b"b" * 5_000)
    assert scene.host.kept.endswith(b"b" * 5_000)
    while scene.host.kept or scene.host.outbox:
        scene.host.drain()
        scene.ready()
    assert scene.host.wire == b"a" * 30_000 + b"b" * 5_000


def test_kept_bytes_are_bounded_by_the_window():
    scene = Scene(sndbuf=50_000).established()
    edge = scene.connection.receive.wnd_edge
    scene.host.sndbuf = 0
    for _ in range(10_000):
        scene.guest(b"z" * 1000, at=seq.diff(scene.connection.receive.seq_from_tap, scene.next))
    assert len(scene.host.kept) <= seq.diff(edge, scene.next) + 65536


def test_fin_waits_for_kept_bytes():
    scene = Scene(sndbuf=50_000).established()
    scene.host.sndbuf = 1000
    scene.guest(b"a" * 3000, flags=ACK | FIN)
    assert not scene.host.shut
    for _ in range(3):
        scene.host.drain()
        scene.ready()
    assert scene.host.shut
    scene.host.drain()
    assert scene.host.wire == b"a" * 3000


@pytest.mark.parametrize("size", (1, 100, 127))
def test_many_small_segments_close_the_window_too(size):
    """Rounding to the scale must not push the right edge on for ever."""
    scene = Scene(sndbuf=50_000).established()
    scene.host.sndbuf = 0
    kept = before = 0
    for _ in range(200_000 // size):
        (ack,) = scene.guest(b"z" * size, at=seq.diff(scene.connection.receive.seq_from_tap, scene.next))
        if not ack.window:
            break
        # nothing that fits into the window is refused
        kept = len(scene.host.kept)
        assert kept == before + size
        before = kept
    assert ack.window == 0
    assert kept < 50_000 + 40_000


def test_bytes_beyond_the_window_are_not_taken():
    scene = Scene(sndbuf=20_000).established()
    (ack,) = scene.guest(b"x" * 200_000)
    left = seq.diff(ack.ack, scene.next) + 200_000
    assert left < 66_000
    assert len(scene.host.outbox) + len(scene.host.kept) == left


def test_window_update_when_the_socket_drains():
    scene = Scene(sndbuf=40_000).established()
    scene.guest(b"x" * 39_900)
    assert scene.host.armed
    assert scene.ready() == []
    scene.host.drain()
    (update,) = scene.ready()
    assert update.window << 7 >= 30_000


def test_window_probe_is_answered():
    scene = Scene(sndbuf=20_000).established()
    scene.guest(b"x" * 20_000)
    (answer,) = scene.guest(at=-1)
    assert answer.ack == scene.connection.receive.seq_from_tap


def test_host_socket_breaks_under_an_upload():
    scene = Scene().established()
    scene.host.failure = errno.EPIPE
    (reset,) = scene.guest(b"x")
    assert reset.flags == RST | ACK
    assert reset.seq == scene.acked
    assert scene.host.closed == "closed"


# To the guest


def test_download():
    scene = Scene(isn=0xFFFFFFF0).established()
    (data,) = scene.remote(b"hello")
    assert (data.payload, data.flags) == (b"hello", ACK | PSH)
    assert data.seq == scene.acked
    assert len(scene.host.stream) == 5  # held until acknowledged
    scene.ack(5)
    assert len(scene.host.stream) == 0


def test_bytes_stay_in_the_kernel_until_the_window_opens():
    scene = Scene().established()
    scene.guest(window=10)  # 1280 bytes
    (data,) = scene.remote(b"d" * 5000)
    assert len(data.payload) == 1280
    assert len(scene.host.inbox) == 3720
    (more,) = scene.ack(1280, window=512)
    assert len(more.payload) == 3720


def test_only_whole_segments_into_a_narrow_window():
    scene = Scene(mss=1000, guest_mss=1000).established()
    scene.guest(window=20)  # 2560
    (data,) = scene.remote(b"d" * 10_000)
    assert len(data.payload) == 2000


def test_guest_mss_bounds_segments():
    scene = Scene(guest_mss=536).established()
    (data,) = scene.remote(b"d" * 3000)
    assert data.mss == 536


def test_remote_half_closes():
    scene = Scene().established()
    data, fin = scene.remote(b"bye", eof=True)
    assert (data.payload, fin.flags) == (b"bye", FIN | ACK)
    assert fin.seq == seq.add(data.seq, 3)
    scene.ack(4)
    assert not scene.facts & CLOSED
    (ack,) = scene.guest(b"answer")
    assert scene.host.outbox == b"answer"
    assert ack.window
    (last,) = scene.guest(flags=FIN | ACK)
    assert last.ack == scene.next
    assert scene.host.shut
    assert scene.host.closed == "closed"
    assert scene.connection.deadline() == NEVER or scene.facts & CLOSED


def test_guest_half_closes():
    scene = Scene().established()
    (ack,) = scene.guest(b"question", flags=FIN | ACK)
    assert ack.ack == scene.next
    assert scene.host.shut
    (data, fin) = scene.remote(b"answer", eof=True)
    assert data.payload == b"answer"
    scene.ack(7)
    assert scene.host.closed == "closed"


def test_simultaneous_close():
    scene = Scene().established()
    (fin,) = scene.remote(eof=True)
    assert fin.flags == FIN | ACK
    (ack,) = scene.guest(flags=FIN | ACK)  # which does not acknowledge ours yet
    assert not scene.facts & CLOSED
    scene.ack(1)
    assert scene.host.closed == "closed"


def test_a_fin_that_is_there_in_time_acknowledges_the_guests():
    scene = Scene().established()
    scene.host.eof = True
    run = FakeRun(scene.next, flags=FIN | ACK, ack=scene.acked, window=512)
    scene.connection.on_tap(scene.host.offer(run), scene.now)
    scene.connection.on_host(scene.host.ready(), scene.now)
    scene.connection.acknowledge()
    (fin,) = scene.tap.take()
    assert fin.flags == FIN | ACK
    assert fin.ack == seq.add(scene.next, 1)


def test_repeated_fin_is_acknowledged():
    scene = Scene().established()
    scene.guest(flags=FIN | ACK)
    (ack,) = scene.guest(flags=FIN | ACK, at=-1)
    assert ack.ack == scene.next


@pytest.mark.parametrize("waiting", (False, True))
def test_remote_resets(waiting):
    scene = Scene().established()
    if waiting:
        scene.guest(window=0)
        scene.host.inbox += b"never delivered"
    scene.host.failure = errno.ECONNRESET
    scene.host.connect_error = errno.ECONNRESET  # SO_ERROR
    (reset,) = scene.ready(ERROR | HANGUP)
    assert reset.flags == RST | ACK
    assert reset.seq == scene.acked
    assert scene.connection.error == errno.ECONNRESET


def test_remote_resets_after_it_has_said_all():
    """Half-closed by the remote host, then reset: nothing is read any more, and still the guest is told."""
    scene = Scene().established()
    scene.remote(b"bye", eof=True)
    scene.ack(4)
    scene.host.connect_error = errno.ECONNRESET
    (reset,) = scene.ready(ERROR | HANGUP)
    assert reset.flags == RST | ACK
    assert scene.connection.error == errno.ECONNRESET


def test_guest_resets():
    scene = Scene().established()
    scene.remote(b"unread")
    assert scene.guest(flags=RST) == []
    assert scene.host.closed == "aborted"


def test_reset_off_the_mark_is_challenged():
    """RFC 5961, section 3.2."""
    scene = Scene().established()
    (challenge,) = scene.guest(flags=RST, at=100)
    assert challenge.flags == ACK
    assert scene.guest(flags=RST, at=10_000_000) == []
    assert not scene.facts & CLOSED


def test_syn_in_the_middle_is_challenged():
    scene = Scene().established()
    (challenge,) = scene.guest(flags=SYN, at=5000)
    assert (challenge.flags, challenge.ack) == (ACK, scene.next)
    assert not scene.facts & CLOSED


@pytest.mark.parametrize(
    "segment",
    ({"flags": SYN}, {"flags": RST, "at": 100}, {"at": -1}, {"ack": seq.add(ISN, 5000)}),
    ids=("SYN", "RST", "keepalive", "ACK"),
)
def test_challenges_are_rare(segment):
    """RFC 5961, section 7; a segment with data is answered always."""
    scene = Scene().established()
    assert len(scene.guest(**{"at": 5, **segment})) == 1
    assert [scene.guest(**{"at": 5, **segment}) for _ in range(10)] == [[]] * 10
    assert len(scene.guest(b"again", at=-5)) == 1
    scene.now += 0.51
    assert len(scene.guest(**{"at": 5, **segment})) == 1


def test_the_handshake_is_the_first_round_trip():
    scene = Scene()
    scene.connected()
    scene.now += 0.4
    scene.guest(window=512)
    scene.remote(b"x")
    assert scene.connection.send.retransmit_at - scene.now == pytest.approx(1.2)  # 0.4 + 4 * 0.4 / 2


def test_a_handshake_that_was_repeated_measures_nothing():
    """Karn's algorithm: which of the two was answered is not known."""
    scene = Scene()
    scene.connected()
    scene.advance(1.1)
    scene.guest(window=512)
    scene.remote(b"x")
    assert scene.connection.send.retransmit_at - scene.now == pytest.approx(1)


def test_a_refusal_counts_the_data_of_the_syn():
    """RFC 9293, 3.10.7.1: the RST acknowledges SEG.SEQ + SEG.LEN."""
    scene = Scene(syn_data=b"ten bytes!")
    scene.host.connect_error = errno.ECONNREFUSED
    (reset,) = scene.ready(ERROR)
    assert (reset.flags, reset.ack) == (RST | ACK, seq.add(IRS, 11))


def test_ack_of_what_was_never_sent():
    scene = Scene().established()
    (answer,) = scene.guest(b"dropped too", at=0, ack=seq.add(scene.acked, 1000))
    assert answer.flags == ACK
    assert scene.host.outbox == b""
    assert scene.connection.send.seq_ack_from_tap == scene.acked


# Loss on the way to the guest


def test_retransmission_backs_off():
    scene = Scene().established()
    (data,) = scene.remote(b"lost")
    begun, times = scene.now, []
    for _ in range(4):
        scene.now = scene.connection.deadline()
        scene.connection.on_timer(scene.now)
        (again,) = scene.tap.take()
        assert (again.seq, again.payload) == (data.seq, b"lost")
        times.append(scene.now - begun)
    assert times == pytest.approx([0.2, 0.6, 1.4, 3.0])
    scene.ack(4)
    assert scene.connection.send.retransmit_at == NEVER


def test_round_trips_set_the_timer():
    """RFC 6298, section 2: after a first sample of R the timeout is 3 R, at least 0.2 s here."""
    scene = Scene().established()
    scene.remote(b"one")
    scene.now += 0.1
    scene.ack(3)
    assert scene.connection.send.round_trip.rto == pytest.approx(0.3)
    scene.remote(b"two")
    scene.now += 0.0001
    scene.ack(3)
    assert scene.connection.send.round_trip.rto >= 0.2


def test_fast_retransmit_and_recovery():
    scene = Scene(mss=1000, guest_mss=1000).established()
    scene.remote(b"a" * 3000)
    scene.remote(b"b" * 3000)
    for _ in range(DUP_ACKS - 1):
        assert scene.guest() == []
    (again,) = scene.guest()
    assert again.seq == scene.acked
    assert scene.guest() == []  # once only
    # A partial acknowledgement shows the next hole
    (next_hole,) = scene.ack(3000)
    assert next_hole.seq == scene.acked
    scene.ack(3000)
    assert scene.connection.send.recover < 0


def test_duplicate_acks_that_came_as_one_run():
    scene = Scene().established()
    scene.remote(b"a" * 3000)
    assert len(scene.guest(frames=DUP_ACKS)) == 1


def test_window_updates_are_no_duplicates():
    scene = Scene().established()
    scene.remote(b"a" * 3000)
    for field in (400, 401, 402, 403):
        assert scene.guest(window=field) == []


def test_guest_that_never_answers_is_given_up():
    scene = Scene().established()
    scene.remote(b"x")
    sent = scene.advance(3600)
    assert len(sent) == RETRIES + 1
    assert sent[-1].flags & RST
    assert scene.host.closed == "aborted"
    assert scene.connection.error == errno.ETIMEDOUT


def test_a_window_that_closes_before_there_is_data_is_probed():
    """Nothing is under way then and nothing was taken from the host socket: it waits there, and has no timer."""
    scene = Scene().established()
    scene.guest(window=0)
    assert scene.remote(b"x" * 10) == []
    (probe,) = scene.advance(0.3)
    assert (probe.seq, probe.payload) == (seq.add(scene.acked, -1), b"")


def test_closed_window_is_probed_for_ever():
    scene = Scene().established()
    scene.guest(window=0)
    scene.remote(b"x" * 100)
    for _ in range(40):
        scene.now = scene.connection.deadline()
        scene.connection.on_timer(scene.now)
        (probe,) = scene.tap.take()
        assert (probe.seq, probe.payload) == (seq.add(scene.acked, -1), b"")
        scene.guest(window=0)
    (data,) = scene.guest(window=512)
    assert data.payload == b"x" * 100


def test_tap_that_refuses_is_tried_again():
    scene = Scene().established()
    scene.tap.down = True
    scene.remote(b"x" * 100)
    scene.advance(0.5)
    scene.tap.down = False
    sent = scene.advance(30)
    assert b"x" * 100 in [s.payload for s in sent]


def test_the_end_is_learnt_once():
    """The tap does not take what comes before the FIN, and the socket goes on to report its end."""
    scene = Scene().established()
    scene.tap.down = True
    scene.remote(b"x" * 100, eof=True)
    scene.ready(WRITABLE)
    scene.ready(HANGUP)
    scene.advance(5)
    scene.tap.down = False
    sent = scene.advance(60)
    assert sent[0].payload == b"x" * 100 and sent[1].flags & FIN


def test_an_opened_window_starts_the_timer_anew():
    """The probes of a window that was closed for long say nothing of what is sent afterwards."""
    scene = Scene().established()
    scene.guest(window=0)
    scene.remote(b"x" * 100)
    for _ in range(200):
        scene.now = min(scene.connection.deadline(), scene.now + 2)
        scene.connection.on_timer(scene.now)
        scene.guest(window=0)
    scene.guest(window=512)
    assert scene.connection.deadline() - scene.now <= 1.01


def test_many_tiny_segments_are_not_asked_for():
    scene = Scene(guest_mss=1).established()
    (data,) = scene.remote(b"d" * 1000)
    assert data.mss == 88


def test_fin_is_retransmitted():
    scene = Scene().established()
    (fin,) = scene.remote(eof=True)
    assert scene.facts & TAP_FIN_SENT
    assert scene.advance(0.3) == [fin]


# Time


def test_idle_guest_is_probed_and_given_up():
    scene = Scene().established()
    (probe,) = scene.advance(45)
    assert (probe.seq, probe.flags) == (seq.add(scene.acked, -1), ACK)
    scene.guest()
    assert scene.advance(25) == []
    sent = scene.advance(600)
    assert sent[-1].flags & RST
    assert scene.connection.error == errno.ETIMEDOUT


def test_a_pause_is_no_silence():
    """The process was stopped for ten minutes: the guest is asked, and has time to answer."""
    scene = Scene().established()
    scene.now += 600
    scene.connection.on_timer(scene.now)
    assert len(scene.tap.take()) == 1
    assert scene.connection.deadline() >= scene.now + 29
    assert not scene.facts & CLOSED


def test_reset_in_both_directions():
    scene = Scene().established()
    scene.connection.reset(errno.EIO)
    assert scene.tap.take()[0].flags & RST
    assert scene.host.closed == "aborted"
    scene.connection.reset(errno.EIO)  # once more is nothing
    assert scene.tap.take() == []


def test_idle_connections_share_their_wake_ups():
    deadlines = set()
    for offset in range(10):
        scene = Scene()
        scene.now += offset * 0.7
        scene.established()
        deadlines.add(scene.connection.deadline())
    assert len(deadlines) <= 2


def test_a_call_too_early_does_nothing():
    scene = Scene().established()
    scene.connection.on_timer(scene.now)
    assert scene.tap.take() == []


def test_connecting_has_no_timer_of_ours():
    assert Scene().connection.deadline() == NEVER


# Opened by the host


def inbound(**fields) -> Scene:
    scene = Scene(inbound=True, **fields)
    (syn,) = scene.tap.take()
    assert (syn.flags, syn.seq, syn.ack, syn.mss, syn.wscale) == (SYN, ISN, 0, 1460, 7)
    assert syn.window == 65535
    return scene


def test_a_client_on_the_host_reaches_the_guest():
    scene = inbound()
    scene.host.inbox += b"early"
    assert scene.ready() == []  # nobody to take it yet
    ack, data = scene.answered()
    assert (ack.flags, ack.ack, ack.seq) == (ACK, scene.next, scene.acked)
    assert data.payload == b"early"
    assert scene.facts & ESTABLISHED
    scene.ack(5)
    scene.guest(b"answer")
    scene.host.drain()
    assert scene.host.wire == b"answer"
    (data,) = scene.remote(b"more")
    assert data.payload == b"more"


def test_the_answer_is_awaited_and_asked_for_again():
    scene = inbound()
    syns = scene.advance(300)
    assert [s.flags for s in syns] == [SYN] * SYN_ACK_RETRIES + [RST]
    assert {s.seq for s in syns[:-1]} == {ISN}
    assert scene.host.closed == "aborted"


def test_nobody_listens_in_the_guest():
    scene = inbound()
    assert scene.answered(flags=RST | ACK) == []
    assert scene.host.closed == "aborted"
    assert scene.connection.error == errno.ECONNREFUSED


@pytest.mark.parametrize("flags", (RST, RST | ACK, SYN, ACK, SYN | ACK, 0))
def test_strangers_do_not_answer_for_the_guest(flags):
    """RFC 9293, 3.10.7.3: what does not acknowledge our SYN is nothing to us."""
    scene = inbound()
    sent = scene.answered(flags=flags, ack=scene.acked + 1)
    assert [s.flags for s in sent] == ([RST] if flags & ACK and not flags & RST else [])
    assert not scene.facts & (ESTABLISHED | CLOSED)
    assert scene.answered() and scene.facts & ESTABLISHED


def test_the_client_leaves_before_the_guest_answers():
    scene = inbound()
    scene.host.failure = errno.ECONNRESET
    (reset,) = scene.ready(ERROR | HANGUP)
    assert (reset.flags, reset.seq) == (RST, scene.acked)
    assert scene.facts & CLOSED


def test_a_guest_that_does_not_scale_back():
    scene = inbound(wscale=-1)
    scene.answered()
    (ack,) = scene.guest(b"x" * 100, window=65535)
    assert ack.window == 65535
    assert scene.connection.send.wnd_from_tap == 65535


def test_the_first_window_holds_for_the_first_data():
    """What the SYN offers is what the guest may send at once, whatever its own numbers are."""
    scene = inbound()
    scene.answered()
    scene.guest(b"y" * 60000)
    scene.host.drain()
    assert scene.host.wire == b"y" * 60000


def test_a_syn_ack_again_is_acknowledged_again():
    scene = inbound()
    scene.answered()
    (ack,) = scene.answered()
    assert (ack.flags, ack.ack) == (ACK, scene.next)


# What was acknowledged arrives


@pytest.mark.parametrize("kept", (False, True))
@pytest.mark.parametrize("how", ("reset", "silence"))
def test_behind_its_fin_the_guest_takes_nothing_back(kept, how):
    """Not by a RST that its kernel sends for a connection that it has forgotten, nor by being gone."""
    queue = {"sndbuf": 20_000, "overhead": 2.0, "snd_wnd": 60_000, "estimate": window.peer} if kept else {}
    scene = Scene(**queue).established()
    scene.guest(b"x" * 20_000)
    assert bool(scene.host.kept) == kept
    scene.guest(flags=FIN | ACK)
    if how == "reset":
        scene.advance(45)
        scene.guest(flags=RST)
    else:
        scene.advance(1000)
    assert scene.facts & CLOSED
    assert scene.host.closed == "closed"


def test_before_its_fin_the_reset_comes_behind_what_was_acknowledged():
    scene = Scene().established()
    scene.guest(b"x" * 20_000)
    scene.guest(flags=RST)
    assert scene.facts & CLOSED and scene.host.closed == "reset at the end"


def test_a_fin_on_a_closed_window():
    """It is one beyond the edge, and the field says 0, not -1 (RFC 9293, 3.8.6)."""
    scene = Scene(wscale=-1, sndbuf=4608).established()
    while scene.connection.receive.room_left() > 0:
        scene.guest(b"x" * min(scene.connection.receive.room_left(), 1460))
    (answer,) = scene.guest(flags=FIN | ACK)
    assert answer.window == 0


def test_data_that_our_acknowledged_fin_has_overtaken():
    """The segment was sent before the guest saw our FIN: its acknowledgement is one less, and its data counts."""
    scene = Scene().established()
    (fin,) = scene.remote(eof=True)
    assert fin.flags == FIN | ACK
    scene.ack(1)
    scene.guest(b"overtaken", ack=seq.add(scene.acked, -1))
    assert bytes(scene.host.outbox) + bytes(scene.host.wire) == b"overtaken"


def test_the_window_of_an_older_segment_does_not_count():
    """RFC 9293, 3.10.7.4: SND.WL1 and SND.WL2."""
    scene = Scene().established()
    scene.guest(window=0)
    scene.remote(b"a" * 3000)
    (data,) = [s for s in scene.guest(at=10, window=512) if s.payload]  # it has overtaken the next one
    assert len(data.payload) == 3000
    scene.guest(b"0123456789", window=0)
    assert scene.connection.send.wnd_from_tap == 512 << 7


def test_the_window_of_a_run_is_that_of_its_last_segment():
    """Segments that were sent between the first and the last of a run are older than its window."""
    scene = Scene().established()
    run = FakeRun(scene.next, scene.acked, 100, payload=b"x" * 3000, frames=3, last=2000)
    scene.connection.on_tap(scene.host.offer(run), scene.now)
    scene.next = seq.add(scene.next, 1000)
    scene.guest(window=0)
    assert scene.connection.send.wnd_from_tap == 100 << 7


def test_duplicates_in_the_run_of_the_acknowledgement_that_they_repeat():
    """RFC 5681, 3.2: the third starts fast retransmit, however the batches fall."""
    scene = Scene().established()
    scene.remote(b"a" * 14_600)
    (resent,) = [s for s in scene.ack(1460, frames=4) if s.payload]
    assert resent.seq == scene.acked
    scene = Scene().established()
    scene.remote(b"a" * 14_600)
    assert not [s for s in scene.ack(1460, frames=3) if s.payload]


@pytest.mark.parametrize("back, challenged", ((1, False), (10_000, False), (10_001, True), (1 << 30, True)))
def test_an_acknowledgement_that_is_far_too_old(back, challenged):
    """RFC 5961, section 5.2: it is answered, and nothing in its segment counts."""
    scene = Scene().established()
    scene.remote(b"a" * 10_000)
    scene.ack(10_000)
    before = scene.connection.receive.seq_from_tap
    sent = scene.guest(b"data", ack=seq.add(scene.acked, -back))
    assert (scene.connection.receive.seq_from_tap == before) == challenged
    assert [s.flags for s in sent] == [ACK]


def test_a_reset_in_the_window_during_the_handshake_is_challenged():
    """RFC 5961, section 3.2."""
    scene = Scene()
    scene.connected()
    (challenge,) = scene.guest(flags=RST, at=5)
    assert (challenge.flags, challenge.ack) == (ACK, scene.next)
    assert scene.guest(flags=RST, at=10_000_000) == []
    assert not scene.facts & CLOSED


def test_a_window_is_counted_from_the_acknowledgement_that_came_with_it():
    """A segment that is sent again acknowledges more than any before it: its window goes with that."""
    scene = Scene().established()
    scene.remote(b"a" * 30_000)
    scene.guest(b"x" * 100, window=200)
    scene.acked = seq.add(scene.acked, 14_600)
    scene.guest(b"x" * 100, at=-50, window=10)  # half of it once more
    assert scene.connection.send.wnd_from_tap == 10 << 7


# Exactly what is sent in the handshake, and what is not


def test_resets_of_the_handshake_carry_nothing_else():
    """RFC 9293, 3.10.7.1: one number, and no window."""
    scene = Scene()
    scene.connected()
    assert scene.guest(ack=seq.add(ISN, 77)) == [Segment(seq.add(ISN, 77), 0, 0, RST)]
    inbound = Scene(inbound=True)
    inbound.tap.take()
    assert inbound.answered(ack=seq.add(ISN, 77)) == [Segment(seq.add(ISN, 77), 0, 0, RST)]
    refused = Scene()
    refused.host.connect_error = errno.ECONNREFUSED
    assert refused.ready(ERROR) == [Segment(0, seq.add(IRS, 1), 0, RST | ACK)]


def test_nothing_is_confirmed_before_it_was_offered():
    scene = Scene()
    assert scene.guest(ack=ISN) == [Segment(ISN, 0, 0, RST)]
    assert not scene.facts & ESTABLISHED


def test_only_an_acknowledgement_confirms():
    scene = Scene()
    scene.connected()
    assert scene.guest(flags=PSH) == []
    assert not scene.facts & ESTABLISHED


def test_only_a_syn_ack_accepts():
    scene = Scene(inbound=True)
    scene.tap.take()
    assert scene.answered(flags=ACK) == []
    assert not scene.facts & ESTABLISHED


@pytest.mark.parametrize(("connected", "at"), ((False, 5), (True, 10_000_000)))
def test_a_reset_that_cannot_be_meant_gets_no_answer(connected, at):
    """Before there is a SYN-ACK, or outside the window."""
    scene = Scene()
    if connected:
        scene.connected()
    assert scene.guest(flags=RST, at=at) == []
    assert not scene.facts & CLOSED


def test_initial_numbers_are_a_clock_and_a_secret():
    """RFC 6528: ISN = M + F(addresses and ports, secret), where M counts 4 microseconds."""
    digest = int.from_bytes(hashlib.blake2b(b"flow", key=b"secret", digest_size=4).digest(), "big")
    assert seq.isn(b"secret", b"flow", 3.0) == (750_000 + digest) & 0xFFFFFFFF
