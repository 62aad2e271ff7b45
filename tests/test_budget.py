"""Shares of descriptors and memory."""

import pytest

from pysplice import budget


@pytest.mark.parametrize("descriptors", (20, 100, 256, 1024, 524288))
@pytest.mark.parametrize("listeners", (0, 10, 100_000))
def test_shares_fit(descriptors, listeners):
    """The shares add up to no more than there is, and every kind has one."""
    most = budget.share_out(descriptors, listeners)
    assert min(most) >= 1
    held = most.outbound + most.inbound + 4 * most.spliced + most.lingering
    held += most.endpoints + most.udp_spliced + most.echo
    left = descriptors - budget.RESERVED - listeners
    if left >= 100:
        assert held <= left


def test_memory_has_one_total():
    """However many have a stream, the next one is smaller, and none goes without."""
    sizes = []
    for lent in range(100_000):
        size = budget.stream_size(lent)
        sizes.append(size)
        if size == budget.STREAM_SIZES[-1]:
            break
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) <= 5 * budget.STREAMS_BYTES
    assert all(
        budget.warm_streams(size) * size <= max(4 * size, budget.WARM_BYTES) for size in budget.STREAM_SIZES
    )


def test_a_bucket():
    limit = budget.RateLimit(burst=10, rate=100)
    assert sum(limit.allows(1.0) for _ in range(50)) == 10
    assert sum(limit.allows(1.1) for _ in range(50)) == 10  # a tenth of a second later
    assert limit.held_back == 80
    # A time that lies back gives and takes nothing
    assert not limit.allows(0.5)
    assert sum(limit.allows(1.25) for _ in range(50)) == 10


def test_new_flows():
    limit = budget.new_flows(5)
    assert sum(limit.allows(1.0) for _ in range(50)) == 5
    assert sum(limit.allows(2.0) for _ in range(50)) == 5
    without = budget.new_flows(0)
    assert all(without.allows(now) for now in (1.0, 1.0, 0.5, 1e9))
