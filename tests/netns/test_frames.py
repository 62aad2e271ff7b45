"""Crafted and broken frames through a real tap, beside connections that must not notice."""

import contextlib
import random
import socket
import struct
import time

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from pysplice.budget import HALF_OPEN_MAX
from pysplice.link.icmp import ERRORS_BURST, ERRORS_PER_SECOND
from pysplice.stream.open import MSS_MAX_VNET
from pysplice.wire import checksum

from ..support.transfer import Background, transfer
from .test_flows import descriptors, pair

ETH_P_ALL = 3
GUEST_MAC, OUR_MAC = "02:00:00:00:00:77", "9a:55:9a:55:9a:55"
# An address that the guest's kernel does not have, so that it stays out of it
ADDRESS4, ADDRESS6 = "10.99.0.177", "fd99::177"


class Wire:
    """Raw frames on the guest's end of the tap."""

    def __init__(self, world) -> None:
        self.world = world
        self.sock = world.guest.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.sock.bind(("tap0", 0))
        self.sock.settimeout(0.05)

    def send(self, frame) -> None:
        self.sock.send(bytes(frame))

    def sniff(self, wanted, seconds=3.0):
        """The first frame from us that `wanted` accepts, or None."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                data, address = self.sock.recvfrom(70_000)
            except TimeoutError:
                continue
            if address[2] != socket.PACKET_OUTGOING and wanted(frame := Ether(data)):
                return frame
        return None

    def tcp(self, dport, sport=5555, version=4, payload=b"", **fields):
        world = self.world
        ip = IP(src=ADDRESS4, dst=world.REMOTE4) if version == 4 else IPv6(src=ADDRESS6, dst=world.REMOTE6)
        fields.setdefault("window", 64240)
        segment = TCP(sport=sport, dport=dport, **fields)
        return Ether(src=GUEST_MAC, dst=OUR_MAC) / ip / segment / payload

    def ours(self, sport=5555, flags=None, **fields):
        def accepts(frame):
            tcp = frame.getlayer(TCP)
            return (
                tcp is not None
                and tcp.dport == sport
                and (flags is None or str(tcp.flags) == flags)
                and all(getattr(tcp, name) == value for name, value in fields.items())
            )

        return accepts

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def wire(served):
    made = Wire(served)
    yield made
    made.close()


SYN_OPTIONS = [("MSS", 1460), ("WScale", 7)]


def handshake(wire, port, version=4, sport=5555, seq=1000):
    """Our SYN-ACK and the numbers to go on with."""
    wire.send(wire.tcp(port, sport, version, flags="S", seq=seq, options=SYN_OPTIONS))
    syn_ack = wire.sniff(wire.ours(sport, "SA"))
    assert syn_ack is not None
    tcp = syn_ack[TCP]
    assert tcp.ack == seq + 1
    options = dict(tcp.options)
    assert options["WScale"] == 7 and options["MSS"] == MSS_MAX_VNET
    wire.send(wire.tcp(port, sport, version, flags="A", seq=seq + 1, ack=tcp.seq + 1))
    return tcp.seq + 1


@pytest.mark.parametrize("version", (4, 6))
def test_a_connection_by_hand(served, wire, version):
    with served.remote.listen(served.remote_address(version)) as listener:
        port = listener.getsockname()[1]
        ours = handshake(wire, port, version)
        remote, _ = listener.accept()
        wire.send(wire.tcp(port, version=version, flags="PA", seq=1001, ack=ours, payload=b"hello"))
        assert remote.recv(5) == b"hello"
        assert wire.sniff(wire.ours(flags="A", ack=1006)) is not None
        # A repetition is acknowledged again and not delivered again
        wire.send(wire.tcp(port, version=version, flags="PA", seq=1001, ack=ours, payload=b"hello"))
        assert wire.sniff(wire.ours(flags="A", ack=1006)) is not None
        # So is a window probe
        wire.send(wire.tcp(port, version=version, flags="A", seq=1005, ack=ours))
        assert wire.sniff(wire.ours(flags="A", ack=1006)) is not None
        remote.sendall(b"world")
        data = wire.sniff(wire.ours(seq=ours))
        assert bytes(data[TCP].payload) == b"world"
        # Not acknowledged: it comes again
        assert wire.sniff(wire.ours(seq=ours), 3) is not None
        wire.send(wire.tcp(port, version=version, flags="RA", seq=1006, ack=ours + 5))
        with pytest.raises(ConnectionResetError):
            remote.recv(1)
        remote.close()


def test_a_segment_without_connection_is_reset(served, wire):
    """RFC 9293, 3.10.7.1."""
    wire.send(wire.tcp(9, flags="A", seq=5, ack=77))
    reset = wire.sniff(wire.ours(flags="R"))
    assert reset[TCP].seq == 77
    wire.send(wire.tcp(9, flags="F", seq=5, payload=b"abc"))
    reset = wire.sniff(wire.ours(flags="RA"))
    assert (reset[TCP].seq, reset[TCP].ack) == (0, 9)
    wire.send(wire.tcp(9, flags="R", seq=5))
    assert wire.sniff(wire.ours(), 0.5) is None


def test_ports_are_used_again(served, wire):
    """A reset, and the same ports at once: the new connection is a new one."""
    with served.remote.listen(served.REMOTE4) as listener:
        port = listener.getsockname()[1]
        for seq in (1000, 900_000, 5):
            ours = handshake(wire, port, seq=seq)
            remote, _ = listener.accept()
            wire.send(wire.tcp(port, flags="PA", seq=seq + 1, ack=ours, payload=b"new"))
            assert remote.recv(3) == b"new"
            wire.send(wire.tcp(port, flags="RA", seq=seq + 4, ack=ours))
            with pytest.raises(ConnectionResetError):
                remote.recv(1)
            remote.close()


@pytest.mark.parametrize("address", ("::ffff:127.0.0.1", "::ffff:10.99.0.2", "::1", "::", "::127.0.0.1"))
def test_ipv6_is_no_way_to_ipv4(served, wire, address):
    """A socket would take these addresses for IPv4's, past what is said of those."""
    with served.host.listen("127.0.0.1") as here, served.remote.listen(served.REMOTE4) as there:
        for listener in (here, there):
            listener.settimeout(0.3)
            port = listener.getsockname()[1]
            ip = IPv6(src=ADDRESS6, dst=address)
            wire.send(Ether(src=GUEST_MAC, dst=OUR_MAC) / ip / TCP(sport=5, dport=port, flags="S"))
            with pytest.raises(TimeoutError):
                listener.accept()


def test_long_solicitations_cost_nothing(served, wire):
    """64 KiB of options, 200 times, beside requests and responses."""
    options = bytes((14, 1, 0, 0, 0, 0, 0, 0)) * 8000
    ns = ICMPv6ND_NS(tgt="fd99::200") / Raw(options)
    frame = bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / IPv6(src="fe80::77", dst="ff02::1") / ns)
    guest, remote = pair(served, 4)
    with guest, remote:
        for _ in range(200):
            wire.send(frame)
        begun = time.monotonic()
        guest.sendall(b"x")
        assert remote.recv(1) == b"x"
        assert time.monotonic() - begun < 1


def test_arp_and_ndp(served, wire):
    wire.send(Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff")
              / ARP(hwsrc=GUEST_MAC, psrc=ADDRESS4, pdst="10.99.0.200"))  # fmt: skip
    reply = wire.sniff(lambda f: f.haslayer(ARP) and f[ARP].op == 2)
    assert (reply[ARP].psrc, reply[ARP].hwsrc) == ("10.99.0.200", OUR_MAC)
    wire.send(neighbour_solicitation())
    reply = wire.sniff(lambda f: f.haslayer(IPv6) and f[IPv6].dst == "fe80::77" and f[IPv6].nh == 58)
    assert reply is not None and reply.src == OUR_MAC


def neighbour_solicitation():
    ip = IPv6(src="fe80::77", dst="ff02::1:ff00:200")
    ns = ICMPv6ND_NS(tgt="fd99::200") / ICMPv6NDOptSrcLLAddr(lladdr=GUEST_MAC)
    return Ether(src=GUEST_MAC, dst="33:33:ff:00:02:00") / ip / ns


def test_unreachable_quotes_the_syn(served, wire):
    syn = (
        Ether(src=GUEST_MAC, dst=OUR_MAC)
        / IP(src=ADDRESS4, dst="10.99.0.88")
        / TCP(sport=7, dport=8, flags="S")
    )
    wire.send(syn)
    error = wire.sniff(lambda f: f.haslayer(ICMP), 6)
    assert (error[ICMP].type, error[ICMP].code) == (3, 1)
    assert error[IP].dst == ADDRESS4
    assert bytes(error[ICMP].payload)[:28] == bytes(syn)[14:42]


def damaged(wire, port):
    """Every truncation of valid frames, and fields that lie."""
    whole = [
        bytes(wire.tcp(port, 6000, flags="S", seq=1, options=SYN_OPTIONS)),
        bytes(wire.tcp(port, 6001, version=6, flags="S", seq=1, options=SYN_OPTIONS)),
        bytes(wire.tcp(port, 6002, flags="PA", seq=1, ack=1, payload=b"x" * 40)),
        bytes(neighbour_solicitation()),
    ]
    for frame in whole:
        # The kernel pads nothing: a short frame goes as it is, from the Ethernet header on
        for length in range(14, len(frame)):
            yield frame[:length]
    syn = whole[0]
    for at, value in (
        (14, 0x44), (14, 0x4F), (14, 0x65), (16, 0xFF), (17, 0), (17, 19), (24, 0xFF), (20, 0x20), (21, 1),
        (46, 0x10), (46, 0xF0), (47, 0x03), (47, 0x06), (50, 0xFF), (55, 0), (55, 1), (55, 40), (59, 0), (59, 9),
    ):  # fmt: skip
        yield syn[:at] + bytes((value,)) + syn[at + 1 :]
        if at not in (24, 50):  # the sums themselves
            yield with_checksums(syn[:at] + bytes((value,)) + syn[at + 1 :])
    for src, dst in (("127.0.0.1", served_remote), (ADDRESS4, "127.0.0.1"), ("0.0.0.0", served_remote),
                     (ADDRESS4, "224.0.0.1"), (ADDRESS4, "255.255.255.255")):  # fmt: skip
        yield bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / IP(src=src, dst=dst) / TCP(dport=port, flags="S"))
    for options in (b"\x02\x04", b"\x02\x00\x00\x00", b"\x02\xff\x01\x01", b"\x08\x0a\x00\x00"):
        tcp = TCP(sport=6100, dport=port, flags="S", dataofs=6) / Raw(options)
        yield bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / IP(src=ADDRESS4, dst=served_remote) / tcp)
    hop = bytes((6, 255)) + bytes(6)
    for chain in (hop, bytes((0, 0)) + bytes(6), bytes((60, 0)) + bytes(6)):
        ip = IPv6(src=ADDRESS6, dst="fd99::2", nh=0)
        yield bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / ip / Raw(chain * 6))


served_remote = "10.99.0.2"


def with_checksums(frame: bytes) -> bytes:
    """The lie once more, with sums that agree with it."""
    frame = frame[:24] + b"\0\0" + frame[26:50] + b"\0\0" + frame[52:]
    frame = frame[:24] + checksum(frame[14:34]) + frame[26:]
    pseudo = frame[26:34] + struct.pack("!HH", 6, len(frame) - 34)
    return frame[:50] + checksum(pseudo + frame[34:]) + frame[52:]


def noise(count, seed):
    """Random bytes, some of them behind headers that look right."""
    rng = random.Random(seed)
    ethernet = bytes.fromhex("9a559a559a55020000000077")
    for _ in range(count):
        body = rng.randbytes(rng.randint(0, 200))
        kind = rng.random()
        if kind < 0.3:
            yield ethernet + b"\x08\x00" + b"\x45" + body
        elif kind < 0.6:
            yield ethernet + b"\x86\xdd" + b"\x60\0\0\0" + struct.pack("!HBB", len(body), 6, 64) + body
        elif kind < 0.8:
            yield ethernet + rng.choice((b"\x08\x06", b"\x86\xdd", b"\x08\x00")) + body
        else:
            yield ethernet + body + b"\0\0"


def memory(process) -> int:
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_broken_frames_harm_nobody(served, wire):
    """100,000 broken frames beside a transfer: it goes on, and nothing grows or ends."""
    guest, remote = pair(served, 4)
    with guest, remote, served.remote.listen(served.REMOTE4) as listener:
        port = listener.getsockname()[1]
        for frame in noise(5_000, 0):
            wire.send(frame)
        before = memory(served.process)
        beside = Background(transfer, guest, remote, 9, 64 << 20)
        for frame in damaged(wire, port):
            wire.send(frame)
        for frame in noise(95_000, 1):
            wire.send(frame)
        beside.result()
        assert served.process.poll() is None
        assert memory(served.process) - before < 16 << 20
        # None of them made a connection, but for those that have nothing wrong with them but their options: of one port
        # each, 6000 and 6100 (RFC 9293, 3.1)
        listener.settimeout(0.2)
        made = []
        with contextlib.suppress(TimeoutError):
            while True:
                made.append(listener.accept()[1])
        assert len(made) == 2
        # The link still works
        ours = handshake(wire, port, sport=7777)
        assert ours


def test_what_a_router_does_not_pass_on(served, wire):
    """Frames for another station, and packets with no hops left: the latter are reported to the guest."""
    with served.remote.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((served.REMOTE4, 0))
        server.settimeout(0.5)
        port = server.getsockname()[1]
        packet = IP(src=ADDRESS4, dst=served.REMOTE4) / UDP(sport=5555, dport=port) / b"x"
        wire.send(Ether(src=GUEST_MAC, dst="02:00:00:00:00:99") / packet)
        wire.send(Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / packet)
        for layer in (
            packet,
            IP(src=ADDRESS4, dst=served.REMOTE4) / TCP(sport=5555, dport=port, flags="S"),
        ):
            layer = layer.copy()
            layer.ttl = 0
            wire.send(Ether(src=GUEST_MAC, dst=OUR_MAC) / layer)
            assert wire.sniff(
                lambda frame: ICMP in frame and (frame[ICMP].type, frame[ICMP].code) == (11, 0)
            )
        with pytest.raises(TimeoutError):
            server.recv(10)
        wire.send(Ether(src=GUEST_MAC, dst=OUR_MAC) / packet)
        assert server.recv(10) == b"x"


def test_errors_are_not_too_many(served, wire):
    """RFC 4443, section 2.4 (f): a guest that asks for thousands gets hundreds."""
    packet = IP(src=ADDRESS4, dst=served.REMOTE4, ttl=0) / UDP(sport=5555, dport=9) / b"x"
    frame = bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / packet)
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    began = time.monotonic()
    for _ in range(4000):
        wire.sock.send(frame)
    heard = 0
    while wire.sniff(lambda frame: ICMP in frame and frame[ICMP].type == 11, 0.5):
        heard += 1
    assert 0 < heard <= ERRORS_BURST + ERRORS_PER_SECOND * (time.monotonic() - began)


def test_a_flood_of_syns_leaves_room_for_others(served, wire):
    """A guest that only ever sends SYNs, to a host that does not answer: descriptors are left over."""
    before = descriptors(served.process)
    for port in range(3000):
        syn = IP(src=ADDRESS4, dst="10.99.0.99") / TCP(sport=1024 + port, dport=9, flags="S")
        wire.send(Ether(src=GUEST_MAC, dst=OUR_MAC) / syn)
    assert 500 < descriptors(served.process) - before <= HALF_OPEN_MAX
    # Those that have waited longest give way at once
    guest, remote = pair(served, 4)
    guest.close()
    remote.close()
