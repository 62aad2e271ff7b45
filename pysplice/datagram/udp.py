"""UDP of the guest's: one socket on the host for each address and port that it sends from.

Owns these sockets and the epoll instance that watches them, and the table of all UDP flows.  Imports `_cext`,
`tap`, `translate`, `observe` and the files of this room.

A guest's address and port are an endpoint: one socket, at the same port of the host if that is free, whatever it
talks to (RFC 4787, REQ-1: endpoint-independent mapping).  Which peers may answer is a filter in the table (REQ-8),
address-dependent unless told: any port of an address that was asked, and any address once a group was asked.  Each
answer is handed on with the address that it came from.  Payload stays in C, in batches.

Where the guest's port is published, the listener of that port is its socket.  Clients that come to a listener are
for clients.py, the short cut over loopback for spliced.py.
"""

import errno
import itertools
import select
import socket
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from .. import _cext
from ..observe.log import Log
from ..observe.words import flow_name
from ..tap import TapDevice, template
from ..translate import KEY4_LEN, Translation, pack
from . import errors, routes
from .routes import Peer, Port
from .table import OUTBOUND, Expiring, Table

FLOWS_MAX = 8192
TIMEOUT, TIMEOUT_DIALOGUE = 30.0, 120.0
CONNTRACK = "/proc/sys/net/netfilter/nf_conntrack_udp_timeout"

PRIVILEGED = 1024  # PROT_SOCK

FILTERS = ("endpoint", "address", "port")

# What a send() may report of an earlier datagram: once told, it is over
TOLD = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPROTO})
NO_ROUTE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EACCES, errno.EPERM})
NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
SOCKETS_PER_EVENT = 64
EVICT_LOOKS = 256  # at flows that were never answered, for an endpoint that has no other

# Routers of the addresses that were asked last, looked up when another host sends, once in so many seconds
HOPS_ASKED, HOPS_VALID = 16, 1.0


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


class Asked:
    """An address of the host's network that an endpoint has asked: as the guest knows it, and by how many flows."""

    __slots__ = ("flow", "flows", "guest")

    def __init__(self, guest: bytes) -> None:
        self.guest = guest
        self.flows = 0
        self.flow: TapFlow | None = None  # the one that has asked last


class Endpoint(Port):
    """An address and port of the guest's, as a socket on the host.

    `asked`: by packed address; `peers`: flows by the peer's struct sockaddr.  `open_until`: till then any host may
    answer.
    """

    __slots__ = ("answered", "asked", "hops", "hops_until", "mac", "name", "number", "open_until", "peers")

    def __init__(self, sock: socket.socket, name: bytes, mac: bytes) -> None:
        super().__init__(sock)
        self.name = name
        self.number: int = sock.getsockname()[1]
        self.mac = mac
        self.answered = 0  # flows that were answered
        self.open_until = 0.0
        self.hops: set[bytes] = set()  # routers, packed, known until then
        self.hops_until = 0.0
        self.asked: dict[bytes, Asked] = {}
        self.peers: dict[bytes, TapFlow] = {}


class TapFlow(Expiring):
    """Between the guest and a peer on the host's side; `key` as in the guest's datagrams.

    `peer` and `address` (struct sockaddr) are where its datagrams go, by `port`; `source` and `interface` where they
    leave from.  `template` is the start of frames to the guest.
    """

    __slots__ = (
        "address",
        "control",
        "interface",
        "peer",
        "port",
        "source",
        "template",
        "ttl",
    )

    def __init__(
        self, key: bytes, now: float, share: int, port: Port, peer: Peer, frame_start: bytes
    ) -> None:
        super().__init__(key, now, share)
        self.port = port
        self.peer = peer
        self.address = routes.sockaddr(port.family, peer)
        self.template = frame_start
        self.source = b""
        self.interface = 0
        self.ttl = -1
        self.control = b""

    def use_ttl(self, ttl: int) -> None:
        """The hop limit is the guest's (traceroute lives on it): on the way it has made no hop."""
        if ttl != self.ttl:
            self.ttl = ttl
            self.control = routes.ancillary(self.source, self.interface, ttl, self.peer)

    def name(self) -> str:
        """The flow in words, as the guest has it."""
        return flow_name(self.key)


class Udp:
    """The table of UDP flows, and those that the guest begins.

    `published(port, address)`: the socket of the listener that leads to this port of the guest's, or None.
    """

    def __init__(
        self,
        tap: TapDevice | None,
        translation: Translation,
        mtu: int,
        flows_max: tuple[int, int, int],
        endpoints_max: int,
        log: Log,
        filtering: str = "address",
        broadcasts: frozenset[bytes] = frozenset(),
    ) -> None:
        self.epoll = select.epoll()
        timeout, dialogue = timeouts()
        most = (min(flows_max[0], FLOWS_MAX), min(flows_max[1], FLOWS_MAX), flows_max[2])
        self.flows: Table[Any] = Table(most, timeout, dialogue)
        self.tap = tap
        self.translation = translation
        self.mtu = mtu
        self.log = log
        self.packets = _cext.Packets()
        self.filtered = 0  # datagrams from hosts that were not asked
        self.undelivered = 0  # datagrams of the guest's that could not be sent
        self.published: Callable[[int, bytes], Port | None] = lambda port, address: None
        # Of the sockets of listeners: who else may find a flow there, and who has it
        self.adopt: Callable[[Port, TapFlow], None] = lambda port, flow: None
        self.of_listener: Callable[[Port, bytes], TapFlow | None] = lambda port, address: None
        self._filtering = filtering
        self._broadcasts = broadcasts
        self._timeout = timeout
        self._next_hops = routes.NextHops()
        self.endpoints_max = max(endpoints_max, 1)
        self._endpoints: OrderedDict[bytes, Endpoint] = OrderedDict()
        self._by_fd: dict[int, Endpoint] = {}

    def fileno(self) -> int:
        return self.epoll.fileno()

    def is_everybody(self, address: bytes) -> bool:
        """True for an address of more than one host, packed."""
        return is_group(address) or address in self._broadcasts

    def close(self) -> None:
        self.flows.close()
        for endpoint in list(self._endpoints.values()):
            self._drop(endpoint)
        self._next_hops.close()
        self.epoll.close()

    @property
    def endpoints(self) -> int:
        """How many sockets there are."""
        return len(self._endpoints)

    def ports(self) -> int:
        """The ports of the host that these sockets have, as bits."""
        bits = 0
        for endpoint in self._endpoints.values():
            bits |= 1 << endpoint.number
        return bits

    # From the guest

    def on_run(self, run: _cext.Datagrams, now: float) -> None:
        """Datagrams of one flow from the tap."""
        assert self.tap is not None
        flow = self.flows.get(run.key)
        if flow is None or flow.port.closed:
            flow = self._birth(run.key, self.tap.headers(run.handle), now, flow)
            if flow is None:
                self.undelivered += run.frames
                return
        self._heard(flow, run.ttl, run.mac, now)
        port = flow.port
        port.fragment(run.df)
        skip = refused = 0
        while skip < run.frames:
            sent = self.packets.send(self.tap.raw, run.handle, port.fd, skip, flow.address, flow.control)
            if sent > 0:
                skip += sent
                refused = 0
            elif self._again(flow, -sent, refused):
                refused += 1
            elif -sent == errno.EAGAIN:
                self.undelivered += run.frames - skip
                return  # the rest is lost, as on any full queue
            else:
                self._cannot(flow, -sent, now, self.tap.headers(run.handle))
                skip += 1
                refused = 0

    def on_whole(self, key: bytes, payload: bytes, ttl: int, headers: bytes, now: float) -> None:
        """A datagram that came in fragments."""
        flow = self.flows.get(key)
        if flow is None or flow.port.closed:
            flow = self._birth(key, headers, now, flow)
            if flow is None:
                self.undelivered += 1
                return
        self._heard(flow, ttl, headers[6:12], now)
        flow.port.fragment(0)
        for tries in range(3):
            error = -self.packets.send_bytes(payload, flow.port.fd, flow.address, flow.control)
            if not error:
                return
            if not self._again(flow, error, tries):
                self._cannot(flow, error, now, headers)
                return

    def _again(self, flow: TapFlow, error: int, tries: int) -> bool:
        """True if a datagram that could not be sent is to be tried once more."""
        if error in TOLD and tries < 2:
            self.on_errors(flow.port)
            return True
        return False

    def _cannot(self, flow: TapFlow, error: int, now: float, headers: bytes) -> None:
        self.undelivered += 1
        if error == errno.EMSGSIZE:
            # It does not fit the path and must not be fragmented: the kernel has queued what a router would say
            self.on_errors(flow.port, sent=flow)
        self.log.flow("udp", f"{flow.name()}: {errno.errorcode.get(error, error)}", now)
        if error in NO_ROUTE and self.tap is not None:
            self.tap.unreachable(headers, error)

    def _birth(self, key: bytes, headers: bytes, now: float, old: TapFlow | None) -> TapFlow | None:
        """A flow of the guest's; `headers` are those of its first frame, `old` one whose socket is gone."""
        assert self.tap is not None
        if old is not None:
            self.flows.remove(old)
        translation = self.translation
        target = translation.target(key)
        ipv4 = len(key) == KEY4_LEN
        half = 4 if ipv4 else 16
        guest, called = key[:half], key[half : 2 * half]
        host = pack(target.address[0])
        group = self.is_everybody(called)
        peer = Peer(host, target.address[1], target.address[3] if len(target.address) > 3 else 0)
        try:
            interface = socket.if_nametoindex(target.interface) if target.interface else 0
            if group and not interface and not ipv4:
                interface = translation.scope
            port: Port | None = self.published(int.from_bytes(key[-4:-2], "big"), guest)
            if port is None:
                port = self._endpoint(guest + key[-4:-2], called, host, headers[6:12])
        except OSError as e:
            self.log.flow("udp", f"{target.address[0]}: {e.strerror}", now)
            if e.errno in NO_ROUTE:
                self.tap.unreachable(headers, e.errno or 0)
            return None
        start = template(headers[6:12], self.tap.mac, key, socket.IPPROTO_UDP)
        flow = TapFlow(key, now, OUTBOUND, port, peer, start)
        flow.source = pack(target.source[0]) if target.source is not None else b""
        flow.interface = interface
        if isinstance(port, Endpoint):
            self._ask(port, flow, called, group, now)
        else:
            self.adopt(port, flow)
        self.flows.add(flow)
        if self.log.debug_on:
            self.log.debug(f"udp {flow.name()}")
        return flow

    def _endpoint(self, name: bytes, called: bytes, host: bytes, mac: bytes) -> Endpoint:
        """The socket of an address and port of the guest's; raises OSError.

        One that answers could come to from two addresses that the guest tells apart is two sockets.
        """
        endpoint = self._endpoints.get(name)
        if endpoint is not None:
            asked = endpoint.asked.get(host)
            if asked is not None and asked.guest != called:
                name += called
                endpoint = self._endpoints.get(name)
        if endpoint is not None:
            self._endpoints.move_to_end(name)
            return endpoint
        if len(self._endpoints) >= self.endpoints_max:
            self._evict()
        family = socket.AF_INET if len(called) == 4 else socket.AF_INET6
        number = int.from_bytes(name[len(called) : len(called) + 2], "big")
        if number < PRIVILEGED:
            number = 0  # started as root, it could be had; but the host's services have such ports
        try:
            sock = routes.open_port(family, routes.ANY[family], number)
        except OSError as e:
            if e.errno not in NO_DESCRIPTOR or not self._evict():
                raise
            sock = routes.open_port(family, routes.ANY[family], number)
        endpoint = Endpoint(sock, name, mac)
        self._endpoints[name] = endpoint
        self._by_fd[endpoint.fd] = endpoint
        self.epoll.register(endpoint.fd, select.EPOLLIN)
        return endpoint

    def _ask(self, endpoint: Endpoint, flow: TapFlow, called: bytes, group: bool, now: float) -> None:
        """A flow is added to an endpoint, until it is forgotten."""
        asked = endpoint.asked.get(flow.peer.address)
        if asked is None:
            endpoint.asked[flow.peer.address] = asked = Asked(called)
        asked.flows += 1
        asked.flow = flow
        endpoint.peers[flow.address] = flow
        if group:
            endpoint.open_until = now + self._timeout

        def forgotten(flow: TapFlow) -> None:
            if endpoint.peers.get(flow.address) is flow:
                del endpoint.peers[flow.address]
            asked.flows -= 1
            endpoint.answered -= flow.answered
            if asked.flow is flow:
                asked.flow = None
            if not asked.flows and endpoint.asked.get(flow.peer.address) is asked:
                del endpoint.asked[flow.peer.address]
            if not endpoint.asked:
                self._drop(endpoint)

        flow.forgotten = forgotten

    def _evict(self) -> bool:
        """The endpoint that is the least loss goes, with its flows; False if there is none."""
        if not self._endpoints:
            return False
        looked_at = itertools.islice(self.flows.unanswered(OUTBOUND), EVICT_LOOKS)
        ports = (flow.port for flow in looked_at)
        silent = (port for port in ports if isinstance(port, Endpoint) and not port.answered)
        self._forget(next(silent, next(iter(self._endpoints.values()))))
        return True

    def _forget(self, endpoint: Endpoint) -> None:
        for flow in list(endpoint.peers.values()):
            self.flows.remove(flow)
        self._drop(endpoint)

    def _drop(self, endpoint: Endpoint) -> None:
        if self._by_fd.pop(endpoint.fd, None) is not None:
            self._endpoints.pop(endpoint.name, None)
            endpoint.sock.close()

    def release(self, number: int) -> bool:
        """Give up the sockets at this port of the host's, which a listener wants; True if there were any.

        What the guest sends from there goes by the listener afterwards, and so does what comes.
        """
        held = [endpoint for endpoint in self._endpoints.values() if endpoint.number == number]
        for endpoint in held:
            self._forget(endpoint)
        return bool(held)

    def _heard(self, flow: TapFlow, ttl: int, mac: bytes, now: float) -> None:
        """The guest has sent something."""
        if flow.share == OUTBOUND:
            self.flows.touch(flow, now)
            endpoint = flow.port
            if (
                isinstance(endpoint, Endpoint)
                and endpoint.open_until
                and self.is_everybody(flow.peer.address)
            ):
                endpoint.open_until = now + self._timeout
        else:
            self.flows.answer(flow, now)
        if mac != flow.template[:6] and not mac[0] & 1:
            flow.template = mac + flow.template[6:]
        if ttl != flow.ttl:
            flow.use_ttl(ttl)

    # From the sockets

    def on_ready(self, now: float) -> None:
        """Some sockets have datagrams, or errors: one batch of each, the rest when the others had a turn."""
        for fd, ready in self.epoll.poll(0, SOCKETS_PER_EVENT):
            endpoint = self._by_fd.get(fd)
            if endpoint is None:
                continue
            if ready & select.EPOLLERR:
                self.on_errors(endpoint)
            if ready & select.EPOLLIN:
                self._answers(endpoint, now)

    def _answers(self, endpoint: Endpoint, now: float) -> None:
        assert self.tap is not None
        tap, uso = self.tap.raw, self.tap.uso
        groups = self.packets.receive(endpoint.fd)
        if isinstance(groups, int):
            return
        for address, _, interface, first, count in groups:
            flow = endpoint.peers.get(address)
            if flow is not None and flow.interface in (0, interface):
                self._answer(endpoint, flow, now)
                self.packets.emit(tap, flow.template, first, count, self.mtu, uso)
                continue
            peer = routes.peer_of(address) if flow is None else None
            start = self._from_another(endpoint, peer, interface, now)
            if start:
                self.packets.emit(tap, start, first, count, self.mtu, uso)
            else:
                self.filtered += count
                if self.log.debug_on:
                    self.log.flow("dropped", f"udp from {routes.in_words(address)}: it was not asked", now)

    def _answer(self, endpoint: Endpoint, flow: TapFlow, now: float) -> None:
        if not flow.answered:
            endpoint.answered += 1
            # An endpoint that is talked to is the last to give way
            self._endpoints.move_to_end(endpoint.name)
        self.flows.answer(flow, now)

    def _from_another(self, endpoint: Endpoint, peer: Peer | None, interface: int, now: float) -> bytes:
        """The start of frames from a peer that was not asked at this port, if it may answer; else nothing."""
        assert self.tap is not None
        if peer is None:
            return b""
        asked = endpoint.asked.get(peer.address)
        if self._filtering == "port":
            return b""
        if asked is not None:
            if asked.flow is not None:
                if asked.flow.interface not in (0, interface):
                    return b""
                self._answer(endpoint, asked.flow, now)
            seen = asked.guest
        elif (
            self._filtering == "endpoint"
            or now < endpoint.open_until
            or self._is_next_hop(endpoint, peer.address, now)
        ):
            half = 4 if len(peer.address) == 4 else 16
            seen = self.translation.caller(peer.address, endpoint.name[:half])
        else:
            return b""
        if not seen:
            return b""
        half = len(seen)
        guest, number = endpoint.name[:half], endpoint.name[half : half + 2]
        key = guest + seen + number + peer.port.to_bytes(2, "big")
        flow = next(iter(endpoint.peers.values()), None)
        mac = flow.template[:6] if flow is not None else endpoint.mac
        return template(mac, self.tap.mac, key, socket.IPPROTO_UDP)

    def _is_next_hop(self, endpoint: Endpoint, address: bytes, now: float) -> bool:
        """True for the router by which an address is reached that was asked.

        It may be that host itself, by another of its addresses; and it could give any source address if it wanted.
        """
        if now >= endpoint.hops_until:
            endpoint.hops_until = now + HOPS_VALID
            asked = itertools.islice(reversed(endpoint.asked), HOPS_ASKED)
            endpoint.hops = {self._next_hops.of(one) for one in asked} - {b""}
        return address in endpoint.hops

    def on_errors(
        self,
        port: Port,
        sent: TapFlow | None = None,
    ) -> None:
        """The guest hears of errors; `sent` is the flow that has just sent.

        What the kernel says of its own accord has no port (ip_local_error() of an unconnected socket).
        """
        for error in errors.queued(port.sock):
            if self.tap is None or not error.peer:
                continue
            peer = routes.peer_of_words(error.peer)
            address = routes.sockaddr(port.family, peer)
            flow = (
                port.peers.get(address) if isinstance(port, Endpoint) else self.of_listener(port, address)
            )
            if flow is None and sent is not None and not peer.port and peer.address == sent.peer.address:
                flow = sent
            if flow is None:
                continue
            frame = errors.frame(
                error,
                flow.key,
                socket.IPPROTO_UDP,
                self.tap.mac,
                flow.template[:6],
                flow.peer.address,
            )
            if frame is not None:
                self.tap.emit_error(frame)


def is_group(address: bytes) -> bool:
    """True for a multicast or the limited broadcast address, packed."""
    if len(address) == 4:
        return address[0] & 0xF0 == 0xE0 or address == b"\xff" * 4
    return address[0] == 0xFF
