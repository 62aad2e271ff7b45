"""UDP: a connected socket for each flow, on the host for those of the tap, at both ends for the short cut.

Owns the sockets of its flows and the epoll instance that watches them.  Imports `_cext`, `inside`, `translate`,
`tap`, `observe`, `services` (by errors.py) and the files of this room.

A datagram of the guest's makes a flow to where it goes.  One that arrives at a listener makes a flow from its
sender: the flow's socket is bound to the same address and port as the listener and connected to the sender, so
the kernel gives it what follows; the listener has only first datagrams.  Payload stays in C, in batches.
"""

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

from .. import _cext
from ..inside import IP_FREEBIND, IPV6_FREEBIND, Inside, make
from ..observe.log import Log
from ..tap import TapDevice, template
from ..translate import Target, Translation, pack, unpack
from . import errors
from .table import Expiring, Table

FLOWS_MAX = 8192
TIMEOUT, TIMEOUT_DIALOGUE = 30.0, 120.0
CONNTRACK = "/proc/sys/net/netfilter/nf_conntrack_udp_timeout"

UDP_GRO = 104
IP_PKTINFO = 8
RECEIVE_BUFFER = 1 << 20  # net.core.rmem_max bounds it
FIRSTS_PER_EVENT = 64  # datagrams that a listener is asked for at a time
PENDING_BYTES = 1 << 20  # that wait for a socket in the namespace, for each flow
DATAGRAM_MAX = 65536
STRAYS_MAX = 256
KEY_BYTES_MIN = 64
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}

# What a send() may report of an earlier datagram: once told, it is over
TOLD = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EMSGSIZE, errno.EACCES})
NO_ROUTE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EACCES, errno.EPERM})


def timeouts() -> tuple[float, float]:
    """Seconds as the kernel's conntrack has them: without an answer, and of a dialogue."""
    values = []
    for path, default in ((CONNTRACK, TIMEOUT), (CONNTRACK + "_stream", TIMEOUT_DIALOGUE)):
        try:
            with open(path) as file:
                values.append(float(file.read()))
        except (OSError, ValueError):
            values.append(default)
    return values[0], values[1]


class TapFlow(Expiring):
    """Between the guest and a socket on the host; `key` as in the guest's datagrams."""

    __slots__ = ("inbound", "sock", "template", "ttl")

    def __init__(
        self, key: bytes, sock: socket.socket, now: float, frame_start: bytes, owners: dict[int, Any]
    ) -> None:
        super().__init__(key, now, owners)
        self.sock = sock
        self.template = frame_start
        self.ttl = 0
        self.inbound = False  # a client on the host began it

    def name(self) -> str:
        """The flow in words, as the guest has it."""
        half = len(self.key) // 2 - 2
        source, destination = (unpack(self.key[at : at + half]) for at in (0, half))
        sport, dport = struct.unpack("!HH", self.key[-4:])
        return f"[{source}]:{sport} -> [{destination}]:{dport}"


class SplicedFlow(Expiring):
    """Between a client and a server on two sockets; `pending` while the second is not there."""

    __slots__ = ("far", "held", "near", "pending")

    def __init__(self, key: bytes, now: float, owners: dict[int, Any]) -> None:
        super().__init__(key, now, owners)
        self.near: socket.socket | None = None
        self.far: socket.socket | None = None
        self.pending: list[bytes] = []
        self.held = 0

    def name(self) -> str:
        """The flow in words: its client and what that has called."""
        if self.near is None:
            return "short cut"
        here, peer = self.near.getsockname(), self.near.getpeername()
        return f"[{peer[0]}]:{peer[1]} -> [{here[0]}]:{here[1]}, short cut"


class Arrival:
    """A datagram at a listener: where it came from, and which address it was sent to."""

    __slots__ = ("data", "interface", "local", "peer")

    def __init__(self, data: bytes, peer: tuple[Any, ...], local: bytes, interface: int) -> None:
        self.data = data
        self.peer = peer
        self.local = local
        self.interface = interface


def receive_first(sock: socket.socket) -> Arrival:
    """The next datagram of a listener; raises OSError."""
    data, ancillary, _, peer = sock.recvmsg(DATAGRAM_MAX, 256)
    local, interface = b"", 0
    for level, kind, value in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            interface, _, local = struct.unpack("=i4s4s", value)
        elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            packed, interface = struct.unpack("=16sI", value)
            local = pack(unpack(packed))
    return Arrival(data, peer, local, interface)


class Udp:
    """All UDP flows."""

    def __init__(
        self,
        tap: TapDevice | None,
        translation: Translation,
        inside: Inside | None,
        mtu: int,
        flows_max: int,
        log: Log,
    ) -> None:
        self.epoll = select.epoll()
        timeout, dialogue = timeouts()
        self.flows: Table[Any] = Table(min(flows_max, FLOWS_MAX), timeout, dialogue)
        self._tap = tap
        self._translation = translation
        self._inside = inside
        self._mtu = mtu
        self._log = log
        self._packets = _cext.Packets()
        self._owners: dict[int, Any] = {}
        # What tells flows apart on the host: SO_REUSEADDR lets two sockets have the same addresses and ports
        self._pairs: dict[Any, Any] = {}
        self._clients: dict[Any, Any] = {}

    def fileno(self) -> int:
        return self.epoll.fileno()

    def close(self) -> None:
        self.flows.close()
        self.epoll.close()

    # From the guest

    def on_run(self, run: _cext.Datagrams, now: float) -> None:
        """Datagrams of one flow from the tap."""
        assert self._tap is not None
        flow = self.flows.get(run.key)
        if flow is None:
            flow = self._birth(run.key, self._tap.headers(run.handle), now)
            if flow is None:
                return
        self._heard(flow, run.ttl, run.mac, now)
        skip = refused = 0
        while skip < run.frames:
            sent = self._packets.send(self._tap.raw, run.handle, flow.sock.fileno(), skip)
            if sent > 0:
                skip += sent
                refused = 0
            elif -sent in TOLD and not refused:
                refused = 1
            elif -sent == errno.EAGAIN:
                return  # the rest is lost, as on any full queue
            else:
                skip += 1
                refused = 0

    def on_whole(self, key: bytes, payload: bytes, ttl: int, headers: bytes, now: float) -> None:
        """A datagram that came in fragments."""
        flow = self.flows.get(key) or self._birth(key, headers, now)
        if flow is None:
            return
        self._heard(flow, ttl, headers[6:12], now)
        for _ in range(2):
            try:
                flow.sock.send(payload)
            except OSError as e:
                if e.errno in TOLD:
                    continue
            return

    def _birth(self, key: bytes, headers: bytes, now: float) -> TapFlow | None:
        """A flow of the guest's; `headers` are those of its first frame."""
        assert self._tap is not None
        target = self._translation.target(key)
        port = int.from_bytes(key[-4:-2], "big")
        pair = (port, target.address[:2])
        if pair in self._pairs:
            # Two flows of the guest's would be one on the host
            port = 0
        try:
            sock, strays = self._opened(lambda: _open(target, port))
        except OSError as e:
            self._log.flow("udp", f"{target.address[0]}: {e.strerror}", now)
            if e.errno in NO_ROUTE:
                self._tap.unreachable(headers, e.errno or 0)
            return None
        flow = self._add(key, sock, headers[6:12], now)
        if port:
            flow.register(self._pairs, pair)
        for data, peer in strays:
            if peer[:2] == target.address[:2]:
                self._packets.emit(self._tap.raw, flow.template, data, self._mtu)
        return flow

    def _opened(self, make_one: Callable[[], "Opened"]) -> "Opened":
        """A socket; where descriptors are short, the flow that was used least lately gives way."""
        try:
            return make_one()
        except OSError as e:
            if e.errno not in (errno.EMFILE, errno.ENFILE) or not self.flows.evict():
                raise
            return make_one()

    def _add(self, key: bytes, sock: socket.socket, guest_mac: bytes, now: float) -> TapFlow:
        assert self._tap is not None
        start = template(guest_mac, self._tap.mac, key, socket.IPPROTO_UDP)
        flow = TapFlow(key, sock, now, start, self._owners)
        flow.watch(sock, self.epoll)
        self.flows.add(flow)
        if self._log.debug_on:
            self._log.debug(f"udp {flow.name()}")
        return flow

    def _heard(self, flow: TapFlow, ttl: int, mac: bytes, now: float) -> None:
        """The guest has sent something."""
        self.flows.touch(flow, now)
        if flow.inbound:
            flow.answered = True
        if mac != flow.template[:6] and not mac[0] & 1:
            flow.template = mac + flow.template[6:]
        self._use_ttl(flow, ttl)

    def _use_ttl(self, flow: TapFlow, ttl: int) -> None:
        """The hop limit is the guest's (traceroute lives on it); on the way it has made no hop."""
        if ttl == flow.ttl:
            return
        flow.ttl = ttl
        with contextlib.suppress(OSError):
            if flow.sock.family == socket.AF_INET:
                flow.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            else:
                flow.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)

    # From the sockets

    def on_ready(self, now: float) -> None:
        """Some sockets have datagrams, or errors."""
        for fd, ready in self.epoll.poll(0):
            flow = self._owners.get(fd)
            if flow is None:
                continue
            if isinstance(flow, SplicedFlow):
                self._relay(flow, fd, now)
                continue
            if ready & select.EPOLLERR:
                self._errors(flow)
            if ready & select.EPOLLIN and self._tap is not None:
                n = self._packets.forward(self._tap.raw, flow.template, fd, self._mtu, self._tap.uso)
                if n > 0:
                    flow.answered = True
                    self.flows.touch(flow, now)

    def _errors(self, flow: TapFlow) -> None:
        assert self._tap is not None
        guest_mac, mac = flow.template[:6], self._tap.mac
        for frame in errors.frames(flow.sock, flow.key, socket.IPPROTO_UDP, mac, guest_mac):
            self._tap.emit_frame(frame)
        # A pending error that is not in the queue would be reported for ever
        flow.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def _relay(self, flow: SplicedFlow, fd: int, now: float) -> None:
        if flow.near is None or flow.far is None:
            return
        sock, other = (flow.near, flow.far) if fd == flow.near.fileno() else (flow.far, flow.near)
        n, _ = self._packets.relay(fd, other.fileno())
        if n > 0:
            if sock is flow.far:
                flow.answered = True
            self.flows.touch(flow, now)
        else:
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    # From listeners

    def to_guest(
        self,
        arrival: Arrival,
        port: int,
        target: int,
        guest: bytes,
        caller: bytes,
        interface: str,
        freebind: bool,
        now: float,
    ) -> None:
        """A datagram that came to `port` of the host is for the guest's `target` at `guest`, by the tap.

        The guest sees it come from `caller`.
        """
        assert self._tap is not None
        client = pack(arrival.peer[0])
        name = (client, arrival.peer[1], arrival.local, port)
        flow = self._clients.get(name)
        strays: list[tuple[bytes, Any]] = []
        if flow is None:
            try:
                sock, strays = self._opened(
                    lambda: self._beside(arrival, client, port, interface, freebind)
                )
            except OSError as e:
                self._log.flow("udp", f"cannot answer {unpack(client)} from {port}: {e.strerror}", now)
                return
            # The guest sees one client where several ports of the host lead to the same of its own
            key = guest + caller + struct.pack("!HH", target, arrival.peer[1])
            while self.flows.get(key) is not None:
                key = key[:-2] + struct.pack("!H", 1024 + int.from_bytes(os.urandom(2), "big") % 64512)
            flow = self._add(key, sock, self._tap.guest_mac, now)
            flow.inbound = True
            flow.register(self._clients, name)
            flow.register(self._pairs, (port, arrival.peer[:2]))
        self.flows.touch(flow, now)
        self._packets.emit(self._tap.raw, flow.template, arrival.data, self._mtu)
        for data, peer in strays:
            other = Arrival(data, peer, arrival.local, arrival.interface)
            self.to_guest(other, port, target, guest, caller, interface, freebind, now)

    def _beside(
        self, arrival: Arrival, client: bytes, port: int, interface: str, freebind: bool
    ) -> "Opened":
        """The socket of a flow beside its listener, on the host."""
        family = socket.AF_INET if len(client) == 4 else socket.AF_INET6
        scope = arrival.interface if family == socket.AF_INET6 and client[:2] == b"\xfe\x80" else 0
        return _connected(
            family,
            (unpack(client), arrival.peer[1], *((0, scope) if family == socket.AF_INET6 else ())),
            (_local(arrival, family), port, *((0, scope) if scope else ())),
            interface,
            freebind,
        )

    # The short cut

    def spliced(
        self,
        name: bytes,
        arrival: Arrival,
        port: int,
        target: tuple[str, int],
        inside_first: bool,
        now: float,
    ) -> None:
        """A datagram from one loopback for the other, by two sockets.

        `name` tells the listener from others; `target` is where its server listens; with `inside_first` the listener
        is in the namespace.
        """
        client = pack(arrival.peer[0])
        # Longer than a key of the guest's, which it could make up
        key = name.ljust(KEY_BYTES_MIN) + client + arrival.local + struct.pack("!H", arrival.peer[1])
        flow = self.flows.get(key)
        if isinstance(flow, SplicedFlow):
            self.flows.touch(flow, now)
            if flow.far is not None and flow.near is not None:
                with contextlib.suppress(OSError):
                    flow.far.send(arrival.data)
            elif flow.held + len(arrival.data) < PENDING_BYTES:
                flow.pending.append(arrival.data)
                flow.held += len(arrival.data)
            return
        if self._inside is None:
            return
        flow = SplicedFlow(key, now, self._owners)
        flow.pending.append(arrival.data)
        self.flows.add(flow)
        family = socket.AF_INET if len(client) == 4 else socket.AF_INET6
        near = {"bind": [_local(arrival, family), port], "peer": (unpack(client), arrival.peer[1])}
        far_family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        pair = (inside_first, arrival.peer[1], target)
        far = {"bind": [ANY[far_family], 0 if pair in self._pairs else arrival.peer[1]], "peer": target}
        if pair not in self._pairs:
            flow.register(self._pairs, pair)
        here, there = (far, near) if inside_first else (near, far)
        # On either side, loopback keeps loopback: the kernel chooses no other address for it
        request = {"kind": int(socket.SOCK_DGRAM), "reuse": 1}
        families = (far_family, family) if inside_first else (family, far_family)
        try:
            sock = _plugged({**request, "family": int(families[0]), "bind": here["bind"]}, here["peer"])
        except OSError as e:
            self._log.flow("udp", f"a short cut for {unpack(client)}: {e.strerror}", now)
            self.flows.remove(flow)
            return
        if inside_first:
            flow.far = sock
        else:
            flow.near = sock
        flow.watch(sock, self.epoll)

        def done(socks: list[socket.socket], error: int) -> None:
            self._complete(flow, socks, error, there["peer"], inside_first)

        self._inside.ask({**request, "family": int(families[1]), "bind": there["bind"], "any": 1}, done)

    def _complete(
        self, flow: SplicedFlow, socks: list[socket.socket], error: int, peer: Any, inside_first: bool
    ) -> None:
        if error or flow.closed:
            for sock in socks:
                sock.close()
            if error:
                self._log.flow("udp", f"a socket in the namespace: {os.strerror(error)}", flow.used)
            self.flows.remove(flow)
            return
        sock = socks[0]
        if inside_first:
            flow.near = sock
        else:
            flow.far = sock
        flow.watch(sock, self.epoll)
        try:
            sock.connect(peer)
        except OSError:
            self.flows.remove(flow)
            return
        _tune(sock)
        assert flow.far is not None
        for data in flow.pending:
            with contextlib.suppress(OSError):
                flow.far.send(data)
        flow.pending.clear()


def _local(arrival: Arrival, family: int) -> str:
    """The address that a client has used, or any."""
    fits = len(arrival.local) == (4 if family == socket.AF_INET else 16)
    return unpack(arrival.local) if fits and any(arrival.local) else ANY[socket.AddressFamily(family)]


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RECEIVE_BUFFER)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)


def _plugged(request: dict[str, Any], peer: Any) -> socket.socket:
    """A socket of our own namespace, bound (to another port, if it must be) and connected; raises OSError."""
    sock = make({**request, "any": 1})
    try:
        sock.connect(peer)
    except OSError:
        sock.close()
        raise
    _tune(sock)
    return sock


Opened = tuple[socket.socket, list[tuple[bytes, Any]]]


def _open(target: Target, source_port: int) -> Opened:
    """A socket that leads to the target, from the guest's port if that is free; raises OSError."""
    family = socket.AddressFamily(target.family)
    address = target.source[0] if target.source is not None else ANY[family]
    return _connected(family, target.address, (address, source_port), target.interface, False)


def _connected(
    family: int, peer: tuple[Any, ...], local: tuple[Any, ...], interface: str, freebind: bool
) -> Opened:
    """A socket, and what came to it from anybody before it was connected."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    strays: list[tuple[bytes, Any]] = []
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if interface:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        if freebind:
            level, option = (
                (socket.IPPROTO_IPV6, IPV6_FREEBIND) if family == socket.AF_INET6 else (0, IP_FREEBIND)
            )
            sock.setsockopt(level, option, 1)
        errors.enable(sock)
        # A guest may have sent to a broadcast address
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        try:
            sock.bind(local)
        except OSError as e:
            if e.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            sock.bind((local[0], 0, *local[2:]))
        sock.connect(peer)
        if local[1]:
            # Between the two calls it was as good as any listener on that port
            with contextlib.suppress(BlockingIOError):
                while len(strays) < STRAYS_MAX:
                    strays.append(sock.recvfrom(DATAGRAM_MAX))
        _tune(sock)
    except OSError:
        sock.close()
        raise
    return sock, strays
