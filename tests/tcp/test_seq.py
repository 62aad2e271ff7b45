"""Sequence numbers wrap."""

from hypothesis import given
from hypothesis import strategies as st

from pysplice.tcp import seq

NUMBER = st.integers(0, seq.MASK)
NEAR = st.integers(-(2**31) + 1, 2**31 - 1)


@given(NUMBER, NEAR)
def test_diff_undoes_add(number, n):
    assert seq.diff(seq.add(number, n), number) == n


@given(NUMBER, NEAR)
def test_order_is_antisymmetric(number, n):
    other = seq.add(number, n)
    assert seq.diff(other, number) == -seq.diff(number, other)


def test_wrap():
    assert seq.add(0xFFFFFFFF, 1) == 0
    assert seq.diff(0, 0xFFFFFFFF) == 1


def test_isn_differs_by_flow_and_secret_and_moves_with_time():
    key, other = b"k" * 12, b"l" * 12
    assert seq.isn(b"s", key, 1.0) != seq.isn(b"s", other, 1.0)
    assert seq.isn(b"s", key, 1.0) != seq.isn(b"t", key, 1.0)
    # RFC 9293, 3.4.1: a tick is 4 microseconds
    assert seq.diff(seq.isn(b"s", key, 2.0), seq.isn(b"s", key, 1.0)) == 250_000
