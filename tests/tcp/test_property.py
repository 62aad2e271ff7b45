"""Whatever the link does, the bytes arrive once, in order, in both directions."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pysplice.tcp.events import FINISHED

from .model import World

STEPS = 60_000


def drive(world: World) -> None:
    for _ in range(STEPS):
        world.step()
        if world.finished():
            break
    assert world.finished(), "stalled"
    assert world.connection.facts & FINISHED == FINISHED
    assert not world.guest.reset
    world.host.drain()
    assert world.host.wire == world.up
    assert world.guest.received == world.down
    assert world.host.closed == "closed"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    up=st.integers(0, 200_000),
    down=st.integers(0, 200_000),
    loss=st.sampled_from((0.0, 0.0, 0.05, 0.3)),
    repeat=st.sampled_from((0.0, 0.2)),
)
def test_bytes_arrive_once_and_in_order(seed, up, down, loss, repeat):
    rng = random.Random(seed)
    drive(World(seed, rng.randbytes(up), rng.randbytes(down), loss, repeat))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 500_000))
def test_nothing_is_sent_twice_without_loss(seed, size):
    """A short send never costs a retransmission, in either direction."""
    rng = random.Random(seed)
    world = World(seed, rng.randbytes(size), rng.randbytes(size), 0.0, 0.0)
    drive(world)
    assert world.connection.send.retransmissions == 0
