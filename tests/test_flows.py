"""The table of flows: limits, timers, and what addresses mean."""

import socket
from types import SimpleNamespace

import pytest

from pysplice.loop import NEVER
from pysplice.stream.flows import Flows
from pysplice.tcp.events import CLOSED, ESTABLISHED, TAP_SYN_ACK_SENT
from pysplice.translate import Translation

from .support.loops import FakeLoop

pytestmark = pytest.mark.pure  # a stub stands for a connection


class Stub:
    """A connection that does nothing but wait."""

    def __init__(self, at: float = NEVER) -> None:
        self.facts = 0
        self.receive = SimpleNamespace(bytes_read=10)
        self.send = SimpleNamespace(bytes_acked=1)
        self.at = at
        self.fired: list[float] = []

    def deadline(self) -> float:
        return self.at

    def on_timer(self, now: float) -> None:
        self.fired.append(now)
        self.at = NEVER


def flows_of(outbound, inbound, half_open, failed=None):
    return Flows(FakeLoop(0.0), outbound, inbound, half_open, failed)


def test_opened_and_closed():
    flows = flows_of(10, 10, 10)
    flow = flows.add(b"k", Stub())
    flows.settle(flow)
    assert flows.lookup(b"k") is flow and len(flows) == 1
    flow.connection.facts = CLOSED
    flows.settle(flow)
    assert flows.lookup(b"k") is None and len(flows) == 0 and flows.half_open == 0
    assert flows.bytes_moved() == (10, 1)


def test_an_old_flow_does_not_remove_its_successor():
    flows = flows_of(10, 10, 10)
    old = flows.add(b"k", Stub())
    old.connection.facts = CLOSED
    new = flows.add(b"k", Stub())
    flows.settle(old)
    assert flows.lookup(b"k") is new


def test_a_flow_that_was_agreed_to_gives_way_last():
    """The guest's answer may be on its way, behind SYNs that came later."""
    flows = flows_of(10, 10, 2)
    first, second = flows.add(b"1", Stub()), flows.add(b"2", Stub())
    first.connection.facts = TAP_SYN_ACK_SENT
    flows.settle(first)
    assert flows.longest_waiting(inbound=False) is second
    second.connection.facts = TAP_SYN_ACK_SENT
    flows.settle(second)
    flows.settle(first)  # once only: what it sends again does not count
    assert flows.longest_waiting(inbound=False) is first
    first.connection.facts |= ESTABLISHED
    flows.settle(first)
    assert flows.half_open == 1


def test_limits():
    flows = flows_of(3, 2, 2)
    first = flows.add(b"1", Stub())
    assert flows.longest_waiting(inbound=False) is None
    second = flows.add(b"2", Stub())
    assert flows.longest_waiting(inbound=False) is first  # it has to give way
    first.connection.facts = ESTABLISHED
    flows.settle(first)
    assert flows.longest_waiting(inbound=False) is None and flows.has_room()
    flows.add(b"3", Stub())
    assert flows.longest_waiting(inbound=False) is second
    assert not flows.has_room() and flows.refused == 1


def test_each_direction_has_a_share():
    """Idle clients from outside do not keep the guest from connecting, nor the other way round."""
    flows = flows_of(2, 2, 2)
    clients = [flows.add(b"in%d" % n, Stub(), inbound=True) for n in range(2)]
    assert not flows.has_room(inbound=True) and flows.has_room()
    for n in range(2):
        flow = flows.add(b"out%d" % n, Stub())
        flow.connection.facts = ESTABLISHED
        flows.settle(flow)
    assert not flows.has_room() and (flows.inbound, flows.outbound) == (2, 2)
    clients[0].connection.facts = CLOSED
    flows.settle(clients[0])
    flows.settle(clients[0])
    assert flows.has_room(inbound=True) and (flows.inbound, flows.outbound) == (1, 2)


def test_timers_fire_in_order_and_once():
    flows = flows_of(10, 10, 10)
    late, early = flows.add(b"1", Stub(5.0)), flows.add(b"2", Stub(3.0))
    flows.settle(late)
    flows.settle(early)
    assert flows._loop.timers.next() == 3.0
    flows._loop.advance(4.0 - flows._loop.time)
    assert (early.connection.fired, late.connection.fired) == ([3.0], [])
    flows._loop.advance(9.0 - flows._loop.time)
    assert late.connection.fired == [5.0]
    assert flows._loop.timers.next() == NEVER


def test_a_timer_that_raises_harms_no_other():
    class Broken(Stub):
        def on_timer(self, now: float) -> None:
            raise RuntimeError

    failed = []

    def note(flow, error):
        failed.append(flow)
        flow.connection.facts = CLOSED

    flows = flows_of(10, 10, 10, note)
    broken, sound = flows.add(b"1", Broken(1.0)), flows.add(b"2", Stub(2.0))
    flows.settle(broken)
    flows.settle(sound)
    broken.connection.facts = 0

    flows._loop.advance(5.0 - flows._loop.time)
    assert failed == [broken]
    assert sound.connection.fired == [2.0]
    assert flows.lookup(b"1") is None


def test_a_deadline_that_moved_is_looked_at_again():
    flows = flows_of(10, 10, 10)
    flow = flows.add(b"1", Stub(3.0))
    flows.settle(flow)
    flow.connection.at = 7.0
    flows.settle(flow)
    flows._loop.advance(3.5 - flows._loop.time)
    assert flow.connection.fired == []
    assert flows._loop.timers.next() == 7.0
    flow.connection.at = 4.0  # and one that moved forward
    flows.settle(flow)
    assert flows._loop.timers.next() == 4.0


def test_the_heap_does_not_grow_with_dead_flows():
    flows = flows_of(10, 10, 10)
    for i in range(10_000):
        flow = flows.add(b"%d" % i, Stub(1000.0 + i))
        flows.settle(flow)
        flow.connection.facts = CLOSED
        flows.settle(flow)
    assert len(flows._loop.timers._heap) < 200


def key(destination: str, port: int = 80) -> bytes:
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    packed = socket.inet_pton(family, destination)
    return bytes(len(packed)) + packed + b"\x9c\x40" + port.to_bytes(2, "big")


def test_destinations():
    gateway = {socket.inet_pton(socket.AF_INET, "10.0.2.2"): "127.0.0.1"}
    outbound = Translation(gateway, source4="192.0.2.1", interface6="eth1", scope=3)
    target = outbound.target(key("10.0.2.2", 22))
    assert (target.family, target.address, target.source) == (socket.AF_INET, ("127.0.0.1", 22), None)
    target = outbound.target(key("198.51.100.1"))
    assert (target.address, target.source) == (("198.51.100.1", 80), ("192.0.2.1", 0))
    target = outbound.target(key("2001:db8::1"))
    assert (target.address, target.source, target.interface) == (("2001:db8::1", 80, 0, 0), None, "eth1")
    assert outbound.target(key("fe80::1")).address == ("fe80::1", 80, 0, 3)
