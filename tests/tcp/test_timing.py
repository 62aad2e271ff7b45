"""Round trips and timeouts (RFC 6298)."""

import pytest

from pysplice.tcp.timing import BACKOFF_MAX, RTO_INITIAL, RTO_MAX, RTO_MIN, RoundTrip, keepalive_at


def test_before_the_first_sample():
    assert RoundTrip().timeout() == RTO_INITIAL


def test_samples():
    trip = RoundTrip()
    trip.sent(100, 1.0)
    trip.acknowledged(99, 5.0)  # not all of it yet
    trip.acknowledged(100, 1.4)
    assert (trip.srtt, trip.rttvar, trip.rto) == pytest.approx((0.4, 0.2, 1.2))
    trip.sent(200, 2.0)
    trip.acknowledged(200, 2.8)
    # 3/4 * 0.2 + 1/4 * 0.4; 7/8 * 0.4 + 1/8 * 0.8
    assert (trip.rttvar, trip.srtt) == pytest.approx((0.25, 0.45))


def test_one_segment_at_a_time_is_timed():
    trip = RoundTrip()
    trip.sent(100, 1.0)
    trip.sent(200, 9.0)
    trip.acknowledged(200, 9.5)
    assert trip.srtt == pytest.approx(8.5)
    trip.acknowledged(300, 99.0)
    assert trip.srtt == pytest.approx(8.5)


def test_what_was_sent_twice_is_not_timed():
    trip = RoundTrip()
    trip.sent(100, 1.0)
    trip.resent()
    trip.acknowledged(100, 50.0)
    assert trip.srtt == 0


def test_back_off():
    trip = RoundTrip()
    waits = []
    for _ in range(BACKOFF_MAX + 3):
        trip.expired()
        waits.append(trip.timeout())
    assert waits[:4] == [2, 4, 8, 16]
    assert waits[-1] == RTO_MAX
    trip.acknowledged(1, 0.0)
    assert trip.timeout() == RTO_INITIAL


def test_bounds():
    trip = RoundTrip()
    trip.sent(1, 0.0)
    trip.acknowledged(1, 0.00001)
    assert trip.rto == RTO_MIN


def test_keepalive_comes_in_ticks():
    assert keepalive_at(1000.0) == 1030.0
    assert keepalive_at(1000.1) == keepalive_at(1009.9) == 1040.0
