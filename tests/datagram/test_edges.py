"""The datagram plane at its edges: errors as the kernel gives them, clients that are spliced, exact cuts."""

import contextlib
import errno
import io
import select
import socket
import struct
from types import SimpleNamespace

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment

from pysplice import _cext, wire
from pysplice.config.ports import HOST, Rule
from pysplice.config.ports import UDP as UDP_RULE
from pysplice.datagram import clients, echo, errors, fragments, routes, udp
from pysplice.datagram.table import Table
from pysplice.forward.policy import Listener, Policy
from pysplice.observe.log import Log
from pysplice.translate import Translation

from ..support.house import ADDRESSES, House, ip
from ..support.taps import GUEST_MAC, OUR_MAC
from .test_plane import BOTH, FAMILY, echo_of, inside, peers, pings, sends  # noqa: F401

pytestmark = pytest.mark.usefixtures("isolated")
MAC, OURS = (bytes.fromhex(mac.replace(":", "")) for mac in (GUEST_MAC, OUR_MAC))
ROUTER, SERVER = {4: "198.51.100.1", 6: "2001:db8:1::1"}, {4: "192.0.2.7", 6: "2001:db8::7"}
IP_PKTINFO = 8
TIME_EXCEEDED = {4: (11, 0), 6: (3, 0)}


def packed(version: int, address: str) -> bytes:
    return socket.inet_pton(FAMILY[version], address)


def key_to(version: int, server: str, sport: int = 4001, dport: int = 53) -> bytes:
    return (
        packed(version, ADDRESSES[version][0]) + packed(version, server) + struct.pack("!HH", sport, dport)
    )


def reported(
    version: int,
    offender: str = "",
    origin: int = -1,
    kind=None,
    info: int = 0,
    data: bytes = b"sent",
    port: int = 53,
) -> errors.QueuedError:
    """An error as recvmsg(2) gives it; `offender`: who has sent the ICMP message."""
    origin = origin if origin >= 0 else errors.ORIGIN_ICMP if version == 4 else errors.ORIGIN_ICMP6
    kind = kind or TIME_EXCEEDED[version]
    address = b""
    if offender:
        address = routes.sockaddr(FAMILY[version], routes.Peer(packed(version, offender), 0))
    extended = errors.EXTENDED.pack(errno.EHOSTUNREACH, origin, *kind, 0, info, 0) + address
    return errors.QueuedError((SERVER[version], port), extended, data)


def frame_of(version: int, error: errors.QueuedError, host: str = "", key: bytes = b""):
    key = key or key_to(version, SERVER[version])
    made = errors.frame(error, key, wire.PROTO_UDP, OURS, MAC, packed(version, host or SERVER[version]))
    return None if made is None else (IP if version == 4 else IPv6)(made[14:])


# Errors


@BOTH
def test_a_router_on_the_way_speaks_for_itself(version):
    packet = frame_of(version, reported(version, ROUTER[version]))
    guest = ADDRESSES[version][0]
    assert (packet.src, packet.dst) == (ROUTER[version], guest)
    inner = bytes(packet.payload)[8:]
    quoted = (IP if version == 4 else IPv6)(inner)
    assert (quoted.src, quoted.dst) == (guest, SERVER[version])
    header = bytes(quoted.payload)[:8]
    assert struct.unpack("!HHHH", header) == (4001, 53, 8 + 4, 0)
    assert bytes(quoted.payload)[8:] == b"sent"


@BOTH
@pytest.mark.parametrize("size", (0, 1, 1000, 40_000))
def test_what_is_quoted_has_the_length_that_was_sent(version, size):
    quoted = errors.quoted(key_to(version, SERVER[version]), wire.PROTO_UDP, bytes(size), MAC, OURS)
    header = quoted[14 + (20 if version == 4 else 40) :][:8]
    assert struct.unpack("!HHHH", header) == (4001, 53, 8 + size, 0)
    assert quoted[:12] == OURS + MAC


@BOTH
def test_who_an_error_comes_from(version):
    guest, _, loopback = ADDRESSES[version]
    # The destination is another host's address on the host: nobody between them concerns the guest
    assert frame_of(version, reported(version, ROUTER[version]), host=loopback).src == SERVER[version]
    # Nobody is named, or the unspecified address, or the guest itself
    unspecified = "0.0.0.0" if version == 4 else "::"
    for offender in ("", unspecified, guest):
        assert frame_of(version, reported(version, offender)).src == SERVER[version]


def test_an_offender_of_the_other_version_is_not_named():
    error = reported(4, ROUTER[4])._replace(
        extended=reported(6, ROUTER[6], origin=errors.ORIGIN_ICMP).extended
    )
    assert frame_of(4, error).src == SERVER[4]
    # In a socket of both versions IPv4 addresses are mapped
    mapped = routes.sockaddr(socket.AF_INET6, routes.Peer(packed(4, ROUTER[4]), 0))
    extended = errors.EXTENDED.pack(0, errors.ORIGIN_ICMP, 11, 0, 0, 0, 0) + mapped
    assert frame_of(4, error._replace(extended=extended)).src == ROUTER[4]


@BOTH
@pytest.mark.parametrize(
    ("origin", "info", "told"),
    ((errors.ORIGIN_LOCAL, 1280, True), (errors.ORIGIN_LOCAL, 0, False), (0, 0, False), (5, 1280, False)),
)
def test_errors_of_the_kernels_own(version, origin, info, told):
    """A packet that is too large for the path is what a router would tell; its other errors are no packet's."""
    packet = frame_of(version, reported(version, origin=origin, kind=(0, 0), info=info))
    assert (packet is not None) == told
    if told:
        kind, code, mtu = struct.unpack_from("!BB4xH", bytes(packet.payload))
        assert (kind, code) == ((3, 4) if version == 4 else (2, 0)) and mtu == 1280


@BOTH
def test_the_number_behind_an_error_is_passed_on_only_as_an_mtu(version):
    packet = frame_of(version, reported(version, ROUTER[version], info=0x01020304))
    assert bytes(packet.payload)[4:8] == bytes(4)
    too_big = (3, 4) if version == 4 else (2, 0)
    packet = frame_of(version, reported(version, ROUTER[version], kind=too_big, info=1400))
    assert int.from_bytes(bytes(packet.payload)[4:8], "big") == 1400


@BOTH
def test_an_error_about_an_echo(version, pings, monkeypatch):  # noqa: F811
    """The guest's identifier is in what it quotes, and where the guest can hear it."""
    house = House(ipv6=True)

    def script():
        house.send(echo_of(version, b"data", ident=0x1234))
        house.loop.settle()
        house.received()
        sent = (
            bytes(8 if version == 4 else 128 for _ in range(1)) + bytes(3) + b"\x77\x77" + b"\0\5" + b"data"
        )
        error = reported(version, data=sent)
        plane = house.proxy._planes.datagrams._from_guest.echo
        (flow,) = plane.flows
        monkeypatch.setattr(
            errors, "queued", lambda sock: iter([error, error] if sock is flow.sock else [])
        )
        plane.on_socket(flow.sock.fileno(), select.EPOLLERR, 5.0)
        frames = house.received()
        assert len(frames) == 2
        packet = frames[0].payload
        guest, gateway, _ = ADDRESSES[version]
        assert (packet.src, packet.dst, frames[0].dst) == (gateway, guest, GUEST_MAC)
        inner = (IP if version == 4 else IPv6)(bytes(packet.payload)[8:])
        assert bytes(inner.payload)[4:6] == b"\x12\x34"
        plane.on_socket(99_999, select.EPOLLERR | select.EPOLLIN, 5.0)
        # Readiness of one kind is not that of the other
        plane.on_socket(flow.sock.fileno(), select.EPOLLIN, 5.0)
        assert not house.received()

    inside(house, script)


def test_a_quote_that_is_cut_short_is_left_as_it_is():
    frame = bytes(14) + bytes(IP(src="10.0.0.1", dst="10.0.0.2")) + bytes(8) + bytes(20)
    for more in (0, 7):
        assert echo.with_ident(frame + bytes(more), b"\x12\x34") == frame + bytes(more)
    quote = bytes(IP(src="10.0.2.15", dst="192.0.2.7") / ICMP(id=7, seq=258) / b"xyz")
    frame = bytes(14) + bytes(IP(src="192.0.2.7", dst="10.0.2.15") / ICMP(type=11)) + quote
    made = IP(echo.with_ident(frame, b"\x12\x34")[14:])
    inner = IP(bytes(made.payload)[8:])
    assert (inner[ICMP].id, inner[ICMP].seq, bytes(inner[ICMP].payload)) == (0x1234, 258, b"xyz")


@BOTH
@pytest.mark.parametrize("size", (0, 1, 40_000))
def test_which_packets_are_echo_requests(version, size):
    made = bytes(
        ip(version, dst=SERVER[version])
        / (
            ICMP(id=1, seq=2) / bytes(size)
            if version == 4
            else ICMPv6EchoRequest(id=1, seq=2, data=bytes(size))
        )
    )
    found = echo.request(made)
    assert found is not None and len(found[1]) == 8 + size
    assert echo.request(made + b"padding") == found
    assert echo.request(made[: (20 if version == 4 else 40) + 7]) is None


# Clients


class Spliced:
    def __init__(self) -> None:
        self.taken: list = []
        self.forgotten: list = []

    def on_client(self, call, batch, now) -> None:
        self.taken.append((call, batch, now))

    def forget(self, sock) -> None:
        self.forgotten.append(sock)


class Way:
    """A way to the guest that takes those whose port is even."""

    def __init__(self) -> None:
        self.asked: list = []
        self.emitted: list = []
        self.errors: list = []

    def open(self, call, now):
        self.asked.append((call, now))
        if call.peer.port % 2:
            return None
        key = key_to(4, "10.0.2.2", 80, call.peer.port + len(self.asked))
        return udp.TapFlow(key, now, 1, call.port, call.peer, b"start%d" % call.peer.port)

    def emit(self, start, first, count) -> None:
        self.emitted.append((start, first, count))

    def on_errors(self, port, now) -> None:
        self.errors.append((port, now))


@pytest.fixture
def desk():
    """Clients behind one listener on the loopback interface, and what they are handed to."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        sock.bind(("::", 0))
        sock.setblocking(False)
        port = sock.getsockname()[1]
        rule = Rule(HOST, UDP_RULE, port, port, 80)
        listener = Listener(sock, rule, port)
        spliced, way, table = Spliced(), Way(), Table(10, 30.0, 120.0)
        policy = Policy(packed(4, "10.0.2.15"))
        said = io.StringIO()
        desk = clients.Clients(table, _cext.Packets(), spliced, way, policy, Log(debug=True, stream=said))
        desk.opened(listener)
        yield SimpleNamespace(
            clients=desk,
            listener=listener,
            port=port,
            spliced=spliced,
            way=way,
            table=table,
            said=said,
            stack=stack,
        )


def client(desk, parity: int, address: str = "127.0.0.1") -> socket.socket:
    while True:
        sock = desk.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((address, 0))
        if sock.getsockname()[1] % 2 == parity:
            return sock


def test_clients_on_the_loopback_interface_are_spliced(desk):
    ours = [client(desk, 0), client(desk, 1)]
    for sock in ours:
        sock.sendto(b"a", ("127.0.0.1", desk.port))
    desk.clients.on_ready(desk.listener, False, True, 7.0)
    assert not desk.way.asked and not desk.way.emitted
    calls = [call for call, _, _ in desk.spliced.taken]
    assert [call.peer.port for call in calls] == [sock.getsockname()[1] for sock in ours]
    assert [batch for _, batch, _ in desk.spliced.taken] == [(0, 1), (1, 1)]
    assert {now for _, _, now in desk.spliced.taken} == {7.0}
    lo = socket.if_nametoindex("lo")
    assert all(call.listener is desk.listener and call.interface == lo for call in calls)
    assert all(call.local == packed(4, "127.0.0.1") and len(call.address) == 28 for call in calls)


def test_where_nothing_can_be_spliced_they_go_through_the_tap(desk):
    """And those for whom there is no way are refused, one by one."""
    ours = [client(desk, 1), client(desk, 0), client(desk, 1), client(desk, 0)]
    for sock in ours:
        for _ in range(2):
            sock.sendto(b"a", ("127.0.0.1", desk.port))
    desk.clients.on_ready(desk.listener, True, False, 7.0)
    assert [now for _, now in desk.way.errors] == [7.0]
    assert len(desk.way.asked) == 4 and {now for _, now in desk.way.asked} == {7.0}
    even = [sock.getsockname()[1] for sock in ours if sock.getsockname()[1] % 2 == 0]
    assert [start for start, _, _ in desk.way.emitted] == [b"start%d" % number for number in even]
    assert desk.clients.refused == 4
    assert "no way in" in desk.said.getvalue() and "a client on the host" in desk.said.getvalue()
    desk.clients.on_ready(desk.listener, False, False, 8.0)
    assert len(desk.way.errors) == 1, "no errors were reported"


def test_a_client_is_known_by_the_address_that_it_has_called(desk):
    sock = client(desk, 0)
    for address, count in (("127.0.0.1", 1), ("127.0.0.1", 1), ("127.0.0.2", 2)):
        sock.sendto(b"a", (address, desk.port))
        desk.clients.on_ready(desk.listener, False, False, 7.0)
        assert len(desk.way.asked) == count
    flows = list(desk.clients._by_call[desk.listener.sock].values())
    assert len(flows) == 2
    address = flows[1].address
    assert desk.clients.flow_of(flows[0].port, address) is flows[1]
    flows[1].close()
    assert desk.clients.flow_of(flows[0].port, address) is None
    flows[0].close()
    assert not desk.clients._by_call[desk.listener.sock]


def test_a_listener_that_is_closed(desk):
    sock = client(desk, 0)
    sock.sendto(b"a", ("127.0.0.1", desk.port))
    desk.clients.on_ready(desk.listener, False, False, 7.0)
    port = desk.clients.port_of(80, packed(4, "10.0.2.15"))
    (flow,) = desk.clients._by_call[desk.listener.sock].values()
    assert port is not None and port.sock is desk.listener.sock
    assert desk.clients.port_of(81, packed(4, "10.0.2.15")) is None
    assert desk.clients.port_of(80, packed(4, "10.0.2.16")) is None, "another of the guest's addresses"
    # A flow of the guest's own by this socket
    own = udp.TapFlow(b"own", 0.0, 0, port, routes.Peer(packed(4, "192.0.2.9"), 5), b"")
    desk.clients.adopt(port, own)
    assert desk.clients.flow_of(port, own.address) is own
    own.close()
    assert desk.clients.flow_of(port, own.address) is None
    desk.clients.closed(desk.listener)
    assert port.closed and flow.closed and desk.spliced.forgotten == [desk.listener.sock]
    assert desk.clients.port_of(80, packed(4, "10.0.2.15")) is None
    assert desk.clients.flow_of(port, flow.address) is None
    late = udp.TapFlow(b"late", 0.0, 0, port, routes.Peer(packed(4, "192.0.2.9"), 5), b"")
    desk.clients.adopt(port, late)
    assert desk.clients.flow_of(port, late.address) is None
    desk.clients.closed(desk.listener)  # once more does no harm


def test_without_a_tap_there_is_no_way():
    way = clients.NoWay()
    assert way.open(None, 0.0) is None  # type: ignore[arg-type]
    way.emit(b"", 0, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        errors.enable(sock)
        sock.connect(("127.0.0.1", 9))
        sock.send(b"x")
        way.on_errors(routes.Port(sock), 0.0)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def tap_way(translation: Translation | None = None) -> tuple[clients.TapWay, Table]:
    table: Table = Table(10, 30.0, 120.0)
    handed = SimpleNamespace(emit=None, on_errors=None)
    policy = Policy(packed(4, "10.0.2.15"), packed(6, "fd00::15"))
    callers = {packed(4, "127.0.0.1"): packed(4, "10.0.2.2")}
    translation = translation or Translation({}, callers=callers)
    neighbours = SimpleNamespace(mac=MAC)
    return clients.TapWay(handed, table, neighbours, translation, policy, OURS), table


def call_of(sock, peer: routes.Peer, local: bytes = b"", interface: int = 0) -> clients.Call:
    rule = Rule(HOST, UDP_RULE, 8080, 8080, 80)
    return clients.Call(
        Listener(sock, rule, 8080), routes.Port(sock), peer, routes.sockaddr(sock.family, peer), local, interface
    )  # fmt: skip


def test_a_flow_of_a_client():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        way, table = tap_way()
        peer = routes.Peer(packed(4, "127.0.0.1"), 999)
        flow = way.open(call_of(sock, peer, packed(4, "127.0.0.5")), 3.0)
        assert flow.key == key_to(4, "10.0.2.2", 80, 999) and table.get(flow.key) is flow
        assert flow.source == packed(4, "127.0.0.5") and flow.interface == 0 and flow.used == 3.0
        assert flow.start == wire.frame_start(MAC, OURS, flow.key, wire.PROTO_UDP)
        # An address of the other version is none to answer from
        other = way.open(
            call_of(sock, routes.Peer(packed(6, "2001:db8::9"), 1000), packed(4, "127.0.0.5")), 3.0
        )
        assert other.source == b""
        # The interface matters for addresses that are of a link
        link = way.open(
            call_of(sock, routes.Peer(packed(6, "fe80::9"), 1001, 4), packed(6, "fe80::1"), 4), 3.0
        )
        assert link is None or link.interface == 4
        # From port 0 nobody can be answered
        assert way.open(call_of(sock, routes.Peer(packed(4, "127.0.0.1"), 0)), 3.0) is None
        # Another socket of ours, the same client: it has another number there, and not a low one
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as second:
            again = way.open(call_of(second, peer), 3.0)
            assert again.key[:-2] == flow.key[:-2] and again.key != flow.key
            assert int.from_bytes(again.key[-2:], "big") >= 1024


def test_a_guest_without_an_address_of_that_version_has_no_clients():
    table: Table = Table(10, 30.0, 120.0)
    handed = SimpleNamespace(emit=None, on_errors=None)
    way = clients.TapWay(
        handed, table, SimpleNamespace(mac=MAC), Translation({}), Policy(packed(4, "10.0.2.15")), OURS
    )  # fmt: skip
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        assert way.open(call_of(sock, routes.Peer(packed(6, "2001:db8::9"), 1000)), 3.0) is None


# Fragments, to the byte


@BOTH
@pytest.mark.parametrize("mtu", (68, 600, 1280, 1500))
def test_where_a_packet_is_cut(version, mtu):
    mtu = mtu if version == 4 else max(mtu, 1280)
    header = 20 if version == 4 else 40
    unit = (mtu - header - (0 if version == 4 else 8)) // 8 * 8
    for size in (mtu - header, mtu - header + 1, 2 * unit, 2 * unit + 1, 3 * unit - 1, 40_000):
        packet = bytes(ip(version, dst=SERVER[version]) / UDP(sport=1, dport=2) / bytes(size - 8))
        parts = list(fragments.split(packet, mtu, 0xFEDC))
        if size <= mtu - header:
            assert parts == [packet]
            continue
        assert all(len(part) <= mtu for part in parts) and len(parts) == -(-size // unit)
        at = 0
        for n, part in enumerate(parts):
            last = n == len(parts) - 1
            if version == 4:
                shown = IP(part)
                assert (shown.frag * 8, shown.id, bool(shown.flags & 1)) == (at, 0xFEDC, not last)
                length = shown.len - 20
            else:
                shown = IPv6(part)[IPv6ExtHdrFragment]
                assert (shown.offset * 8, shown.id, bool(shown.m), shown.nh) == (at, 0xFEDC, not last, 17)
                assert shown.res1 == 0 and IPv6(part).plen == len(part) - 40
                length = len(part) - 48
            at += length
        assert at == size


@BOTH
def test_which_packets_hold_a_datagram(version):
    def packet(sport=1, dport=2, **fields):
        return bytes(ip(version, dst=SERVER[version]) / UDP(sport=sport, dport=dport, **fields) / b"abc")

    assert fragments.datagram(packet())[1] == b"abc"
    empty = bytes(ip(version, dst=SERVER[version]) / UDP(sport=1, dport=2))
    assert fragments.datagram(empty)[1] == b""
    for bad in (packet(sport=0), packet(dport=0), packet(len=7), packet(len=12)):
        assert fragments.datagram(bad) is None
    short = packet(len=10)
    assert fragments.datagram(short) is None or fragments.datagram(short)[1] == b"ab"


# Answers of the kernel about routes


class Netlink:
    """A socket that gives one answer."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.asked, self.closed = answer, b"", False

    def send(self, data: bytes) -> None:
        self.asked = data

    def recv(self, most: int) -> bytes:
        return self.answer

    def close(self) -> None:
        self.closed = True


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


@pytest.mark.parametrize(
    ("answer", "router"),
    (
        (attribute(1, b"abcd") + attribute(5, b"\x0a\0\0\1"), b"\x0a\0\0\1"),
        (attribute(9, b"x") + attribute(5, b"\x0a\0\0\1"), b"\x0a\0\0\1"),
        (
            attribute(9, b"xyz") + attribute(8, b"") + attribute(5, b"\x0a\0\0\1") + attribute(5, b"late"),
            b"\x0a\0\0\1",
        ),
        (attribute(1, b"abcd"), b""),
        (struct.pack("=HH", 0, 9) + attribute(5, b"\x0a\0\0\1"), b"\x0a\0\0\1"),
        (b"", b""),
    ),
)
def test_an_answer_about_a_route(answer, router):
    header = struct.pack("=IHHII", 28 + len(answer), routes.RTM_NEWROUTE, 0, 0, 0) + bytes(12)
    netlink = Netlink(header + answer)
    hops = routes.NextHops(SimpleNamespace(make=lambda request: netlink))
    assert hops.of(packed(4, "192.0.2.1")) == router
    length, kind, flags, number, _ = struct.unpack_from("=IHHII", netlink.asked)
    assert (length, kind, flags) == (len(netlink.asked), routes.RTM_GETROUTE, 1)
    family, bits = struct.unpack_from("=BB", netlink.asked, 16)
    assert (family, bits) == (socket.AF_INET, 32)
    netlink.answer = struct.pack("=IHHII", 20, 2, 0, 0, 0) + bytes(4)
    assert hops.of(packed(6, "2001:db8::1")) == b"", "an error"
    assert struct.unpack_from("=BB", netlink.asked, 16) == (socket.AF_INET6, 128)
    netlink.answer = b"short"
    assert hops.of(packed(4, "192.0.2.1")) == b""
    hops.close()
    assert netlink.closed


def test_without_a_netlink_socket_no_router_is_known():
    def make(request):
        raise OSError(errno.EACCES, "no")

    hops = routes.NextHops(SimpleNamespace(make=make))
    assert hops.of(packed(4, "192.0.2.1")) == b""
    hops.close()


def test_a_router_may_answer_for_the_host_that_was_asked(peers):  # noqa: F811
    """By another of its addresses; routers are looked up again after a while."""
    house = House()
    peer, router = peers(4), peers(4, "127.0.0.9")
    asked: list[bytes] = []

    def of(address):
        asked.append(address)
        return packed(4, "127.0.0.9")

    def script():
        plane = house.proxy._planes.datagrams._from_guest.udp
        plane._next_hops = SimpleNamespace(of=of)
        sends(house, 4, peer.port)
        port = peer.receive()[1]
        for n in range(3):
            router.sock.sendto(b"%d" % n, ("127.0.0.1", port))
            house.loop.settle()
        assert [data for _, _, data in house.datagrams()] == [b"0", b"1", b"2"]
        assert asked == [packed(4, "127.0.0.1")]
        house.loop.advance(udp.HOPS_VALID)
        router.sock.sendto(b"later", ("127.0.0.1", port))
        house.loop.settle()
        assert len(asked) == 2

    inside(house, script)


def test_of_many_hosts_the_last_are_looked_up(peers):  # noqa: F811
    house, stranger = House(), peers(4, "127.0.0.9")
    asked: list[bytes] = []

    def script():
        plane = house.proxy._planes.datagrams._from_guest.udp
        plane._next_hops = SimpleNamespace(of=lambda address: asked.append(address) or b"")
        for n in range(udp.HOPS_ASKED + 5):
            sends(house, 4, 9, dst=f"127.0.1.{n + 1}" if n else "10.0.2.2")
        port = house.proxy._planes.datagrams._from_guest.endpoints.ports().bit_length() - 1
        stranger.sock.sendto(b"x", ("127.0.0.1", port))
        house.loop.settle()
        assert len(asked) <= udp.HOPS_ASKED
        assert not house.datagrams()

    inside(house, script)


# Echo, to the letter


def echo_plane(house):
    return house.proxy._planes.datagrams._from_guest.echo


@BOTH
def test_what_is_taken_is_not_counted_as_lost(version, pings, monkeypatch):  # noqa: F811
    house = House(ipv6=True, limit_flows=1)

    def script():
        house.send(echo_of(version, ident=1))
        house.send(echo_of(version, ident=2))  # beyond the limit
        house.send(echo_of(version, ident=1))
        (flow,) = echo_plane(house).flows
        assert flow.used == house.loop.time and flow.ttl == 64
        assert flow.host == packed(version, ADDRESSES[version][2])

        class Full:
            family = flow.sock.family

            def send(self, message):
                raise BlockingIOError

            def close(self):
                pass

        real, flow.sock = flow.sock, Full()
        house.send(echo_of(version, ident=1))
        flow.sock = real
        assert house.figures()["datagrams"]["not_passed_on"] == 0
        house.send(ip(version) / UDP(sport=0, dport=9))
        house.loop.advance(30)
        house.send(echo_of(version, ident=1))
        assert flow.used == house.loop.time

    inside(house, script)


@pytest.mark.parametrize("fails", (1, 2))
def test_an_error_about_an_earlier_request_costs_none(pings, fails):  # noqa: F811
    house = House()
    sent: list[bytes] = []

    def script():
        house.send(echo_of(4))
        (flow,) = echo_plane(house).flows
        house.received()
        real = flow.sock

        class Refusing:
            family = real.family
            left = fails

            def send(self, message):
                if self.left:
                    self.left -= 1
                    raise ConnectionRefusedError
                sent.append(message)

            def __getattr__(self, name):
                return getattr(real, name)

        flow.sock = Refusing()
        house.send(echo_of(4, seq=9))
        assert len(sent) == (fails == 1)
        flow.sock = real

    inside(house, script)


def test_an_echo_leaves_as_the_options_say(pings):  # noqa: F811
    import ipaddress
    import subprocess

    addresses = ("10.99.1.1", "10.99.1.2")
    for address in addresses:
        subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
    house = House(outbound=(ipaddress.ip_address("10.99.1.2"),), outbound_if4="lo")

    def script():
        house.send(echo_of(4, dst="10.99.1.1"))
        (flow,) = echo_plane(house).flows
        assert flow.sock.getsockname()[0] == "10.99.1.2"
        assert flow.sock.getsockopt(socket.SOL_SOCKET, 25, 16).rstrip(b"\0") == b"lo"
        house.loop.settle()
        assert len(house.received()) == 1

    try:
        inside(house, script)
    finally:
        for address in addresses:
            subprocess.run(["ip", "addr", "del", f"{address}/32", "dev", "lo"], check=True)


def test_each_reply_has_an_identification_of_its_own(pings):  # noqa: F811
    house = House(mtu=1500)

    def script():
        idents = []
        for seq in range(3):
            house.send(echo_of(4, bytes(2000), seq=seq))
            house.loop.settle()
            frames = house.received()
            assert len({frame[IP].id for frame in frames}) == 1 and len(frames) == 2
            idents.append(frames[0][IP].id)
        assert idents == [1, 2, 3]

    inside(house, script)


def test_strange_messages_at_a_ping_socket_hold_no_reply_up(pings):  # noqa: F811
    house = House()

    def script():
        house.send(echo_of(4))
        house.loop.settle()
        house.received()
        (flow,) = echo_plane(house).flows
        real = flow.sock
        messages = [b"\x08\0 a request", b"\0\0\0\0\0\0\0\5pong"]

        class Odd:
            family = real.family

            def recv(self, most):
                if not messages:
                    raise BlockingIOError
                return messages.pop(0)

            def __getattr__(self, name):
                return getattr(real, name)

        flow.sock = Odd()
        echo_plane(house).on_socket(real.fileno(), select.EPOLLIN, 1.0)
        (frame,) = house.received()
        assert bytes(frame[ICMP].payload) == b"pong" and frame[ICMP].seq == 5
        flow.sock = real

    inside(house, script)


# Errors that come before their time


@pytest.mark.parametrize(("fails", "sent"), ((0, True), (2, True), (3, False)))
def test_how_often_a_datagram_is_tried(peers, fails, sent):  # noqa: F811
    """An error about an earlier datagram is reported by the next send: twice at most that is no reason to give up."""
    house, peer = House(), peers(4)

    def script():
        sends(house, 4, peer.port, b"first")
        peer.receive()
        plane = house.proxy._planes.datagrams._from_guest.udp
        real, left = plane._packets, [fails]

        class Packets:
            def send(self, *args):
                if left[0]:
                    left[0] -= 1
                    return -errno.ECONNREFUSED
                return real.send(*args)

            def __getattr__(self, name):
                return getattr(real, name)

        plane._packets = Packets()
        sends(house, 4, peer.port, b"second")
        if sent:
            assert peer.receive()[0] == b"second"
        else:
            assert peer.is_empty()
        assert house.figures()["datagrams"]["not_passed_on"] == (not sent)
        plane._packets = real

    inside(house, script)


def test_an_error_without_a_port_is_about_what_was_just_sent(monkeypatch, peers):  # noqa: F811
    house, peer = House(), peers(4)

    def script():
        sends(house, 4, peer.port)
        plane = house.proxy._planes.datagrams._from_guest.udp
        (flow,) = plane._flows
        local = reported(4, origin=errors.ORIGIN_LOCAL, kind=(0, 0), info=1280)
        about = {
            "another host's": local._replace(peer=("127.0.0.9", 0)),
            "its own": local._replace(peer=("127.0.0.1", 0)),
            "nobody's": local._replace(peer=()),
        }
        for queue, sender, told in (
            (["its own"], flow, 1),
            (["its own"], None, 0),
            (["another host's"], flow, 0),
            (["nobody's", "its own"], flow, 1),
        ):
            monkeypatch.setattr(errors, "queued", lambda sock, queue=queue: [about[name] for name in queue])
            house.received()
            house.loop.advance(1)
            plane.on_errors(flow.port, house.loop.time, sent=sender)
            assert len(house.received()) == told, queue

    inside(house, script)
