"""Echo requests and replies as packets, held against scapy's idea of them."""

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6

from pysplice.datagram import echo, errors
from pysplice.link import icmp

BOTH = pytest.mark.parametrize("version", (4, 6))
A4, B4, A6, B6 = "10.0.2.15", "192.0.2.7", "fd00::15", "2001:db8::7"
MAC, GUEST = bytes.fromhex("9a559a559a55"), bytes.fromhex("020000000001")


def ping(version, data=b"data", **fields):
    if version == 4:
        return bytes(IP(src=A4, dst=B4, ttl=9) / ICMP(id=0x1234, seq=5, **fields) / data)
    return bytes(IPv6(src=A6, dst=B6, hlim=9) / ICMPv6EchoRequest(id=0x1234, seq=5, data=data, **fields))


@BOTH
@pytest.mark.parametrize("size", (0, 1, 56))
def test_request_and_reply(version, size):
    packet = ping(version, bytes(range(size)))
    key, message, ttl = echo.request(packet)
    assert ttl == 9 and key[-4:] == b"\x12\x34\0\0"
    # The kernel answers with an identifier of its own
    answer = bytes((0 if version == 4 else 129, 0)) + b"\xaa\xaa" + b"\x77\x77" + message[6:]
    made = (IP if version == 4 else IPv6)(echo.reply(key, answer))
    assert (made.src, made.dst) == ((B4, A4) if version == 4 else (B6, A6))
    layer = made[ICMP] if version == 4 else made[ICMPv6EchoReply]
    assert (layer.id, layer.seq) == (0x1234, 5)
    again = (IP if version == 4 else IPv6)(bytes(made))
    if version == 4:
        del again[IP].chksum, again[ICMP].chksum
    else:
        del again[ICMPv6EchoReply].cksum
    assert bytes(again) == bytes(made)


@BOTH
def test_what_is_no_request(version):
    good = ping(version)
    bad = [good[:-1] + b"x", good[:27], b"", good[:20]]
    if version == 4:
        bad += [ping(4, type=0), ping(4, type=8, code=1), bytes(IP(src=A4, dst="224.0.0.1") / ICMP())]
        bad += [bytes(IP(src=A4, dst=B4) / UDP()), bytes(IP(src=A4, dst="127.0.0.1") / ICMP())]
    else:
        bad += [
            ping(6, type=129),
            ping(6, code=1),
            bytes(IPv6(src=A6, dst="ff02::1") / ICMPv6EchoRequest()),
        ]
        bad += [bytes(IPv6(src=A6, dst="::1") / ICMPv6EchoRequest())]
    for packet in bad:
        assert echo.request(packet) is None
    key, message, _ = echo.request(good)
    assert echo.reply(key, message) is None  # a request is no reply
    assert echo.reply(key, b"\0\0\0") is None


@BOTH
def test_an_error_quotes_the_guests_identifier(version):
    key, message, _ = echo.request(ping(version))
    protocol = 1 if version == 4 else 58
    sent = message[:2] + b"\x11\x11\x77\x77" + message[6:]
    quoted = errors.quoted(key, protocol, sent, GUEST, MAC)
    source = key[4:8] if version == 4 else key[16:32]
    frame = icmp.error_frame(quoted, *((11, 0) if version == 4 else (3, 0)), 0, MAC, source)
    frame = echo.with_ident(frame, key[-4:-2])
    assert frame[:14] == GUEST + MAC + (b"\x08\x00" if version == 4 else b"\x86\xdd")
    packet = (IP if version == 4 else IPv6)(frame[14:])
    if version == 4:
        inner = packet[ICMP].payload
        assert (inner.src, inner.dst, inner[1].id) == (A4, B4, 0x1234)
        check = IP(bytes(packet))
        del check[ICMP].chksum
        assert IP(bytes(check))[ICMP].chksum == packet[ICMP].chksum
    else:
        assert packet.payload.payload.src == A6
        assert bytes(packet)[40 + 8 + 40 + 4 :][:2] == b"\x12\x34"
