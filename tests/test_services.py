"""ARP, NDP, DHCP, DHCPv6 and ICMP errors, held against scapy's idea of them."""

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dhcp6 import (
    DUID_LL,
    DHCP6_Advertise,
    DHCP6_Confirm,
    DHCP6_InfoRequest,
    DHCP6_Rebind,
    DHCP6_Release,
    DHCP6_Renew,
    DHCP6_Reply,
    DHCP6_Request,
    DHCP6_Solicit,
    DHCP6OptClientId,
    DHCP6OptDNSDomains,
    DHCP6OptDNSServers,
    DHCP6OptIA_NA,
    DHCP6OptIAAddress,
    DHCP6OptRapidCommit,
    DHCP6OptServerId,
    DHCP6OptStatusCode,
)
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDNSSL,
    ICMPv6NDOptMTU,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptRDNSS,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether

from pysplice.link import arp, dhcp, dhcpv6, icmp, ndp
from pysplice.link.responder import Responder
from pysplice.wire import checksum

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
    assert checksum(frame[14:34]) == checksum(frame[34:]) == b"\0\0"

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


# DHCP

LEASE = dhcp.Lease(
    bytes((10, 0, 2, 15)),
    24,
    bytes((10, 0, 2, 2)),
    1400,
    (bytes((10, 0, 2, 3)), bytes((10, 0, 2, 4))),
    ("a.example", "b.example"),
    "box",
    "box.example.org",
)
CHADDR = bytes.fromhex("020000000001")


def dhcp_request(kind, options=(), src="0.0.0.0", dst="255.255.255.255", **fields) -> bytes:
    message = [("message-type", kind)] if kind else []
    return bytes(
        Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff")
        / IP(src=src, dst=dst)
        / UDP(sport=68, dport=67)
        / BOOTP(chaddr=CHADDR, xid=0x1234567, **fields)
        / DHCP(options=[*message, *options, "end"])
    )


def dhcp_reply(frame, lease=LEASE):
    """The reply, checked as a packet; its options by name."""
    made = dhcp.answer(frame, MAC, lease)
    if made is None:
        return None, {}
    packet = Ether(made)
    again = Ether(made)
    del again[IP].chksum, again[UDP].chksum
    assert bytes(again) == made
    assert (packet[UDP].sport, packet[UDP].dport, packet[BOOTP].xid) == (67, 68, 0x1234567)
    assert packet[BOOTP].chaddr.startswith(CHADDR)
    assert len(packet[UDP].payload) >= 300
    return packet, {option[0]: option[1] for option in packet[DHCP].options if isinstance(option, tuple)}


@pytest.mark.parametrize(("asked", "answered"), (("discover", 2), ("request", 5)))
def test_dhcp(asked, answered):
    wanted = [("requested_addr", "10.0.2.15")] if asked == "request" else []
    packet, options = dhcp_reply(dhcp_request(asked, wanted))
    assert (packet[IP].src, packet[IP].dst, packet.dst) == ("10.0.2.2", "10.0.2.15", GUEST)
    assert packet[BOOTP].yiaddr == "10.0.2.15"
    assert options["message-type"] == answered
    assert (options["subnet_mask"], options["router"]) == ("255.255.255.0", "10.0.2.2")
    assert (options["server_id"], options["lease_time"]) == ("10.0.2.2", 0xFFFFFFFF)
    assert (options["interface-mtu"], options["name_server"], options["hostname"]) == (
        1400,
        "10.0.2.3",
        b"box",
    )
    raw = bytes(packet[DHCP])
    assert bytes((119, 22)) + b"\x01a\x07example\x00\x01b\x07example\x00" in raw
    assert bytes((81, 20, 0x0C, 255, 255)) + b"\x03box\x07example\x03org\x00" in raw


def test_dhcp_with_rapid_commit():
    _, options = dhcp_reply(dhcp_request("discover", [(80, b"")]))
    assert options["message-type"] == 5


def test_dhcp_inform_and_bootp():
    packet, options = dhcp_reply(dhcp_request("inform", ciaddr="10.0.2.9"))
    assert (packet[BOOTP].yiaddr, packet[IP].dst) == ("0.0.0.0", "10.0.2.9")
    assert "lease_time" not in options and options["router"] == "10.0.2.2"
    packet, options = dhcp_reply(dhcp_request(None))
    assert packet[BOOTP].yiaddr == "10.0.2.15" and "message-type" not in options


def test_dhcp_what_we_have_not_got():
    packet, options = dhcp_reply(dhcp_request("request", [("requested_addr", "10.0.9.9")]))
    assert (options["message-type"], packet[BOOTP].yiaddr) == (6, "0.0.0.0")
    assert "router" not in options


def test_dhcp_renewal_by_unicast():
    frame = dhcp_request("request", src="10.0.2.15", dst="10.0.2.2", ciaddr="10.0.2.15")
    packet, options = dhcp_reply(frame)
    assert (options["message-type"], packet[IP].dst) == (5, "10.0.2.15")


def test_dhcp_broadcast_where_it_is_asked_for():
    packet, _ = dhcp_reply(dhcp_request("discover", flags="B"))
    assert (packet[IP].dst, packet.dst) == ("255.255.255.255", "ff:ff:ff:ff:ff:ff")


def test_dhcp_a_gateway_off_the_link():
    _, options = dhcp_reply(dhcp_request("discover"), LEASE._replace(gateway=bytes((192, 0, 2, 9))))
    assert options["router"] == "192.0.2.9"
    made = dhcp.answer(dhcp_request("discover"), MAC, LEASE._replace(gateway=bytes((192, 0, 2, 9))))
    assert bytes((121, 14, 32, 192, 0, 2, 9, 0, 0, 0, 0, 0, 192, 0, 2, 9)) in made


def test_dhcp_little_to_say():
    made = dhcp.Lease(bytes((10, 0, 2, 15)), 32, bytes((10, 0, 2, 2)))
    _, options = dhcp_reply(dhcp_request("discover"), made)
    assert not options.keys() & {"interface-mtu", "name_server", "hostname"}


@pytest.mark.parametrize(
    "frame",
    (
        dhcp_request("release"),
        dhcp_request("decline"),
        dhcp_request("offer"),
        dhcp_request("request", [("server_id", "10.0.2.77"), ("requested_addr", "10.0.2.15")]),
        dhcp_request("discover", op=2),
        dhcp_request("discover", htype=6),
        dhcp_request("discover")[:100],
        dhcp_request("discover", [(12, b"x" * 20)])[:-15],
        request(),
    ),
)
def test_dhcp_without_answer(frame):
    assert dhcp.answer(frame, MAC, LEASE) is None


@given(st.binary(max_size=80), st.integers(14, 330))
@settings(max_examples=200, deadline=None)
def test_dhcp_noise(noise, at):
    frame = dhcp_request("discover", [(12, b"name")])
    for broken in (frame[:at] + noise + frame[at + len(noise) :], frame[:at] + noise):
        dhcp.answer(broken, MAC, LEASE)


# DHCPv6

LEASE6 = dhcpv6.Lease(
    bytes.fromhex("fe800000000000000000000000000001"),
    bytes.fromhex("fd000000000000000000000000000015"),
    (bytes.fromhex("fd000000000000000000000000000053"),),
    ("a.example",),
    "box.example.org",
)
CLIENT = DHCP6OptClientId(duid=DUID_LL(lladdr=GUEST))
SERVER = DHCP6OptServerId(duid=DUID_LL(lladdr="9a:55:9a:55:9a:55"))
OTHER = DHCP6OptServerId(duid=DUID_LL(lladdr="9a:55:9a:55:9a:56"))


def dhcp6_frame(message, dst="ff02::1:2") -> bytes:
    return bytes(
        Ether(src=GUEST, dst="33:33:00:01:00:02")
        / IPv6(src="fe80::5", dst=dst)
        / UDP(sport=546, dport=547)
        / message
    )


def ia(*addresses):
    return DHCP6OptIA_NA(iaid=7, ianaopts=[DHCP6OptIAAddress(addr=address) for address in addresses])


@pytest.mark.parametrize(
    ("message", "kind"),
    (
        (DHCP6_Solicit(trid=9) / CLIENT / ia(), DHCP6_Advertise),
        (DHCP6_Solicit(trid=9) / CLIENT / ia() / DHCP6OptRapidCommit(), DHCP6_Reply),
        (DHCP6_Request(trid=9) / CLIENT / SERVER / ia("fd00::15"), DHCP6_Reply),
        (DHCP6_Renew(trid=9) / CLIENT / SERVER / ia("fd00::15"), DHCP6_Reply),
        (DHCP6_Rebind(trid=9) / CLIENT / ia("fd00::15", "fd00::99"), DHCP6_Reply),
    ),
)
def test_dhcpv6(message, kind):
    made = dhcpv6.answer(dhcp6_frame(message), MAC, LEASE6)
    packet = Ether(made)
    again = Ether(made)
    del again[UDP].chksum
    assert bytes(again) == made
    assert (packet[IPv6].src, packet[IPv6].dst, packet.dst) == ("fe80::1", "fe80::5", GUEST)
    assert kind in packet and packet[kind].trid == 9
    assert bytes(packet[DHCP6OptServerId].duid) == bytes(SERVER.duid)
    assert bytes(packet[DHCP6OptClientId].duid) == bytes(CLIENT.duid)
    assert packet[DHCP6OptIA_NA].iaid == 7
    address = packet[DHCP6OptIA_NA].ianaopts[0]
    assert (address.addr, address.preflft, address.validlft) == ("fd00::15", 0xFFFFFFFF, 0xFFFFFFFF)
    if DHCP6_Rebind in Ether(dhcp6_frame(message)):
        gone = packet[DHCP6OptIA_NA].ianaopts[1]
        assert (gone.addr, gone.validlft) == ("fd00::99", 0)
    assert packet[DHCP6OptDNSServers].dnsservers == ["fd00::53"]
    assert packet[DHCP6OptDNSDomains].dnsdomains == ["a.example."]
    assert b"\x00\x27\x00\x12\x04\x03box\x07example\x03org\x00" in made


def test_dhcpv6_information_release_and_confirm():
    made = dhcpv6.answer(dhcp6_frame(DHCP6_InfoRequest(trid=9)), MAC, LEASE6)
    assert DHCP6OptDNSServers in Ether(made) and DHCP6OptIA_NA not in Ether(made)
    for message, status in (
        (DHCP6_Release(trid=9) / CLIENT / SERVER / ia("fd00::15"), 0),
        (DHCP6_Confirm(trid=9) / CLIENT / ia("fd00::15"), 0),
        (DHCP6_Confirm(trid=9) / CLIENT / ia("fd00::99"), 4),
    ):
        assert (
            Ether(dhcpv6.answer(dhcp6_frame(message), MAC, LEASE6))[DHCP6OptStatusCode].statuscode == status
        )


@pytest.mark.parametrize(
    "frame",
    (
        dhcp6_frame(DHCP6_Solicit() / ia()),  # RFC 8415, section 16: no client
        dhcp6_frame(DHCP6_Solicit() / CLIENT / SERVER / ia()),
        dhcp6_frame(DHCP6_Request() / CLIENT / ia()),
        dhcp6_frame(DHCP6_Request() / CLIENT / OTHER / ia()),
        dhcp6_frame(DHCP6_Rebind() / CLIENT / SERVER / ia()),
        dhcp6_frame(DHCP6_Advertise() / CLIENT / SERVER),
        dhcp6_frame(DHCP6_Solicit() / CLIENT / ia(), dst="fe80::77"),
        dhcp6_frame(DHCP6_Solicit() / CLIENT / ia())[:-3],
    ),
)
def test_dhcpv6_without_answer(frame):
    assert dhcpv6.answer(frame, MAC, LEASE6) is None


@given(st.binary(max_size=60), st.integers(14, 120))
@settings(max_examples=200, deadline=None)
def test_dhcpv6_noise(noise, at):
    frame = dhcp6_frame(DHCP6_Request(trid=9) / CLIENT / SERVER / ia("fd00::15"))
    for broken in (frame[:at] + noise + frame[at + len(noise) :], frame[:at] + noise):
        dhcpv6.answer(broken, MAC, LEASE6)


def test_advertisements_have_names():
    made = ROUTER._replace(managed=True, dns=LEASE6.dns * 2, search=("a.example", "b.example"))
    packet = Ether(ndp.unsolicited(made))
    assert (packet.dst, packet[IPv6].dst, packet[IPv6].hlim) == ("33:33:00:00:00:01", "ff02::1", 255)
    assert packet[ICMPv6ND_RA].M == 1
    assert packet[ICMPv6NDOptRDNSS].dns == ["fd00::53", "fd00::53"]
    assert packet[ICMPv6NDOptDNSSL].searchlist == ["a.example.", "b.example."]
    assert bytes(packet)[14 + 40 + 2 :] and len(bytes(packet)) % 2 == 0


def test_the_responder():
    made = Responder(MAC, OWN4 | OWN6, arp=True, ndp=True, router=ROUTER, dhcp=LEASE, dhcpv6=LEASE6)
    solicit = dhcp6_frame(DHCP6_Solicit() / CLIENT / ia())
    for frame in (request(), dhcp_request("discover"), solicit, solicitation()):
        assert made.answer(frame) is not None
    nothing = Responder(MAC, OWN4, arp=False, ndp=False, router=None, dhcp=None, dhcpv6=None)
    for frame in (request(), dhcp_request("discover"), solicit, solicitation(), b"", bytes(14), bytes(60)):
        assert nothing.answer(frame) is None
    renewal = dhcp_request("request", src="10.0.2.15", dst="10.0.2.2")[26:38]
    assert made.claims(renewal) and not nothing.claims(renewal)
    assert not made.claims(renewal[:4] + bytes((10, 0, 2, 99)) + renewal[8:])


def test_dhcp_a_client_that_names_no_address():
    """It takes what it is given, as pasta has it; one that names another is refused."""
    packet, options = dhcp_reply(dhcp_request("request"))
    assert (options["message-type"], packet[BOOTP].yiaddr) == (dhcp.ACK, "10.0.2.15")


@pytest.mark.parametrize("length", (4, 20))
def test_dhcpv6_thousands_of_options(length):
    """Each is looked at only once, and a legitimate client never sends so many."""
    data = dhcpv6.option(99, bytes(length - 4)) * (65_000 // length)
    assert dhcpv6.parse_options(data) is None
    few = data[: length * dhcpv6.OPTIONS_MAX]
    assert len(dhcpv6.parse_options(few)) == dhcpv6.OPTIONS_MAX
    assert dhcpv6.parse_options(few[:-1] if length > 4 else few[:-2]) is None
