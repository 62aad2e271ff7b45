"""ARP, NDP and ICMP errors, held against scapy's idea of them."""

import errno

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptMTU,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether

from pysplice.services import arp, icmp, ndp

GUEST = "02:00:00:00:00:01"
MAC = bytes.fromhex("9a559a559a55")
OWN4 = frozenset({bytes((10, 0, 2, 15))})
OWN6 = frozenset({bytes.fromhex("fd000000000000000000000000000015")})
ROUTER = ndp.Router(MAC, bytes.fromhex("fe800000000000000000000000000001"), next(iter(OWN6)), 1400)


def request(**fields) -> bytes:
    fields = {"hwsrc": GUEST, "psrc": "10.0.2.15", "pdst": "10.0.2.2", **fields}
    return bytes(Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff") / ARP(**fields))


@pytest.mark.parametrize("target", ("10.0.2.2", "10.0.2.99", "192.0.2.1"))
def test_arp_for_any_address(target):
    reply = Ether(arp.answer(request(pdst=target), MAC, OWN4))
    assert (reply.dst, reply.src) == (GUEST, "9a:55:9a:55:9a:55")
    assert (reply.op, reply.psrc, reply.hwsrc) == (2, target, "9a:55:9a:55:9a:55")
    assert (reply.pdst, reply.hwdst) == ("10.0.2.15", GUEST)


@pytest.mark.parametrize(
    "frame",
    (
        request(pdst="10.0.2.15"),  # its own address
        request(psrc="10.0.2.9", pdst="10.0.2.9"),  # gratuitous
        request(psrc="0.0.0.0"),  # a probe
        request(op=2),
        request(hwlen=8),
        request(ptype=0x86DD),
        request(hwsrc="ff:ff:ff:ff:ff:ff"),
        request()[:41],
    ),
)
def test_arp_without_answer(frame):
    assert arp.answer(frame, MAC, OWN4) is None


def solicitation(target="fe80::1", src="fe80::5", **ip) -> bytes:
    message = ICMPv6ND_NS(tgt=target)
    packet = IPv6(src=src, dst="ff02::1:ff00:1", hlim=ip.pop("hlim", 255), **ip) / message
    return bytes(Ether(src=GUEST, dst="33:33:ff:00:00:01") / packet / ICMPv6NDOptSrcLLAddr(lladdr=GUEST))


def test_neighbour_advertisement():
    frame = ndp.answer(solicitation(), MAC, OWN6, ROUTER)
    reply = Ether(frame)
    assert (reply.dst, reply.src) == (GUEST, "9a:55:9a:55:9a:55")
    assert (reply[IPv6].src, reply[IPv6].dst, reply[IPv6].hlim) == ("fe80::1", "fe80::5", 255)
    advert = reply[ICMPv6ND_NA]
    assert (advert.tgt, advert.R, advert.S, advert.O) == ("fe80::1", 1, 1, 1)
    assert advert.payload.lladdr == "9a:55:9a:55:9a:55"
    assert checksum_valid(frame)


def checksum_valid(frame: bytes) -> bool:
    packet = IPv6(frame[14:])
    sent = packet.payload.cksum
    del packet.payload.cksum
    return IPv6(bytes(packet)).payload.cksum == sent


def damaged(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes((frame[at] ^ 1,)) + frame[at + 1 :]


@pytest.mark.parametrize(
    "frame",
    (
        solicitation(target="fd00::15"),
        solicitation(src="::"),  # duplicate address detection
        solicitation(src="fe80::1"),
        solicitation(target="ff02::1"),
        solicitation(hlim=254),
        damaged(solicitation(), 56),  # checksum
        damaged(solicitation(), 55),  # code
        solicitation()[:77],
        bytes(Ether() / IPv6() / TCP()),
    ),
)
def test_solicitation_without_answer(frame):
    assert ndp.answer(frame, MAC, OWN6, ROUTER) is None


def test_every_truncation_of_a_solicitation():
    whole = solicitation()
    for length in range(14, len(whole)):
        assert ndp.answer(whole[:length], MAC, OWN6, ROUTER) is None


@pytest.mark.parametrize("source", ("fe80::5", "::"))
def test_router_advertisement(source):
    frame = bytes(Ether(src=GUEST) / IPv6(src=source, dst="ff02::2", hlim=255) / ICMPv6ND_RS())
    answer = ndp.answer(frame, MAC, OWN6, ROUTER)
    reply = Ether(answer)
    assert reply.dst == (GUEST if source != "::" else "33:33:00:00:00:01")
    assert (reply[IPv6].src, reply[IPv6].hlim) == ("fe80::1", 255)
    advert = reply[ICMPv6ND_RA]
    assert advert.routerlifetime == 65535
    prefix = reply[ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("fd00::", 64, 1, 1)
    assert prefix.validlifetime == prefix.preferredlifetime == 0xFFFFFFFF
    assert reply[ICMPv6NDOptMTU].mtu == 1400
    assert reply[ICMPv6NDOptSrcLLAddr].lladdr == "9a:55:9a:55:9a:55"
    assert checksum_valid(answer)
    assert ndp.answer(frame, MAC, OWN6, None) is None


@pytest.mark.parametrize(
    ("error", "code4", "code6"),
    ((errno.ENETUNREACH, 0, 0), (errno.EHOSTUNREACH, 1, 3), (errno.EACCES, 13, 1)),
)
def test_unreachable(error, code4, code6):
    syn = bytes(Ether(src=GUEST) / IP(src="10.0.2.15", dst="192.0.2.9") / TCP(sport=7, dport=9, flags="S"))
    frame = icmp.unreachable(syn, error, MAC, bytes((10, 0, 2, 2)))
    reply = Ether(frame)
    assert (reply.dst, reply[IP].src, reply[IP].dst) == (GUEST, "10.0.2.2", "10.0.2.15")
    assert (reply[ICMP].type, reply[ICMP].code) == (3, code4)
    assert frame[42:70] == syn[14:42]
    assert icmp.checksum(frame[14:34]) == icmp.checksum(frame[34:]) == b"\0\0"

    syn = bytes(Ether(src=GUEST) / IPv6(src="fd00::15", dst="2001:db8::9") / TCP(flags="S"))
    frame = icmp.unreachable(syn, error, MAC, ROUTER.address)
    reply = Ether(frame)
    assert (reply[IPv6].src, reply[IPv6].dst) == ("fe80::1", "fd00::15")
    assert reply[ICMPv6DestUnreach].code == code6
    assert frame.endswith(syn[14:])
    assert checksum_valid(frame)


def test_no_icmp_for_other_errors():
    syn = bytes(Ether(src=GUEST) / IP() / TCP())
    assert icmp.unreachable(syn, errno.ECONNREFUSED, MAC, bytes(4)) is None
    assert icmp.unreachable(syn[:30], errno.EHOSTUNREACH, MAC, bytes(4)) is None
