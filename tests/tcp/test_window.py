"""The window: what the host socket can still queue."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysplice.tcp import window
from pysplice.tcp.doors import SocketFacts

KIB, MIB = 1024, 1024 * 1024


def facts(sndbuf, queued=0, outq=0, mss=1448, rtt=100, sent=0):
    return SocketFacts(sndbuf, queued, outq, mss, 65535, rtt, sent)


@pytest.mark.parametrize(
    ("sndbuf", "payload"),
    (
        (0, 0),
        (16384, 16384),
        (128 * KIB, 128 * KIB),
        (4 * MIB, 3 * MIB),
        (8 * MIB, 6 * MIB),
        # half-way between small and big it is 87.5 %
        ((128 * KIB + 4 * MIB) // 2, int((128 * KIB + 4 * MIB) // 2 * 0.875)),
    ),
)
def test_scaled(sndbuf, payload):
    assert abs(window.scaled(sndbuf) - payload) <= 1


@given(st.integers(0, 64 * MIB))
def test_scaled_grows_with_the_buffer(sndbuf):
    assert window.scaled(sndbuf) <= window.scaled(sndbuf + 4096) <= sndbuf + 4096


def test_empty_queue_gives_the_scaled_buffer():
    assert window.room(facts(87040), 1460) == 87040


def test_overhead_is_counted_by_segment():
    # 10 segments queued, each charged 2304 bytes: 34 more of them fit into what is free
    room = window.room(facts(101376, 23040, 14480), 1460)
    assert room == (101376 - 23040) // 2304 * 1448 == 34 * 1448


def test_more_charged_than_allowed_is_no_room():
    """Memory pressure, or a last segment that overshot: W > S."""
    assert window.room(facts(87040, 90000, 80000), 1460) == 0


@pytest.mark.parametrize("queued", (0, 500, 1000))
def test_a_queue_that_drained_between_the_readings(queued):
    """Q > 0 with W <= Q: the overhead cannot be seen, the scaled buffer counts."""
    assert window.room(facts(87040, queued, 1000), 1460) == 87040 - queued


def test_without_meminfo():
    assert window.room(facts(87040, -1, 40), 1460) == 87000


def test_silly_window_is_closed_while_data_flows():
    """Less than a segment is left and the socket is not writable."""
    almost_full = facts(87040, 86000, 60000, rtt=20_000, sent=100)
    assert not window.writable(almost_full)
    assert window.room(almost_full, 1460) == 0


@pytest.mark.parametrize(
    ("sndbuf", "queued", "expected"), ((3000, 2000, True), (3000, 2001, False), (3001, 2001, True))
)
def test_writable_to_the_byte(sndbuf, queued, expected):
    assert window.writable(facts(sndbuf, queued)) == expected == (sndbuf - queued >= queued // 2)


def test_a_writable_socket_never_closes_the_window():
    """The kernel reports writability once only: who closes the window there waits for ever."""
    big_segments = facts(87040, 50000, 45000, mss=65483)
    assert window.writable(big_segments)
    assert window.room(big_segments, 65480) == 65480


@given(
    st.integers(4608, 16 * MIB),
    st.integers(0, 16 * MIB),
    st.integers(0, 16 * MIB),
    st.sampled_from((536, 1448, 9000, 65483)),
)
def test_room_is_sane(sndbuf, queued, outq, mss):
    room = window.room(facts(sndbuf, queued, outq, mss), 1460)
    assert 0 <= room <= max(sndbuf, 1460)
    if window.writable(facts(sndbuf, queued, outq, mss)):
        assert room >= 1460


@pytest.mark.parametrize(
    ("space", "scale"),
    (
        (0, 0),
        (65535, 0),
        (65536, 1),
        (131071, 1),
        (131072, 2),
        (3839488, 6),
        (4194304, 7),
        (6291456, 7),
        (33554432, 10),
        (1 << 31, 14),
    ),
)
def test_scale_is_the_kernels(space, scale):
    assert window.scale(space) == scale


def test_queue_budget():
    assert window.queue_budget(1000, 1400, 1) == 700_000
    assert window.queue_budget(1000, 1400, 10) == 70_000
    assert window.queue_budget(1000, 100, 64) == 700
    assert window.queue_budget(1000, 100, 6400) == 200
