"""Bulk data, compared by hash: 1 GiB each way, plain frames, a link that loses and reorders."""

import pytest

from ..support import namespaces
from ..support.transfer import transfer
from .test_flows import pair

GIB = 1 << 30


def both_directions(world, version, size, timeout=300):
    for upload in (True, False):
        guest, remote = pair(world, version)
        with guest, remote:
            a, b = (guest, remote) if upload else (remote, guest)
            transfer(a, b, version, size, timeout)


@pytest.mark.parametrize("version", (4, 6))
def test_gigabyte(served, version):
    both_directions(served, version, GIB)


@pytest.mark.parametrize("options", (("--no-offload", "-m", "1500"), ("-m", "1500"), ("-m", "1280")))
def test_other_roads(world, options):
    world.pysplice("--config-net", *options)
    for version in (4, 6):
        both_directions(world, version, GIB // 4)


@pytest.mark.parametrize("options", ((), ("--no-offload", "-m", "1500")))
def test_loss_and_reordering(isolated, options):
    link = ("--loss", "1", "--reorder", "1", "--delay", "0.1")
    with namespaces.ImpairedWorld(*link) as world:
        world.pysplice("--config-net", *options)
        both_directions(world, 4, GIB)


def test_a_slow_line(isolated):
    """20 Mbit/s and 20 ms: the window follows the path, nothing is sent twice to the guest."""
    with namespaces.ImpairedWorld("--delay", "10", "--rate", "20") as world:
        world.pysplice("--config-net")
        both_directions(world, 4, 4 << 20)
