"""UDP of the guest's: what it sends, and which hosts may answer.

Owns nothing: the sockets are endpoints.py's or those of listeners. Imports `_cext`, `budget`, `link`, `observe`,
`translate`, `wire` and the files of this room.

Which hosts may answer is a filter (RFC 4787, REQ-8), address-dependent by default: any port of an address
that was asked, and any address once a group was asked.  Each answer is handed on with the address that it came from.
Payload stays in C, in batches.

Where the guest's port is forwarded, the listener's socket is also the guest's; clients.py has those.
"""

import errno
import itertools
import select
import socket
from typing import Any, NamedTuple, Protocol

from .. import _cext, wire
from ..budget import RateLimit
from ..link.tap import TapDevice
from ..observe.log import Log
from ..translate import Translation
from ..wire import pack
from . import errors, routes
from .endpoints import Endpoint, Endpoints, TapFlow
from .routes import Peer, Port
from .table import OUTBOUND, Table

TIMEOUT, TIMEOUT_DIALOGUE = 30.0, 120.0  # seconds
CONNTRACK = "/proc/sys/net/netfilter/nf_conntrack_udp_timeout"

FILTERS = ("endpoint", "address", "port")

# Errors that a send may report about an earlier datagram; once reported, an error is gone
ABOUT_EARLIER = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPROTO}
)
NO_ROUTE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EACCES, errno.EPERM})

# Routers of the addresses that were asked last; they are looked up when another host sends, at most once in this many
# seconds
HOPS_ASKED, HOPS_VALID = 16, 1.0


def timeouts() -> tuple[float, float]:
    """Seconds after which the kernel's conntrack forgets a flow: one without an answer, and a dialogue."""
    values = []
    for path, default in ((CONNTRACK, TIMEOUT), (CONNTRACK + "_stream", TIMEOUT_DIALOGUE)):
        try:
            with open(path) as file:
                values.append(float(file.read()))
        except (OSError, ValueError):
            values.append(default)
    return values[0], values[1]


class Kept(NamedTuple):
    """Datagrams of one flow whose batch is over; `headers` are those of the first frame."""

    key: bytes
    headers: bytes
    ttl: int
    mac: bytes
    df: int
    payloads: list[bytes]


class Rules:
    """What holds for all of the guest's datagrams.

    `mtu`: of the tap, bytes.  `new_flows`: how many the guest may begin.  `filtering`: which hosts may answer, one of
    FILTERS.  `broadcasts`: the directed broadcast addresses of the guest's networks, packed.  `timeout`: how long any
    host may answer a group, seconds.
    """

    def __init__(
        self,
        mtu: int,
        new_flows: RateLimit,
        filtering: str = "address",
        broadcasts: frozenset[bytes] = frozenset(),
        timeout: float = TIMEOUT,
    ) -> None:
        self.mtu = mtu
        self.new_flows = new_flows
        self.filtering = filtering
        self.broadcasts = broadcasts  # host_changes.py changes it
        self.timeout = timeout

    def is_everybody(self, address: bytes) -> bool:
        """True for a packed address that stands for more than one host."""
        return wire.is_group(address) or address in self.broadcasts


class Forwarded(Protocol):
    """The methods of the listeners whose ports the guest sends from."""

    def port_of(self, number: int, guest: bytes) -> Port | None:
        """The socket of the listener that leads to this port of the guest's packed address, or None."""

    def adopt(self, port: Port, flow: TapFlow) -> None:
        """The guest has begun a flow through a listener's socket."""

    def flow_of(self, port: Port, address: bytes) -> TapFlow | None:
        """The flow of a listener's socket with this peer (a struct sockaddr)."""


class Udp:
    """The flows that the guest begins, and the answers to them."""

    def __init__(
        self,
        tap: TapDevice,
        translation: Translation,
        flows: Table[Any],
        packets: _cext.Packets,
        endpoints: Endpoints,
        rules: Rules,
        next_hops: routes.NextHops,
        log: Log,
    ) -> None:
        self._tap = tap
        self._translation = translation
        self._flows = flows
        self._packets = packets
        self._endpoints = endpoints
        self._rules = rules
        self._next_hops = next_hops
        self._log = log
        self.forwarded: Forwarded | None = None  # set once, when the listeners are there
        self.filtered = 0  # datagrams of hosts that were not asked
        self.undelivered = 0  # datagrams of the guest's that could not be sent

    # From the guest

    def knows(self, key: bytes) -> bool:
        """True if there is a flow with this key."""
        return self._flows.get(key) is not None

    def on_run(self, run: _cext.Datagrams, now: float) -> None:
        """Datagrams of one flow from the tap."""
        flow = self._flows.get(run.key)
        if flow is None or flow.port.closed:
            flow = self._open(run.key, self._tap.headers(run.handle), now, flow)
            if flow is None:
                self.undelivered += run.frames
                return
        self._heard(flow, run.ttl, run.mac, now)
        port = flow.port
        port.fragment(run.df)
        skip = refused = 0
        while skip < run.frames:
            sent = self._packets.send(self._tap.raw, run.handle, port.fd, skip, flow.address, flow.control)
            if sent > 0:
                skip += sent
                refused = 0
            elif self._is_about_earlier(flow, -sent, refused, now):
                refused += 1
            elif -sent == errno.EAGAIN:
                self.undelivered += run.frames - skip
                return  # the rest is lost, as on any full queue
            else:
                self._not_sent(flow, -sent, now, self._tap.headers(run.handle))
                skip += 1
                refused = 0

    def keep(self, run: _cext.Datagrams) -> Kept:
        """Keep datagrams from the tap beyond their batch."""
        headers, payloads = self._tap.headers(run.handle), self._tap.payloads(run.handle)
        return Kept(run.key, headers, run.ttl, run.mac, run.df, payloads)

    def on_kept(self, kept: Kept, now: float) -> None:
        """Datagrams that are no longer in a batch: they have waited, or came in fragments."""
        flow = self._flows.get(kept.key)
        if flow is None or flow.port.closed:
            flow = self._open(kept.key, kept.headers, now, flow)
            if flow is None:
                self.undelivered += len(kept.payloads)
                return
        self._heard(flow, kept.ttl, kept.mac, now)
        flow.port.fragment(kept.df)
        for payload in kept.payloads:
            self._send_kept(flow, payload, kept.headers, now)

    def _send_kept(self, flow: TapFlow, payload: bytes, headers: bytes, now: float) -> None:
        for tries in range(3):
            error = -self._packets.send_bytes(payload, flow.port.fd, flow.address, flow.control)
            if not error:
                return
            if not self._is_about_earlier(flow, error, tries, now):
                self._not_sent(flow, error, now, headers)
                return

    def _is_about_earlier(self, flow: TapFlow, error: int, tries: int, now: float) -> bool:
        """True if an error was about an earlier datagram: then this one has to be sent again."""
        if error in ABOUT_EARLIER and tries < 2:
            self.on_errors(flow.port, now)
            return True
        return False

    def _not_sent(self, flow: TapFlow, error: int, now: float, headers: bytes) -> None:
        self.undelivered += 1
        if error == errno.EMSGSIZE:
            # It does not fit the path and must not be fragmented: the kernel has queued what a router would say
            self.on_errors(flow.port, now, sent=flow)
        self._log.flow("udp", f"{flow.name()}: {errno.errorcode.get(error, error)}", now)
        if error in NO_ROUTE:
            self._tap.unreachable(headers, error, now)

    def _open(self, key: bytes, headers: bytes, now: float, old: TapFlow | None) -> TapFlow | None:
        """Open a flow of the guest's; None if that fails.

        `headers` are those of its first frame; `old` is a flow with this key whose socket is gone.
        """
        if old is not None:
            self._flows.remove(old)
        if not self._rules.new_flows.allows(now):
            self._log.flow("limit", "too many new flows, a datagram was dropped", now)
            return None
        target = self._translation.target(key)
        guest, called = wire.key_source(key), wire.key_destination(key)
        mac = wire.frame_source(headers)
        host = pack(target.address[0])
        group = self._rules.is_everybody(called)
        peer = Peer(host, target.address[1], target.address[3] if len(target.address) > 3 else 0)
        try:
            interface = socket.if_nametoindex(target.interface) if target.interface else 0
            if group and not interface and len(called) == 16:
                interface = self._translation.scope
            port = self.forwarded.port_of(wire.key_source_port(key), guest) if self.forwarded else None
            if port is None:
                port = self._endpoints.get(key, host, mac)
        except OSError as e:
            self._log.flow("udp", f"{target.address[0]}: {e.strerror}", now)
            if e.errno in NO_ROUTE:
                self._tap.unreachable(headers, e.errno or 0, now)
            return None
        start = wire.frame_start(mac, self._tap.mac, key, wire.PROTO_UDP)
        flow = TapFlow(key, now, OUTBOUND, port, peer, start)
        flow.source = pack(target.source[0]) if target.source is not None else b""
        flow.interface = interface
        if isinstance(port, Endpoint):
            self._endpoints.add(port, flow, called)
            if group:
                port.open_until = now + self._rules.timeout
        elif self.forwarded is not None:
            self.forwarded.adopt(port, flow)
        self._flows.add(flow)
        if self._log.debug_on:
            self._log.debug(f"udp {flow.name()}")
        return flow

    def _heard(self, flow: TapFlow, ttl: int, mac: bytes, now: float) -> None:
        """The guest has sent a datagram of a flow."""
        if flow.share == OUTBOUND:
            self._flows.touch(flow, now)
            endpoint = flow.port
            if (
                isinstance(endpoint, Endpoint)
                and endpoint.open_until
                and self._rules.is_everybody(flow.peer.address)
            ):
                endpoint.open_until = now + self._rules.timeout
        else:
            self._flows.answer(flow, now)
        if mac != flow.start[:6] and not wire.is_group_mac(mac):
            flow.start = mac + flow.start[6:]
        if ttl != flow.ttl:
            flow.use_ttl(ttl)

    # From the sockets

    def on_socket(self, endpoint: Endpoint, ready: int, now: float) -> None:
        """A socket has datagrams, or errors: one batch is taken, so that the others have their turn."""
        if ready & select.EPOLLERR:
            self.on_errors(endpoint, now)
        if ready & select.EPOLLIN:
            self._answers(endpoint, now)

    def _answers(self, endpoint: Endpoint, now: float) -> None:
        groups = self._packets.receive(endpoint.fd)
        if isinstance(groups, int):
            return
        for address, _, interface, first, count in groups:
            flow = endpoint.peers.get(address)
            if flow is not None and flow.interface in (0, interface):
                self._endpoints.answered(endpoint, flow, now)
                self.emit(flow.start, first, count)
                continue
            peer = routes.peer_of(address) if flow is None else None
            start = self._from_another(endpoint, peer, interface, now)
            if start:
                self.emit(start, first, count)
            else:
                self.filtered += count
                if self._log.debug_on:
                    name = routes.described(address)
                    self._log.flow("dropped", f"udp from {name}: it was not asked", now)

    def emit(self, start: bytes, first: int, count: int) -> None:
        """Send datagrams of the last batch to the guest, in frames that begin with `start`."""
        self._packets.emit(self._tap.raw, start, first, count, self._rules.mtu, self._tap.uso)

    def _from_another(self, endpoint: Endpoint, peer: Peer | None, interface: int, now: float) -> bytes:
        """The start of frames from a peer that was not asked at this port; empty if it may not answer."""
        if peer is None or self._rules.filtering == "port":
            return b""
        asked = endpoint.asked.get(peer.address)
        if asked is not None:
            if asked.flow is not None:
                if asked.flow.interface not in (0, interface):
                    return b""
                self._endpoints.answered(endpoint, asked.flow, now)
            seen = asked.guest
        elif (
            self._rules.filtering == "endpoint"
            or now < endpoint.open_until
            or self._is_next_hop(endpoint, peer.address, now)
        ):
            seen = self._translation.caller(peer.address, endpoint.guest)
        else:
            return b""
        if not seen:
            return b""
        number = int.from_bytes(endpoint.name[len(seen) : len(seen) + 2], "big")
        key = wire.make_key(endpoint.name[: len(seen)], seen, number, peer.port)
        flow = next(iter(endpoint.peers.values()), None)
        mac = flow.start[:6] if flow is not None else endpoint.mac
        return wire.frame_start(mac, self._tap.mac, key, wire.PROTO_UDP)

    def _is_next_hop(self, endpoint: Endpoint, address: bytes, now: float) -> bool:
        """True for the router on the way to a host that was asked.

        It may be that host itself, by another of its addresses; and a router can give any source address anyway.
        """
        if now >= endpoint.hops_until:
            endpoint.hops_until = now + HOPS_VALID
            asked = itertools.islice(reversed(endpoint.asked), HOPS_ASKED)
            endpoint.hops = {self._next_hops.of(one) for one in asked} - {b""}
        return address in endpoint.hops

    def on_errors(self, port: Port, now: float, sent: TapFlow | None = None) -> None:
        """Tell the guest about ICMP errors; `sent` is the flow that has just sent, if its datagram caused them.

        An error that the kernel itself has found has no port (ip_local_error() of an unconnected socket).
        """
        for error in errors.queued(port.sock):
            if not error.peer:
                continue
            peer = routes.peer_of_python(error.peer)
            address = routes.sockaddr(port.family, peer)
            flow = self._flow_of(port, address)
            if flow is None and sent is not None and not peer.port and peer.address == sent.peer.address:
                flow = sent
            if flow is not None:
                frame = errors.frame(
                    error, flow.key, wire.PROTO_UDP, self._tap.mac, flow.start[:6], flow.peer.address
                )
                self._tap.emit_error(frame, now)

    def _flow_of(self, port: Port, address: bytes) -> TapFlow | None:
        if isinstance(port, Endpoint):
            return port.peers.get(address)
        return self.forwarded.flow_of(port, address) if self.forwarded is not None else None
