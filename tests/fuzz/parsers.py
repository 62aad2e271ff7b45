"""Every Python parser that a guest, a remote host, a local client or a user feeds, under a coverage-guided fuzzer.

Usage: parsers.py TARGET [libFuzzer's options] [CORPUS]; parsers.py TARGET FILE... runs these inputs alone.

    link      ARP, NDP, DHCP and DHCPv6, as frames of the guest's
    packets   echo, ICMP errors, fragments: packets of the guest's, and what the kernel says of a remote host
    control   the control socket: JSON requests, pesto's tables, and what a server says to our clients
    words     options, port specifiers, resolv.conf, what engines ask for
"""

import contextlib
import errno
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

try:
    import atheris
except ImportError:  # only the inputs of a corpus can be run then
    atheris = None

# A test that imports this file gets the parsers as they are
_IS_MAIN = __name__ == "__main__" and atheris is not None
with atheris.instrument_imports(include=["pysplice"]) if _IS_MAIN else contextlib.nullcontext():
    from pysplice import wire
    from pysplice.cni import netavark
    from pysplice.cni import options as cni_options
    from pysplice.cni.request import Attachment, Failure, Request
    from pysplice.config import ConfigError
    from pysplice.config.check import rules
    from pysplice.config.options import Usage, parse
    from pysplice.control import pesto, tables
    from pysplice.control.client import _line as json_line
    from pysplice.control.requests import Requests
    from pysplice.datagram import echo, errors, fragments
    from pysplice.link import arp, dhcp, dhcpv6, icmp, ndp
    from pysplice.setup import names

OURS, GUEST = bytes.fromhex("9a559a559a55"), bytes.fromhex("020000000001")
GUEST4, GATEWAY4, GUEST6, GATEWAY6 = map(wire.pack, ("10.0.2.15", "10.0.2.2", "fd00::15", "fe80::1"))
LEASE4 = dhcp.Lease(GUEST4, 24, GATEWAY4, 1500, (GATEWAY4,), ("example.org",), "guest", "guest.example.org")
LEASE6 = dhcpv6.Lease(GATEWAY6, GUEST6, (GATEWAY6,), ("example.org",), "guest.example.org")
ROUTER = ndp.Router(OURS, GATEWAY6, GUEST6, 1500, True, (GATEWAY6,), ("example.org",))
FRAME_MAX = 65_600


class _Input:
    """Bytes that are taken piece by piece."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def number(self, size: int) -> int:
        part, self.data = self.data[:size], self.data[size:]
        return int.from_bytes(part, "big")

    def bytes(self, size: int) -> bytes:
        part, self.data = self.data[:size], self.data[size:]
        return part


def _check_frame(answer: bytes | None) -> None:
    """A frame to the guest says how long it is, and its sums are right."""
    if answer is None:
        return
    assert wire.ETHERNET + 20 <= len(answer) <= FRAME_MAX, len(answer)
    packet = answer[wire.ETHERNET :]
    if wire.ethertype(answer) == wire.ETHERTYPE_IPV4:
        assert int.from_bytes(packet[2:4], "big") == len(packet)
        assert wire.checksum(packet[:20]) == b"\0\0"
    elif wire.ethertype(answer) == wire.ETHERTYPE_IPV6:
        assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
        assert wire.is_sum_valid(packet[8:40], packet[6], packet[40:])


def _udp(source: bytes, destination: bytes, ports: tuple[int, int], payload: bytes) -> bytes:
    kind = wire.ETHERTYPE_IPV4 if len(source) == 4 else wire.ETHERTYPE_IPV6
    return wire.ethernet(OURS, GUEST, kind) + wire.udp_packet(source, destination, ports, payload)


def link(data: bytes) -> None:
    given = _Input(data)
    choice, data = given.number(1) % 8, given.data
    everybody = b"\xff" * 4
    if choice == 0:
        _check_frame(ndp.answer(data, OURS, (GUEST6,), ROUTER))
        answer = arp.answer(data, OURS, (GUEST4,))
        assert answer is None or len(answer) == 42
        if answer:
            arp.sender_address(data)
    elif choice == 1:
        _check_frame(dhcp.answer(data, OURS, LEASE4))
        _check_frame(dhcpv6.answer(data, OURS, LEASE6))
    elif choice == 2:
        frame = wire.ethernet(b"\xff" * 6, GUEST, wire.ETHERTYPE_ARP) + data
        answer = arp.answer(frame, OURS, (GUEST4,))
        assert answer is None or len(answer) == 42
    elif choice in (3, 4):
        packet = wire.icmp_packet(GUEST6, GATEWAY6, data[:2] + b"\0\0" + data[4:])
        frame = wire.ethernet(OURS, GUEST, wire.ETHERTYPE_IPV6) + packet
        _check_frame(ndp.answer(frame[:21] + b"\xff" + frame[22:], OURS, (GUEST6,), ROUTER))
    elif choice in (5, 6):
        # The fixed part of a BOOTP request, then the fuzzer's options
        head = bytes((1, 1, 6, 0)) + b"\0" * 24 + GUEST + b"\0" * 202 + bytes.fromhex("63825363")
        _check_frame(dhcp.answer(_udp(bytes(4), everybody, (68, 67), head + data), OURS, LEASE4))
    else:
        everyone = wire.pack("ff02::1:2")
        _check_frame(dhcpv6.answer(_udp(wire.pack("fe80::77"), everyone, (546, 547), data), OURS, LEASE6))


def packets(data: bytes) -> None:
    given = _Input(data)
    choice = given.number(1) % 6
    if choice == 0:
        source = GATEWAY6 if wire.ethertype(given.data) == wire.ETHERTYPE_IPV6 else GATEWAY4
        for error in (errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.EACCES):
            _check_frame(icmp.unreachable(given.data, error, OURS, source))
        _check_frame(icmp.time_exceeded(given.data, OURS, source))
    elif choice == 1:
        found = echo.request(given.data)
        if found is not None:
            key, message, ttl = found
            assert len(key) in (12, 36) and len(message) >= 8 and 0 < ttl < 256
            packet = echo.reply(key, message)
            assert packet is None or len(packet) > len(message)
    elif choice == 2:
        key = wire.make_key(GUEST4, GATEWAY4, given.number(2) or 1, given.number(2) or 1)
        packet = echo.reply(key, given.data)
        assert packet is None or len(packet) <= FRAME_MAX
    elif choice == 3:
        ipv4 = given.number(1) & 1
        ends = (GUEST4, GATEWAY4) if ipv4 else (GUEST6, GATEWAY6)
        key = wire.make_key(*ends, 1000, 53)
        queued = errors.QueuedError(*_queued(given))
        protocol = (wire.PROTO_UDP, wire.PROTO_ICMP if ipv4 else wire.PROTO_ICMPV6)[given.number(1) & 1]
        _check_frame(errors.frame(queued, key, protocol, OURS, GUEST, ends[1]))
    elif choice == 4:
        _fragments(given)
    else:
        size = given.number(2)
        mtu = max(given.number(2) % 9000, 1280)
        whole = wire.udp_packet(GUEST6, GATEWAY6, (1, 2), given.data * (size % 50 + 1))[:65_000]
        whole = whole[:4] + (len(whole) - 40).to_bytes(2, "big") + whole[6:]
        parts = fragments.split(whole, mtu, 7) if len(whole) > mtu else []
        reassembler, joined = fragments.Reassembler(), None
        for part in parts:
            assert len(part) <= mtu
            joined = reassembler.feed(part, 0.0)
        assert not parts or (joined is not None and joined[40:] == whole[40:])


def _queued(given: _Input) -> tuple[object, ...]:
    """The fields of a QueuedError: the socket's name for the peer, struct sock_extended_err, and the data."""
    extended = given.bytes(errors.EXTENDED.size + given.number(1) % 29).ljust(errors.EXTENDED.size, b"\0")
    fields = {"extended": extended, "data": given.bytes(given.number(1))}
    return tuple(fields.get(name, ("10.0.2.2", 53)) for name in errors.QueuedError._fields)


def _fragments(given: _Input) -> None:
    """Fragments of a few packets, in any order: what comes out is a packet, and little is held."""
    reassembler, now = fragments.Reassembler(), 0.0
    while given.data:
        flags = given.number(1)
        offset, more = given.number(1), flags & 1
        payload = given.bytes(given.number(1))
        if flags & 2:
            head = struct.pack(
                "!BBHHHBB2x4s4s",
                0x45,
                0,
                20 + len(payload),
                flags >> 4,
                more << 13 | offset,
                64,
                17,
                GUEST4,
                GATEWAY4,
            )
            packet = head[:10] + wire.checksum(head) + head[12:] + payload
        else:
            head = struct.pack("!BBHI", 17, 0, offset << 3 | more, flags >> 4)
            packet = wire.ip_packet(GUEST6, GATEWAY6, 44, head + payload)
        now += flags >> 2 & 3
        assert wire.is_fragment(packet) or flags & 2
        whole = reassembler.feed(packet, now)
        if whole is not None:
            assert len(whole) <= FRAME_MAX
            fragments.datagram(whole)
        assert 0 <= reassembler.held <= fragments.BYTES_MAX


class _Forwarding:
    """Takes every change."""

    def change(self, changes: object) -> list[str]:
        return []


def control(data: bytes) -> None:
    given = _Input(data)
    choice = given.number(1) % 4
    if choice == 0:
        requests = Requests(_Forwarding(), dict)
        for line in (given.data, given.data + b"\n"):
            answer, _ = requests.take(line)
            for part in answer.splitlines():
                assert json.loads(part)["ok"] in (True, False)
    elif choice == 1:
        feeder = tables.Feeder(tables.read_update())
        with contextlib.suppress(ConfigError):
            half = len(given.data) // 2
            done = feeder.feed(given.data[:half]) or feeder.feed(given.data[half:])
            assert not done or feeder.result is not None
            for pif, rules_ in feeder.result or ():
                for rule in rules_:
                    with contextlib.suppress(ConfigError):
                        tables.read_rule(pif, rule)
    elif choice == 2:
        reading = tables.read_greeting()
        wanted = next(reading)
        with contextlib.suppress(ConfigError, pesto.Failure):
            try:
                while len(given.data) >= wanted:
                    wanted = reading.send(given.bytes(wanted))
            except StopIteration as stop:
                for table in stop.value:
                    for rule in table.rules:
                        assert str(pesto.Line.of(rule)).isprintable()
    else:
        text = given.data.split(b"\n", 1)[0]
        with contextlib.suppress(ValueError, RecursionError), _answering(text + b"\n") as sock:
            json_line(sock)


@contextlib.contextmanager
def _answering(data: bytes):
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data[:100_000])
        theirs.close()
        ours.settimeout(1)
        yield ours


def words(data: bytes) -> None:
    given = _Input(data)
    choice = given.number(1) % 4
    text = given.data.decode("utf-8", "surrogateescape")
    if choice == 0:
        with contextlib.suppress(ConfigError, Usage):
            rules(parse([word for word in text.split("\n") if "\0" not in word]))
    elif choice == 1:
        found = names.parse(text)
        assert names.HostNames.from_json(json.loads(json.dumps(found.to_json()))) == found
    elif choice == 2:
        with contextlib.suppress(ConfigError, Usage):
            option = ("-t", "-u", "-T", "-U")[len(text) % 4]
            rules(parse([option, text.replace("\0", "")]))
    else:
        with contextlib.suppress(ValueError, RecursionError, Failure):
            asked = json.loads(text)
            if isinstance(asked, dict):
                attachment = Attachment("net", "box", "eth0")
                with contextlib.suppress(Failure):
                    cni_options.options_of(Request("ADD", asked, "1.0.0", attachment, "/proc/1/ns/net"))
                with contextlib.suppress(Failure):
                    netavark._create(asked)
                cni_options.options_of(Request("ADD", netavark._conf(asked), "1.0.0", attachment, "/x"))


TARGETS: dict[str, Callable[[bytes], None]] = {f.__name__: f for f in (link, packets, control, words)}


def main() -> int:
    target, inputs = TARGETS[sys.argv[1]], sys.argv[2:]
    if inputs and all(os.path.isfile(path) for path in inputs):
        for path in inputs:
            target(Path(path).read_bytes())
        return 0
    if atheris is None:
        print("parsers.py: atheris is not installed", file=sys.stderr)
        return 1
    atheris.Setup([sys.argv[0], *inputs], target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
