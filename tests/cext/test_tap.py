"""The Tap and Stream types of the C extension, held against scapy and slow Python."""

import errno
import gc
import random
import resource
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether

from pysplice import _cext
from pysplice.wire import checksum, frame_start

from ..support.taps import GUEST_MAC, OUR_MAC, VNET, key, segment, tap_pair

BOTH = pytest.mark.parametrize("version", (4, 6))
MAC = bytes.fromhex("9a559a559a55")
GUEST = bytes.fromhex("020000000001")
ACK, FIN, PSH, SYN = 0x10, 0x01, 0x08, 0x02


@pytest.fixture(params=(False, True), ids=("plain", "vnet"))
def tap(request):
    ours, guest = tap_pair()
    made = _cext.Tap(ours.fileno(), request.param)
    yield Pair(made, guest, request.param)
    ours.close()
    guest.close()


class Pair:
    def __init__(self, tap, guest, vnet):
        self.tap, self.guest, self.vnet = tap, guest, vnet

    def put(self, *frames):
        for frame in frames:
            self.guest.send((VNET if self.vnet else b"") + frame)

    def drain(self, *frames):
        """Runs of TCP and other frames; datagrams are in `datagrams`."""
        self.put(*frames)
        runs, self.datagrams, others = self.tap.drain()
        return runs, others

    def get(self):
        """What the guest was sent: virtio header or None, and the frame."""
        data = self.guest.recv(70000)
        return (data[:10], data[10:]) if self.vnet else (None, data)


def test_empty(tap):
    assert tap.drain() == ([], [])


@BOTH
def test_syn(tap, version):
    options = [("MSS", 1234), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 9)]
    frame = segment(version, flags="S", seq=7, window=4321, options=options)
    (run,), others = tap.drain(frame)
    assert others == []
    assert run.key == key(version)
    assert (run.seq, run.flags, run.window, run.length) == (7, SYN, 4321, 0)
    assert (run.mss, run.wscale) == (1234, 9)
    headers = tap.tap.headers(run.handle)
    assert headers == frame
    (run,), _ = tap.drain(segment(version, flags="S"))
    assert (run.mss, run.wscale) == (0, -1)


@pytest.mark.parametrize(
    ("options", "mss", "wscale"),
    (
        ("020405b4fe000000", 1460, -1),  # a length of 0: what is behind cannot be read
        ("fe280000020405b4", 0, -1),  # longer than the header
        ("0203050303070000", 0, 7),  # an MSS of another length says nothing
        ("0304070002040218", 536, -1),
        ("00020405b4000000", 0, -1),  # behind the end of the list
        ("01010101020405b4", 1460, -1),
    ),
)
def test_broken_options_of_a_syn(tap, options, mss, wscale):
    """RFC 9293, section 3.1 (MUST-7): the segment counts, and what can be read of its options."""
    options = bytes.fromhex(options)
    frame = segment(4, flags="S", dataofs=5 + len(options) // 4, payload=options)
    (run,), _ = tap.drain(frame)
    assert (run.flags, run.mss, run.wscale, run.length) == (2, mss, wscale, 0)


def test_ipv6_extension_headers(tap):
    plain = segment(6, b"data", seq=5)
    # A hop-by-hop and a destination options header before TCP
    inner = plain[14 + 40 :]
    ip = bytearray(plain[14:54])
    ip[6] = 0
    ip[4:6] = struct.pack("!H", len(inner) + 16)
    (run,), _ = tap.drain(
        plain[:14] + bytes(ip) + bytes((60, 0, 1, 4, 0, 0, 0, 0)) + bytes((6, 0, 1, 4, 0, 0, 0, 0)) + inner
    )
    assert (run.seq, run.length) == (5, 4)


def test_other_frames_are_handed_over_whole(tap):
    arp = bytes(Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(pdst="10.0.2.2"))
    assert tap.drain(arp) == ([], [arp])


@BOTH
def test_runs_are_contiguous_data_of_one_flow(tap, version):
    frames = [
        segment(version, b"a" * 100, seq=1000, ack=5, window=10),
        segment(version, b"x" * 50, seq=1, sport=5),
        segment(version, b"b" * 200, seq=1100, ack=6, window=11, flags="PA"),
        segment(version, b"y" * 50, seq=51, sport=5),
        segment(version, b"c" * 10, seq=1300, ack=6, window=12, flags="FA"),
    ]
    first, second = tap.drain(*frames)[0]
    assert (first.seq, first.length, first.frames, first.ack, first.window) == (1000, 310, 3, 6, 12)
    assert first.flags == ACK | PSH | FIN
    assert (second.seq, second.length, second.frames) == (1, 100, 2)


@pytest.mark.parametrize(
    "frames",
    (
        # a hole
        [segment(4, b"a", seq=1), segment(4, b"b", seq=3)],
        # once more
        [segment(4, b"a", seq=1), segment(4, b"a", seq=1)],
        # after a FIN
        [segment(4, b"a", seq=1, flags="FA"), segment(4, b"b", seq=2)],
        # RST and SYN stand alone
        [segment(4, b"a", seq=1), segment(4, seq=2, flags="RA")],
        [segment(4, seq=1, flags="S"), segment(4, b"a", seq=1)],
        # data and bare acknowledgement
        [segment(4, b"a", seq=1), segment(4, seq=2)],
        [segment(4, seq=1), segment(4, b"a", seq=1)],
        # an acknowledgement that goes back
        [segment(4, b"a", seq=1, ack=10), segment(4, b"b", seq=2, ack=9)],
        # a window update
        [segment(4, seq=1, ack=9, window=5), segment(4, seq=1, ack=9, window=6)],
    ),
)
def test_what_ends_a_run(tap, frames):
    runs, _ = tap.drain(*frames)
    assert len(runs) == 2
    assert runs[0].frames == runs[1].frames == 1


def test_repeated_acknowledgements_are_counted(tap):
    frames = [segment(4, seq=1, ack=ack, window=5) for ack in (10, 20, 20, 30, 30, 30)]
    (run,), _ = tap.drain(*frames)
    assert (run.ack, run.frames, run.length) == (30, 3, 0)


def test_sequence_numbers_wrap_in_a_run(tap):
    frames = [segment(4, b"a" * 10, seq=0xFFFFFFFA, ack=0xFFFFFFFF), segment(4, b"b", seq=4, ack=3)]
    (run,), _ = tap.drain(*frames)
    assert (run.length, run.ack) == (11, 3)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_grouping_against_a_twin(seed, vnet):
    """Any frames, grouped as slow Python groups them; and the payload of each run is right."""
    rng = random.Random(seed)
    ours, guest = tap_pair()
    with ours, guest:
        pair = Pair(_cext.Tap(ours.fileno(), vnet), guest, vnet)
        expected, position = [], {1: 100, 2: 0xFFFFFFF0}
        for _ in range(rng.randint(1, 30)):
            port = rng.choice((1, 2))
            length = rng.choice((0, 0, 1, 5, 1000))
            number = (position[port] + rng.choice((0, 0, 0, 0, -3, 7))) % 2**32
            fields = {
                "seq": number,
                "ack": 50 + rng.randint(0, 2),
                "window": rng.randint(1, 2),
                "flags": rng.choice(("A", "A", "A", "PA", "FA", "RA", "S", "")),
            }
            payload = rng.randbytes(length)
            position[port] = (number + length) % 2**32
            pair.put(segment(4, payload, sport=port, **fields))
            join_or_add(expected, port, payload, fields)
        runs, _, _ = pair.tap.drain()
        assert [(r.seq, r.ack, r.window, r.length, r.frames) for r in runs] == [
            (r["seq"], r["ack"], r["window"], len(r["payload"]), r["frames"]) for r in expected
        ]
        for run, twin in zip(runs, expected, strict=True):
            assert run_payload(pair.tap, run) == twin["payload"]


def join_or_add(runs, port, payload, fields):
    """The twin: what tap.c says about runs, in Python."""
    flags = set(fields["flags"])
    last = next((r for r in reversed(runs) if r["port"] == port), None)
    joins = (
        last is not None
        and not last["closed"]
        and "A" in flags
        and not flags & set("RS")
        and fields["seq"] == (last["seq"] + len(last["payload"])) % 2**32
        and fields["ack"] >= last["ack"]
    )
    if joins and (payload or "F" in flags):
        joins = bool(last["payload"])
        frames = last["frames"] + 1
    elif joins:
        joins = not last["payload"] and (fields["ack"] > last["ack"] or fields["window"] == last["window"])
        frames = last["frames"] + 1 if fields["ack"] == last["ack"] else 1
    if joins:
        last.update(ack=fields["ack"], window=fields["window"], frames=frames, closed="F" in flags)
        last["payload"] += payload
    else:
        closed = "A" not in flags or bool(flags & set("FRS"))
        runs.append({**fields, "port": port, "payload": payload, "frames": 1, "closed": closed})


def run_payload(tap, run, skip=0, length=None):
    """The bytes of a run, by way of a socket."""
    length = run.length - skip if length is None else length
    a, b = socket.socketpair()
    with a, b:
        assert tap.send(run.handle, a.fileno(), skip, length) == length
        a.shutdown(socket.SHUT_WR)
        got = b""
        while part := b.recv(1 << 20):
            got += part
        return got


def test_parts_of_a_run(tap):
    data = [bytes([i]) * size for i, size in enumerate((100, 1, 999))]
    position, frames = 1, []
    for part in data:
        frames.append(segment(4, part, seq=position))
        position += len(part)
    (run,), _ = tap.drain(*frames)
    whole = b"".join(data)
    for skip in (0, 1, 99, 100, 101, 102, 1100):
        for length in (0, 1, 2, 100, 1100 - skip):
            if 0 <= length <= 1100 - skip:
                assert run_payload(tap.tap, run, skip, length) == whole[skip : skip + length]
    stream = _cext.Stream(2000)
    tap.tap.store(run.handle, stream, 50, 200)
    assert stream_bytes(stream) == whole[50:250]


def stream_bytes(stream):
    a, b = socket.socketpair()
    with a, b:
        while len(stream):
            stream.send(a.fileno())
        a.shutdown(socket.SHUT_WR)
        got = b""
        while part := b.recv(1 << 20):
            got += part
        return got


def test_bounds_are_checked(tap):
    (run,), _ = tap.drain(segment(4, b"abc", seq=1))
    stream = _cext.Stream(2)
    for call in (
        lambda: tap.tap.send(run.handle, 1, 0, 4),
        lambda: tap.tap.send(run.handle, 1, 4, 0),
        lambda: tap.tap.send(run.handle, 1, -1, 1),
        lambda: tap.tap.send(run.handle, 1, 0, -1),
        lambda: tap.tap.send(run.handle, 1, 2**62, 2**62),
        lambda: tap.tap.send(run.handle + 1, 1, 0, 1),
        lambda: tap.tap.send(2**63, 1, 0, 1),
        lambda: tap.tap.store(run.handle, stream, 0, 3),
        lambda: tap.tap.headers(run.handle + 65536),
        lambda: tap.tap.emit(b"short", 0, 0, 0, 0, b""),
        lambda: tap.tap.emit(frame_start(GUEST, MAC, key()), 0, 0, 0, 0, b"odd"),
        lambda: tap.tap.emit(frame_start(GUEST, MAC, key()), 0, 0, 0, 0, bytes(44)),
        lambda: tap.tap.emit_data(frame_start(GUEST, MAC, key()), 0, 0, 0, 0, 0, stream, 0, 0),
        lambda: tap.tap.emit_data(frame_start(GUEST, MAC, key()), 0, 0, 0, 0, 9, stream, 0, 1),
        lambda: tap.tap.emit_data(frame_start(GUEST, MAC, key()), 0, 0, 0, 0, 9, stream, -1, 1),
        lambda: _cext.Stream(0),
        lambda: _cext.Stream(2**40),
        lambda: stream.discard(1),
        lambda: stream.discard(-1),
        lambda: stream.receive(0, 3),
        lambda: stream.receive(0, 0),
    ):
        with pytest.raises(ValueError):
            call()
    tap.drain()
    with pytest.raises(ValueError, match="earlier batch"):
        tap.tap.send(run.handle, 1, 0, 1)


def test_errors_are_negative_numbers(tap):
    (run,), _ = tap.drain(segment(4, b"abc", seq=1))
    with socket.socket() as unconnected:
        assert tap.tap.send(run.handle, unconnected.fileno(), 0, 3) == -errno.EPIPE
    assert tap.tap.send(run.handle, 9999, 0, 3) == -errno.EBADF
    stream = _cext.Stream(10)
    a, b = socket.socketpair()
    with a, b:
        a.setblocking(False)
        assert stream.receive(a.fileno(), 10) == -errno.EAGAIN
        b.close()
        assert stream.receive(a.fileno(), 10) == 0
    with pytest.raises(OSError):
        _cext.socket_facts(9999, 0, 0)
    with pytest.raises(OSError):
        _cext.Tap(9999, False).drain()


def test_a_stream_is_a_ring():
    rng = random.Random(1)
    stream, twin = _cext.Stream(1000), bytearray()
    a, b = socket.socketpair()
    with a, b:
        b.setblocking(False)
        for _ in range(2000):
            n = rng.randint(0, 1000 - len(twin))
            if n:
                data = rng.randbytes(n)
                a.send(data)
                assert stream.receive(b.fileno(), n) == n
                twin += data
            n = rng.randint(0, len(twin))
            stream.discard(n)
            del twin[:n]
            assert len(stream) == len(twin)
    assert stream_bytes(stream) == twin


def test_trim_gives_pages_back():
    stream = _cext.Stream(64 << 20)
    before = resident()
    a, b = socket.socketpair()
    with a, b:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            a.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
        for _ in range(400):
            a.sendall(bytes(100_000))
            assert stream.receive(b.fileno(), 100_000) == 100_000
        with pytest.raises(ValueError, match="not empty"):
            stream.trim()
        assert resident() - before > 30 << 20
        stream.discard(len(stream))
        stream.trim()
        assert resident() - before < 8 << 20
        a.sendall(b"again")
        assert stream.receive(b.fileno(), 10) == 5
    assert stream_bytes(stream) == b"again"


def test_trim_leaves_the_pages_of_small_answers():
    """Memory counts as used where bytes were written, not where they might have been: no page is faulted in again."""
    stream = _cext.Stream(1 << 20)
    a, b = socket.socketpair()
    with a, b:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(1000):
            a.sendall(b"small")
            assert stream.receive(b.fileno(), 1 << 20) == 5
            stream.discard(5)
            stream.trim()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 500


# Emission


def fill(stream, data):
    a, b = socket.socketpair()
    with a, b:
        for at in range(0, len(data), 10_000):
            part = data[at : at + 10_000]
            a.sendall(part)
            assert stream.receive(b.fileno(), len(part)) == len(part)


def l4(frame):
    """Scapy's view of a frame, checksums verified by slow Python."""
    ether = Ether(frame)
    assert (ether.dst, ether.src) == (GUEST_MAC, OUR_MAC)
    ip = ether.payload
    if isinstance(ip, IP):
        assert checksum(frame[14:34]) == b"\0\0"
        assert (ip.src, ip.dst, ip.ttl, ip.len) == ("192.0.2.7", "10.0.2.15", 255, len(frame) - 14)
        assert ip.flags == "DF"
    else:
        assert isinstance(ip, IPv6)
        assert (ip.src, ip.dst, ip.hlim, ip.plen) == ("2001:db8::7", "fd00::15", 255, len(frame) - 54)
    assert isinstance(ip.payload, TCP)
    assert (ip.payload.sport, ip.payload.dport) == (80, 40000)
    return ip.payload


def tcp_sum(frame):
    at = 14 + (20 if frame[12:14] == b"\x08\0" else 40)
    addresses = frame[26:34] if at == 34 else frame[22:54]
    return checksum(addresses + struct.pack("!II", len(frame) - at, 6) + frame[at:])


@BOTH
def test_emit(tap, version):
    syn_ack = bytes((2, 4, 5, 180, 1, 3, 3, 7))
    assert tap.tap.emit(frame_start(GUEST, MAC, key(version)), 1, 2**32 - 1, 65535, 0x12, syn_ack) == 0
    vnet, frame = tap.get()
    tcp = l4(frame)
    assert (tcp.seq, tcp.ack, tcp.window, tcp.flags) == (1, 2**32 - 1, 65535, "SA")
    assert tcp.options == [("MSS", 1460), ("NOP", None), ("WScale", 7)]
    check(vnet, frame, version, 0, 0)


def check(vnet, frame, version, payload, mss):
    """The virtio header asks for what the frame needs; a plain frame is complete."""
    if vnet is None:
        assert tcp_sum(frame) == b"\0\0"
        return
    flags, gso, hdr_len, gso_size, start, offset = struct.unpack("=BBHHHH", vnet)
    header = 14 + (20 if version == 4 else 40)
    assert (flags, start, offset) == (1, header, 16)
    if payload > mss:
        assert (gso, gso_size) == (1 if version == 4 else 4, mss)
        assert hdr_len == len(frame) - payload
    else:
        assert (gso, gso_size, hdr_len) == (0, 0, 0)
    # The field holds the sum of the pseudo header: completing it as a receiver does gives a valid one
    whole = bytearray(frame)
    whole[header + 16 : header + 18] = checksum(frame[header:])
    assert tcp_sum(bytes(whole)) == b"\0\0"


@BOTH
@pytest.mark.parametrize("mss", (1, 536, 1460, 32000, 65480))
@pytest.mark.parametrize("size", (1, 535, 1460, 1461, 100_001))
def test_emit_data(tap, version, mss, size):
    if mss == 1:
        size = min(size, 1461)
    data = random.Random(size).randbytes(size)
    stream = _cext.Stream(110_000)
    # The ring's seam lies within the data
    fill(stream, bytes(60_000))
    stream.discard(59_999)
    fill(stream, b"y" + data[: size - 1])
    stream.discard(1)
    fill(stream, data[size - 1 :] + b"tail")
    first = 2**32 - 100
    sent = 0
    got = []
    while sent < size + 1:
        # As many at a time as the pair of sockets holds
        part = min(size + 1 - sent, mss * 30)
        flags = ACK | PSH
        result = tap.tap.emit_data(
            frame_start(GUEST, MAC, key(version)),
            (first + sent) % 2**32,
            9,
            77,
            flags,
            mss,
            stream,
            sent,
            part,
        )
        assert result == part
        expected = []
        end = sent + part
        while sent < end:
            vnet, frame = tap.get()
            tcp = l4(frame)
            payload = bytes(tcp.payload)
            assert tcp.seq == (first + sent) % 2**32
            assert (tcp.ack, tcp.window) == (9, 77)
            assert len(payload) <= (65535 if tap.vnet else mss)
            check(vnet, frame, version, len(payload), mss)
            got.append(payload)
            sent += len(payload)
            expected.append("PA" if sent == end else "A")
            assert str(tcp.flags) == expected[-1]
    assert b"".join(got) == b"y" + data
    if tap.vnet and mss < 30_000:
        assert all(len(part) % mss == 0 for part in got[:-1] if len(part) >= mss * 30)


def test_refused_frames_are_errors():
    ours, guest = tap_pair()
    with ours:
        tap = _cext.Tap(ours.fileno(), False)
        guest.close()
        assert tap.emit(frame_start(GUEST, MAC, key()), 0, 0, 0, 0, b"") < 0
        stream = _cext.Stream(10)
        fill(stream, b"0123")
        assert tap.emit_data(frame_start(GUEST, MAC, key()), 0, 0, 0, 0, 9, stream, 0, 4) < 0
        assert tap.emit_frame(bytes(60)) < 0


def test_nothing_leaks(tap):
    """Objects come and go without growing the process."""
    gc.collect()
    before = resident()
    for _ in range(300):
        tap.drain(*(segment(4, b"x" * 100, seq=i * 100) for i in range(3)))
        stream = _cext.Stream(1 << 20)
        fill(stream, b"z" * 10_000)
        made = _cext.Tap(0, True)
        del stream, made
    gc.collect()
    assert resident() - before < 8 << 20


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
