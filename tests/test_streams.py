"""TCP of a guest's, from its frames to real sockets and back: how flows are opened, bounded and ended."""

import contextlib
import errno
import ipaddress
import re
import socket
import struct
import subprocess

import pytest
from scapy.layers.inet import ICMP, TCP, IPerror, TCPerror
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from pysplice.budget import HALF_OPEN_MAX
from pysplice.config.ports import HOST, Rule
from pysplice.config.ports import TCP as TCP_RULE
from pysplice.sockets.request import HostMaker
from pysplice.stream import host as stream_host
from pysplice.stream import linger
from pysplice.stream.plane import NoStreams

from .support.house import ADDRESSES, House, ip
from .support.taps import GUEST_MAC, OUR_MAC

pytestmark = pytest.mark.usefixtures("isolated")
BOTH = pytest.mark.parametrize("version", (4, 6))
WINDOW = 64240
RESET = struct.pack("ii", 1, 0)
SO_BINDTODEVICE = 25


class Guest:
    """One connection of the guest's: its numbers, and what it gets."""

    def __init__(
        self, house: House, port: int, version: int = 4, sport: int = 40000, isn: int = 1000
    ) -> None:
        self.house, self.port, self.version, self.sport = house, port, version, sport
        self.nxt, self.ack = isn, 0

    def send(self, flags: str, data: bytes = b"", **fields) -> list:
        """A segment with the numbers that are due; what comes back."""
        fields = {"seq": self.nxt, "ack": self.ack, "window": WINDOW} | fields
        segment = TCP(sport=self.sport, dport=self.port, flags=flags, **fields) / data
        self.house.send(ip(self.version) / segment)
        if "R" not in flags:
            self.nxt += len(data) + ("S" in flags) + ("F" in flags)
        return self.got()

    def got(self) -> list:
        """The segments for this connection; what they carry counts as received."""
        found = [frame[TCP] for frame in self.house.received() if TCP in frame]
        for segment in found:
            if "R" not in str(segment.flags):
                length = len(segment.payload) + bool(segment.flags & 3)
                self.ack = max(self.ack, (segment.seq + length) & 0xFFFFFFFF)
        return [segment for segment in found if segment.dport == self.sport]

    def open(self, **fields) -> "Guest":
        (syn_ack,) = self.send("S", ack=0, **fields)
        assert syn_ack.flags == "SA" and syn_ack.ack == self.nxt
        self.send("A")
        return self


def inside(house, script):
    assert house.serve(script) == 0


@pytest.fixture
def servers():
    """Makes servers on the loopback interface."""
    with contextlib.ExitStack() as stack:

        def make(version: int = 4, backlog: int = 600) -> socket.socket:
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            listener = socket.create_server((ADDRESSES[version][2], 0), family=family, backlog=backlog)
            listener.settimeout(5)
            return stack.enter_context(listener)

        yield make


def port_of(server) -> int:
    return server.getsockname()[1]


# How a flow begins


@BOTH
def test_a_connection_of_each_version(version, servers):
    house, server = House(ipv6=True), servers(version)

    def script():
        guest = Guest(house, port_of(server), version).open(options=[("MSS", 1400), ("WScale", 3)])
        peer, name = server.accept()
        peer.settimeout(5)
        guest.send("PA", b"up")
        assert peer.recv(10) == b"up"
        peer.sendall(b"down")
        house.loop.settle()
        (segment,) = guest.got()
        assert bytes(segment.payload) == b"down"
        (line,) = house.flows()
        assert f":{40000}" in line and f":{port_of(server)}" in line
        for option, level in (
            (socket.TCP_NODELAY, socket.IPPROTO_TCP),
            (socket.SO_KEEPALIVE, socket.SOL_SOCKET),
        ):
            (flow,) = house.proxy._planes.streams.flows.all()
            assert flow.connection.host._sock.getsockopt(level, option)
        assert flow.connection.host._sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
        peer.close()

    inside(house, script)


@pytest.mark.parametrize(
    ("options", "version"), (({"ipv4": False}, 4), ({"ipv6": False}, 6), ({"tcp": False}, 4))
)
def test_a_version_that_is_not_served_gets_no_answer(options, version, servers):
    house, server = House(**{"ipv6": True} | options), servers(version)

    def script():
        guest = Guest(house, port_of(server), version)
        assert guest.send("S", ack=0) == [] and guest.send("A") == [] and not house.flows()

    inside(house, script)


@BOTH
def test_a_closed_port_of_each_version(version, servers):
    house, server = House(ipv6=True), servers(version)
    port = port_of(server)
    server.close()

    def script():
        (refusal,) = Guest(house, port, version).send("S", ack=0)
        assert refusal.flags == "RA" and refusal.ack == 1001 and refusal.seq == 0 and refusal.window == 0
        assert not house.flows() and house.figures()["connections"]["opened"] == 1

    inside(house, script)


@pytest.mark.parametrize(
    ("flags", "data", "answer"),
    (
        ("A", b"", ("R", 77, 0)),
        ("PA", b"abc", ("R", 77, 0)),
        ("F", b"", ("RA", 0, 1001)),
        ("PF", b"abc", ("RA", 0, 1004)),
        ("", b"", ("RA", 0, 1000)),
        ("R", b"", None),
        ("RA", b"", None),
        ("SA", b"", ("R", 77, 0)),
        ("SF", b"", None),
    ),
)
def test_what_belongs_to_no_connection(flags, data, answer, servers):
    """RFC 9293, 3.10.7.1."""
    house, server = House(), servers()

    def script():
        got = Guest(house, port_of(server)).send(flags, data, ack=77)
        if answer is None:
            assert not got
        else:
            (segment,) = got
            assert (str(segment.flags), segment.seq, segment.ack if "A" in answer[0] else 0) == answer
        assert not house.flows()

    inside(house, script)


@BOTH
def test_no_route_is_told(version):
    house = House(ipv6=True)
    nowhere = "192.0.2.9" if version == 4 else "2001:db8::9"

    def script():
        house.send(ip(version, dst=nowhere) / TCP(sport=40000, dport=80, flags="S", seq=1))
        (frame,) = house.received()
        if version == 4:
            assert (frame[ICMP].type, frame[IPerror].dst) == (3, nowhere)
            assert (frame[TCPerror].sport, frame[TCPerror].dport) == (40000, 80)
        else:
            assert frame.haslayer(ICMPv6DestUnreach)
        assert not house.flows()

    inside(house, script)
    assert f"{nowhere}: Network is unreachable" in house.said.getvalue()


@pytest.mark.pure
@pytest.mark.parametrize(
    ("error", "answer"),
    ((errno.EMFILE, ""), (errno.ENOBUFS, ""), (errno.EADDRNOTAVAIL, "RA"), (errno.EINVAL, "RA")),
)
def test_a_socket_that_cannot_be_made(error, answer, servers, monkeypatch):
    """For want of descriptors or memory the guest tries again by itself; what will not change is refused."""
    house, server = House(), servers()

    def make(self, request):
        raise OSError(error, "planted")

    def script():
        monkeypatch.setattr(HostMaker, "make", make)
        got = Guest(house, port_of(server)).send("S", ack=0)
        assert [str(segment.flags) for segment in got] == [answer][: bool(answer)]
        monkeypatch.undo()
        Guest(house, port_of(server), sport=40001).open()

    inside(house, script)
    assert "127.0.0.1: planted" in house.said.getvalue()


def test_the_source_address_and_interface_of_the_options():
    """For hosts beyond the loopback interface."""
    for address in ("10.99.0.1", "10.99.0.2"):
        subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
    house = House(outbound=(ipaddress.ip_address("10.99.0.2"),), outbound_if4="lo")

    def script():
        with socket.create_server(("10.99.0.1", 0)) as server:
            syn = TCP(sport=40000, dport=port_of(server), flags="S", seq=1, window=WINDOW)
            house.send(ip(4, dst="10.99.0.1") / syn)
            peer, name = server.accept()
            assert name[0] == "10.99.0.2"
            (flow,) = house.proxy._planes.streams.flows.all()
            device = flow.connection.host._sock.getsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, 16)
            assert device.rstrip(b"\0") == b"lo"
            peer.close()

    try:
        inside(house, script)
    finally:
        for address in ("10.99.0.1", "10.99.0.2"):
            subprocess.run(["ip", "addr", "del", f"{address}/32", "dev", "lo"], check=True)


# Limits


def test_the_limit_of_new_flows(servers):
    house, server = House(limit_flows=2), servers()

    def script():
        for sport in (1001, 1002):
            Guest(house, port_of(server), sport=sport).open()
        third = Guest(house, port_of(server), sport=1003)
        assert third.send("S", ack=0) == []
        assert house.figures()["connections"] == {"opened": 2, "open": 2, "refused": 1}
        house.loop.advance(0.6)
        third.nxt = 1000
        third.open()
        fourth = Guest(house, port_of(server), sport=1004)
        fourth.send("S", ack=0)
        fourth.send("S", ack=0)
        assert house.figures()["connections"]["refused"] == 3

    inside(house, script)
    assert "limit: too many new flows, a SYN was dropped" in house.said.getvalue()


def test_too_many_connections(servers):
    house, server = House(descriptors=112), servers()

    def script():
        most = house.proxy._planes.streams.flows.outbound_max
        guests = [Guest(house, port_of(server), sport=2000 + n).open() for n in range(most)]
        one_more = Guest(house, port_of(server), sport=5000)
        for n in range(2):
            assert one_more.send("S", ack=0) == []
            assert house.figures()["connections"]["refused"] == n + 1
        assert len(house.flows()) == most
        guests[0].send("RA")
        one_more.nxt = 1000
        one_more.open()

    inside(house, script)
    assert "limit: too many connections, a SYN was dropped" in house.said.getvalue()


def test_the_oldest_that_waits_gives_way(servers):
    """A flow without an answer is ended silently: its SYN may be answered as well as any other, later."""
    house, server = House(), servers()

    def script():
        flows = house.proxy._planes.streams.flows
        flows._half_open_max = 3
        waiting = [Guest(house, port_of(server), sport=3000 + n) for n in range(4)]
        answers = [guest.send("S", ack=0) for guest in waiting]
        assert all(len(answer) == 1 for answer in answers)
        assert len(house.flows()) == 3 and not any(":3000 " in line for line in house.flows())
        assert flows.gave_way == 1 and flows.half_open == 3
        (refusal,) = waiting[0].send("A")
        assert refusal.flags == "R"
        waiting[1].send("A")
        assert flows.half_open == 2

    inside(house, script)
    assert HALF_OPEN_MAX == 1024


def test_the_oldest_client_that_waits_gives_way():
    """The guest does not answer: a client of long ago is reset for a new one."""
    house = House()
    port = published(house)

    def script():
        house.proxy._planes.streams.flows._half_open_max = 2
        clients = []
        for _ in range(3):
            clients.append(socket.create_connection(("127.0.0.1", port)))
            house.loop.settle()
        clients[0].settimeout(5)
        with pytest.raises(ConnectionResetError):
            clients[0].recv(1)
        flags = [str(frame[TCP].flags) for frame in house.received()]
        assert flags.count("S") == 3 and sum("R" in which for which in flags) == 1
        assert len(house.flows()) == 2
        for client in clients:
            client.close()

    inside(house, script)


# Clients


def published(house, target: int = 80, address: str = "::") -> int:
    with socket.socket() as free:
        free.bind(("0.0.0.0", 0))
        port = free.getsockname()[1]
    house.proxy.follow((Rule(HOST, TCP_RULE, port, port, target),))
    return port


def answer(house, version, syn, flags="SA", **fields):
    """The guest's server answers a SYN."""
    fields = {"seq": 9, "ack": syn.seq + 1, "window": WINDOW} | fields
    house.send(ip(version) / TCP(sport=syn.dport, dport=syn.sport, flags=flags, **fields))
    return [frame[TCP] for frame in house.received() if TCP in frame]


@BOTH
def test_a_client_of_each_version(version):
    house = House(ipv6=True)
    port = published(house)

    def script():
        with socket.create_connection((ADDRESSES[version][2], port)) as client:
            client.settimeout(5)
            house.loop.settle()
            (frame,) = house.received()
            guest, gateway, _ = ADDRESSES[version]
            assert (frame.payload.src, frame.payload.dst) == (gateway, guest)
            syn = frame[TCP]
            assert syn.flags == "S" and syn.dport == 80 and syn.sport == client.getsockname()[1]
            answer(house, version, syn)
            client.sendall(b"ask")
            house.loop.settle()
            (data,) = [f[TCP] for f in house.received() if TCP in f and f[TCP].payload]
            assert bytes(data.payload) == b"ask"
            answer(house, version, syn, "PA", seq=10, ack=data.seq + 3)
            assert house.figures()["connections"] == {"opened": 1, "open": 1, "refused": 0}

    inside(house, script)
    assert "a client on the host" in house.said.getvalue()


def test_two_clients_of_one_number():
    """Two addresses of the host that are one to the guest: one of the clients gets another port there."""
    house = House()
    port = published(house)

    def script():
        first = socket.create_connection(("127.0.0.1", port))
        number = first.getsockname()[1]
        house.loop.settle()
        second = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.5", number))
        house.loop.settle()
        sources = [frame[TCP].sport for frame in house.received() if TCP in frame]
        assert sources[0] == number and len(set(sources)) == 2 and min(sources) >= 1024
        first.close()
        second.close()

    inside(house, script)


def test_a_client_that_is_refused():
    house = House()
    port = published(house)

    def script():
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(5)
            house.loop.settle()
            (frame,) = house.received()
            answer(house, 4, frame[TCP], "RA", seq=0)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            assert not house.flows()

    inside(house, script)


def test_clients_without_room():
    house = House(descriptors=112)
    port = published(house)

    def script():
        flows = house.proxy._planes.streams.flows
        clients = []
        for n in range(flows.inbound_max + 2):
            client = socket.create_connection(("127.0.0.1", port))
            clients.append(client)
            house.loop.settle()
            for frame in house.received():
                if TCP in frame and frame[TCP].flags == "S":
                    answer(house, 4, frame[TCP])
            assert len(house.flows()) == min(n + 1, flows.inbound_max)
        for client in clients[-2:]:
            client.settimeout(5)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        for client in clients:
            client.close()
        assert house.figures()["connections"]["refused"] == 2

    inside(house, script)
    assert "inbound: no way to the guest for 127.0.0.1" in house.said.getvalue()


# How a flow ends


def test_a_guest_that_resets(servers):
    house, server = House(), servers()

    def script():
        guest = Guest(house, port_of(server)).open()
        peer, _ = server.accept()
        peer.settimeout(5)
        assert guest.send("R") == [] and not house.flows()
        with pytest.raises(ConnectionResetError):
            peer.recv(1)

    inside(house, script)


def test_a_server_that_resets(servers):
    house, server = House(), servers()

    def script():
        guest = Guest(house, port_of(server)).open()
        peer, _ = server.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        peer.close()
        house.loop.settle()
        (segment,) = guest.got()
        assert "R" in str(segment.flags) and segment.seq == guest.ack and not house.flows()

    inside(house, script)


def test_the_end_of_the_proxy_is_seen_by_both(servers):
    """What the guest had ended is ended, what it had not is reset."""
    house, server = House(), servers()
    peers = []

    def script():
        open_one = Guest(house, port_of(server), sport=1001).open()
        ended = Guest(house, port_of(server), sport=1002).open()
        peers.extend(server.accept()[0] for _ in range(2))
        open_one.send("PA", b"all?")
        ended.send("PA", b"all")
        ended.send("FA")

    inside(house, script)
    got = {}
    for peer in peers:
        peer.settimeout(5)
        try:
            data = b""
            while part := peer.recv(10):
                data += part
            got[data] = "end"
        except ConnectionResetError:
            got[data] = "reset"
        peer.close()
    assert got.get(b"all") == "end" and "reset" in got.values()


def test_the_same_ports_at_once_after_a_reset(servers):
    house, server = House(), servers()

    def script():
        for isn in (1000, 500_000, 77):
            guest = Guest(house, port_of(server), isn=isn).open()
            peer, _ = server.accept()
            guest.send("R")
            peer.close()
        assert house.figures()["connections"]["opened"] == 3

    inside(house, script)


def test_bytes_are_counted_also_of_flows_that_have_ended(servers):
    house, server = House(), servers()

    def script():
        for n in range(2):
            guest = Guest(house, port_of(server), sport=1001 + n).open()
            peer, _ = server.accept()
            guest.send("PA", b"x" * 100)
            peer.sendall(b"y" * 30)
            house.loop.settle()
            guest.got()
            guest.send("A")
            assert house.figures()["bytes"] == {"from_guest": 100 * (n + 1), "to_guest": 30 * (n + 1)}
            guest.send("R")
            peer.close()
            assert house.figures()["bytes"] == {"from_guest": 100 * (n + 1), "to_guest": 30 * (n + 1)}

    inside(house, script)


def test_a_defect_at_a_host_socket_harms_one_flow_alone(servers, monkeypatch):
    house, server = House(), servers()

    def script():
        first = Guest(house, port_of(server), sport=1001).open()
        second = Guest(house, port_of(server), sport=1002).open()
        peers = [server.accept()[0] for _ in range(2)]
        flow = house.proxy._planes.streams.flows.all()[0]

        class Broken:
            """The flow's connection, but for one method."""

            def __init__(self, real):
                self._real = real

            def __getattr__(self, name):
                return getattr(self._real, name)

            def on_host(self, ready, now):
                raise RuntimeError("planted")

        flow.connection = Broken(flow.connection)
        for peer in peers:
            peer.sendall(b"data")
        house.loop.settle()
        got = [frame[TCP] for frame in house.received() if TCP in frame]
        assert {str(segment.flags)[0] for segment in got if segment.dport == 1001} == {"R"}
        assert [bytes(segment.payload) for segment in got if segment.dport == 1002] == [b"data"]
        assert len(house.flows()) == 1
        assert first.sport != second.sport
        for peer in peers:
            peer.close()

    inside(house, script)
    assert "planted" in house.said.getvalue()


# The host's sockets


def test_the_largest_send_buffer_is_the_kernels(tmp_path, monkeypatch):
    path = tmp_path / "wmem"
    monkeypatch.setattr(stream_host, "WMEM_PATH", str(path))
    assert stream_host.read_wmem_max() == 4 << 20
    for text, size in (("1 2 3\n", 3), ("1 2\n", 4 << 20), ("a b c", 4 << 20)):
        path.write_text(text)
        assert stream_host.read_wmem_max() == size


def test_a_large_answer_is_taken_as_the_guest_takes_it(servers):
    """No more is read than the window has room for, and streams are given back."""
    house, server = House(), servers()
    data = bytes(n * 7 % 251 for n in range(200_000))

    def script():
        guest = Guest(house, port_of(server)).open(options=[("MSS", 1460)])
        peer, _ = server.accept()
        peer.sendall(data)
        got = bytearray()
        start = guest.ack
        house.loop.settle()
        segments = guest.got()
        while segments and len(got) < len(data):
            in_flight = 0
            for segment in sorted(segments, key=lambda s: s.seq):
                at = segment.seq - start
                if at == len(got):
                    got += bytes(segment.payload)
                in_flight += len(segment.payload)
            assert 0 < in_flight <= WINDOW
            segments = guest.send("A")
        assert bytes(got) == data
        guest.send("A")
        hosts = house.proxy._planes.streams.hosts
        assert hosts._lent == 0
        peer.close()

    inside(house, script)


def test_what_the_guest_sends_to_one_who_does_not_read_arrives_in_the_end(servers):
    """All that was acknowledged, and the end, although the guest has nothing more to do with it."""
    house, server = House(), servers()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    unit = b"0123456789" * 146

    def script():
        guest = Guest(house, port_of(server)).open(options=[("MSS", 1460)])
        peer, _ = server.accept()
        (flow,) = house.proxy._planes.streams.flows.all()
        flow.connection.host._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        window = len(unit)
        while window >= len(unit):
            got = guest.send("A", unit)
            assert got and got[-1].ack == guest.nxt
            window = got[-1].window
        sent = guest.nxt - 1001
        assert sent < 200 * len(unit), "the window closes"
        guest.send("FA")
        got = bytearray()
        peer.settimeout(5)
        while part := peer.recv(1 << 20):
            got += part
            house.loop.advance(0.01)
            house.loop.settle()
        assert bytes(got) == unit * (sent // len(unit))
        peer.close()

    inside(house, script)


def test_a_reset_on_close_is_seen():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
        assert linger.unsent(client) == 0
        linger.reset(client)
        with pytest.raises(ConnectionResetError):
            peer.recv(1)
        peer.close()
    ours, theirs = socket.socketpair()
    ours.send(b"x")
    assert linger.unsent(ours) == 0, "what is in the peer's queue is there"
    ours.close()
    theirs.close()


def test_a_trace_of_flows_names_their_end(servers):
    house, server = House(), servers()

    def script():
        guest = Guest(house, port_of(server)).open()
        guest.send("R")

    inside(house, script)
    said = house.said.getvalue()
    assert re.search(r"10\.0\.2\.15:40000 -> 10\.0\.2\.2:\d+: connecting to 127\.0\.0\.1", said)


# What waits


def test_a_connection_that_the_small_queue_has_held_back_is_resumed(servers):
    house, server = House(limit_output=2000), servers()

    def script():
        guest = Guest(house, port_of(server)).open(options=[("MSS", 1460)])
        peer, _ = server.accept()
        queue = house.proxy._planes.streams._queue
        for _ in range(5):
            (acked, *_) = guest.send("PA", b"x" * 1000)
        assert acked.ack == guest.nxt and acked.window < 2 * 1460
        assert len(queue.throttled) == 1
        house.loop.advance(0.05)
        assert not queue.throttled
        (update,) = guest.got()
        assert update.window >= 1460 and update.ack == guest.nxt
        peer.close()

    inside(house, script)


def test_a_defect_while_connections_are_resumed_harms_no_other(servers):
    house, server = House(limit_output=2000), servers()

    def script():
        guests = [
            Guest(house, port_of(server), sport=1001 + n).open(options=[("MSS", 1460)])
            for n in range(2)
        ]  # fmt: skip
        peers = [server.accept()[0] for _ in range(2)]
        for guest in guests:
            for _ in range(5):
                guest.send("PA", b"x" * 1000)
        queue = house.proxy._planes.streams._queue
        (broken, at), sound = next(iter(queue.throttled.items())), list(queue.throttled)[1]

        class Broken:
            receive = broken.receive

            def resume(self):
                raise RuntimeError("planted")

        queue.throttled = {Broken(): at, sound: queue.throttled[sound]}
        house.loop.advance(0.05)
        assert any(segment.window >= 1460 for segment in guests[1].got())
        for peer in peers:
            peer.close()

    inside(house, script)
    assert "no flow: RuntimeError: planted" in house.said.getvalue()


def test_a_defect_of_a_syn_that_has_waited_harms_no_other(servers, monkeypatch):
    house, server = House(), servers()

    def script():
        plane = house.proxy._planes.streams
        real = plane._open.from_tap

        def from_tap(run, headers, now):
            if run.key[-4:-2] == (1010).to_bytes(2, "big"):
                raise RuntimeError("planted")
            return real(run, headers, now)

        plane._open.from_tap = from_tap
        for sport in range(1000, 1020):
            frame = ip() / TCP(sport=sport, dport=port_of(server), flags="S", seq=1, window=WINDOW)
            house.guest.send(bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / frame))
        for _ in range(100):
            house.loop.turn(0.01)
        assert house.figures()["connections"]["opened"] == 19

    inside(house, script)
    assert "no flow: RuntimeError: planted" in house.said.getvalue()


def test_a_syn_that_waits_for_a_flow_that_is_there_by_then_opens_no_second(servers):
    house, server = House(), servers()

    def script():
        guest = Guest(house, port_of(server)).open()
        plane = house.proxy._planes.streams
        (flow,) = plane.flows.all()

        class Run:
            key = flow.key

        plane._begin((Run(), b""), house.loop.now())
        assert plane.flows.all() == [flow] and guest.got() == []

    inside(house, script)


# Without a tap


def test_without_a_tap_there_are_no_streams_but_spliced_ones():
    none = NoStreams()
    assert none.fileno() == -1 and len(none) == 0 and list(none.names()) == []
    assert (
        none.bytes_moved() == (0, 0) and none.undelivered() == [] and (none.opened, none.refused) == (0, 0)
    )
    none.on_ready(0.0)
    none.close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        client.settimeout(5)
        accepted, _ = listener.accept()
        none.accepted(accepted, b"", 80, b"", 1, 0.0)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        client.close()


# A socket that lingers, and readiness of descriptors


def hosts_of(house):
    return house.proxy._planes.streams.hosts


def test_errors_of_a_host_socket_are_negative_numbers(servers):
    house, server = House(), servers()

    def script():
        Guest(house, port_of(server)).open()
        (flow,) = house.proxy._planes.streams.flows.all()
        door = flow.connection.host
        assert door.error() == 0 and door.flush() == 0
        peer, _ = server.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        peer.close()
        assert door.shutdown() == -errno.ENOTCONN
        assert door.receive(10) == -errno.ECONNRESET or door.error() == errno.ECONNRESET
        door._sock.close()
        assert door.error() == errno.EBADF and door.shutdown() == -errno.EBADF

    house.serve(script)


def test_streams_are_lent_and_given_back():
    house = House()
    hosts = hosts_of(house)
    sizes = [hosts.share()]
    held = []
    for _ in range(40):
        size = hosts.share()
        held.append((hosts.borrow(size), size))
        sizes.append(size)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] and hosts._lent == 40
    for stream, size in held:
        hosts.give_back(stream, size)
    assert hosts._lent == 0 and hosts.share() == sizes[0]
    again = hosts.borrow(sizes[0])
    assert any(again is stream for stream, _ in held), "an unused one is taken again"
    house.serve(lambda: None)


@pytest.mark.parametrize(
    ("flags", "data", "answer"),
    (("S", b"", (0, 1001)), ("S", b"abc", (0, 1004)), ("SF", b"", None)),
)
def test_a_refusal_counts_what_the_segment_takes(flags, data, answer, servers, monkeypatch):
    """Of the numbers: a SYN, its data, a FIN; and a reset in answer to an acknowledgement has none of its own."""
    house, server = House(), servers()

    def make(self, request):
        raise OSError(errno.EADDRNOTAVAIL, "planted")

    def script():
        guest = Guest(house, port_of(server))
        house.proxy._planes.streams._open._hosts.connect = lambda *args: make(None, None)
        got = guest.send(flags, data, ack=0)
        assert [(segment.seq, segment.ack) for segment in got] == ([answer] if answer else [])
        (segment,) = Guest(house, port_of(server)).send("A", ack=77)
        assert (segment.seq, segment.ack) == (77, 0)

    inside(house, script)


def test_why_flows_were_ended_is_kept(servers):
    house, server = House(), servers()

    def script():
        Guest(house, port_of(server)).open()
        plane = house.proxy._planes.streams
        (flow,) = plane.flows.all()
        plane.failed(flow, RuntimeError("planted"))
        assert flow.connection.error == errno.EIO
        plane.flows.settle(flow)
        port = published(house)
        plane.flows._half_open_max = 1
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            before = []
            real = plane.flows.longest_waiting

            def longest(inbound):
                found = real(inbound)
                before.extend([found] if found else [])
                return found

            plane.flows.longest_waiting = longest
            house.loop.settle()
            assert [flow.connection.error for flow in before] == [errno.ETIMEDOUT]

    inside(house, script)


def test_what_lingers_is_not_delivered_yet(servers):
    house = House()
    plane = house.proxy._planes.streams
    assert plane.undelivered() == []

    class Lingering:
        kept = 77

        def close(self):
            pass

    real, plane.hosts.lingering = plane.hosts.lingering, Lingering()
    assert plane.undelivered() == [77]
    plane.hosts.lingering = real
    house.serve(lambda: None)


def test_a_guest_without_an_address_has_no_clients():
    house = House()
    opener = house.proxy._planes.streams._open
    client = bytes((192, 0, 2, 1))
    assert opener._inbound_key(b"", 80, client, 1000) is None
    assert opener._inbound_key(bytes((10, 0, 2, 15)), 80, client, 1000) is not None
    house.serve(lambda: None)


def test_a_stream_is_lent_while_it_holds_something(servers):
    house, server = House(), servers()

    def script():
        Guest(house, port_of(server)).open()
        peer, _ = server.accept()
        (flow,) = house.proxy._planes.streams.flows.all()
        door, hosts = flow.connection.host, hosts_of(house)
        assert door.receive(10) == -errno.EAGAIN and door.stream is None and hosts._lent == 0
        peer.sendall(b"abc")
        assert door.receive(1) == 1
        stream = door.stream
        assert door.receive(1) == 1 and door.stream is stream and bytes(len(stream)) == bytes(2)
        assert hosts._lent == 1
        door.discard(1)
        assert door.stream is stream
        assert door.receive(10) == 1
        assert door.receive(10) == -errno.EAGAIN and door.stream is stream, "it holds something"
        door.discard(2)
        assert door.stream is None and hosts._lent == 0
        assert door.shutdown() == 0
        peer.close()
        assert door.receive(10) == 0 and door.stream is None

    inside(house, script)


@BOTH
def test_a_guest_that_moves_to_another_mac(version, servers):
    """A question of ARP or NDP, or a SYN, moves its connections; data alone does not."""
    house, server = House(ipv6=True), servers(version)
    second, third = "02:00:00:00:00:02", "02:00:00:00:00:03"
    address, gateway, _ = ADDRESSES[version]

    def goes_to(peer) -> set[str]:
        peer.sendall(b"data")
        house.loop.settle()
        return {frame.dst for frame in house.received() if TCP in frame and frame[TCP].dport == 40000}

    def script():
        guest = Guest(house, port_of(server), version).open()
        peer, _ = server.accept()
        data = (
            TCP(sport=40000, dport=guest.port, flags="PA", seq=guest.nxt, ack=guest.ack, window=WINDOW)
            / b"x"
        )
        house.guest.send(bytes(Ether(src=third, dst=OUR_MAC) / ip(version) / data))
        house.loop.settle()
        house.received()
        assert goes_to(peer) == {GUEST_MAC}
        if version == 4:
            question = ARP(hwsrc=second, psrc=address, pdst=gateway)
        else:
            question = IPv6(src=address, dst=gateway, hlim=255) / ICMPv6ND_NS(tgt=gateway)
            question /= ICMPv6NDOptSrcLLAddr(lladdr=second)
        house.guest.send(bytes(Ether(src=second, dst=OUR_MAC) / question))
        house.loop.settle()
        house.received()
        assert goes_to(peer) == {second}
        syn = TCP(sport=40001, dport=guest.port, flags="S", seq=1, window=WINDOW)
        house.guest.send(bytes(Ether(src=third, dst=OUR_MAC) / ip(version) / syn))
        house.loop.settle()
        house.received()
        assert goes_to(peer) == {third}
        peer.close()

    inside(house, script)
