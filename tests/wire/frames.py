"""Frames from steps and steps' words from frames: scapy builds and parses, nothing here is of pysplice."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, TCPerror, UDPerror
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPerror6,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw
from scapy.utils import checksum

from .language import FLAGS, Step

LETTERS = dict(zip(FLAGS, "FSRPAUEC", strict=True))
UNREACHABLE = {
    4: {"net": 0, "host": 1, "protocol": 2, "port": 3, "prohibited": 13},
    6: {"net": 0, "prohibited": 1, "host": 3, "port": 4},
}
IPPROTO = {4: {"icmp": 1}, 6: {"icmp": 58}}


# A prime number of bytes each, longer than any window that is not scaled
_PATTERNS = {side: random.Random(side).randbytes(65521) for side in ("guest", "server")}


def pattern(side: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a side's stream."""
    base = _PATTERNS[side]
    at = start % len(base)
    return (base[at:] + base * ((end - start) // len(base) + 1))[: max(end - start, 0)]


def span(text: str) -> tuple[int, int]:
    """FROM:TO."""
    start, _, end = text.partition(":")
    return int(start), int(end)


@dataclass
class Ends:
    """The addresses of a script on a stack, and its ports."""

    version: int
    guest: str
    server: str
    gateway: str
    guest_mac: str
    mac: str  # of the stack
    sport: int
    dport: int  # dport + 1 is closed

    def address(self, name: str) -> str:
        nobody = {4: "198.51.100.77", 6: "2001:db8:77::77"}[self.version]
        return {"server": self.server, "gateway": self.gateway, "guest": self.guest, "nobody": nobody}.get(
            name, name
        )


def number(fields: dict[str, str], name: str, default: int) -> int:
    return int(fields.get(name, default), 0) if isinstance(fields.get(name, default), str) else default


def options_of(fields: dict[str, str], base: int) -> list[Any] | bytes:
    """TCP options; `base`: what SACK blocks count from."""
    if "options" in fields:
        return bytes.fromhex(fields["options"])
    made: list[Any] = []
    if "mss" in fields and fields["mss"] != "none":
        made.append(("MSS", int(fields["mss"])))
    if "sackok" in fields:
        made.append(("SAckOK", b""))
    if "ts" in fields:
        made.append(("Timestamp", span(fields["ts"])))
    if "wscale" in fields:
        made += [("NOP", None), ("WScale", int(fields["wscale"]))]
    if "fastopen" in fields:
        made.append((34, bytes.fromhex(fields["fastopen"])))
    if "sack" in fields:
        blocks = [(base + n) & 0xFFFFFFFF for n in span(fields["sack"])]
        made += [("NOP", None), ("NOP", None), ("SAck", tuple(blocks))]
    return made


def tcp_of(
    verb: str, fields: dict[str, str], ends: Ends, seq: int, ack: int, win: int, base: int
) -> Packet:
    """A segment; `seq` and `ack` are absolute."""
    payload = pattern("guest", *span(fields["data"])) if "data" in fields else b""
    segment = TCP(
        sport=number(fields, "sport", ends.sport), dport=dport_of(fields, ends),
        flags="".join(LETTERS[flag] for flag in verb.split(",") if flag != "NONE"), seq=seq & 0xFFFFFFFF,
        ack=ack & 0xFFFFFFFF, window=win, urgptr=number(fields, "urg", 0),
    )  # fmt: skip
    options = options_of(fields, base)
    if isinstance(options, bytes):
        padded = options + bytes(-len(options) % 4)
        segment.dataofs = 5 + len(padded) // 4
        payload = padded + payload
    else:
        segment.options = options
    if "doff" in fields:
        segment.dataofs = int(fields["doff"])
    return segment / Raw(payload) if payload else segment


def dport_of(fields: dict[str, str], ends: Ends) -> int:
    return number(fields, "dport", ends.dport + (fields.get("to") == "closed"))


def udp_of(step: Step, ends: Ends) -> Packet:
    fields = step.fields
    datagram = UDP(sport=number(fields, "sport", ends.sport), dport=dport_of(fields, ends))
    if "udplen" in fields:
        datagram.len = int(fields["udplen"])
    if "checksum" in fields:
        datagram.chksum = int(fields["checksum"])
    return datagram / Raw(pattern("guest", 0, number(fields, "len", 0)))


def echo_of(step: Step, ends: Ends) -> Packet:
    fields = step.fields
    kind: Any = ICMP(type=8) if ends.version == 4 else ICMPv6EchoRequest()
    kind.id, kind.seq = number(fields, "id", ends.sport), number(fields, "seq", 0)
    if ends.version == 4 and "code" in fields:
        kind.code = int(fields["code"])
    data = pattern("guest", 0, number(fields, "len", 56))
    if ends.version == 4:
        return kind / Raw(data)
    kind.data = data
    return kind


def error_of(step: Step, ends: Ends, quoted: bytes) -> Packet:
    """An ICMP error that quotes a packet."""
    code, mtu = step.fields.get("code", "port"), number(step.fields, "mtu", 0)
    quote = quoted[: number(step.fields, "quote", 548 if ends.version == 4 else 1200)]
    if ends.version == 4:
        if code == "too-big":
            return ICMP(type=3, code=4, nexthopmtu=mtu) / Raw(quote)
        if code == "time":
            return ICMP(type=11, code=0) / Raw(quote)
        return ICMP(type=3, code=UNREACHABLE[4][code]) / Raw(quote)
    if code == "too-big":
        return ICMPv6PacketTooBig(mtu=mtu) / Raw(quote)
    if code == "time":
        return ICMPv6TimeExceeded() / Raw(quote)
    return ICMPv6DestUnreach(code=UNREACHABLE[6][code]) / Raw(quote)


def solicited(address: str) -> tuple[str, str]:
    """The group and its MAC address that a solicitation for an address goes to (RFC 4291, 2.7.1)."""
    packed = socket.inet_pton(socket.AF_INET6, address)
    group = bytes.fromhex("ff0200000000000000000001ff") + packed[13:]
    return socket.inet_ntop(socket.AF_INET6, group), "33:33:" + ":".join(f"{b:02x}" for b in group[12:])


def neighbour_of(step: Step, ends: Ends) -> Packet:
    """A whole frame of ARP or NDP."""
    fields, verb = step.fields, step.verb
    target = ends.address(fields.get("target", "server"))
    source = fields.get("source", "guest")
    if verb == "SOLICIT-ROUTER":
        own = "::" if source == "none" else "fe80::77"
        frame = Ether(src=ends.guest_mac, dst="33:33:00:00:00:02") / IPv6(
            src=own, dst="ff02::2", hlim=number(fields, "hops", 255)
        )
        return frame / ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=ends.guest_mac)
    if ends.version == 4:
        own = {"none": "0.0.0.0", "guest": ends.guest}.get(source, source)
        arp = ARP(op=1 if verb == "WHO-HAS" else 2, hwsrc=ends.guest_mac, psrc=own, pdst=target)
        for name in ("hwlen", "plen", "hwtype", "ptype"):
            if name in fields:
                setattr(arp, name, int(fields[name], 0))
        if verb == "IS-AT":
            arp.psrc, arp.pdst, arp.hwdst = ends.guest, ends.server, ends.mac
        unicast = verb == "IS-AT" or fields.get("to") == "unicast"
        return Ether(src=ends.guest_mac, dst=ends.mac if unicast else "ff:ff:ff:ff:ff:ff") / arp
    own = {"none": "::", "guest": ends.guest}.get(source, source)
    if verb == "IS-AT":
        na = ICMPv6ND_NA(tgt=ends.guest, R=0, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=ends.guest_mac)
        return (
            Ether(src=ends.guest_mac, dst="33:33:00:00:00:01") / IPv6(src=own, dst="ff02::1", hlim=255) / na
        )
    group, group_mac = solicited(target)
    if fields.get("to") == "unicast":
        group, group_mac = target, ends.mac
    ns: Packet = ICMPv6ND_NS(tgt=target)
    if source != "none":
        ns = ns / ICMPv6NDOptSrcLLAddr(lladdr=ends.guest_mac)
    return (
        Ether(src=ends.guest_mac, dst=group_mac)
        / IPv6(src=own, dst=group, hlim=number(fields, "hops", 255))
        / ns
    )


HEADERS = {
    "hop": lambda: IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)]),
    "destination": lambda: IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)]),
    "routing": lambda: IPv6ExtHdrRouting(type=0, segleft=1, addresses=["2001:db8::1"]),
    "none": None,
}


def ip_of(step: Step, ends: Ends, transport: Packet) -> Packet:
    """The packet around a segment or a datagram."""
    fields = step.fields
    to = fields.get("to", "server")
    target = ends.address("server" if to == "closed" else to)
    if ends.version == 4:
        packet = IP(src=ends.guest, dst=target, ttl=number(fields, "ttl", 64), tos=number(fields, "tos", 0))
        packet.id = number(fields, "id", 1)
        packet.flags = "DF" if "df" in fields else 0
        if "ipoptions" in fields:
            from scapy.layers.inet import IPOption

            packet.options = [IPOption(bytes.fromhex(fields["ipoptions"]))]
        if "iplen" in fields:
            packet.len = int(fields["iplen"])
        if "protocol" in fields:
            packet.proto = int(fields["protocol"])
    else:
        packet = IPv6(
            src=ends.guest, dst=target, hlim=number(fields, "ttl", 64), tc=number(fields, "tos", 0)
        )
        if "iplen" in fields:
            packet.plen = int(fields["iplen"]) - 40
        if fields.get("header", "none") != "none":
            packet = packet / HEADERS[fields["header"]]()
        if "protocol" in fields:
            packet.nh = int(fields["protocol"])
    return packet / transport


def spoil(packet: bytes, version: int, which: str) -> bytes:
    """The packet with a checksum that is wrong."""
    made = bytearray(packet)
    ihl = (made[0] & 15) * 4 if version == 4 else 40
    protocol = made[9] if version == 4 else made[6]
    at = 10 if which == "ip" else ihl + {6: 16, 17: 6, 1: 2, 58: 2}[protocol]
    value = (made[at] << 8 | made[at + 1]) ^ 0x0101
    made[at : at + 2] = (value or 0x0202).to_bytes(2, "big")
    return bytes(made)


def fragments_of(packet: bytes, step: Step, ends: Ends) -> Iterator[bytes]:
    """Parts of a packet, as the step lists them."""
    header_len = 20 if ends.version == 4 else 40
    payload = packet[header_len:]
    spans = [span(text) for text in step.fields["fragments"].split(",")]
    for start, end in spans:
        last = end >= len(payload) and "more" not in step.fields
        part = (payload + bytes(max(0, end - len(payload))))[start:end]
        if ends.version == 4:
            ip = IP(packet[:header_len])
            ident = number(step.fields, "id", ends.sport)
            outer = IP(
                src=ip.src,
                dst=ip.dst,
                ttl=ip.ttl,
                id=ident,
                flags=0 if last else 1,
                frag=start // 8,
                proto=ip.proto,
            )
            yield bytes(outer / Raw(part))
        else:
            ip6 = IPv6(packet[:header_len])
            inner = ip6.nh
            fragment = IPv6ExtHdrFragment(
                nh=inner, offset=start // 8, m=0 if last else 1, id=number(step.fields, "id", ends.sport)
            )
            yield bytes(IPv6(src=ip6.src, dst=ip6.dst, hlim=ip6.hlim, nh=44) / fragment / Raw(part))


def frames_of(step: Step, ends: Ends, transport: Packet | None) -> list[bytes]:
    """All frames of a step; `transport` is None for neighbours and routers."""
    if transport is None:
        whole = bytes(neighbour_of(step, ends))
        packet, header = whole[14:], whole[:14]
        packets = [spoil(packet, ends.version, step.fields["bad"]) if "bad" in step.fields else packet]
    else:
        packet = bytes(ip_of(step, ends, transport))
        if "bad" in step.fields:
            packet = spoil(packet, ends.version, step.fields["bad"])
        packets = list(fragments_of(packet, step, ends)) if "fragments" in step.fields else [packet]
        header = bytes(
            Ether(src=ends.guest_mac, dst=ends.mac, type=0x0800 if ends.version == 4 else 0x86DD)
        )
    made = []
    for packet in packets:
        frame = header + packet
        frame = frame[: len(frame) - number(step.fields, "cut", 0)]
        made.append(frame + b"\xee" * number(step.fields, "pad", 0))
    return made


@dataclass
class Frame:
    """What a frame from the stack says: its kind, its values, its bytes."""

    kind: str  # flags joined by commas, or another kind of language.py
    values: dict[str, Any]
    payload: bytes
    time: float
    key: tuple[int, int] | None  # version, the guest's port or identifier; None: for all scripts
    raw: bytes = field(repr=False, default=b"")  # the packet, without the Ethernet header
    is_repetition: bool = False

    def __str__(self) -> str:
        shown = " ".join(
            f"{k}={v}" for k, v in self.values.items() if v not in (None, "none") and k in SHOWN
        )
        return f"{self.kind} {shown}"


SHOWN = ("seq", "ack", "len", "win", "mss", "code", "mtu", "sack")


def _tcp(segment: Any, common: dict[str, Any]) -> tuple[str, dict[str, Any], bytes]:
    kind = ",".join(name for name in FLAGS if LETTERS[name] in str(segment.flags)) or "NONE"
    payload = segment.original[segment.dataofs * 4 :]
    options = {name: value for name, value in segment.options if isinstance(name, str)}
    values = common | {
        "sport": segment.sport, "seq": segment.seq, "ack": segment.ack, "win": segment.window, "urg": segment.urgptr,
        "mss": options.get("MSS", "none"), "wscale": options.get("WScale", "none"),
        "sackok": 1 if "SAckOK" in options else "none", "ts": 1 if "Timestamp" in options else "none",
        "sack": options.get("SAck", "none"), "fastopen": "none",
    }  # fmt: skip
    return kind, values, payload


def _icmp(icmp: Any, version: int, common: dict[str, Any]) -> tuple[str, dict[str, Any], bytes, int | None]:
    if isinstance(icmp, ICMPv6EchoReply) or (version == 4 and icmp.type == 0):
        payload = icmp.original[8:]
        return "ECHO-REPLY", common | {"id": icmp.id, "seq": icmp.seq}, payload, icmp.id
    code: Any = "other"
    if version == 4:
        if icmp.type == 3:
            code = (
                "too-big"
                if icmp.code == 4
                else {v: k for k, v in UNREACHABLE[4].items()}.get(icmp.code, icmp.code)
            )
        elif icmp.type == 11:
            code = "time" if icmp.code == 0 else "reassembly"
        inner, mtu = icmp.payload, getattr(icmp, "nexthopmtu", 0)
    else:
        if isinstance(icmp, ICMPv6DestUnreach):
            code = {v: k for k, v in UNREACHABLE[6].items()}.get(icmp.code, icmp.code)
        elif isinstance(icmp, ICMPv6PacketTooBig):
            code = "too-big"
        elif isinstance(icmp, ICMPv6TimeExceeded):
            code = "time" if icmp.code == 0 else "reassembly"
        elif icmp.type == 4:
            code = "parameter"
        inner, mtu = icmp.payload, getattr(icmp, "mtu", 0)
    quoted = inner if isinstance(inner, IPerror | IPerror6) else None
    port: int | None = None
    if quoted is not None:
        transport = quoted.getlayer(TCPerror) or quoted.getlayer(UDPerror)
        echo = quoted.getlayer("ICMP in ICMP") or quoted.getlayer(ICMPv6EchoRequest)
        port = transport.sport if transport is not None else echo.id if echo is not None else None
    return "ERROR", common | {"code": code, "mtu": mtu, "quotes": len(bytes(inner))}, b"", port


def _plain(data: bytes, now: float) -> Frame | None:
    """A segment without options, as nearly all are, without scapy: thousands come in a row; None for any other."""
    version = (
        4 if data[12:14] == b"\x08\x00" and data[14] == 0x45 else 6 if data[12:14] == b"\x86\xdd" else 0
    )
    at = 34 if version == 4 else 54
    if (
        not version
        or len(data) < at + 20
        or data[23 if version == 4 else 20] != 6
        or data[at + 12] >> 4 != 5
    ):
        return None
    (length,) = struct.unpack_from("!H", data, 16 if version == 4 else 18)
    end = 14 + length if version == 4 else 54 + length
    sport, dport, seq, ack, _, flags, win, _, urg = struct.unpack_from("!HHIIBBHHH", data, at)
    values: dict[str, Any] = dict.fromkeys(("mss", "wscale", "sackok", "ts", "sack", "fastopen"), "none")
    values |= {
        "mac": _mac(data[6:12]), "dst": _mac(data[:6]), "fragments": 1, "version": version,
        "ttl": data[22 if version == 4 else 21], "sport": sport, "seq": seq, "ack": ack, "win": win, "urg": urg,
        "len": end - at - 20,
    }  # fmt: skip
    kind = ",".join(name for bit, name in enumerate(FLAGS) if flags & 1 << bit) or "NONE"
    return Frame(kind, values, data[at + 20 : end], now, (version, dport), data[14:])


def _mac(packed: bytes) -> str:
    return ":".join(f"{byte:02x}" for byte in packed)


def parse(data: bytes, now: float, fragments: int = 1) -> Frame | None:
    """A frame in a script's words; None if no script can be about it."""
    plain = _plain(data, now) if fragments == 1 else None
    if plain is not None:
        return plain
    frame = Ether(data)
    common: dict[str, Any] = {"mac": frame.src, "dst": frame.dst, "fragments": fragments}
    if ARP in frame:
        arp = frame[ARP]
        values = common | {"version": 4, "target": arp.psrc if arp.op == 2 else arp.pdst}
        return Frame("IS-AT" if arp.op == 2 else "WHO-HAS", values, b"", now, None)
    if IP in frame:
        version, ip = 4, frame[IP]
        common |= {"version": 4, "ttl": ip.ttl, "tos": ip.tos, "df": 1 if "DF" in str(ip.flags) else "none"}
        body = bytes(ip)[: ip.len]
        ip = IP(body) if ip.len else ip
    elif IPv6 in frame:
        version, ip = 6, frame[IPv6]
        common |= {"version": 6, "ttl": ip.hlim, "tos": ip.tc}
        body = bytes(ip)
    else:
        return None
    raw = data[14:]
    if ip.haslayer(TCP):
        kind, values, payload = _tcp(ip[TCP], common)
        return Frame(kind, values | {"len": len(payload)}, payload, now, (version, ip[TCP].dport), raw)
    if ip.haslayer(UDP) and not ip.haslayer(UDPerror) and not ip.haslayer(ICMP):
        payload = ip[UDP].original[8 : max(ip[UDP].len, 8)]
        return Frame("UDP", common | {"len": len(payload)}, payload, now, (version, ip[UDP].dport), raw)
    for layer, kind in (
        (ICMPv6ND_NA, "IS-AT"),
        (ICMPv6ND_NS, "WHO-HAS"),
        (ICMPv6ND_RA, "ADVERTISE-ROUTER"),
    ):
        if ip.haslayer(layer):
            values = common | {
                "target": getattr(ip[layer], "tgt", "none"),
                "solicited": getattr(ip[layer], "S", "none"),
                "lifetime": getattr(ip[layer], "routerlifetime", "none"),
            }
            return Frame(kind, values, b"", now, None, raw)
    icmp = ip.payload if version == 6 else ip.getlayer(ICMP)
    if icmp is None or not (version == 4 or hasattr(icmp, "type")):
        return None
    if version == 6 and icmp.type >= 128 and not isinstance(icmp, ICMPv6EchoReply):
        return None  # no error: groups, for instance
    kind, values, payload, port = _icmp(icmp, version, common)
    key = (version, port) if port is not None else None
    return Frame(kind, values | {"len": len(payload)}, payload, now, key, raw)


class Reassembly:
    """Fragments from the stack, put together in a plain way."""

    def __init__(self) -> None:
        self._parts: dict[tuple[bytes, int], dict[int, tuple[bytes, bool]]] = {}

    def whole(self, data: bytes) -> tuple[bytes, int] | None:
        """The frame that is complete with this one, and of how many fragments; None if some are missing."""
        ethertype = data[12:14]
        if ethertype == b"\x08\x00":
            (field_,) = struct.unpack_from("!H", data, 20)
            if not field_ & 0x3FFF:
                return data, 1
            ihl, (total,) = (data[14] & 15) * 4, struct.unpack_from("!H", data, 16)
            key, more, at = (
                (data[26:34], data[18] << 8 | data[19]),
                bool(field_ & 0x2000),
                (field_ & 0x1FFF) * 8,
            )
            body, header = data[14 + ihl : 14 + total], bytearray(data[: 14 + ihl])
        elif ethertype == b"\x86\xdd" and data[20] == 44:
            field_, ident = struct.unpack_from("!HI", data, 56)
            key, more, at = (data[22:54], ident), bool(field_ & 1), field_ & 0xFFF8
            body, header = data[62:], bytearray(data[:54])
            header[20] = data[54]
        else:
            return data, 1
        parts = self._parts.setdefault(key, {})
        parts[at] = (body, more)
        joined = b""
        while len(joined) in parts:
            body, more = parts[len(joined)]
            joined += body
            if not more:
                del self._parts[key]
                if ethertype == b"\x08\x00":
                    header[16:18], header[20:22], header[24:26] = (
                        (len(joined) + 20).to_bytes(2, "big"),
                        b"\0\0",
                        b"\0\0",
                    )
                else:
                    header[18:20] = len(joined).to_bytes(2, "big")
                return bytes(header) + joined, len(parts)
            if not body:
                break
        return None


def advertisement(frame: Packet, guest: str, mac: str) -> bytes:
    """The guest's answer to a solicitation for it; empty if it is for another."""
    asked = frame[ICMPv6ND_NS]
    if asked.tgt != guest or frame[IPv6].src == "::":
        return b""
    answer = ICMPv6ND_NA(tgt=guest, R=0, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=mac)
    return bytes(Ether(src=mac, dst=frame.src) / IPv6(src=guest, dst=frame[IPv6].src, hlim=255) / answer)


def cut(data: bytes, size: int) -> list[bytes]:
    """The segments of a long one, as the kernel makes them (tcp_gso_segment())."""
    is_ipv4 = data[12:14] == b"\x08\x00"
    at = 14 + ((data[14] & 15) * 4 if is_ipv4 else 40)
    header = at + (data[at + 12] >> 4) * 4
    payload, made = data[header:], []
    (seq,) = struct.unpack_from("!I", data, at + 4)
    for start in range(0, len(payload), size):
        part, part_header = payload[start : start + size], bytearray(data[:header])
        struct.pack_into("!I", part_header, at + 4, (seq + start) & 0xFFFFFFFF)
        if start + size < len(payload):
            part_header[at + 13] &= ~0x09  # FIN and PSH are the last one's
        struct.pack_into(
            "!H", part_header, 16 if is_ipv4 else 18, header - (14 if is_ipv4 else 54) + len(part)
        )
        made.append(bytes(part_header) + part)
    return made


def segment_of(ends: Ends, seq: int, ack: int, payload: bytes) -> bytes:
    """The frame of an ordinary segment with data, made without scapy: many are sent in a row."""
    header = struct.pack(
        "!HHIIBBHHH", ends.sport, ends.dport, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x50, 0x10, 65535, 0, 0
    )
    segment = bytearray(header + payload)
    addresses = b"".join(
        socket.inet_pton(FAMILY[ends.version], address) for address in (ends.guest, ends.server)
    )
    struct.pack_into("!H", segment, 16, checksum(addresses + struct.pack("!II", len(segment), 6) + segment))
    macs = b"".join(bytes.fromhex(mac.replace(":", "")) for mac in (ends.mac, ends.guest_mac))
    if ends.version == 6:
        return macs + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(segment), 6, 64) + addresses + segment
    ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, 6, 0) + addresses)
    struct.pack_into("!H", ip, 10, checksum(ip))
    return macs + b"\x08\x00" + ip + segment


FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
