"""The window: estimators, what holds for all of them, the first window and its scale."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysplice.config import Config, values
from pysplice.tcp import window
from pysplice.tcp.doors import SocketFacts

from ..doors.fakes import FakeHost
from .scene import Scene

KIB, MIB = 1024, 1024 * 1024


ESTIMATORS = sorted(window.ESTIMATORS)


def facts(sndbuf, queued=0, outq=0, mss=1448, rtt=100, sent=0, peer=65535):
    return SocketFacts(sndbuf, queued, outq, mss, peer, rtt, sent, 4 * MIB)


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


# The estimators, one by one

EMPTY = facts(1 * MIB)
BULK = facts(1 * MIB, 512 * KIB, 500 * KIB)  # 353 segments of 1448 bytes, 34 bytes of overhead each
SMALL = facts(87040, 2304, 100)  # one segment of 100 bytes waits
DRAINED = facts(1 * MIB, 500, 1000)  # read apart: the queue went down between the two
OVER = facts(87040, 90000, 80000)
OLD = facts(87040, -1, 40)  # a kernel without SO_MEMINFO

SCALED = window.scaled(1 * MIB)


@pytest.mark.parametrize(
    ("name", "reading", "expected"),
    (
        ("sndbuf", EMPTY, SCALED),
        ("sndbuf", BULK, SCALED - 500 * KIB),
        ("sndbuf", OVER, 87040 - 80000),
        ("sndbuf", facts(87040, 90000, 88000), 0),
        ("sndbuf", OLD, 87000),
        ("linear", EMPTY, SCALED),
        ("linear", BULK, 512 * KIB * 500 // 512),
        ("linear", SMALL, (87040 - 2304) * 100 // 2304),  # the collapse of a nearly empty queue
        ("linear", DRAINED, SCALED - 500),
        ("linear", OVER, 0),
        ("linear", OLD, 87000),
        ("segments", EMPTY, SCALED),
        ("segments", BULK, 512 * KIB // (1448 + 34) * 1448),
        ("segments", SMALL, (87040 - 2304) // (1448 + 2204) * 1448),
        ("segments", DRAINED, SCALED - 1000),
        ("segments", OVER, 0),
        ("segments", OLD, 87000),
        ("segments-wmem", EMPTY, SCALED),
        ("segments-wmem", BULK, 512 * KIB // (1448 + 34) * 1448),
        ("segments-wmem", SMALL, (87040 - 2304) // (1448 + 2204) * 1448),
        ("segments-wmem", DRAINED, SCALED - 500),
        ("segments-wmem", facts(87040, 23040, 14480), (87040 - 23040) // 2304 * 1448),
        ("segments-wmem", OVER, 0),
        ("segments-wmem", OLD, 87000),
        ("truesize", EMPTY, (1 * MIB - 2048) * 1448 // (1448 + 832)),
        ("truesize", BULK, (512 * KIB - 2048) * 1448 // (1448 + 34)),
        ("truesize", SMALL, (87040 - 2304 - 170) * 1448 // (1448 + 2204)),
        ("truesize", DRAINED, (1 * MIB - 500 - 2048) * 1448 // (1448 + 832)),
        ("truesize", facts(46080, mss=65483), (46080 - 90) * 65483 // (65483 + 832)),
        ("truesize", facts(46080, 833, 1), (46080 - 833 - 90) * 1448 // (1448 + 832)),
        ("truesize", OVER, 0),
        ("truesize", facts(87040, 87000, 80000), 0),
        ("truesize", OLD, 87000),
        ("peer", facts(87040, 80000, 70000, peer=3 * MIB), 3 * MIB),
        ("peer", facts(87040, 0, 40, peer=-1), 87000),
        ("peer", facts(87040, peer=0), 0),
    ),
)
def test_estimators(name, reading, expected):
    assert window.ESTIMATORS[name](reading) == expected


@given(
    st.sampled_from(ESTIMATORS),
    st.integers(4608, 16 * MIB),
    st.integers(-1, 16 * MIB),
    st.integers(0, 16 * MIB),
    st.sampled_from((0, 536, 1448, 9000, 65483)),
    st.integers(-1, 1 << 30),
)
def test_estimators_are_sane(name, sndbuf, queued, outq, mss, peer):
    estimate = window.ESTIMATORS[name](facts(sndbuf, queued, outq, mss, peer=peer))
    assert isinstance(estimate, int) and estimate >= 0
    if name != "peer":
        assert estimate <= sndbuf


def test_the_options_name_them_all():
    assert set(values.ESTIMATORS) == set(window.ESTIMATORS)
    assert Config().window == window.DEFAULT_NAME
    assert window.ESTIMATORS[window.DEFAULT_NAME] is window.DEFAULT_ESTIMATOR


@pytest.mark.pure
def test_each_says_where_it_fails():
    for estimator in window.ESTIMATORS.values():
        assert "Fails" in estimator.__doc__ or "otherwise" in estimator.__doc__


# What holds whichever it is


@pytest.mark.parametrize("sent", (0, 100, 60_000))
def test_a_silly_window_is_closed(sent):
    """Less than a segment is left and the socket is not writable, however long nothing was sent."""
    almost_full = facts(87040, 86000, 60000, rtt=20_000, sent=sent)
    assert not window.writable(almost_full)
    assert window.room(almost_full, 1460) == 0


@pytest.mark.parametrize(
    ("sndbuf", "queued", "expected"), ((3000, 2000, True), (3000, 2001, False), (3001, 2001, True))
)
def test_writable_to_the_byte(sndbuf, queued, expected):
    assert window.writable(facts(sndbuf, queued)) == expected == (sndbuf - queued >= queued // 2)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_writable_socket_never_closes_the_window(name):
    """The kernel reports writability only once: a proxy that closes the window there waits for ever."""
    big_segments = facts(87040, 50000, 45000, mss=65483, peer=0)
    assert window.writable(big_segments)
    assert window.room(big_segments, 65480, window.ESTIMATORS[name]) == 65480


@given(
    st.sampled_from(ESTIMATORS),
    st.integers(4608, 16 * MIB),
    st.integers(0, 16 * MIB),
    st.integers(0, 16 * MIB),
    st.sampled_from((536, 1448, 9000, 65483)),
)
def test_room_is_sane(name, sndbuf, queued, outq, mss):
    reading = facts(sndbuf, queued, outq, mss)
    room = window.room(reading, 1460, window.ESTIMATORS[name])
    assert 0 <= room <= max(sndbuf, 1460, 65535)
    if window.writable(reading):
        assert room >= 1460


@pytest.mark.parametrize(
    ("reading", "by"),
    (
        (BULK, "estimate"),
        (facts(87040, 86000, 86500, rtt=20_000, sent=1), "silly"),
        (facts(1000, 600, 500), "writable"),
    ),
)
def test_what_each_bound_said(reading, by):
    said = window.bounds(reading, 1460, window.sndbuf)
    assert said["by"] == by
    assert said["room"] == window.room(reading, 1460, window.sndbuf)
    assert said["estimate"] == said["estimates"]["sndbuf"]
    assert set(said["estimates"]) == set(window.ESTIMATORS)


# The rule that collapses

# Readings of one upload over a path without delay, taken with --trace-window under --window peer
RECORDED = [
    SocketFacts(**json.loads(line))
    for line in Path(__file__).with_name("recorded.jsonl").read_text().splitlines()
]

# The kernel takes a whole sk_buff while W is below S, so that much more than S - W may go in
SKB_MAX = 64 * KIB


def too_much(reading, offer):
    """What the kernel would not take of an offer: the burst that a plain proxy drops, bytes."""
    return max(offer - max(reading.sndbuf - reading.wmem_queued, 0) - SKB_MAX, 0)


def test_the_peers_window_collapses_without_delay():
    """All readings are below a millisecond, where upstream offers the remote host's window alone."""
    assert max(reading.rtt for reading in RECORDED) < 1000
    excess = [too_much(reading, window.peer(reading)) for reading in RECORDED]
    offered = sum(window.peer(reading) for reading in RECORDED)
    assert sum(1 for n in excess if n) > len(RECORDED) * 0.8
    assert sum(excess) > offered / 2
    # The default refuses it, and leaves the sender what the buffer has
    rooms = [window.room(reading, 1460) for reading in RECORDED]
    assert sum(too_much(*pair) for pair in zip(RECORDED, rooms, strict=True)) == 0
    free = sum(max(reading.sndbuf - reading.wmem_queued, 0) for reading in RECORDED)
    assert sum(rooms) > 0.6 * free


@pytest.mark.parametrize(("name", "collapses"), (("peer", True), (window.DEFAULT_NAME, False)))
def test_a_burst_into_a_small_buffer(name, collapses):
    """A guest that fills each window it is given, over a socket as recorded at the start of the upload."""
    overhead = RECORDED[15].wmem_queued / RECORDED[15].outq
    host = {"sndbuf": RECORDED[6].sndbuf, "snd_wnd": RECORDED[6].snd_wnd, "overhead": overhead}
    scene = Scene(estimate=window.ESTIMATORS[name], **host).established()
    connection = scene.connection
    for _ in range(20):
        left = connection.receive.room_left()
        for start in range(0, left, 64_000):
            scene.guest(b"x" * min(left - start, 64_000))
        scene.host.drain()
        scene.ready()
    assert bool(connection.receive.short_sends) == collapses
    assert bool(connection.receive.short_bytes) == collapses


def test_without_meminfo():
    assert Scene(meminfo=False).established().connection.host.facts().wmem_queued == -1
    assert window.room(FakeHost(meminfo=False).facts(), 1460) == 87040


# The first window and the scale


@pytest.mark.parametrize(
    ("rmem_max", "scale"),
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
def test_scale_is_the_kernels(rmem_max, scale):
    first = window.select_initial_window(64 * 1460, 1460, 0, True, rmem_max)
    # The space itself needs a shift of one
    assert first.rcv_wscale == max(scale, 1)
    assert window.select_initial_window(1000, 1460, 0, True, rmem_max).rcv_wscale == scale
    assert window.select_initial_window(1000, 1460, 0, False, rmem_max).rcv_wscale == 0


@pytest.mark.parametrize(
    ("arguments", "rcv_wnd", "wscale", "clamp"),
    (
        # whole segments, unless not even one fits
        ((100_000, 1460), 68 * 1460, 1, 65535 << 1),
        ((1459, 1460), 1459, 0, 65535),
        ((1460, 1460), 1460, 0, 65535),
        ((1461, 1460), 1460, 0, 65535),
        ((-5, 1460), 0, 0, 65535),
        # the clamp bounds the window, what it may become, and itself
        ((100_000, 1460, 20_000, True, 6291456), 13 * 1460, 0, 20_000),
        ((100_000, 1460, 1_000_000, True, 6291456), 68 * 1460, 4, 1_000_000),
        ((100_000, 1460, 0, False, 6291456), 68 * 1460, 0, 65535),
        # few segments at first; hosts that take the field for a signed number
        ((100_000, 1460, 0, True, 6291456, 10), 14_600, 7, 65535 << 7),
        ((100_000, 1460, 0, True, 6291456, 0, True), 32767, 7, 65535 << 7),
        ((20_000, 1460, 0, True, 6291456, 0, True), 13 * 1460, 7, 65535 << 7),
    ),
)
def test_select_initial_window(arguments, rcv_wnd, wscale, clamp):
    assert window.select_initial_window(*arguments) == (rcv_wnd, wscale, clamp)


@given(st.integers(-10, 1 << 31), st.integers(88, 65483), st.integers(0, 1 << 31), st.integers(0, 1 << 31))
def test_the_scale_never_caps_what_may_come(space, mss, clamp, rmem_max):
    first = window.select_initial_window(space, mss, clamp, True, rmem_max)
    assert 0 <= first.rcv_wnd <= max(space, 0)
    most = min(max(first.rcv_wnd, rmem_max), clamp or 1 << 31, 65535 << 14)
    # What cannot be said exactly is less than one unit of the scale
    assert (65536 << first.rcv_wscale) > most
