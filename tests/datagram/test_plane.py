"""UDP and echo of a guest's, from its frames to real sockets and back; the proxy is whole, its clock a fake."""

import contextlib
import errno
import pathlib
import socket
import struct
import subprocess

import pytest
from scapy.layers.inet import ICMP, UDP, IPerror, UDPerror, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    IPerror6,
)
from scapy.layers.l2 import Ether

from pysplice.config.ports import HOST, Rule
from pysplice.config.ports import UDP as UDP_RULE
from pysplice.datagram import endpoints, routes, table, udp
from pysplice.sockets.request import HostMaker

from ..support.house import ADDRESSES, House, ip
from ..support.loops import FakeLoop
from ..support.taps import GUEST_MAC, OUR_MAC

pytestmark = pytest.mark.usefixtures("isolated")
BOTH = pytest.mark.parametrize("version", (4, 6))
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
GUEST_PORT = 4001
IP_RECVTTL = 12


class Peer:
    """A UDP socket on the loopback interface."""

    def __init__(self, version: int, address: str = "", port: int = 0) -> None:
        self.address = address or ADDRESSES[version][2]
        self.sock = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
        if version == 4:
            self.sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        else:
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        self.sock.bind((self.address, port))
        self.sock.settimeout(5)
        self.port = self.sock.getsockname()[1]
        self.ttl = 0

    def receive(self) -> tuple[bytes, int]:
        """A datagram, and the port that it came from."""
        data, ancillary, _, name = self.sock.recvmsg(70_000, 100)
        self.ttl = struct.unpack("=i", ancillary[0][2])[0]
        return data, name[1]

    def is_empty(self) -> bool:
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.sock.recv(1)
            return False
        return True


@pytest.fixture
def peers(request):
    """Makes peers, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(*args) -> Peer:
            peer = Peer(*args)
            stack.callback(peer.sock.close)
            return peer

        yield make


def sends(house, version, port, payload=b"ask", sport=GUEST_PORT, **fields):
    house.send(ip(version, **fields) / UDP(sport=sport, dport=port) / payload)


def inside(house, script):
    assert house.serve(script) == 0


# A datagram, and its answer


@BOTH
def test_there_and_back(version, peers):
    house, peer = House(ipv6=True), peers(version)

    def script():
        sends(house, version, peer.port, b"ask", ttl=61)
        data, port = peer.receive()
        assert data == b"ask" and peer.ttl == 61
        assert port == GUEST_PORT, "the same port, where it is free"
        peer.sock.sendto(b"answer", (peer.address, port))
        house.loop.settle()
        (frame,) = house.received()
        guest, gateway, _ = ADDRESSES[version]
        assert (frame.src, frame.dst) == (OUR_MAC, GUEST_MAC)
        assert (frame.payload.src, frame.payload.dst) == (gateway, guest)
        assert (frame[UDP].sport, frame[UDP].dport) == (peer.port, GUEST_PORT)
        assert bytes(frame[UDP].payload) == b"answer"
        again = frame.payload.copy()
        del again[UDP].chksum
        assert type(again)(bytes(again))[UDP].chksum == frame[UDP].chksum
        (line,) = house.flows()
        assert line.startswith("udp") and f":{GUEST_PORT}" in line and f":{peer.port}" in line
        assert house.figures()["udp_flows"] == {"opened": 1, "open": 1}
        sends(house, version, peer.port, b"more", ttl=9)
        assert peer.receive()[0] == b"more" and peer.ttl == 9
        assert house.figures()["udp_flows"]["opened"] == 1

    inside(house, script)
    assert "udp 10.0.2.15:4001" in house.said.getvalue() or version == 6


@BOTH
@pytest.mark.parametrize("size", (0, 1, 1472, 5000, 60_000))
def test_sizes(version, size, peers):
    """What the guest sends in fragments arrives whole; what is too long for its link comes in fragments."""
    subprocess.run(["ip", "link", "set", "lo", "mtu", "65536"], check=True)
    house, peer = House(ipv6=True, mtu=1500), peers(version)
    data = bytes(n % 251 for n in range(size))

    def script():
        whole = ip(version) / UDP(sport=GUEST_PORT, dport=peer.port) / data
        if size <= 1472 - 20 * (version == 6):
            house.send(whole)
        elif version == 4:
            for part in fragment(whole, 1480):
                house.guest.send(bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / part))
            house.loop.settle()
        else:
            house.send(whole)  # the link takes it here
        got, port = peer.receive()
        assert got == data
        peer.sock.sendto(data, (peer.address, port))
        house.loop.settle()
        frames = house.received()
        assert all(len(frame) <= 1514 for frame in frames)
        assert len(frames) == max(1, -(-(size + 8) // 1480 if version == 4 else -(size + 8) // 1448))
        if len(frames) == 1:
            assert bytes(frames[0][UDP].payload) == data

    inside(house, script)


@BOTH
def test_a_closed_port_is_told(version, peers):
    """The kernel's error about the datagram becomes one about the guest's."""
    house, peer = House(ipv6=True), peers(version)
    peer.sock.close()
    guest, gateway, _ = ADDRESSES[version]

    def script():
        sends(house, version, peer.port)
        house.loop.settle()
        (frame,) = house.received()
        assert frame.payload.src == gateway and frame.payload.dst == guest and frame.dst == GUEST_MAC
        if version == 4:
            assert (frame[ICMP].type, frame[ICMP].code) == (3, 3)
            quoted = frame[IPerror]
        else:
            assert frame[ICMPv6DestUnreach].code == 4
            quoted = frame[IPerror6]
        assert (quoted.src, quoted.dst) == (guest, gateway)
        assert (quoted[UDPerror].sport, quoted[UDPerror].dport) == (GUEST_PORT, peer.port)
        # The error that is queued does not cost a datagram to another
        other = peers(version)
        sends(house, version, peer.port)
        sends(house, version, other.port, b"still")
        assert other.receive()[0] == b"still"

    inside(house, script)


@BOTH
def test_too_large_for_the_path(version, peers):
    house, peer = House(ipv6=True), peers(version)
    subprocess.run(["ip", "link", "set", "lo", "mtu", "1280"], check=True)

    def script():
        fields = {"flags": "DF"} if version == 4 else {}
        sends(house, version, peer.port, bytes(1400), **fields)
        house.loop.settle()
        (frame,) = house.received()
        if version == 4:
            assert (frame[ICMP].type, frame[ICMP].code, frame[ICMP].nexthopmtu) == (3, 4, 1280)
            # Without DF it is fragmented on the way
            sends(house, version, peer.port, bytes(1400))
            assert len(peer.receive()[0]) == 1400
        else:
            assert frame[ICMPv6PacketTooBig].mtu == 1280
        assert house.figures()["datagrams"]["not_passed_on"] == 1

    try:
        inside(house, script)
    finally:
        subprocess.run(["ip", "link", "set", "lo", "mtu", "65536"], check=True)


def test_no_route_is_told():
    house = House()

    def script():
        sends(house, 4, 9, dst="192.0.2.9")
        house.loop.settle()
        frames = house.received()
        assert [frame[ICMP].type for frame in frames if ICMP in frame] == [3]
        assert house.figures()["datagrams"]["not_passed_on"] == 1

    inside(house, script)


# Who may answer


def ask(house, version, peer, sport=GUEST_PORT) -> int:
    """The guest asks a peer; the port on the host that it came from."""
    sends(house, version, peer.port, sport=sport)
    return peer.receive()[1]


def heard(house, stranger, port) -> list:
    """What the guest gets of a stranger who sends to a port of the host."""
    house.received()
    stranger.sock.sendto(b"psst", (ADDRESSES[4][2], port))
    house.loop.settle()
    return house.datagrams()


@pytest.mark.parametrize(
    ("filtering", "another_port", "another_host"),
    (("endpoint", True, True), ("address", True, False), ("port", False, False)),
)
def test_filters(filtering, another_port, another_host, peers):
    """RFC 4787, 5: independent of the endpoint, of the address, or of address and port."""
    house, peer = House(udp_filter=filtering), peers(4)
    near, far = peers(4), peers(4, "127.0.0.9")

    def script():
        port = ask(house, 4, peer)
        assert bool(heard(house, near, port)) == another_port
        assert bool(heard(house, far, port)) == another_host
        dropped = house.figures()["datagrams"]["not_passed_on"]
        assert dropped == (not another_port) + (not another_host)
        if another_port:
            ((sport, dport, data),) = heard(house, near, port)
            assert (sport, dport, data) == (near.port, GUEST_PORT, b"psst")

    inside(house, script)


def test_a_group_may_be_answered_by_anybody_for_a_while(peers):
    house, far = House(), peers(4, "127.0.0.9")
    subprocess.run(["ip", "link", "set", "lo", "multicast", "on"], check=True)
    subprocess.run(["ip", "route", "add", "224.0.0.0/4", "dev", "lo"], check=True)

    def script():
        sends(house, 4, 5999, dst="239.1.2.3")
        house.loop.settle()
        # A frame for one station does not carry what is for all of them, and the other way round
        group_mac = "01:00:5e:01:02:03"
        frame = (
            Ether(src=GUEST_MAC, dst=group_mac)
            / ip(4, dst="239.1.2.3")
            / UDP(sport=4007, dport=5999)
            / b"who"
        )
        house.guest.send(bytes(frame))
        house.loop.settle()
        assert house.figures()["udp_flows"]["open"] == 2
        assert heard(house, far, 4007)
        house.loop.advance(udp.timeouts()[0] - 1)
        house.guest.send(bytes(frame))
        house.loop.settle()
        house.loop.advance(udp.timeouts()[0] - 1)
        assert heard(house, far, 4007), "each datagram to the group opens it again"

    try:
        inside(house, script)
    finally:
        subprocess.run(["ip", "route", "del", "224.0.0.0/4", "dev", "lo"], check=False)


@pytest.mark.parametrize("mac", ("ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"))
def test_a_datagram_for_one_that_was_sent_to_all(peers, mac):
    """RFC 1122, 3.3.6."""
    house, peer = House(), peers(4)

    def script():
        house.guest.send(
            bytes(Ether(src=GUEST_MAC, dst=mac) / ip(4) / UDP(sport=1, dport=peer.port) / b"x")
        )
        house.loop.settle()
        assert peer.is_empty() and not house.flows()
        assert house.figures()["datagrams"]["not_passed_on"] == 1

    inside(house, script)
    assert "it is for one host, but was sent to all stations" in house.said.getvalue()


@pytest.mark.parametrize("port", (67, 68, 546, 547))
@pytest.mark.parametrize("destination", ("255.255.255.255", "10.0.2.255"))
def test_requests_to_the_link_go_no_further(port, destination):
    house = House(dhcp=False, dhcpv6=False)

    def script():
        frame = Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / ip(4, dst=destination)
        house.guest.send(bytes(frame / UDP(sport=GUEST_PORT, dport=port) / b"x"))
        house.loop.settle()
        assert not house.flows() and house.figures()["datagrams"]["not_passed_on"] == 1

    inside(house, script)
    assert "it is for the link's services" in house.said.getvalue()


def test_without_udp_nothing_leaves(peers):
    house, peer = House(udp=False), peers(4)

    def script():
        sends(house, 4, peer.port)
        for part in fragment(ip(4) / UDP(sport=1, dport=peer.port) / bytes(3000), 1480):
            house.send(part)
        assert peer.is_empty() and not house.flows()
        assert house.figures()["datagrams"]["not_passed_on"] == 2

    inside(house, script)
    assert "UDP is switched off" in house.said.getvalue()


# Time and limits


@pytest.mark.parametrize("answered", (False, True))
def test_a_flow_is_forgotten(peers, answered):
    house, peer = House(), peers(4)
    silent, dialogue = udp.timeouts()

    def script():
        port = ask(house, 4, peer)
        if answered:
            peer.sock.sendto(b"a", (peer.address, port))
            house.loop.settle()
        limit = dialogue if answered else silent
        house.loop.advance(limit - 1.5)
        assert len(house.flows()) == 1
        house.loop.advance(3)
        assert not house.flows()
        # Its socket is closed: nobody hears a late answer
        house.received()
        peer.sock.sendto(b"late", (peer.address, port))
        house.loop.settle()
        assert not house.datagrams()

    inside(house, script)


def test_timeouts_are_those_of_the_kernel(tmp_path, monkeypatch):
    assert udp.TIMEOUT == 30.0 and udp.TIMEOUT_DIALOGUE == 120.0
    monkeypatch.setattr(udp, "CONNTRACK", str(tmp_path / "none"))
    assert udp.timeouts() == (30.0, 120.0)
    (tmp_path / "t").write_text("7\n")
    (tmp_path / "t_stream").write_text("77\n")
    monkeypatch.setattr(udp, "CONNTRACK", str(tmp_path / "t"))
    assert udp.timeouts() == (7.0, 77.0)
    (tmp_path / "t").write_text("soon\n")
    assert udp.timeouts() == (30.0, 77.0)


def test_the_limit_of_new_flows(peers):
    house, peer = House(limit_flows=2), peers(4)

    def script():
        for sport in (1001, 1002, 1003):
            sends(house, 4, peer.port, sport=sport)
        assert house.figures()["udp_flows"]["opened"] == 2
        assert house.figures()["datagrams"]["not_passed_on"] >= 1
        sends(house, 4, peer.port, b"known", sport=1001)
        house.loop.advance(0.6)
        sends(house, 4, peer.port, sport=1003)
        assert house.figures()["udp_flows"]["opened"] == 3

    inside(house, script)
    assert "too many new flows, a datagram was dropped" in house.said.getvalue()


def test_a_flow_gives_way_to_a_new_one(peers):
    """Where the table is full, the one that was never answered and is used least goes first."""
    house, peer = House(descriptors=120), peers(4)

    def script():
        most = house.proxy._planes.datagrams.flows.most[0]
        port = ask(house, 4, peer, 2000)
        peer.sock.sendto(b"a", (peer.address, port))
        house.loop.settle()
        for n in range(most + 5):
            ask(house, 4, peer, 2001 + n)
        assert len(house.flows()) <= most
        assert any(":2000 " in line + " " for line in house.flows()), "it has a conversation"
        house.received()
        peer.sock.sendto(b"b", (peer.address, port))
        house.loop.settle()
        assert [data for _, _, data in house.datagrams()] == [b"b"]

    inside(house, script)


# Forwarded ports


def published(house, target=80) -> int:
    """A free port of the host's that leads to a port of the guest."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as free:
        free.bind(("::", 0))
        port = free.getsockname()[1]
    house.proxy.follow((Rule(HOST, UDP_RULE, port, port, target),))
    return port


@BOTH
def test_a_client_and_its_answer(version, peers):
    house, client, other = House(ipv6=True), peers(version), peers(version)
    port = published(house)
    guest, gateway, loopback = ADDRESSES[version]

    def script():
        client.sock.sendto(b"hello", (loopback, port))
        other.sock.sendto(b"other", (loopback, port))
        house.loop.settle()
        frames = house.received()
        assert {(f[UDP].sport, f[UDP].dport, bytes(f[UDP].payload)) for f in frames} == {
            (client.port, 80, b"hello"), (other.port, 80, b"other")
        }  # fmt: skip
        assert all((f.payload.src, f.payload.dst) == (gateway, guest) for f in frames)
        sends(house, version, client.port, b"back", sport=80)
        assert client.receive() == (b"back", port)
        sends(house, version, other.port, b"to the other", sport=80)
        assert other.receive() == (b"to the other", port)
        assert house.figures()["udp_flows"] == {"opened": 2, "open": 2}
        # A second datagram of the same client belongs to the same flow
        client.sock.sendto(b"again", (loopback, port))
        house.loop.settle()
        assert house.datagrams() == [(client.port, 80, b"again")]
        assert house.figures()["udp_flows"]["opened"] == 2

    inside(house, script)


def test_the_guest_sends_from_a_forwarded_port(peers):
    """By the listener's socket, so that the answer comes back the same way."""
    house, peer = House(ipv6=True), peers(4)
    port = published(house)

    def script():
        sends(house, 4, peer.port, b"first", sport=80)
        data, number = peer.receive()
        assert (data, number) == (b"first", port)
        peer.sock.sendto(b"answer", (peer.address, port))
        house.loop.settle()
        assert house.datagrams() == [(peer.port, 80, b"answer")]
        assert house.figures()["udp_flows"]["opened"] == 1, "the guest has asked this host before"

    inside(house, script)


def test_two_forwarded_ports_to_one(peers):
    """The guest sees one host at two ports: answers go out by the socket that was called."""
    house, client = House(ipv6=True), peers(4)
    first, second = published(house), published(house)

    def script():
        for port in (first, second):
            client.sock.sendto(b"%d" % port, ("127.0.0.1", port))
        house.loop.settle()
        got = {data: sport for sport, _, data in house.datagrams()}
        assert len(got) == 2 and len(set(got.values())) == 2
        for data, sport in got.items():
            sends(house, 4, sport, b"re " + data, sport=80)
            assert client.receive() == (b"re " + data, int(data))

    inside(house, script)


def test_a_client_that_is_gone(peers):
    house, client = House(ipv6=True), peers(4)
    port = published(house)

    def script():
        client.sock.sendto(b"hello", ("127.0.0.1", port))
        house.loop.settle()
        house.received()
        client.sock.close()
        sends(house, 4, client.port, b"back", sport=80)
        house.loop.settle()
        (frame,) = house.received()
        assert (frame[ICMP].type, frame[ICMP].code) == (3, 3)
        assert (frame[UDPerror].sport, frame[UDPerror].dport) == (80, client.port)

    inside(house, script)


def test_a_listener_that_is_closed_ends_its_flows(peers):
    house, client, peer = House(ipv6=True), peers(4), peers(4)
    port = published(house)

    def script():
        client.sock.sendto(b"hello", ("127.0.0.1", port))
        house.loop.settle()
        assert len(house.flows()) == 1
        (rule,) = house.proxy.pieces()
        house.proxy.change([(False, rule)])
        assert not house.flows()
        # What the guest sends from that port goes its own way now
        sends(house, 4, peer.port, b"own", sport=80)
        data, number = peer.receive()
        assert data == b"own" and number != port

    inside(house, script)


def test_a_forwarded_port_takes_the_guests_own(peers):
    """A port of the host's that the guest's socket has is given up for a listener."""
    house, peer = House(ipv6=True), peers(4)

    def script():
        port = ask(house, 4, peer, 4455)
        assert port == 4455
        assert house.proxy._planes.datagrams.ports(HOST) >> 4455 & 1
        house.proxy.change([(True, Rule(HOST, UDP_RULE, 4455, 4455, 4455))])
        assert not house.proxy._planes.datagrams.ports(HOST) >> 4455 & 1
        assert not house.flows()
        sends(house, 4, peer.port, b"by the listener", sport=4455)
        assert peer.receive() == (b"by the listener", 4455)

    inside(house, script)


# Echo


@pytest.fixture
def pings(isolated):
    """Ping sockets are allowed, in the namespace of the test process."""
    pathlib.Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")


def echo_of(version, data=b"data", ident=77, seq=5, **fields):
    if version == 4:
        return ip(4, **fields) / ICMP(id=ident, seq=seq) / data
    return ip(6, **fields) / ICMPv6EchoRequest(id=ident, seq=seq, data=data)


@BOTH
def test_an_echo(version, pings):
    house = House(ipv6=True)
    guest, gateway, _ = ADDRESSES[version]

    def script():
        for seq in (5, 6):
            house.send(echo_of(version, seq=seq))
            house.loop.settle()
            (frame,) = house.received()
            layer = frame[ICMP] if version == 4 else frame[ICMPv6EchoReply]
            assert (layer.id, layer.seq) == (77, seq) and layer.type in (0, 129)
            assert (frame.payload.src, frame.payload.dst, frame.dst) == (gateway, guest, GUEST_MAC)
            data = bytes(layer.payload) if version == 4 else layer.data
            assert data == b"data"
        echo = house.proxy._planes.datagrams._from_guest.echo
        assert len(echo.flows) == 1 and echo.flows.opened == 1
        house.loop.advance(59)
        assert len(echo.flows) == 1
        house.loop.advance(3)
        assert len(echo.flows) == 0
        house.loop.advance(120)

    inside(house, script)


@BOTH
@pytest.mark.parametrize("size", (1473, 20_000))
def test_a_large_echo_comes_in_fragments(version, size, pings):
    house = House(ipv6=True, mtu=1500)

    def script():
        house.send(echo_of(version, bytes(size)))
        house.loop.settle()
        frames = house.received()
        assert len(frames) == -(-(size + 8) // (1480 if version == 4 else 1448))
        assert all(len(frame) <= 1514 for frame in frames)
        if version == 4:
            for frame in frames:
                again = frame.payload.copy()
                del again.chksum
                assert type(again)(bytes(again)).chksum == frame.payload.chksum

    inside(house, script)


def test_the_limit_of_new_flows_holds_for_echoes(pings):
    house = House(limit_flows=2)

    def script():
        for ident in (1, 2, 3):
            house.send(echo_of(4, ident=ident))
        house.loop.settle()
        assert [frame[ICMP].id for frame in house.received()] == [1, 2]

    inside(house, script)
    assert "too many new flows, a ping was dropped" in house.said.getvalue()


@pytest.mark.pure
def test_an_echo_that_the_host_does_not_permit(monkeypatch):
    def make(self, request):
        raise PermissionError(errno.EACCES, "Permission denied")

    house = House()
    monkeypatch.setattr(HostMaker, "make", make)

    def script():
        house.send(echo_of(4))
        house.send(echo_of(4))
        assert not house.received()

    inside(house, script)
    assert house.said.getvalue().count("ping_group_range leaves this group out") == 1


def test_an_echo_without_a_route_is_told(pings):
    house = House()

    def script():
        house.send(echo_of(4, dst="192.0.2.9"))
        house.loop.settle()
        assert [frame[ICMP].type for frame in house.received()] == [3]

    inside(house, script)


@BOTH
def test_an_echo_has_the_hop_limit_of_the_guests(version, pings):
    house = House(ipv6=True)
    level, option = (
        (socket.IPPROTO_IP, socket.IP_TTL)
        if version == 4
        else (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
    )

    def script():
        for ttl in (1, 44):
            house.send(echo_of(version, ttl=ttl))
            (flow,) = house.proxy._planes.datagrams._from_guest.echo.flows
            assert flow.sock.getsockopt(level, option) == ttl

    inside(house, script)


def test_without_echo_nothing_answers(pings):
    house = House(icmp=False)

    def script():
        house.send(echo_of(4))
        assert not house.received()
        assert house.figures()["datagrams"]["not_passed_on"] == 1
        house.loop.advance(100)

    inside(house, script)


def test_echoes_give_way_to_new_ones(pings):
    house = House(descriptors=200)

    def script():
        echo = house.proxy._planes.datagrams._from_guest.echo
        most = echo.flows.most[0]
        for ident in range(most + 3):
            house.send(echo_of(4, ident=ident))
        house.loop.settle()
        assert len(echo.flows) == most
        assert len(house.received()) == most + 3

    inside(house, script)


# Sockets and routes


def test_next_hops():
    """The router by which an address is reached, from the kernel."""
    for command in (
        "ip link add near9 type veth peer name far9", "ip link set far9 up",
        "ip addr add 10.77.0.1/24 dev near9", "ip -6 addr add fd77::1/64 dev near9",
        "ip link set near9 up", "ip route add 10.78.0.0/16 via 10.77.0.254", "ip -6 route add fd78::/64 via fd77::fe",
    ):  # fmt: skip
        subprocess.run(command.split(), check=True)
    hops = routes.NextHops(HostMaker())
    pack = socket.inet_pton
    try:
        assert hops.of(pack(socket.AF_INET, "10.78.1.1")) == pack(socket.AF_INET, "10.77.0.254")
        assert hops.of(pack(socket.AF_INET6, "fd78::5")) == pack(socket.AF_INET6, "fd77::fe")
        assert hops.of(pack(socket.AF_INET, "10.77.0.9")) == b"", "a neighbour"
        assert hops.of(pack(socket.AF_INET, "240.0.0.1")) == b"", "no route"
    finally:
        hops.close()
        subprocess.run(["ip", "link", "del", "near9"], check=True)
    assert hops.of(pack(socket.AF_INET, "10.78.1.1")) == b"", "closed"


@BOTH
def test_addresses_as_the_kernel_has_them(version):
    packed = socket.inet_pton(FAMILY[version], ADDRESSES[version][0])
    peer = routes.Peer(packed, 513, 7 if version == 6 else 0)
    address = routes.sockaddr(FAMILY[version], peer)
    assert len(address) == (16 if version == 4 else 28)
    assert routes.peer_of(address) == peer
    assert routes.described(address).endswith(":513")
    # A socket of IPv6 has addresses of IPv4 too
    mapped = routes.sockaddr(socket.AF_INET6, peer)
    assert routes.peer_of(mapped) == peer
    name = (ADDRESSES[version][0], 513) + ((0, 7) if version == 6 else ())
    assert routes.peer_of_python(name) == peer
    assert routes.peer_of(b"\1\0short") is None and routes.described(b"") == "nowhere"


def test_endpoints_are_few(peers):
    """The one that never had an answer goes first; without such a one, the one used least lately."""
    import select

    with select.epoll() as epoll:
        flows = table.Table(100, 30.0, 120.0)
        many = endpoints.Endpoints(epoll, HostMaker(), flows, 2)
        server = socket.inet_pton(socket.AF_INET, "127.0.0.1")

        def key(port: int, called: str = "192.0.2.1") -> bytes:
            guest = socket.inet_pton(socket.AF_INET, "10.0.2.15")
            return guest + socket.inet_pton(socket.AF_INET, called) + struct.pack("!HH", port, 53)

        def flow(port: int) -> endpoints.TapFlow:
            endpoint = many.get(key(port), server, b"\2\0\0\0\0\1")
            made = endpoints.TapFlow(key(port), 0.0, table.OUTBOUND, endpoint, routes.Peer(server, 53), b"")
            many.add(endpoint, made, key(port)[4:8])
            flows.add(made)
            return made

        first, second = flow(40001), flow(40002)
        assert len(many) == 2 and many.ports() == 1 << 40001 | 1 << 40002
        assert many.get(key(40001), server, b"") is first.port
        many.answered(first.port, first, 1.0)
        assert first.port.answered == 1
        third = flow(40003)
        assert second.closed and not first.closed and len(many) == 2
        many.answered(third.port, third, 2.0)
        fourth = flow(40004)
        assert first.closed and not third.closed
        # One host by two addresses that the guest knows: answers must be told apart
        other = many.get(key(40004, "192.0.2.99"), server, b"")
        assert other is not fourth.port and fourth.closed and not third.closed
        assert many.by_fd(other.fd) is other and other.number == 40004
        assert many.release(40004) and not many.release(40004)
        assert many.by_fd(other.fd) is None and len(many) == 1
        flows.close()
        many.close()
        assert len(many) == 0 and many.ports() == 0


def test_a_low_port_of_the_guests_is_another_on_the_host(peers):
    house, peer = House(), peers(4)

    def script():
        assert ask(house, 4, peer, 53) >= 1024

    inside(house, script)


def test_a_port_that_is_taken_is_another_on_the_host(peers):
    house, peer = House(), peers(4)
    holder = peers(4, "0.0.0.0")

    def script():
        assert ask(house, 4, peer, holder.port) != holder.port

    inside(house, script)


def test_the_plane_looks_at_times_only_while_there_are_flows(peers):
    house, peer = House(), peers(4)

    def script():
        assert house.loop.timers.next() == float("inf")
        ask(house, 4, peer)
        assert house.loop.timers.next() < FakeLoop().time + 2
        house.loop.advance(500)
        assert house.loop.timers.next() == float("inf")

    inside(house, script)
