"""Clients of forwarded UDP ports: the listener's own socket receives and sends for all of them.

Owns nothing: the listeners are `forward`'s, the flows are in the table.  Imports `_cext`, `forward`, `link`,
`observe`, `translate`, `wire` and the files of this room.

A client is a struct sockaddr, and the address that it has called; its flow is an entry of the table.  So there is no
socket for each client that could take another client's datagrams, and a flood of strangers costs little: one batch of
the listener's at a time, and a share of the table in which flows that the guest never answered give way.
"""

import os
import socket
from typing import Any, Final, NamedTuple, Protocol

from .. import _cext, wire
from ..forward.policy import Listener, Policy
from ..link.neighbours import Neighbours
from ..observe.log import Log
from ..translate import Translation
from . import errors, routes
from .endpoints import TapFlow
from .routes import Peer, Port
from .table import INBOUND, OUTBOUND, Table
from .udp import Udp

PORT_TRIES: Final = 16


class Call(NamedTuple):
    """Which client has called, and how.

    `port` is the socket of `listener`.  `peer` and `address` (a struct sockaddr) are the client's; it has
    called the packed address `local` (empty if the socket does not tell), by the interface with the index
    `interface`.
    """

    listener: Listener
    port: Port
    peer: Peer
    address: bytes
    local: bytes
    interface: int


class Spliced(Protocol):
    """The methods of the splice of datagrams that are called here."""

    def on_client(self, call: Call, batch: tuple[int, int], now: float) -> None:
        """Datagrams (first and count in the batch) of a client on a loopback interface."""

    def forget(self, sock: socket.socket) -> None:
        """A listener is being closed."""


class Way(Protocol):
    """The way to the guest through the tap; or the fact that there is none."""

    def open(self, call: Call, now: float) -> TapFlow | None:
        """The flow of a client that has not been seen yet; None if there is no way to the guest."""

    def emit(self, start: bytes, first: int, count: int) -> None:
        """See Udp.emit()."""

    def on_errors(self, port: Port, now: float) -> None:
        """See Udp.on_errors()."""


class NoWay:
    """Without a tap, clients reach only the guest's loopback interface."""

    def open(self, call: Call, now: float) -> TapFlow | None:
        return None

    def emit(self, start: bytes, first: int, count: int) -> None:
        pass

    def on_errors(self, port: Port, now: float) -> None:
        list(errors.queued(port.sock))


class TapWay:
    """The way through the tap."""

    def __init__(
        self,
        udp: Udp,
        flows: Table[Any],
        neighbours: Neighbours,
        translation: Translation,
        policy: Policy,
        our_mac: bytes,
    ) -> None:
        self._flows = flows
        self._neighbours = neighbours
        self._translation = translation
        self._policy = policy
        self._our_mac = our_mac
        self.emit = udp.emit
        self.on_errors = udp.on_errors

    def open(self, call: Call, now: float) -> TapFlow | None:
        rule, peer, target = call.listener.rule, call.peer, call.listener.target
        caller = self._translation.caller(peer.address, self._policy.guest(rule, peer.address))
        # A server that is asked from a link-local address answers from its own link-local one
        guest = self._policy.guest(rule, caller) if caller else b""
        if not guest or not peer.port:
            return None
        key = wire.make_key(guest, caller, target, peer.port)
        known = self._flows.get(key)
        asked = (OUTBOUND, call.port, call.address)
        if isinstance(known, TapFlow) and (known.share, known.port, known.address) == asked:
            return known  # the guest has asked this host before
        for _ in range(PORT_TRIES):
            if self._flows.get(key) is None:
                break
            # The guest sees one host where several ports of ours lead to the same port of its own
            number = 1024 + int.from_bytes(os.urandom(2), "big") % 64512
            key = wire.make_key(guest, caller, target, number)
        else:
            return None
        start = wire.frame_start(self._neighbours.mac, self._our_mac, key, wire.PROTO_UDP)
        flow = TapFlow(key, now, INBOUND, call.port, peer, start)
        flow.source = call.local if len(call.local) == len(guest) else b""
        if peer.scope:
            flow.interface = call.interface
        self._flows.add(flow)
        return flow


class Clients:
    """All clients, by listener.

    `flows` is the table, `packets` the batch, `spliced` takes clients on a loopback interface, `way` the others.
    """

    def __init__(
        self,
        flows: Table[Any],
        packets: _cext.Packets,
        spliced: Spliced,
        way: Way,
        policy: Policy,
        log: Log,
    ) -> None:
        self._flows = flows
        self._packets = packets
        self._spliced = spliced
        self._way = way
        self._policy = policy
        self._log = log
        self._ports: dict[socket.socket, Port] = {}
        # Listeners at all addresses, by the port of the guest's that they lead to
        self._forwarded: dict[int, Listener] = {}
        # By listener; then by client and the address that it has called, or by client alone
        self._by_call: dict[socket.socket, dict[tuple[bytes, bytes], TapFlow]] = {}
        self._by_peer: dict[socket.socket, dict[bytes, TapFlow]] = {}
        self.refused = 0  # datagrams that led nowhere

    # Listeners

    def opened(self, listener: Listener) -> None:
        """A listener was opened."""
        sock, rule = listener.sock, listener.rule
        routes.tune(sock)
        errors.enable(sock)
        # A guest may send to a broadcast address from a port that is forwarded
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._by_call[sock], self._by_peer[sock] = {}, {}
        self._ports[sock] = Port(sock)
        if rule.is_at_all_addresses:
            self._forwarded.setdefault(listener.target, listener)

    def closed(self, listener: Listener) -> None:
        """A listener is being closed; its flows end with it."""
        sock = listener.sock
        port = self._ports.pop(sock, None)
        if port is not None:
            port.closed = True
        held = self._forwarded.get(listener.target)
        if held is not None and held.sock is sock:
            del self._forwarded[listener.target]
        for flow in list(self._by_call.pop(sock, {}).values()):
            self._flows.remove(flow)
        self._by_peer.pop(sock, None)
        self._spliced.forget(sock)

    # What the guest sends from a forwarded port (see udp.Forwarded)

    def port_of(self, number: int, guest: bytes) -> Port | None:
        listener = self._forwarded.get(number)
        if listener is None or guest not in (self._policy.guest4, self._policy.guest6):
            return None
        port = self._ports[listener.sock]
        # On a kernel without IPv6 it is a socket of IPv4
        return port if len(guest) == 4 or port.family == socket.AF_INET6 else None

    def adopt(self, port: Port, flow: TapFlow) -> None:
        by_peer = self._by_peer.get(port.sock)
        if by_peer is None:
            return
        by_peer[flow.address] = flow

        def forgotten(flow: TapFlow) -> None:
            if by_peer.get(flow.address) is flow:
                del by_peer[flow.address]

        flow.forgotten = forgotten

    def flow_of(self, port: Port, address: bytes) -> TapFlow | None:
        return self._by_peer.get(port.sock, {}).get(address)

    # Clients

    def on_ready(self, listener: Listener, failed: bool, splices: bool, now: float) -> None:
        """A listener has datagrams, of which one batch is taken; `failed`: it has errors too.

        `splices`: clients on a loopback interface can be spliced; otherwise they go through the tap.
        """
        port = self._ports[listener.sock]
        if failed:
            self._way.on_errors(port, now)
        groups = self._packets.receive(port.fd)
        if isinstance(groups, int):
            return
        flows = self._by_call[listener.sock]
        for address, local, interface, first, count in groups:
            flow = flows.get((address, local))
            if flow is None:
                peer = routes.peer_of(address)
                if peer is None:
                    continue
                call = Call(listener, port, peer, address, local, interface)
                if splices and self._policy.is_spliced(listener.rule, peer.address):
                    self._spliced.on_client(call, (first, count), now)
                    continue
                flow = self._way.open(call, now)
                if flow is None:
                    self._refuse(address, count, now)
                    continue
                self._name(flow, listener.sock, address, local)
            self._flows.touch(flow, now)
            self._way.emit(flow.start, first, count)

    def _refuse(self, address: bytes, count: int, now: float) -> None:
        self.refused += count
        if self._log.debug_on:
            self._log.flow("dropped", f"udp from {routes.described(address)}: no way in", now)

    def _name(self, flow: TapFlow, sock: socket.socket, address: bytes, local: bytes) -> None:
        """Make the flow findable by its client until it is forgotten."""
        by_call, by_peer = self._by_call[sock], self._by_peer[sock]

        def forgotten(flow: TapFlow) -> None:
            if by_call.get((address, local)) is flow:
                del by_call[address, local]
            if by_peer.get(address) is flow:
                del by_peer[address]

        flow.forgotten = forgotten
        by_call[address, local] = by_peer[address] = flow
        if self._log.debug_on:
            self._log.debug(f"udp {flow.name()}: a client on the host")
