"""A guest that asks for more than there is time for: who else is served, what waits, and what is lost."""

import contextlib
import os
import socket
import struct
import threading

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.l2 import ARP, Ether

from pysplice import backlog
from pysplice.config.ports import HOST, Rule
from pysplice.config.ports import UDP as UDP_RULE
from pysplice.datagram import plane as datagram_plane
from pysplice.link import plane as link_plane

from .support.house import GATEWAY, GUEST, House
from .support.taps import GUEST_MAC, OUR_MAC

pytestmark = pytest.mark.usefixtures("isolated")
IP_RECVTTL = 12
GSO_UDP_L4 = 5


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
        assert opened <= 1 + backlog.AT_ONCE + backlog.TURN_MAX
        until_idle(house)
        assert flows(house)["connections"]["opened"] == 51
        peer.close()

    house.serve(script)


def test_syns_beyond_the_room_are_lost(server, monkeypatch):
    house = House()
    port = server.getsockname()[1]
    room = 100
    house.proxy._planes.streams._backlog._most = room

    def script():
        for first in (1000, 1100):
            batch(house, *(syn(port, sport) for sport in range(first, first + 100)))
            house.loop.watched[house.tap_fd]()
        until_idle(house)
        connections = flows(house)["connections"]
        assert connections["opened"] == backlog.AT_ONCE + room
        assert connections["refused"] == 200 - connections["opened"]

    house.serve(script)
    assert "too many connections are opened at once, a SYN was dropped" in house.said.getvalue()


def test_a_burst_is_no_flood(server, peer):
    """So many connections and so many queries at once, as a program may begin: none is lost."""
    house, count = House(descriptors=9000), 900
    port = server.getsockname()[1]

    def script():
        for first in range(10_000, 10_000 + count, 50):
            batch(house, *(syn(port, sport) for sport in range(first, first + 50)))
            batch(house, *(datagram(peer.getsockname()[1], sport) for sport in range(first, first + 50)))
            house.loop.watched[house.tap_fd]()
        until_idle(house)
        found = flows(house)
        assert found["connections"] == {"opened": count, "open": count, "refused": 0}
        assert found["udp_flows"]["opened"] == count and found["datagrams"]["not_passed_on"] == 0

    house.serve(script)


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


@pytest.mark.parametrize("bound", ("KEPT_BYTES", "KEPT_BYTES_FLOW"))
def test_datagrams_beyond_the_room_are_lost_and_counted(peer, monkeypatch, bound):
    """All that wait have a room in common, and each flow has a part of it."""
    house = House()
    port = peer.getsockname()[1]
    monkeypatch.setattr(datagram_plane, bound, 10_000)
    room = 10_000 // (1000 + datagram_plane.KEPT_EACH)

    def script():
        first = [datagram(port, sport) for sport in range(2000, 2000 + backlog.AT_ONCE)]
        many = [
            datagram(port, 3000 if bound == "KEPT_BYTES_FLOW" else 3000 + n, bytes(1000)) for n in range(20)
        ]
        batch(house, *first)
        for packet in many:
            batch(house, packet)
        house.loop.watched[house.tap_fd]()
        until_idle(house)
        lost = (
            20 if bound == "KEPT_BYTES_FLOW" else 20 - room
        )  # a run of one flow waits whole or not at all
        assert flows(house)["datagrams"]["not_passed_on"] == lost
        # The room is there again
        house.loop.advance(0.01)
        before = flows(house)["udp_flows"]["opened"]
        batch(house, *(datagram(port, sport, bytes(1000)) for sport in range(4000, 4008)))
        until_idle(house)
        assert flows(house)["udp_flows"]["opened"] == before + 8

    house.serve(script)
    assert "too many new UDP flows at once, datagrams were dropped" in house.said.getvalue()


def test_datagrams_that_wait_keep_their_hop_limits(peer):
    """traceroute(8) asks from one port with a limit that grows."""
    house = House()
    peer.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    port = peer.getsockname()[1]

    def script():
        ask = [
            IP(src=GUEST, dst=GATEWAY, ttl=ttl) / UDP(sport=3000, dport=port) / (b"%d" % ttl)
            for ttl in (1, 2, 2, 64)
        ]
        batch(house, *(datagram(port, sport, b"") for sport in range(2000, 2000 + backlog.AT_ONCE)), *ask)
        until_idle(house)
        got = []
        for _ in range(backlog.AT_ONCE + len(ask)):
            data, ancillary, _, _ = peer.recvmsg(100, 100)
            if data:
                got.append((int(data), int.from_bytes(ancillary[0][2], "little")))
        assert got == [(1, 1), (2, 2), (2, 2), (64, 64)]

    house.serve(script)


def test_what_waited_goes_before_what_came_later(peer):
    """Also where a client has opened the flow in between."""
    house = House(ipv6=True)
    house.proxy.follow((Rule(HOST, UDP_RULE, 20_080, 20_080, 80),))
    port = peer.getsockname()[1]

    def script():
        batch(house, *(datagram(port, sport) for sport in range(2000, 2000 + backlog.AT_ONCE)))
        batch(house, datagram(port, 80, b"first"))
        house.loop.watched[house.tap_fd]()
        peer.sendto(b"hello", ("127.0.0.1", 20_080))
        for fd, call in list(house.loop.watched.items()):
            if fd != house.tap_fd and fd == house.proxy._planes.forward.fileno():
                call()
        batch(house, datagram(port, 80, b"second"))
        house.loop.watched[house.tap_fd]()
        until_idle(house)
        got = [peer.recv(100) for _ in range(backlog.AT_ONCE + 2)]
        assert [data for data in got if data != b"x"] == [b"first", b"second"]

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


@pytest.mark.parametrize("gone", (False, True))
def test_what_waits_goes_out_at_the_end(peer, gone):
    """Also more than a batch, and if the tap has ended with its namespace; and it is counted."""
    house, count = House(descriptors=9000), 900
    port = peer.getsockname()[1]
    got: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(TimeoutError):
            while len(got) < count:
                got.append(peer.recv(10))

    def script():
        batch(house, *(datagram(port, sport) for sport in range(2000, 2000 + count)))
        if gone:
            for _ in range(4):
                house.loop.watched[house.tap_fd]()
            os.dup2(os.open("/dev/null", os.O_WRONLY), house.tap_fd)
        house.loop.on_signal()

    reader = threading.Thread(target=read)
    reader.start()
    house.serve(script)
    reader.join()
    assert got == [b"x"] * count
    assert f"{count} UDP flows" in house.said.getvalue()


def test_other_packets_hold_no_connection_up_and_none_is_lost(server):
    """The link is answered at once, whatever waits to go beyond it."""
    house = House()
    port = server.getsockname()[1]
    echo = [IP(src=GUEST, dst=GATEWAY) / ICMP(id=n, seq=1) / b"ping" for n in range(100)]

    def script():
        seq, ack = house.established(port)
        peer, _ = server.accept()
        data = TCP(sport=40000, dport=port, flags="PA", seq=seq, ack=ack, window=64240)
        batch(house, *echo, IP(src=GUEST, dst=GATEWAY) / data / b"now")
        house.guest.send(
            bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / ARP(hwsrc=GUEST_MAC, psrc=GUEST, pdst=GATEWAY))
        )
        served = []
        beyond = house.proxy._planes.datagrams
        beyond.on_frame = lambda frame, now: served.append(frame)
        house.loop.watched[house.tap_fd]()
        peer.setblocking(False)
        assert peer.recv(10) == b"now"
        assert len(served) == backlog.AT_ONCE
        assert [frame[ARP].op for frame in house.received() if ARP in frame] == [2]
        until_idle(house)
        assert len(served) == 100
        peer.close()

    house.serve(script)


@pytest.mark.parametrize("bound", ("PACKETS_WAITING", "BYTES_WAITING"))
def test_while_too_many_fragments_wait_nothing_is_read(monkeypatch, bound):
    """One that is lost costs its whole datagram: the ring fills, and senders have to wait."""
    house = House()
    monkeypatch.setattr(link_plane, bound, 10)
    monkeypatch.setattr(backlog, "TURN_MAX", 5)
    served = []
    parts = [part for n in range(30) for part in fragment(datagram(9, 2000 + n, bytes(5000)), 1480)]

    def script():
        house.proxy._planes.datagrams.on_frame = lambda frame, now: served.append(frame)
        link = house.proxy._planes.reader._link
        batch(house, *parts[:-1])
        house.loop.watched[house.tap_fd]()
        waiting = len(link._backlog)
        assert link.is_behind and waiting == len(parts) - 1 - backlog.AT_ONCE
        batch(house, parts[-1])
        house.loop.watched[house.tap_fd]()
        assert len(link._backlog) == waiting - 5, "some were served, and none was read"
        until_idle(house)
        assert len(served) == len(parts) and not link.is_behind
        assert (link._bytes, link._fragments, link.overrun) == (0, 0, 0)

    house.serve(script)


@pytest.mark.parametrize("bound", ("PACKETS_WAITING", "BYTES_WAITING"))
def test_other_packets_do_not_keep_the_tap_from_being_read(monkeypatch, bound):
    """They are lost where too many wait, and counted: the guest's TCP is behind them in the ring."""
    house = House()
    monkeypatch.setattr(link_plane, bound, 10)
    served = []

    def script():
        house.proxy._planes.datagrams.on_frame = lambda frame, now: served.append(frame)
        link = house.proxy._planes.reader._link
        batch(house, *(IP(src=GUEST, dst=GATEWAY) / ICMP(id=n, seq=1) / b"ping" for n in range(60)))
        house.loop.watched[house.tap_fd]()
        assert not link.is_behind and link.overrun > 30
        assert flows(house)["datagrams"]["not_passed_on"] == link.overrun
        until_idle(house)
        assert len(served) == 60 - link.overrun and link._bytes == 0

    house.serve(script)
    assert "too many at once" in house.said.getvalue()


@pytest.mark.parametrize(("segments", "lost"), ((60, 0), (128, 60), (129, 60)))
def test_joined_datagrams_count_one_by_one(peer, segments, lost):
    """A frame may hold 128 of them, or say that it holds more, which no kernel has joined."""
    house = House(vnet=True)
    port = peer.getsockname()[1]
    header = struct.pack("=BBHHHH", 1, GSO_UDP_L4, 42, 1, 34, 6)

    def script():
        for sport in range(2000, 2000 + backlog.AT_ONCE):
            house.guest.send(bytes(10) + bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / datagram(port, sport)))
        frame = bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / datagram(port, 3000, bytes(segments)))
        frames = 60 if lost else 1
        for _ in range(frames):
            house.guest.send(header + frame)
        plane = house.proxy._planes.datagrams._from_guest
        house.loop.watched[house.tap_fd]()
        assert plane._kept_bytes <= datagram_plane.KEPT_BYTES_FLOW
        assert (flows(house)["datagrams"]["not_passed_on"] >= lost) and (lost or not plane.udp.undelivered)
        until_idle(house)
        assert plane._kept_bytes == 0

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
