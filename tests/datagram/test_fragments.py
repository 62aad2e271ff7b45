"""Packets out of fragments, without a tap; scapy cuts, and we put together, and the other way round."""

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP, fragment
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment, fragment6

from pysplice import wire
from pysplice.datagram import fragments
from pysplice.wire import checksum

BOTH = pytest.mark.parametrize("version", (4, 6))
A4, B4, A6, B6 = "10.0.2.15", "192.0.2.7", "fd00::15", "2001:db8::7"


def packet(version, payload, ident=7, **fields):
    if version == 4:
        return IP(bytes(IP(src=A4, dst=B4, id=ident, ttl=50) / UDP(sport=5, dport=53, **fields) / payload))
    return IPv6(bytes(IPv6(src=A6, dst=B6, hlim=50) / UDP(sport=5, dport=53, **fields) / payload))


def cut(whole, size, ident=7):
    """Scapy's own fragments, of about `size` bytes."""
    if whole.version == 4:
        return [bytes(part) for part in fragment(whole, fragsize=size)]
    headed = (
        IPv6(src=whole.src, dst=whole.dst, hlim=whole.hlim) / IPv6ExtHdrFragment(id=ident) / whole.payload
    )
    return [bytes(part) for part in fragment6(headed, size + 60)]


def feed(made, parts, now=0.0):
    return [result for part in parts if (result := made.feed(part, now)) is not None]


@BOTH
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_the_order(version, data):
    payload = random.Random(1).randbytes(data.draw(st.integers(1300, 9000)))
    parts = cut(packet(version, payload), data.draw(st.sampled_from((400, 1000, 1280))))
    order = data.draw(st.permutations(parts))
    made = fragments.Reassembler()
    (whole,) = feed(made, order)
    key, got, ttl = fragments.datagram(whole)
    assert (got, ttl, key[-4:]) == (payload, 50, struct.pack("!HH", 5, 53))
    assert (len(made), made.held, made.dropped) == (0, 0, 0)


@BOTH
def test_the_same_twice_is_no_overlap(version):
    parts = cut(packet(version, bytes(4000)), 1000)
    made = fragments.Reassembler()
    assert len(feed(made, [parts[0], parts[0], *parts[1:]])) == 1


@BOTH
def test_two_at_once(version):
    made = fragments.Reassembler()
    one, other = (cut(packet(version, bytes((n,)) * 3000, ident=n), 1000, ident=n) for n in (1, 2))
    mixed = [part for pair in zip(one, other, strict=True) for part in pair]
    assert sorted(fragments.datagram(whole)[1][0] for whole in feed(made, mixed)) == [1, 2]


def piece(version, offset, data, more, ident=9):
    if version == 4:
        return bytes(
            IP(src=A4, dst=B4, id=ident, proto=17, frag=offset // 8, flags="MF" if more else 0) / data
        )
    head = IPv6ExtHdrFragment(id=ident, offset=offset // 8, m=int(more), nh=17)
    return bytes(IPv6(src=A6, dst=B6) / head / data)


@BOTH
@pytest.mark.parametrize(
    "parts",
    (
        ((0, bytes(16), True), (8, bytes(16), True)),  # overlap
        ((0, bytes(32), True), (8, bytes(8), True)),  # within
        ((0, bytes(16), True), (0, b"other" + bytes(11), True)),  # the same place, other bytes
        ((0, bytes(12), True),),  # not in units of 8
        ((0, b"", True),),  # nothing at all
        ((16, bytes(8), False), (24, bytes(8), True)),  # behind the last
        ((16, bytes(8), False), (8, bytes(8), False)),  # two that are the last
        ((32, bytes(8), True), (8, bytes(8), False)),  # a last one in the middle
        ((65528, bytes(16), True),),  # beyond what a packet can be
    ),
)
def test_contradictions_drop_the_packet(version, parts):
    made = fragments.Reassembler()
    assert feed(made, [piece(version, *part) for part in parts]) == []
    assert (made.dropped, made.held) == (1, 0)


@BOTH
def test_time(version):
    made = fragments.Reassembler()
    parts = cut(packet(version, bytes(3000)), 1000)
    feed(made, parts[:-1], 0.0)
    assert feed(made, parts[-1:], fragments.TIMEOUT - 0.1)
    feed(made, parts[:-1], 100.0)
    assert not feed(made, parts[-1:], 100.0 + fragments.TIMEOUT)
    assert made.dropped == 1


@BOTH
def test_bounds(version):
    """A guest that never finishes costs no more than this, and others still get through."""
    made = fragments.Reassembler()
    for n in range(3 * fragments.PACKETS_MAX):
        made.feed(piece(version, 8, bytes(60000), True, ident=n), 0.0)
        assert made.held <= fragments.BYTES_MAX and len(made) <= fragments.PACKETS_MAX
    for n in range(3 * fragments.PACKETS_MAX):
        made.feed(piece(version, 8, bytes(8), True, ident=n), 0.0)
        assert len(made) <= fragments.PACKETS_MAX
    assert feed(made, cut(packet(version, bytes(3000), ident=999), 1000, ident=999))


@BOTH
@given(st.binary(max_size=120))
def test_noise(version, noise):
    made = fragments.Reassembler()
    head = piece(version, 0, b"", True)
    for data in (noise, head[: len(head) // 2] + noise, head + noise):
        wire.is_fragment(data)
        made.feed(data, 0.0)
        if len(data) >= 40:
            fragments.datagram(data)


@BOTH
def test_datagrams_that_are_none(version):
    good = bytes(packet(version, b"payload"))
    header = 20 if version == 4 else 40
    assert fragments.datagram(good)[1] == b"payload"
    for bad in (
        good[:-1] + b"x",  # checksum
        good[: header + 4] + b"\0\x07" + good[header + 6 :],  # length
        good[: header + 4] + b"\xff\xff" + good[header + 6 :],
        good[:header],
        good[: 9 if version == 4 else 6] + b"\x06" + good[10 if version == 4 else 7 :],  # TCP
    ):
        assert fragments.datagram(bad) is None
    assert (fragments.datagram(bytes(packet(version, b"x", chksum=0))) is None) == (version == 6)


@BOTH
@pytest.mark.parametrize("mtu", (1280, 1500, 9000))
def test_split(version, mtu):
    """Scapy and our own reassembly agree with it."""
    if version == 4:
        whole = bytes(IP(src=A4, dst=B4) / ICMP() / bytes(20000))
    else:
        whole = bytes(IPv6(src=A6, dst=B6) / ICMPv6EchoRequest(data=bytes(20000)))
    parts = fragments.split(whole, mtu, 5)
    assert all(len(part) <= mtu for part in parts)
    assert fragments.split(parts[0][:100], mtu, 5) == [parts[0][:100]]
    (again,) = feed(fragments.Reassembler(), parts)
    header = 20 if version == 4 else 40
    assert again[header:] == whole[header:]
    if version == 4:
        part = IP(parts[1])
        assert (part.frag * 8, part.id, part.proto) == (len(parts[0]) - 20, 5, 1)
        assert checksum(bytes(20)) == b"\xff\xff"
