"""Rules of forwarded ports with a fake loop, and an agent that answers when it is told to."""

import socket
from types import SimpleNamespace

import pytest

from pysplice.config import ConfigError
from pysplice.config.ports import GUEST, TCP, Rule
from pysplice.forward.forward import Forward
from pysplice.forward.listeners import Addressing, Listeners
from pysplice.observe.log import Log
from pysplice.sockets.unix import NoFiles

from .support.loops import FakeLoop


class Agent:
    """Makes sockets in the namespace, each when answer() is called."""

    available = True

    def __init__(self) -> None:
        self.asked: list = []

    def ask(self, request, done) -> None:
        self.asked.append(done)

    def answer(self) -> None:
        asked, self.asked = self.asked, []
        for done in asked:
            sock = socket.socket()
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            done([sock], 0)


@pytest.fixture
def forward():
    loop, agent, log = FakeLoop(), Agent(), Log(quiet=True)
    takers = SimpleNamespace(ports=lambda side: 0)
    scan = SimpleNamespace(bound=lambda side, protocol: 0b1111 << 9000, close=lambda: None)
    listeners = Listeners(None, agent, NoFiles(), Addressing(), takers, loop, log)
    forward = Forward(listeners, scan, agent, Addressing(), takers, 100, loop, log)
    forward.agent, forward.loop = agent, loop
    yield forward
    forward.close()


def following(first: int, last: int) -> Rule:
    return Rule(GUEST, TCP, first, last, first, auto=True)


def ports(forward: Forward) -> list[int]:
    return sorted(held.port for held in forward.listeners.all())


def test_a_part_that_is_taken_out_while_the_agent_is_asked(forward):
    """The other ports of the rule are served by what is left of it, and asked for once."""
    forward.add(following(9000, 9003))
    forward.scan()
    assert len(forward.agent.asked) == 4
    forward.remove(following(9001, 9001))
    forward.scan()
    assert len(forward.agent.asked) == 4
    forward.agent.answer()
    assert ports(forward) == [9000, 9002, 9003]
    assert {held.rule for held in forward.listeners.all()} == {following(9000, 9000), following(9002, 9003)}
    forward.scan()
    assert not forward.agent.asked


def test_a_rule_that_is_removed_while_the_agent_is_asked(forward):
    forward.add(following(9000, 9003))
    forward.scan()
    forward.remove(following(9000, 9003))
    forward.agent.answer()
    assert ports(forward) == []


def test_the_nearest_rule_is_named(forward):
    forward.add(Rule(GUEST, TCP, 1, 65535, 1, auto=True, weak=True))
    with pytest.raises(ConfigError, match=r"^'9000' is not forwarded$"):
        forward.remove(Rule(GUEST, TCP, 9000, 9000, 9000))
