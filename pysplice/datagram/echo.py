"""ICMP and ICMPv6 echo, by ping sockets (IPPROTO_ICMP, SOCK_DGRAM): one flow for each identifier.

Owns its sockets and the epoll instance that watches them.  Imports `services` (packet builders), `translate`, `tap`,
`observe` and the files of this room.

The kernel writes its own identifier and checksum into a request; the guest's come back with the reply.
"""

# system calls (serve): recvfrom sendto

import contextlib
import errno
import select
import socket
import struct

from ..observe.log import Log
from ..services import icmp
from ..tap import TapDevice
from ..translate import Translation, pack
from . import errors, fragments
from .table import Expiring, Table

FLOWS_MAX = 1024
TIMEOUT = 60.0  # seconds, as pasta's ICMP_ECHO_TIMEOUT
ECHO_REPLY, ECHO_REQUEST = 0, 8
ECHO_REQUEST6, ECHO_REPLY6 = 128, 129
PROTO_ICMP, PROTO_ICMPV6 = 1, 58
MESSAGE_MAX = 65535
REPLIES_PER_EVENT = 32
NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM})
NO_ROUTE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN})


class EchoFlow(Expiring):
    """`key`: source, destination, identifier, and two bytes of 0 in the place of a port."""

    __slots__ = ("guest_mac", "host", "sock", "ttl")

    def __init__(self, key: bytes, sock: socket.socket, host: bytes, guest_mac: bytes, now: float) -> None:
        super().__init__(key, now)
        self.sock = sock
        self.host = host  # where it goes on the host, packed
        self.guest_mac = guest_mac
        self.ttl = 0


class Echo:
    """All flows of echo requests."""

    def __init__(
        self,
        tap: TapDevice,
        translation: Translation,
        mtu: int,
        flows_max: int,
        log: Log,
    ) -> None:
        self.epoll = select.epoll()
        self.flows: Table[EchoFlow] = Table(min(flows_max, FLOWS_MAX), TIMEOUT, TIMEOUT)
        self._tap = tap
        self._translation = translation
        self._mtu = mtu
        self._log = log
        self._ident = 0
        self._owners: dict[int, EchoFlow] = {}

    def fileno(self) -> int:
        return self.epoll.fileno()

    def close(self) -> None:
        self.flows.close()
        self.epoll.close()

    def on_packet(self, packet: bytes, frame: bytes, now: float) -> bool:
        """Take an IP packet of the guest's, whole; False if it is no echo request.

        `frame`: the Ethernet frame, or the first bytes of one, that it came in.
        """
        parsed = request(packet)
        if parsed is None:
            return False
        key, message, ttl = parsed
        flow = self.flows.get(key)
        if flow is None:
            try:
                flow = self._birth(key, frame[6:12], now)
            except OSError as e:
                if e.errno in NOT_ALLOWED:
                    why = "the host's net.ipv4.ping_group_range leaves us out"
                    self._log.once("icmp", f"echo requests cannot be passed on: {why}")
                self._log.flow("icmp", f"ping socket: {e.strerror}", now)
                if e.errno in NO_ROUTE:
                    self._tap.unreachable(frame[:14] + packet, e.errno or 0)
                return True
        self.flows.touch(flow, now)
        if ttl != flow.ttl:
            flow.ttl = ttl
            ipv4 = flow.sock.family == socket.AF_INET
            with contextlib.suppress(OSError):
                if ipv4:
                    flow.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
                else:
                    flow.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
        for _ in range(2):
            try:
                flow.sock.send(message)
            except BlockingIOError:
                return True
            except OSError:
                continue  # of an earlier one
            return True
        return True

    def _birth(self, key: bytes, guest_mac: bytes, now: float) -> EchoFlow:
        target = self._translation.target(key)
        protocol = socket.IPPROTO_ICMP if target.family == socket.AF_INET else socket.IPPROTO_ICMPV6
        sock = socket.socket(target.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, protocol)
        try:
            errors.enable(sock)
            if target.interface:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, target.interface.encode())
            if target.source is not None:
                sock.bind(target.source)
            sock.connect((target.address[0], 0, *target.address[2:]))
            # Until it was connected it took replies from anybody
            with contextlib.suppress(BlockingIOError):
                for _ in range(REPLIES_PER_EVENT):
                    sock.recv(1)
        except OSError:
            sock.close()
            raise
        flow = EchoFlow(key, sock, pack(target.address[0]), guest_mac, now)
        fd = sock.fileno()

        def forgotten(flow: EchoFlow) -> None:
            self._owners.pop(fd, None)
            flow.sock.close()

        flow.forgotten = forgotten
        self._owners[fd] = flow
        self.epoll.register(fd, select.EPOLLIN)
        self.flows.add(flow)
        return flow

    def on_ready(self, now: float) -> None:
        """Some sockets have replies, or errors."""
        for fd, ready in self.epoll.poll(0):
            flow = self._owners.get(fd)
            if flow is None:
                continue
            if ready & select.EPOLLERR:
                protocol = PROTO_ICMP if flow.sock.family == socket.AF_INET else PROTO_ICMPV6
                self._errors(flow, protocol)
            if ready & select.EPOLLIN:
                self._replies(flow, now)

    def _errors(self, flow: EchoFlow, protocol: int) -> None:
        for error in errors.queued(flow.sock):
            frame = errors.frame(error, flow.key, protocol, self._tap.mac, flow.guest_mac, flow.host)
            if frame is not None:
                self._tap.emit_error(with_ident(frame, flow.key[-4:-2]))

    def _replies(self, flow: EchoFlow, now: float) -> None:
        for _ in range(REPLIES_PER_EVENT):
            try:
                message = flow.sock.recv(MESSAGE_MAX)
            except OSError:
                return
            packet = reply(flow.key, message)
            if packet is None:
                continue
            self.flows.touch(flow, now)
            self._ident = (self._ident + 1) & 0xFFFFFFFF
            ethernet = flow.guest_mac + self._tap.mac
            ethernet += b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
            for part in fragments.split(packet, self._mtu, self._ident):
                if part[0] >> 4 == 4 and part is not packet:
                    part = part[:10] + icmp.checksum(part[:20]) + part[12:]
                self._tap.emit_frame(ethernet + part)


def request(packet: bytes) -> tuple[bytes, bytes, int] | None:
    """Key, ICMP message and hop limit of an echo request; None if it is none, or not a valid one."""
    if len(packet) >= 28 and packet[0] >> 4 == 4:
        header = (packet[0] & 0x0F) * 4
        (total,) = struct.unpack_from("!H", packet, 2)
        message = packet[header:total]
        if packet[9] != PROTO_ICMP or len(message) < 8 or message[:2] != bytes((ECHO_REQUEST, 0)):
            return None
        addresses, ttl = packet[12:20], packet[8]
        if icmp.checksum(message) != b"\0\0":
            return None
        bad = any(addresses[i] in (0, 127) or addresses[i] >= 224 for i in (0, 4))
    elif len(packet) >= 48 and packet[0] >> 4 == 6:
        (length,) = struct.unpack_from("!H", packet, 4)
        message = packet[40 : 40 + length]
        if packet[6] != PROTO_ICMPV6 or len(message) < 8 or message[:2] != bytes((ECHO_REQUEST6, 0)):
            return None
        addresses, ttl = packet[8:40], packet[7]
        pseudo = addresses + struct.pack("!II", len(message), PROTO_ICMPV6)
        if icmp.checksum(pseudo + message) != b"\0\0":
            return None
        bad = any(addresses[i] == 0xFF or addresses[i : i + 12] in fragments.LOW6 for i in (0, 16))
    else:
        return None
    if bad or not ttl:
        return None
    return addresses + message[4:6] + bytes(2), message, ttl


def reply(key: bytes, message: bytes) -> bytes | None:
    """The packet with an echo reply for the guest, its identifier back in place."""
    ipv4 = len(key) == 12
    if len(message) < 8 or message[0] != (ECHO_REPLY if ipv4 else ECHO_REPLY6):
        return None
    message = message[:2] + bytes(2) + key[-4:-2] + message[6:]
    if ipv4:
        return icmp.ipv4_packet(
            key[4:8], key[:4], PROTO_ICMP, message[:2] + icmp.checksum(message) + message[4:]
        )
    return icmp.icmpv6_packet(key[16:32], key[:16], message)


def with_ident(frame: bytes, ident: bytes) -> bytes:
    """An ICMP error that quotes a request as the kernel has sent it, with the guest's identifier in the quote."""
    ipv4 = frame[12:14] == b"\x08\x00"
    inner = 14 + (20 + 8 + 20 if ipv4 else 40 + 8 + 40)
    if len(frame) < inner + 8:
        return frame
    quote = frame[:inner] + frame[inner : inner + 2] + bytes(2) + ident + frame[inner + 6 :]
    if ipv4:
        message = quote[34:36] + bytes(2) + quote[38:]
        return quote[:34] + message[:2] + icmp.checksum(message) + message[4:]
    message = quote[54:56] + bytes(2) + quote[58:]
    return quote[:14] + icmp.icmpv6_packet(quote[22:38], quote[38:54], message)
