"""A guest that asks for more than there is time for: who else is served, what waits, and what is lost."""

import socket

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.l2 import Ether

from pysplice import backlog
from pysplice.datagram import plane as datagram_plane
from pysplice.link import plane as link_plane

from .support.house import GATEWAY, GUEST, House
from .support.taps import GUEST_MAC, OUR_MAC

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0), backlog=600) as listener:
        listener.settimeout(5)
        yield listener


@pytest.fixture
def peer():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


def batch(house, *packets) -> None:
    """Frames that are in the ring together; nothing is read yet."""
    for packet in packets:
        house.guest.send(bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / packet))


def syn(port: int, sport: int, seq: int = 1):
    return IP(src=GUEST, dst=GATEWAY) / TCP(sport=sport, dport=port, flags="S", seq=seq, window=64240)


def datagram(port: int, sport: int, payload: bytes = b"x"):
    return IP(src=GUEST, dst=GATEWAY) / UDP(sport=sport, dport=port) / payload


def until_idle(house) -> None:
    for _ in range(1000):
        if not house.loop.turn(0.02) and house.loop.timers.next() > house.loop.time:
            return


def flows(house) -> dict:
    return house.proxy.status.figures()


def test_a_connection_does_not_wait_for_syns(server):
    """Data that comes behind fifty SYNs goes out first, but for the few that a batch may begin."""
    house = House()
    port = server.getsockname()[1]

    def script():
        seq, ack = house.established(port)
        peer, _ = server.accept()
        data = TCP(sport=40000, dport=port, flags="PA", seq=seq, ack=ack, window=64240)
        batch(
            house,
            *(syn(port, sport) for sport in range(1000, 1050)),
            IP(src=GUEST, dst=GATEWAY) / data / b"now",
        )
        house.loop.turn()
        peer.setblocking(False)
        assert peer.recv(10) == b"now"
        opened = flows(house)["connections"]["opened"]
        assert opened <= 1 + 2 * backlog.FLOWS_PER_TURN
        until_idle(house)
        assert flows(house)["connections"]["opened"] == 51
        peer.close()

    house.serve(script)


def test_syns_beyond_the_room_are_lost(server):
    house = House()
    port = server.getsockname()[1]

    def script():
        for first in (1000, 1100, 1200, 1300):
            batch(house, *(syn(port, sport) for sport in range(first, first + 100)))
            house.loop.watched[house.tap_fd]()
        until_idle(house)
        connections = flows(house)["connections"]
        assert connections["opened"] == backlog.FLOWS_PER_TURN + backlog.FLOWS_MAX
        assert connections["refused"] == 400 - connections["opened"]

    house.serve(script)
    assert "too many connections are opened at once, a SYN was dropped" in house.said.getvalue()


def test_a_syn_that_waits_can_be_replaced_and_taken_back(server):
    """The guest uses the ports again, or resets what it has asked for."""
    house = House()
    port = server.getsockname()[1]

    def script():
        batch(house, *(syn(port, sport, seq=5) for sport in range(1000, 1020)))
        batch(house, syn(port, 1018, seq=77))
        batch(house, IP(src=GUEST, dst=GATEWAY) / TCP(sport=1019, dport=port, flags="R", seq=6))
        until_idle(house)
        acks = {frame[TCP].dport: frame[TCP].ack for frame in house.received()}
        assert acks[1017] == 6 and acks[1018] == 78
        assert 1019 not in acks

    house.serve(script)


def test_first_datagrams_wait_in_their_order(peer):
    """Also those that come while the first ones wait; none is lost."""
    house = House()
    port = peer.getsockname()[1]

    def script():
        sports = range(2000, 2020)
        batch(house, *(datagram(port, sport, b"%d:%d" % (sport, n)) for n in range(2) for sport in sports))
        house.loop.watched[house.tap_fd]()
        batch(house, *(datagram(port, sport, b"%d:2" % sport) for sport in sports))
        until_idle(house)
        got: dict[bytes, list[bytes]] = {}
        for _ in range(60):
            sport, _, n = peer.recv(100).partition(b":")
            got.setdefault(sport, []).append(n)
        assert len(got) == 20 and all(order == [b"0", b"1", b"2"] for order in got.values())
        assert flows(house)["udp_flows"]["opened"] == 20

    house.serve(script)


def test_datagrams_beyond_the_room_are_lost_and_counted(peer, monkeypatch):
    house = House()
    port = peer.getsockname()[1]
    monkeypatch.setattr(datagram_plane, "KEPT_BYTES", 10_000)

    def script():
        batch(house, *(datagram(port, sport, bytes(1000)) for sport in range(2000, 2040)))
        until_idle(house)
        found = flows(house)
        opened = found["udp_flows"]["opened"]
        assert opened == backlog.FLOWS_PER_TURN + 10_000 // (1000 + datagram_plane.KEPT_EACH)
        assert found["datagrams"]["not_passed_on"] == 40 - opened
        # The room is there again
        house.loop.advance(0.01)
        batch(house, *(datagram(port, sport, bytes(1000)) for sport in range(3000, 3008)))
        until_idle(house)
        assert flows(house)["udp_flows"]["opened"] == opened + 8

    house.serve(script)


def test_a_datagram_in_fragments_does_not_overtake(peer):
    house = House()
    port = peer.getsockname()[1]

    def script():
        frames = fragment(datagram(port, 2019, b"f" * 3000), 1480)
        batch(house, *(datagram(port, sport) for sport in range(2000, 2020)))
        house.loop.watched[house.tap_fd]()
        batch(house, *frames)
        house.loop.watched[house.tap_fd]()
        until_idle(house)
        got = [(len(data), name) for data, name in (peer.recvfrom(5000) for _ in range(21))]
        (sender,) = [name for size, name in got if size == 3000]
        assert [size for size, name in got if name == sender] == [1, 3000]

    house.serve(script)


def test_what_waits_goes_out_at_the_end(peer):
    house = House()
    port = peer.getsockname()[1]

    def script():
        batch(house, *(datagram(port, sport) for sport in range(2000, 2050)))
        house.loop.on_signal()

    house.serve(script)
    assert [peer.recv(10) for _ in range(50)] == [b"x"] * 50


def test_a_flood_of_other_frames_holds_no_connection_up(server):
    house = House()
    port = server.getsockname()[1]
    echo = [IP(src=GUEST, dst=GATEWAY) / ICMP(id=n, seq=1) / b"ping" for n in range(100)]

    def script():
        seq, ack = house.established(port)
        peer, _ = server.accept()
        data = TCP(sport=40000, dport=port, flags="PA", seq=seq, ack=ack, window=64240)
        batch(house, *echo, IP(src=GUEST, dst=GATEWAY) / data / b"now")
        served = []
        plane = house.proxy._planes.reader._link
        real = plane._on_frame
        plane._on_frame = lambda frame, now: (served.append(frame), real(frame, now))
        house.loop.watched[house.tap_fd]()
        peer.setblocking(False)
        assert peer.recv(10) == b"now"
        assert len(served) == link_plane.FRAMES_PER_TURN
        until_idle(house)
        assert len(served) == 100
        peer.close()

    house.serve(script)


def test_a_waiting_datagram_that_raises_harms_no_other(peer, monkeypatch):
    house = House()
    port = peer.getsockname()[1]

    def script():
        udp = house.proxy._planes.datagrams._from_guest.udp
        real = udp.on_kept

        def on_kept(kept, now):
            if kept.payloads == [b"bad"]:
                raise RuntimeError("planted")
            real(kept, now)

        udp.on_kept = on_kept
        batch(house, *(datagram(port, s, b"bad" if s == 2010 else b"good") for s in range(2000, 2020)))
        until_idle(house)
        assert [peer.recv(10) for _ in range(19)] == [b"good"] * 19

    house.serve(script)
    assert "planted" in house.said.getvalue()
