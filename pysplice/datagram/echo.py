"""ICMP and ICMPv6 echo, by ping sockets (IPPROTO_ICMP, SOCK_DGRAM): one flow for each identifier.

Owns its sockets. Imports `budget`, `link`, `observe`, `sockets`, `translate`, `wire` and the files of this room.

The kernel writes its own identifier and checksum into a request; the reply gets the guest's identifier back.
"""

# system calls (serve): recvfrom sendto

import contextlib
import errno
import select
import socket
import struct
from typing import Any, Final

from .. import wire
from ..budget import RateLimit
from ..link.tap import TapDevice
from ..observe.log import Log
from ..sockets.request import Maker, SocketRequest
from ..translate import Translation
from ..wire import PROTO_ICMP, PROTO_ICMPV6, pack
from . import errors, fragments
from .table import Expiring, Table

FLOWS_MAX: Final = 1024
TIMEOUT: Final = 60.0  # seconds, as pasta's ICMP_ECHO_TIMEOUT
ECHO_REPLY, ECHO_REQUEST = 0, 8
ECHO_REQUEST6, ECHO_REPLY6 = 128, 129
MESSAGE_MAX: Final = 65535
REPLIES_PER_EVENT: Final = 32
NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM})
NO_ROUTE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN})


class EchoFlow(Expiring):
    """`key`: source, destination, identifier, and two zero bytes in the place of a port.

    `host` is where the requests go on the host (packed), `guest_mac` where the replies go.
    """

    __slots__ = ("guest_mac", "host", "sock", "ttl")

    def __init__(self, key: bytes, sock: socket.socket, host: bytes, guest_mac: bytes, now: float) -> None:
        super().__init__(key, now)
        self.sock = sock
        self.host = host
        self.guest_mac = guest_mac
        self.ttl = 0


class Echo:
    """All flows of echo requests, at most `flows_max`.  `mtu`: of the tap, bytes; `epoll` watches the sockets."""

    def __init__(
        self,
        tap: TapDevice,
        translation: Translation,
        maker: Maker,
        epoll: select.epoll,
        mtu: int,
        flows_max: int,
        new_flows: RateLimit,
        log: Log,
    ) -> None:
        self._new_flows = new_flows
        self.flows: Table[EchoFlow] = Table(min(flows_max, FLOWS_MAX), TIMEOUT, TIMEOUT)
        self._tap = tap
        self._translation = translation
        self._maker = maker
        self._epoll = epoll
        self._mtu = mtu
        self._log = log
        self._ident = 0
        self._by_fd: dict[int, EchoFlow] = {}

    def limit(self, flows_max: int) -> None:
        """Allow this many flows from now on."""
        self.flows.most[:] = [flows_max] * len(self.flows.most)

    def close(self) -> None:
        """End all flows."""
        self.flows.close()

    def on_packet(self, packet: bytes, frame: bytes, now: float) -> bool:
        """Take a whole IP packet of the guest's; False if it is not an echo request.

        `frame`: the Ethernet frame that it came in, or the first bytes of one.
        """
        parsed = request(packet)
        if parsed is None:
            return False
        key, message, ttl = parsed
        flow = self.flows.get(key)
        if flow is None:
            if not self._new_flows.allows(now):
                self._log.flow("limit", "too many new flows, a ping was dropped", now)
                return True
            try:
                flow = self._open(key, wire.frame_source(frame), now)
            except OSError as e:
                if e.errno in NOT_ALLOWED:
                    why = "the host's net.ipv4.ping_group_range leaves this group out"
                    self._log.once("icmp", f"echo requests (ping) cannot be passed on: {why}", aloud=True)
                self._log.flow("icmp", f"ping socket: {e.strerror}", now)
                if e.errno in NO_ROUTE:
                    self._tap.unreachable(frame[: wire.ETHERNET] + packet, e.errno or 0, now)
                return True
        self.flows.touch(flow, now)
        if ttl != flow.ttl:
            self._set_ttl(flow, ttl)
        for _ in range(2):
            try:
                flow.sock.send(message)
            except BlockingIOError:
                return True
            except OSError:
                continue  # an earlier request caused it
            return True
        return True

    def _set_ttl(self, flow: EchoFlow, ttl: int) -> None:
        flow.ttl = ttl
        with contextlib.suppress(OSError):
            if flow.sock.family == socket.AF_INET:
                flow.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            else:
                flow.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)

    def _open(self, key: bytes, guest_mac: bytes, now: float) -> EchoFlow:
        target = self._translation.target(key)
        protocol = socket.IPPROTO_ICMP if target.family == socket.AF_INET else socket.IPPROTO_ICMPV6
        sock = self._maker.make(
            SocketRequest(
                target.family, socket.SOCK_DGRAM, protocol, bind=target.source, device=target.interface
            )
        )
        try:
            errors.enable(sock)
            sock.connect((target.address[0], 0, *target.address[2:]))
            # Until it was connected it took replies of any host
            with contextlib.suppress(BlockingIOError):
                for _ in range(REPLIES_PER_EVENT):
                    sock.recv(1)
        except OSError:
            sock.close()
            raise
        flow = EchoFlow(key, sock, pack(target.address[0]), guest_mac, now)
        fd = sock.fileno()

        def forgotten(flow: EchoFlow) -> None:
            self._by_fd.pop(fd, None)
            flow.sock.close()

        flow.forgotten = forgotten
        self._by_fd[fd] = flow
        self._epoll.register(fd, select.EPOLLIN)
        self.flows.add(flow)
        return flow

    def on_socket(self, fd: int, ready: int, now: float) -> None:
        """A socket has replies, or errors."""
        flow = self._by_fd.get(fd)
        if flow is None:
            return
        if ready & select.EPOLLERR:
            self._pass_errors(flow, now)
        if ready & select.EPOLLIN:
            self._pass_replies(flow, now)

    def _pass_errors(self, flow: EchoFlow, now: float) -> None:
        protocol = PROTO_ICMP if flow.sock.family == socket.AF_INET else PROTO_ICMPV6
        for error in errors.queued(flow.sock):
            frame = errors.frame(error, flow.key, protocol, self._tap.mac, flow.guest_mac, flow.host)
            if frame is not None:
                self._tap.emit_error(with_ident(frame, flow.key[-4:-2]), now)

    def _pass_replies(self, flow: EchoFlow, now: float) -> None:
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
            guest = wire.key_source(flow.key)
            ethernet = wire.ethernet(flow.guest_mac, self._tap.mac, wire.ip_ethertype(guest))
            for part in fragments.split(packet, self._mtu, self._ident):
                if len(guest) == 4 and part is not packet:
                    part = part[:10] + wire.checksum(part[: wire.IPV4]) + part[12:]
                self._tap.emit_frame(ethernet + part)


class NoEcho:
    """Echo requests are switched off (--no-icmp)."""

    def __init__(self) -> None:
        self.flows: Table[Any] = Table(1, TIMEOUT, TIMEOUT)

    def limit(self, flows_max: int) -> None:
        pass

    def close(self) -> None:
        pass

    def on_packet(self, packet: bytes, frame: bytes, now: float) -> bool:
        return False

    def on_socket(self, fd: int, ready: int, now: float) -> None:
        pass


def request(packet: bytes) -> tuple[bytes, bytes, int] | None:
    """Flow key, ICMP message and hop limit of a valid echo request; None for any other packet."""
    if wire.is_ipv4(packet) and len(packet) >= wire.IPV4 + wire.ICMP:
        header = (packet[0] & 0x0F) * 4
        (total,) = struct.unpack_from("!H", packet, 2)
        message, addresses = packet[header:total], packet[12:20]
        protocol, kind = PROTO_ICMP, ECHO_REQUEST
        if packet[9] != protocol or wire.checksum(message) != b"\0\0":
            return None
    elif wire.is_ipv6(packet) and len(packet) >= wire.IPV6 + wire.ICMP:
        (length,) = struct.unpack_from("!H", packet, 4)
        message, addresses = packet[wire.IPV6 : wire.IPV6 + length], packet[8:40]
        protocol, kind = PROTO_ICMPV6, ECHO_REQUEST6
        if packet[6] != protocol or not wire.is_sum_valid(addresses, protocol, message):
            return None
    else:
        return None
    if len(message) < wire.ICMP or message[:2] != bytes((kind, 0)):
        return None
    ttl = wire.hops(packet)
    if not ttl or not wire.may_pass(addresses, to_group=False):
        return None
    return addresses + message[4:6] + bytes(2), message, ttl


def reply(key: bytes, message: bytes) -> bytes | None:
    """The packet with an echo reply for the guest, its identifier put back; None if `message` is not an echo reply."""
    ipv4 = len(key) == wire.KEY4_LEN
    if len(message) < wire.ICMP or message[0] != (ECHO_REPLY if ipv4 else ECHO_REPLY6):
        return None
    message = message[:2] + bytes(2) + key[-4:-2] + message[6:]
    return wire.icmp_packet(wire.key_destination(key), wire.key_source(key), message)


def with_ident(frame: bytes, ident: bytes) -> bytes:
    """An ICMP error about a request, with the guest's identifier in the place of the kernel's in what it quotes."""
    packet = frame[wire.ETHERNET :]
    header = wire.IPV4 if wire.is_ipv4(packet) else wire.IPV6
    quote = header + wire.ICMP + header  # where the quoted request begins
    if len(packet) < quote + wire.ICMP:
        return frame
    message = packet[header : quote + 2] + bytes(2) + ident + packet[quote + 6 :]
    message = message[:2] + bytes(2) + message[4:]
    source, destination = wire.packet_source(packet), wire.packet_destination(packet)
    return frame[: wire.ETHERNET] + wire.icmp_packet(source, destination, message)
