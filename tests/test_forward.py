"""Rules of forwarded ports with a fake loop, and an agent that answers when it is told to."""

import errno
import socket
from types import SimpleNamespace

import pytest

from pysplice.config import ConfigError
from pysplice.config.ports import GUEST, HOST, TCP, UDP, Rule, parse
from pysplice.forward import listeners as module
from pysplice.forward.forward import Forward
from pysplice.forward.listeners import Addressing, Listeners
from pysplice.forward.scan import bits, ranges
from pysplice.observe.log import Log
from pysplice.sockets.request import HostMaker, NoMaker
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


# Changes of several rules


class Takers:
    """Keeps what it is told about UDP listeners."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def opened(self, listener) -> None:
        self.told.append(("opened", listener.port, listener.target))

    def closed(self, listener) -> None:
        self.told.append(("closed", listener.port, listener.target))

    def ports(self, side) -> int:
        return 0

    def release(self, port) -> bool:
        return False


@pytest.fixture
def on_host():
    """A Forward whose listeners are real ones on a loopback address, and `takers`."""
    loop, takers, log = FakeLoop(), Takers(), Log(quiet=True)
    scan = SimpleNamespace(bound=lambda side, protocol: 0, close=lambda: None)
    listeners = Listeners(HostMaker(), NoMaker(), NoFiles(), Addressing(), takers, loop, log)
    forward = Forward(listeners, scan, NoMaker(), Addressing(), takers, 100, loop, log)
    forward.takers = takers
    yield forward
    forward.close()


def at(text: str, protocol: str = TCP) -> Rule:
    """The rule of a text for an address of this test's own."""
    (rule,) = parse("-t", HOST, protocol, f"127.18.4.9/{text}")
    return rule


def sockets(forward: Forward) -> dict[int, int]:
    return {held.port: held.sock.fileno() for held in forward.listeners.all()}


def answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.18.4.9", port)) == 0


def test_a_port_that_leads_elsewhere_stays_open(on_host):
    on_host.change([(True, at("9000:80")), (True, at("9001"))])
    before = sockets(on_host)
    waiting = socket.create_connection(("127.18.4.9", 9000))
    on_host.change([(False, at("9000:80")), (True, at("9000:81")), (False, at("9001"))])
    assert sockets(on_host) == {9000: before[9000]}
    assert [held.target for held in on_host.listeners.all()] == [81]
    assert [fd for fd, _ in on_host.listeners.epoll.poll(0)] == [before[9000]]
    assert answers(9000) and not answers(9001)
    waiting.close()


def test_a_change_that_fails_is_not_there(on_host):
    taken = socket.create_server(("127.18.4.9", 9005))
    on_host.change([(True, at("9000-9002:80-82")), (True, at("9003", UDP))])
    before, rules, told = sockets(on_host), on_host.rules.copy(), on_host.takers.told.copy()
    changes = [(False, at("9000-9002:80-82")), (True, at("9001:7")), (True, at("9004")), (True, at("9005"))]
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.18\.4\.9 port 9005"):
        on_host.change(changes)
    assert (sockets(on_host), on_host.rules, on_host.takers.told) == (before, rules, told)
    assert {held.target for held in on_host.listeners.all()} == {80, 81, 82, 9003}
    assert [answers(port) for port in (9000, 9001, 9002, 9004)] == [True, True, True, False]
    # Some ports of a rule were bound before the one that was not
    with pytest.raises(ConfigError):
        on_host.change([(False, at("9000-9002:80-82")), (True, at("9001-9008"))])
    assert (sockets(on_host), on_host.rules) == (before, rules)
    assert answers(9002) and not answers(9004)
    with pytest.raises(ConfigError, match="is not forwarded"):
        on_host.change([(False, at("9003", UDP)), (False, at("9100"))])
    assert (sockets(on_host), on_host.takers.told) == (before, told)
    taken.close()
    on_host.change(changes)
    assert sorted(sockets(on_host)) == [9001, 9003, 9004, 9005]


def test_udp_flows_end_only_if_they_lead_elsewhere(on_host):
    on_host.change([(True, at("9000-9001", UDP))])
    del on_host.takers.told[:]
    on_host.change([(False, at("9000-9001", UDP)), (True, at("9000", UDP)), (True, at("9001:9002", UDP))])
    assert on_host.takers.told == [("closed", 9001, 9001), ("opened", 9001, 9002)]
    taken = socket.create_server(("127.18.4.9", 9005))
    del on_host.takers.told[:]
    with pytest.raises(ConfigError):
        on_host.change([(False, at("9000", UDP)), (True, at("9000:5", UDP)), (True, at("9005"))])
    assert on_host.takers.told == []  # nobody has noticed
    taken.close()


def test_all_ports_in_pieces(on_host):
    on_host._ephemeral = bits(32768, 60999)
    everything = Rule(HOST, TCP, 1, 65535, 1, weak=True)
    low, high = everything._replace(last=32767), everything._replace(first=61000, to_first=61000)
    on_host._most = 0
    on_host.change([(True, everything)])
    assert on_host.pieces() == [low, high]
    # An ephemeral port is not among them
    on_host._most = 100
    on_host.change([(True, at("40000"))])
    on_host.change([(False, low)])
    assert on_host.pieces() == [high, at("40000")]
    on_host.change([(False, high)])
    assert on_host.rules == [at("40000")]


def test_the_order_of_rules(on_host):
    on_host.change([(True, at("9000")), (True, at("9001")), (True, at("9002"))])
    on_host.arrange([at("9002"), at("9000")])
    assert on_host.rules == [at("9002"), at("9000"), at("9001")]


def of_all(text: str, protocol: str = TCP) -> Rule:
    (rule,) = parse("-t", HOST, protocol, text)
    return rule


@pytest.mark.parametrize("protocol", (TCP, UDP))
def test_a_port_moves_between_addresses(on_host, protocol):
    """The kernel takes the one at all addresses and the one at one of them for the same: one has to go first."""
    everywhere, here = of_all("9000", protocol), at("9000", protocol)
    on_host.change([(True, everywhere)])
    on_host.change([(False, everywhere), (True, here)])
    assert [held.rule for held in on_host.listeners.all()] == [here]
    on_host.change([(False, here), (True, everywhere)])
    assert [held.rule for held in on_host.listeners.all()] == [everywhere]
    # And if something else fails then, it is there again
    taken = socket.create_server(("127.18.4.9", 9005))
    before = on_host.takers.told.copy()
    with pytest.raises(ConfigError):
        on_host.change([(False, everywhere), (True, here), (True, at("9005"))])
    (held,) = on_host.listeners.all()
    assert held.rule == everywhere and held.sock.fileno() >= 0
    if protocol == TCP:
        assert answers(9000) and [fd for fd, _ in on_host.listeners.epoll.poll(0)] == [held.sock.fileno()]
    else:
        assert on_host.takers.told[len(before) :] == [("closed", 9000, 9000), ("opened", 9000, 9000)]
    taken.close()
    on_host.change([(False, everywhere)])
    assert not on_host.listeners.all() and not on_host.listeners.open


def test_a_port_that_cannot_be_opened_again(on_host):
    everywhere, here = of_all("9000"), at("9000")
    on_host.change([(True, everywhere)])
    made = on_host.listeners._make
    lines: list[str] = []
    on_host.listeners._log = SimpleNamespace(warning=lines.append)

    def make(rule, port):
        if rule == everywhere:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        if rule == at("9005"):
            raise OSError(errno.EACCES, "Permission denied")
        return made(rule, port)

    on_host.listeners._make = make
    with pytest.raises(ConfigError, match="Permission denied"):
        on_host.change([(False, everywhere), (True, here), (True, at("9005"))])
    assert not on_host.listeners.all() and not on_host.listeners.open
    assert lines == ["'9000': port 9000 could not be opened again: Address already in use"]


def test_a_range_that_fails_in_its_middle(on_host):
    """The takers know nothing of the ports that were taken over before the one that fails."""
    on_host.change([(True, at("9000:53", UDP))])
    told = on_host.takers.told.copy()
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("127.18.4.9", 9002))
        with pytest.raises(ConfigError):
            on_host.change([(False, at("9000:53", UDP)), (True, at("9000-9002:63-65", UDP))])
    assert on_host.takers.told == told
    on_host.change([(False, at("9000:53", UDP))])
    assert on_host.takers.told[-1] == ("closed", 9000, 53)


def test_takers_hear_of_the_end_before_the_beginning(on_host):
    """Two ports may lead to the same one of the guest's: the new one is that one's, not the one that goes."""
    on_host.change([(True, at("9000:53", UDP))])
    del on_host.takers.told[:]
    on_host.change([(True, at("9001:53", UDP)), (False, at("9000:53", UDP))])
    assert on_host.takers.told == [("closed", 9000, 53), ("opened", 9001, 53)]


def test_all_ports_are_taken_over_at_once(on_host):
    """Not only opened again a few at a time."""
    most = Rule(HOST, TCP, 9000, 9009, 9000, parse("-t", HOST, TCP, "127.18.4.9/1")[0].address, weak=True)
    on_host.change([(True, most)])
    on_host._open_timer.call()
    before = sockets(on_host)
    assert len(before) == 10
    on_host.change([(False, most), (True, most._replace(first=9005, to_first=9005))])
    assert sockets(on_host) == {port: fd for port, fd in before.items() if port >= 9005}


def test_rules_from_elsewhere_mean_ephemeral_ports_too(on_host):
    on_host._ephemeral = bits(9000, 9009)
    rule = at("9000-9001")._replace(weak=True, every=True)
    on_host.change([(True, rule)])
    on_host._open_timer.call()
    assert sorted(sockets(on_host)) == [9000, 9001]
    assert on_host.pieces() == [rule]
    with pytest.raises(ConfigError, match="is forwarded already"):
        on_host.change([(True, rule)])
    on_host.change([(False, rule)])
    assert not on_host.rules


def test_there_is_a_bound_on_rules(on_host):
    on_host.rules = [at(str(port)) for port in range(1, 1025)]
    with pytest.raises(ConfigError, match="1024 rules"):
        on_host.change([(True, at("9000"))])


def test_what_the_agent_makes_during_a_change(forward):
    """It is for a rule that the change has nothing to do with: it stays, whatever becomes of the change."""
    forward.add(following(9000, 9001))
    forward.scan()
    agent, add = forward.agent, forward.add

    def meanwhile(rule, running=False):
        agent.answer()
        return add(rule, running)

    forward.add = meanwhile
    with pytest.raises(ConfigError):
        forward.change([(True, Rule(GUEST, TCP, 9000, 9001, 9000, auto=True))])
    assert ports(forward) == [9000, 9001]


def test_ranges():
    assert list(ranges(0)) == []
    assert list(ranges(0b1011)) == [(0, 1), (3, 3)]
    assert list(ranges(bits(0, 65535))) == [(0, 65535)]
    assert list(ranges(bits(5, 9) | bits(11, 20))) == [(5, 9), (11, 20)]


def come(port: int, count: int) -> None:
    """So many clients, who do not wait."""
    for _ in range(count):
        socket.create_connection(("127.18.4.9", port)).close()


def test_a_flood_of_clients_leaves_time_for_others(on_host, monkeypatch):
    """A few turns in which more clients are there than are accepted, and fewer are accepted from then on."""
    monkeypatch.setattr(module, "FLOOD_TURNS", 8)
    on_host.change([(True, at("9000"))])
    taken: list[int] = []
    on_host.takers.accepted = lambda listener, sock, address, now: (taken.append(1), sock.close())
    most, few, turns = module.ACCEPTS_PER_TURN, module.ACCEPTS_IN_FLOOD, module.FLOOD_TURNS

    def turn() -> int:
        before = len(taken)
        on_host.listeners.on_ready(0.0)
        return len(taken) - before

    come(9000, most * turns + 2 * few + 1)
    assert [turn() for _ in range(turns + 4)] == [most] * turns + [few, few, 1, 0]
    come(9000, most)
    assert turn() == most, "the flood is over"


@pytest.mark.parametrize("each", (2, 4, 8))
def test_a_flooded_port_holds_no_other_out(on_host, monkeypatch, each):
    monkeypatch.setattr(module, "FLOOD_TURNS", 8)
    on_host.change([(True, at("9000")), (True, at("9001"))])
    ports: list[int] = []
    on_host.takers.accepted = lambda listener, sock, address, now: (
        ports.append(listener.port),
        sock.close(),
    )
    for n in range(40):
        come(9000, each)
        if n >= 20:
            come(9001, 1)
        on_host.listeners.on_ready(0.0)
    assert ports.count(9001) >= 8
