"""Datagrams in the C extension, held against scapy and slow Python."""

import errno
import os
import random
import socket
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether

from pysplice import _cext
from pysplice.datagram import fragments, routes
from pysplice.sockets.request import HostMaker, SocketRequest, make
from pysplice.wire import frame_start, unpack

from ..support.taps import ADDRESSES, GUEST_MAC, OUR_MAC, VNET, key, tap_pair

BOTH = pytest.mark.parametrize("version", (4, 6))
MAC = bytes.fromhex("9a559a559a55")
GUEST = bytes.fromhex("020000000001")
PROTO_UDP = 17
UDP_GRO, UDP_SEGMENT = 104, 103
IP_MTU_DISCOVER = 10
GSO_UDP_L4 = 5


def datagram(version=4, payload=b"", sport=40000, dport=53, **fields):
    """A frame from the guest, checksums and all; fields are scapy's for UDP."""
    src, dst = ADDRESSES[version]
    ip = IP(src=src, dst=dst, ttl=61) if version == 4 else IPv6(src=src, dst=dst, hlim=61)
    return bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / ip / UDP(sport=sport, dport=dport, **fields) / payload)


class Pair:
    def __init__(self, vnet):
        self.ours, self.guest = tap_pair()
        self.tap = _cext.Tap(self.ours.fileno(), vnet)
        self.packets = _cext.Packets()
        self.vnet = vnet

    def put(self, *frames, header=VNET):
        for frame in frames:
            self.guest.send((header if self.vnet else b"") + frame)
        return self.tap.drain()

    def send(self, handle, fd, skip):
        """By a connected socket."""
        return self.packets.send(self.tap, handle, fd, skip, b"", b"")

    def forward(self, start, fd, mtu, uso):
        """Take what a socket has, and hand it to the guest; how many datagrams, or -errno."""
        groups = self.packets.receive(fd)
        if isinstance(groups, int):
            return groups
        for *_, first, count in groups:
            assert self.packets.emit(self.tap, start, first, count, mtu, uso) == 0
        return sum(group[-1] for group in groups)

    def frames(self):
        """What the guest was sent: (virtio header or None, frame)."""
        got = []
        while True:
            try:
                data = self.guest.recv(70000)
            except BlockingIOError:
                return got
            got.append((data[:10], data[10:]) if self.vnet else (None, data))

    def close(self):
        self.ours.close()
        self.guest.close()


@pytest.fixture(params=(False, True), ids=("plain", "vnet"))
def tap(request):
    pair = Pair(request.param)
    yield pair
    pair.close()


def connected_pair():
    """Two UDP sockets that are connected to each other."""
    socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) for _ in range(2)]
    for sock in socks:
        sock.bind(("127.0.0.1", 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    socks[0].connect(socks[1].getsockname())
    socks[1].connect(socks[0].getsockname())
    return socks


@pytest.fixture
def host():
    socks = connected_pair()
    yield socks
    for sock in socks:
        sock.close()


def received(sock):
    got = []
    while True:
        try:
            got.append(sock.recv(70000))
        except BlockingIOError:
            return got


# From the guest


@BOTH
@pytest.mark.parametrize("size", (0, 1, 2, 1471, 9000, 60000))
def test_a_datagram(tap, host, version, size):
    payload = os.urandom(size)
    runs, (several,), others = tap.put(datagram(version, payload))
    assert (runs, others) == ([], [])
    assert several.key == key(version, dport=53)
    assert (several.frames, several.length, several.ttl) == (1, size, 61)
    assert tap.tap.frame(several.handle) == datagram(version, payload)
    assert tap.send(several.handle, host[0].fileno(), 0) == 1
    assert received(host[1]) == [payload]


def test_flows_are_grouped_and_keep_their_order(tap, host):
    frames = [datagram(4, b"%d" % i, sport=40000 + i % 3) for i in range(30)]
    _, runs, _ = tap.put(*frames)
    assert [run.frames for run in runs] == [10, 10, 10]
    for i, run in enumerate(runs):
        assert tap.send(run.handle, host[0].fileno(), 0) == 10
        assert received(host[1]) == [b"%d" % j for j in range(i, 30, 3)]


def test_another_hop_limit_is_another_run(tap):
    one = datagram(4, b"x")
    packet = Ether(one)
    packet.ttl = 3
    del packet[IP].chksum
    _, runs, _ = tap.put(one, bytes(packet))
    assert [(run.frames, run.ttl) for run in runs] == [(1, 61), (1, 3)]


def test_tcp_of_the_same_ports_is_another_flow(tap):
    from ..support.taps import segment

    runs, datagrams, _ = tap.put(
        segment(4, b"t", dport=53), datagram(4, b"u"), segment(4, b"v", dport=53, seq=1)
    )
    assert [run.length for run in runs] == [2] and [d.length for d in datagrams] == [1]


def test_skip(tap, host):
    _, (run,), _ = tap.put(*(datagram(4, b"%d" % i) for i in range(5)))
    assert tap.send(run.handle, host[0].fileno(), 3) == 2
    assert received(host[1]) == [b"3", b"4"]


def test_what_an_earlier_one_met_is_told_once(tap):
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        client.connect(gone.getsockname())
    _, (run,), _ = tap.put(datagram(4, b"x"))
    assert tap.send(run.handle, client.fileno(), 0) == 1
    assert tap.send(run.handle, client.fileno(), 0) == -errno.ECONNREFUSED
    assert tap.send(run.handle, client.fileno(), 0) == 1
    client.close()


def test_segmentation_is_left_to_the_kernel():
    """A frame of many datagrams (USO) goes out in one call, and arrives as many."""
    pair, host = Pair(True), connected_pair()
    payload = os.urandom(20 * 1000 + 7)
    header = struct.pack("=BBHHHH", 1, GSO_UDP_L4, 42, 1000, 34, 6)
    _, (run,), _ = pair.put(datagram(4, payload), header=header)
    assert run.frames == 1
    assert pair.send(run.handle, host[0].fileno(), 0) == 1
    assert received(host[1]) == [payload[at : at + 1000] for at in range(0, len(payload), 1000)]
    pair.close()


def messages(sock):
    """What a socket has, as the kernel joined it: (size of the datagrams or 0, payload)."""
    got = []
    while True:
        try:
            data, control, _, _ = sock.recvmsg(70000, 100)
        except BlockingIOError:
            return got
        sizes = [struct.unpack("=i", value)[0] for _, kind, value in control if kind == UDP_GRO]
        got.append((sizes[0] if sizes else 0, data))


# How long each datagram is, and how many of them go out together
TOGETHER = {
    "of one size": ([700] * 20, [20]),
    "a shorter one ends": ([700] * 5 + [699] + [700] * 4, [6, 4]),
    "a longer one begins": ([100] * 4 + [101] * 4, [4, 4]),
    "too few": ([700] * 3, [1] * 3),
    "mixed": ([9, 8, 9, 9, 9, 9, 3, 2], [1, 1, 5, 1]),
    "none with an empty one": ([5, 5, 0, 5, 5, 5, 5], [1, 1, 1, 4]),
    "too large for most paths": ([1473] * 5, [1] * 5),
    "more than a message holds": ([1472] * 50, [44, 6]),
    "more than one may carry": ([10] * 100, [64, 36]),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_datagrams_of_one_size_go_out_together(tap, case):
    sizes, together = TOGETHER[case]
    host = connected_pair()
    host[1].setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    payloads = [os.urandom(size) for size in sizes]
    _, (run,), _ = tap.put(*(datagram(4, payload) for payload in payloads))
    assert tap.send(run.handle, host[0].fileno(), 0) == len(sizes)
    got = messages(host[1])
    assert [-(-len(data) // size) if size else 1 for size, data in got] == together
    assert b"".join(data for _, data in got) == b"".join(payloads)
    for sock in host:
        sock.close()


def test_behind_one_that_has_failed_they_go_one_by_one(tap):
    """Otherwise each further failure would cost a message of all that are left."""
    host = connected_pair()
    host[1].setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    _, (run,), _ = tap.put(*(datagram(4, b"x" * 100) for _ in range(9)))
    assert tap.send(run.handle, host[0].fileno(), 1) == 8
    assert messages(host[1]) == [(0, b"x" * 100)] * 8
    for sock in host:
        sock.close()


def test_where_they_cannot_go_together_they_go_one_by_one(tap, isolated):
    """The kernel cuts nothing for a path whose MTU is smaller; it makes fragments of each."""
    subprocess.run(["ip", "link", "set", "lo", "mtu", "1280"], check=True)
    payloads = [os.urandom(1400) for _ in range(9)]
    _, (run,), _ = tap.put(*(datagram(4, payload) for payload in payloads))
    host = connected_pair()
    host[0].setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, 0)
    assert tap.send(run.handle, host[0].fileno(), 0) == 9
    assert received(host[1]) == payloads
    for sock in host:
        sock.close()
    subprocess.run(["ip", "link", "set", "lo", "mtu", "65536"], check=True)


@pytest.mark.parametrize("size", (0, 1, 3, 23, 24, 1000, 2999, 3000, 65535))
def test_the_payloads_of_a_run_can_be_copied(size):
    """Datagram by datagram, also those that the guest has joined; a handle of an older batch names nothing."""
    pair = Pair(True)
    payload = os.urandom(3000)
    header = struct.pack("=BBHHHH", 1, GSO_UDP_L4, 42, size, 34, 6)
    pair.guest.send(bytes(10) + datagram(4, b""))
    _, (run,), _ = pair.put(datagram(4, payload), header=header)
    unit = size or len(payload)
    parts = [payload[at : at + unit] for at in range(0, 3000, unit)]
    # A guest's kernel joins 128 at most
    assert pair.tap.payloads(run.handle) == [b"", *(parts if len(parts) <= 128 else [])]
    pair.tap.drain()
    with pytest.raises(ValueError):
        pair.tap.payloads(run.handle)
    with pytest.raises(TypeError):
        pair.tap.payloads("x")


@pytest.mark.parametrize("size", (1, 3, 65535))
def test_a_strange_size_of_segments(size):
    """The guest may write anything there: the bytes arrive cut up somehow, or not at all."""
    pair, host = Pair(True), connected_pair()
    payload = os.urandom(3000)
    header = struct.pack("=BBHHHH", 1, GSO_UDP_L4, 42, size, 34, 6)
    _, (run,), _ = pair.put(datagram(4, payload), header=header)
    pair.send(run.handle, host[0].fileno(), 0)
    got = received(host[1])
    assert payload.startswith(b"".join(got)) and all(len(part) <= size for part in got)
    pair.close()


BROKEN = {
    "checksum": lambda frame: frame[:-1] + bytes((frame[-1] ^ 1,)),
    "length too large": lambda frame: frame[:38] + b"\xff\xff" + frame[40:],
    "length too small": lambda frame: frame[:38] + b"\x00\x07" + frame[40:],
    "cut short": lambda frame: frame[:40],
    "source port 0": lambda frame: frame[:34] + b"\0\0" + frame[36:40] + b"\0\0" + frame[42:],
    "destination port 0": lambda frame: frame[:36] + b"\0\0" + frame[38:40] + b"\0\0" + frame[42:],
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_ones_are_dropped(tap, how):
    assert tap.put(BROKEN[how](datagram(4, b"payload"))) == ([], [], [])
    reason = "checksum" if how == "checksum" else "port" if "port" in how else "length"
    assert tap.tap.dropped == {reason: 1}


def test_no_checksum_is_for_ipv4_only(tap):
    _, runs, _ = tap.put(datagram(4, b"x", chksum=0), datagram(6, b"x", chksum=0))
    assert [run.key for run in runs] == [key(4, dport=53)]


def test_padding_is_no_payload(tap, host):
    _, (run,), _ = tap.put(datagram(4, b"four") + bytes(30))
    tap.send(run.handle, host[0].fileno(), 0)
    assert received(host[1]) == [b"four"]


@pytest.mark.parametrize("address", ("240.0.0.1", "127.0.0.1", "0.0.0.0"))
def test_what_is_not_between_hosts_is_handed_over_whole(tap, address):
    frame = bytes(Ether() / IP(src="10.0.2.15", dst=address) / UDP(sport=68, dport=67) / b"x")
    assert tap.put(frame) == ([], [], [frame])


# To the guest


def check(frame, vnet, version, payload, gso=0):
    """A frame is what scapy makes of its parts; an open checksum is that of the pseudo header."""
    packet = Ether(frame)
    assert (packet.src, packet.dst) == (OUR_MAC, GUEST_MAC)
    layer = packet[IP if version == 4 else IPv6]
    src, dst = ADDRESSES[version]
    assert (layer.src, layer.dst) == (dst, src)
    assert (packet[UDP].sport, packet[UDP].dport) == (53, 40000)
    assert bytes(packet[UDP].payload) == payload
    if vnet is not None:
        flags, kind, _, size, start, offset = struct.unpack("=BBHHHH", vnet)
        assert (flags, start, offset) == (1, 34 if version == 4 else 54, 6)
        assert (kind, size) == ((GSO_UDP_L4, gso) if gso else (0, 0))
        return
    again = Ether(frame)
    del again[UDP].chksum
    if version == 4:
        del again[IP].chksum
    assert bytes(again) == frame


@BOTH
@pytest.mark.parametrize("size", (0, 1, 2, 3, 999, 1452))
def test_forward(tap, host, version, size):
    payloads = [os.urandom(size) for _ in range(10)]
    for payload in payloads:
        host[1].send(payload)
    start = frame_start(GUEST, MAC, key(version, dport=53), PROTO_UDP)
    assert tap.forward(start, host[0].fileno(), 1500, False) == 10
    frames = tap.frames()
    assert len(frames) == 10
    for (vnet, frame), payload in zip(frames, payloads, strict=True):
        check(frame, vnet, version, payload)
    assert tap.forward(start, host[0].fileno(), 1500, False) == -errno.EAGAIN


@BOTH
def test_datagrams_of_one_size_reach_the_guest_in_one_frame(tap, host, version):
    sizes = [900] * 5 + [1] + [2] + [1452] * 60 + [0]
    payloads = [os.urandom(size) for size in sizes]
    for payload in payloads[:64]:
        host[1].send(payload)
    start = frame_start(GUEST, MAC, key(version, dport=53), PROTO_UDP)
    assert tap.forward(start, host[0].fileno(), 1500, True) == 64
    for payload in payloads[64:]:
        host[1].send(payload)
    assert tap.forward(start, host[0].fileno(), 1500, True) == 4
    counts = [6, 1, 45, 12, 3, 1] if tap.vnet else [1] * len(sizes)
    frames = tap.frames()
    assert len(frames) == len(counts)
    for (vnet, frame), count in zip(frames, counts, strict=True):
        size = len(payloads[0]) if count > 1 else 0
        check(frame, vnet, version, b"".join(payloads[:count]), size)
        del payloads[:count]


@BOTH
def test_a_checksum_of_zero_goes_out_as_ones(version):
    """RFC 768: 0 means that there is none."""
    pair, host = Pair(False), connected_pair()
    start = frame_start(GUEST, MAC, key(version, dport=53), PROTO_UDP)
    # Find a payload whose checksum is 0
    probe = bytes(2)
    host[1].send(probe)
    pair.forward(start, host[0].fileno(), 1500, False)
    ((_, frame),) = pair.frames()
    sum_ = Ether(frame)[UDP].chksum
    host[1].send(struct.pack("!H", sum_))
    pair.forward(start, host[0].fileno(), 1500, False)
    ((_, frame),) = pair.frames()
    assert Ether(frame)[UDP].chksum == 0xFFFF
    pair.close()


def whole(frames):
    """The slow twin: the datagram that fragments make, by the reassembly of the other direction."""
    made = fragments.Reassembler()
    result = None
    for frame in frames:
        assert result is None
        result = made.feed(frame[14:], 0.0)
    return result


@BOTH
@pytest.mark.parametrize("mtu", (1280, 1500, 9000))
@pytest.mark.parametrize("size", (1473, 8972, 20001, 65487))
def test_forward_in_fragments(tap, host, version, mtu, size):
    payload = os.urandom(size)
    host[1].send(payload)
    start = frame_start(GUEST, MAC, key(version, dport=53), PROTO_UDP)
    assert tap.forward(start, host[0].fileno(), mtu, True) == 1
    frames = tap.frames()
    if size + (28 if version == 4 else 48) <= mtu:
        ((vnet, frame),) = frames
        check(frame, vnet, version, payload)
        return
    assert all(len(frame) <= 14 + mtu for _, frame in frames)
    assert all(vnet in (None, bytes(10)) for vnet, _ in frames)
    idents = set()
    for _, frame in frames:
        packet = Ether(frame)
        if version == 4:
            assert IP(bytes(packet[IP])).chksum == IP(bytes(IP(frame[14:]))).chksum
            idents.add(packet[IP].id)
        else:
            idents.add(packet[IPv6ExtHdrFragment].id)
    assert len(idents) == 1
    result = fragments.datagram(whole([frame for _, frame in frames]))
    src, dst = (
        socket.inet_pton(socket.AF_INET if version == 4 else socket.AF_INET6, a) for a in ADDRESSES[version]
    )
    assert result == (dst + src + struct.pack("!HH", 53, 40000), payload, 255)


def test_joined_ones_stay_joined_where_the_tap_takes_that(host):
    for uso in (True, False):
        pair = Pair(True)
        host[0].setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        payload = os.urandom(10 * 1000 + 5)
        host[1].setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        host[1].send(payload)
        start = frame_start(GUEST, MAC, key(4, dport=53), PROTO_UDP)
        assert pair.forward(start, host[0].fileno(), 1500, uso) >= 1
        frames = pair.frames()
        assert b"".join(bytes(Ether(frame)[UDP].payload) for _, frame in frames) == payload
        if uso:
            vnet, frame = frames[0]
            check(frame, vnet, 4, payload, gso=1000)
        else:
            assert [len(Ether(frame)[UDP].payload) for _, frame in frames] == [1000] * 10 + [5]
        pair.close()


def relay(packets, source, target, address=b""):
    """Take what a socket has, and send it by another; (datagrams or -errno, errno)."""
    groups = packets.receive(source)
    if isinstance(groups, int):
        return groups, 0
    error = 0
    for *_, first, count in groups:
        error = packets.relay(first, count, target, address, b"") or error
    return sum(group[-1] for group in groups), -error


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_relay(sizes, rng):
    """Between two pairs of sockets each datagram arrives once, as it was, in order."""
    here, there = connected_pair(), connected_pair()
    packets = _cext.Packets()
    payloads = [rng.randbytes(size) for size in sizes]
    got = []
    for payload in payloads:
        here[1].send(payload)
        if rng.random() < 0.3:
            relay(packets, here[0].fileno(), there[0].fileno())
            got += received(there[1])
    while relay(packets, here[0].fileno(), there[0].fileno())[0] > 0:
        got += received(there[1])
    assert got == payloads
    for sock in (*here, *there):
        sock.close()


def test_relay_says_why(host):
    packets = _cext.Packets()
    assert relay(packets, host[0].fileno(), host[0].fileno()) == (-errno.EAGAIN, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as lonely:
        host[1].send(b"x")
        assert relay(packets, host[0].fileno(), lonely.fileno()) == (1, errno.EDESTADDRREQ)


# By sockets that are connected to nobody


def open_socket(version, address, port=0):
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    return routes.open_port(HostMaker(), family, address, port)


LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@BOTH
def test_each_has_its_peer(isolated, version):
    """What arrives is grouped by who has sent it to which address, and can be answered from there."""
    packets = _cext.Packets()
    server = open_socket(version, "0.0.0.0" if version == 4 else "::")
    port = routes.Port(server)
    called = ("127.0.0.1", "127.0.0.9") if version == 4 else ("::1",)
    clients = [open_socket(version, LOOPBACK[version]) for _ in range(3)]
    for client in clients:
        for address in called:
            client.sendto(b"one", (address, server.getsockname()[1]))
            client.sendto(b"two", (address, server.getsockname()[1]))
    groups = packets.receive(server.fileno())
    assert [group[-2:] for group in groups] == [(2 * i, 2) for i in range(3 * len(called))]
    i = 0
    for client in clients:
        for address in called:
            peer, local, interface, first, count = groups[i]
            i += 1
            assert routes.peer_of(peer) == routes.peer_of_python(client.getsockname())
            assert routes.sockaddr(port.family, routes.peer_of(peer)) == peer
            assert (unpack(local), interface) == (address, 1)
            assert packets.payload(first) == [b"one"] and packets.payload(first + 1) == [b"two"]
            control = routes.ancillary(local, 0, 7, routes.peer_of(peer))
            assert packets.relay(first, count, server.fileno(), peer, control) == 0
            assert packets.send_bytes(b"three", server.fileno(), peer, control) == 0
            got = [client.recvfrom(10) for _ in range(3)]
            assert [data for data, _ in got] == [b"one", b"two", b"three"]
            assert {source[:2] for _, source in got} == {(address, server.getsockname()[1])}
    for sock in (server, *clients):
        sock.close()


def test_a_socket_of_both_versions(isolated):
    """IPv4 comes to it as such, and is answered from the address that was called."""
    packets = _cext.Packets()
    request = SocketRequest(
        socket.AF_INET6, socket.SOCK_DGRAM, bind=("::", 0), v6only=False, packet_info=True
    )
    with make(request) as server, open_socket(4, "127.0.0.1") as client:
        client.sendto(b"x", ("127.0.0.7", server.getsockname()[1]))
        ((peer, local, _, first, count),) = packets.receive(server.fileno())
        assert routes.peer_of(peer) == routes.peer_of_python(client.getsockname())
        assert unpack(local) == "127.0.0.7"
        control = routes.ancillary(local, 0, 0, routes.peer_of(peer))
        assert packets.relay(first, count, server.fileno(), peer, control) == 0
        assert client.recvfrom(10)[1] == ("127.0.0.7", server.getsockname()[1])


@BOTH
def test_datagrams_of_a_run_to_an_address(isolated, tap, version):
    _, (run,), _ = tap.put(*(datagram(version, b"%d" % i) for i in range(100)))
    assert (run.df, run.group) == (version == 6, 0)
    with open_socket(version, LOOPBACK[version]) as server:
        server.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 0)
        with open_socket(version, "0.0.0.0" if version == 4 else "::") as ours:
            peer = routes.peer_of_python(server.getsockname())
            address = routes.sockaddr(ours.family, peer)
            control = routes.ancillary(b"", 1, 9, peer)
            done = 0
            while done < 100:
                done += tap.packets.send(tap.tap, run.handle, ours.fileno(), done, address, control)
            assert received(server) == [b"%d" % i for i in range(100)]


def test_joined_ones_one_by_one(host):
    packets = _cext.Packets()
    host[0].setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    host[1].setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
    host[1].send(bytes(250))
    groups = packets.receive(host[0].fileno())
    parts = [
        part
        for *_, first, count in groups
        for i in range(first, first + count)
        for part in packets.payload(i)
    ]
    assert parts == [bytes(100), bytes(100), bytes(50)]


def test_sent_to_all(tap):
    """A frame to a group of stations says so, and is not joined to one that was sent to us alone."""
    one = datagram(4, b"x")
    _, runs, _ = tap.put(one, b"\xff" * 6 + one[6:])
    assert [(run.frames, run.group) for run in runs] == [(1, 0), (1, 1)]
    group = bytes(
        Ether(dst="01:00:5e:00:00:fb")
        / IP(src="10.0.2.15", dst="224.0.0.251")
        / UDP(sport=5353, dport=5353)
    )
    _, (run,), _ = tap.put(group)
    assert run.group == 1


def test_frames_for_other_stations_are_dropped():
    ours, guest = tap_pair()
    tap = _cext.Tap(ours.fileno(), False, MAC)
    one = datagram(4, b"x")
    guest.send(one)
    guest.send(bytes.fromhex("020000000099") + one[6:])
    guest.send(bytes.fromhex("020000000099") + one[6:12] + b"\x08\x06" + bytes(28))
    _, (run,), others = tap.drain()
    assert run.frames == 1 and others == [] and tap.dropped == {"mac": 2}
    with pytest.raises(ValueError):
        _cext.Tap(ours.fileno(), False, MAC[:-1])
    ours.close()
    guest.close()


def test_without_a_hop_left_it_is_handed_over_whole(tap):
    packet = Ether(datagram(4, b"x"))
    packet.ttl = 0
    del packet[IP].chksum
    assert tap.put(bytes(packet)) == ([], [], [bytes(packet)])


# What cannot be


def test_wrong_calls(tap, host):
    _, (run,), _ = tap.put(datagram(4, b"x"))
    start = frame_start(GUEST, MAC, key(4, dport=53), PROTO_UDP)
    fd = host[0].fileno()
    for call in (
        lambda: tap.send(run.handle + 5, fd, 0),
        lambda: tap.send(run.handle, fd, -1),
        lambda: tap.packets.emit(tap.tap, start[:-1], 0, 0, 1500, False),
        lambda: tap.packets.emit(tap.tap, start, 0, 0, 67, False),
        lambda: tap.packets.emit(tap.tap, start, 0, 1, 1500, False),
        lambda: tap.packets.emit(tap.tap, start, -1, 1, 1500, False),
        lambda: tap.packets.relay(0, 1, fd, b"", b""),
        lambda: tap.packets.payload(0),
        lambda: tap.packets.send(tap.tap, run.handle, fd, 0, bytes(29), b""),
        lambda: tap.packets.send(tap.tap, run.handle, fd, 0, b"", bytes(129)),
        lambda: _cext.ancillary(socket.AF_INET, bytes(16), 0, 0),
        lambda: _cext.ancillary(socket.AF_UNIX, b"", 0, 0),
        lambda: tap.tap.frame(run.handle + 5),
    ):
        with pytest.raises(ValueError):
            call()
    tap.put()
    with pytest.raises(ValueError):
        tap.send(run.handle, fd, 0)


# Ports


def bound_ports(fd, family, protocol, without=0):
    found = int.from_bytes(_cext.bound_ports(fd, family, protocol, without), "little")
    return {port for port in range(65536) if found >> port & 1}


def from_proc(name, state):
    """The slow twin: /proc/net."""
    with open(f"/proc/net/{name}") as file:
        lines = [line.split() for line in list(file)[1:]]
    return {int(words[1].split(":")[1], 16) for words in lines if words[3] == state}


def test_bound_ports(isolated):
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)
    socks = []
    ports = random.Random(1).sample(range(1024, 60000), 60)
    for i, port in enumerate(ports):
        family = (socket.AF_INET, socket.AF_INET6)[i % 2]
        kind = (socket.SOCK_STREAM, socket.SOCK_DGRAM)[i // 2 % 2]
        sock = socket.socket(family, kind)
        if i % 5 == 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        sock.bind(("::" if family == socket.AF_INET6 else "127.0.0.1", port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        socks.append((family, kind, sock))
    for family, kind, tcp, udp in ((socket.AF_INET, 4, "tcp", "udp"), (socket.AF_INET6, 6, "tcp6", "udp6")):
        del kind
        for protocol, name, state in ((6, tcp, "0A"), (17, udp, "07")):
            assert bound_ports(netlink.fileno(), family, protocol) == from_proc(name, state)
            wanted = socket.SOCK_STREAM if protocol == 6 else socket.SOCK_DGRAM
            on_lo = {
                sock.getsockname()[1]
                for other, type_, sock in socks
                if (other, type_) == (family, wanted)
                and sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).startswith(b"lo")
            }
            assert bound_ports(netlink.fileno(), family, protocol, 1) == from_proc(name, state) - on_lo
    for _, _, sock in socks:
        sock.close()
    with pytest.raises(OSError):
        _cext.bound_ports(0, socket.AF_INET, 6, 0)


# A capture


def test_capture(tap, tmp_path, host):
    path = tmp_path / "cap"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    tap.tap.capture(fd)
    start = frame_start(GUEST, MAC, key(4, dport=53), PROTO_UDP)
    tap.put(datagram(4, b"in"))
    host[1].send(b"out")
    tap.forward(start, host[0].fileno(), 1500, False)
    tap.tap.capture(-1)
    host[1].send(b"unseen")
    tap.forward(start, host[0].fileno(), 1500, False)
    data = path.read_bytes()
    frames = []
    while data:
        _, micros, length, original = struct.unpack_from("=IIII", data)
        assert length == original and micros < 1_000_000
        frames.append(data[16 : 16 + length])
        data = data[16 + length :]
    assert [bytes(Ether(frame)[UDP].payload) for frame in frames] == [b"in", b"out"]
    os.close(fd)


@pytest.mark.parametrize("count, sent", ((64, True), (65, True), (128, True), (129, False)))
def test_many_segments_go_in_few_calls(count, sent):
    """More than one message can carry go in two; more than any kernel makes of a frame are refused."""
    pair, host = Pair(True), connected_pair()
    payload = os.urandom(count * 100)
    header = struct.pack("=BBHHHH", 1, GSO_UDP_L4, 42, 100, 34, 6)
    _, (run,), _ = pair.put(datagram(4, payload), header=header)
    result = pair.send(run.handle, host[0].fileno(), 0)
    got = received(host[1])
    if sent:
        assert result == 1 and got == [payload[at : at + 100] for at in range(0, len(payload), 100)]
    else:
        assert (result, got) == (-errno.EINVAL, [])
    pair.close()
