"""Clients of published UDP ports: the listener itself receives and sends for all of them.

Owns nothing: the listeners are forward.py's, the flows udp.py's.  Imports `forward`, `tap`, `translate` and the files
of this room.

A client is a struct sockaddr and the address that it has called; its flow is an entry of the table.  So there is no
socket for each client that could take another one's datagrams, and what a flood of strangers costs is bounded: a
batch of the listener's at a time, and a share of the table in which those that the guest never answered give way.
"""

import os
import socket
import struct

from ..forward import Listener, Policy
from ..tap import template
from ..translate import KEY4_LEN
from . import errors, routes
from .routes import Peer, Port
from .spliced import Spliced
from .table import INBOUND, OUTBOUND
from .udp import TapFlow, Udp

PORT_TRIES = 16


class Clients:
    """All of them, by listener."""

    def __init__(self, udp: Udp, spliced: Spliced, policy: Policy) -> None:
        self._udp = udp
        self._spliced = spliced
        self._policy = policy
        self._ports: dict[socket.socket, Port] = {}
        # By listener; then by client and the address that the client has called, or by client alone
        self._flows: dict[socket.socket, dict[tuple[bytes, bytes], TapFlow]] = {}
        self._last: dict[socket.socket, dict[bytes, TapFlow]] = {}
        self.refused = 0  # datagrams that led nowhere
        udp.adopt, udp.of_listener = self._adopt, self._of_listener

    def _of_listener(self, port: Port, address: bytes) -> TapFlow | None:
        return self._last.get(port.sock, {}).get(address)

    def _adopt(self, port: Port, flow: TapFlow) -> None:
        """The guest has begun a flow by a listener's socket: errors find it."""
        last = self._last.get(port.sock)
        if last is None:
            return
        last[flow.address] = flow

        def forgotten(flow: TapFlow) -> None:
            if last.get(flow.address) is flow:
                del last[flow.address]

        flow.forgotten = forgotten

    def open(self, listener: Listener) -> Port:
        """A listener is there."""
        sock = listener.sock
        routes.tune(sock)
        errors.enable(sock)
        # A guest may send to a broadcast address from a port that is published
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._flows[sock], self._last[sock] = {}, {}
        self._ports[sock] = port = Port(sock)
        return port

    def close(self, listener: Listener) -> None:
        """It goes, and all flows with it: their socket was this one."""
        sock = listener.sock
        port = self._ports.pop(sock, None)
        if port is not None:
            port.closed = True
        for flow in list(self._flows.pop(sock, {}).values()):
            self._udp.flows.remove(flow)
        self._last.pop(sock, None)
        self._spliced.forget(sock)

    def port(self, listener: Listener) -> Port:
        """The listener's socket."""
        return self._ports[listener.sock]

    def on_ready(self, listener: Listener, failed: bool, helped: bool, now: float) -> None:
        """One batch of datagrams; `failed`: there are errors too.

        Without `helped` nobody can make sockets in the namespace, and loopback comes by the tap.
        """
        port = self._ports[listener.sock]
        if failed:
            self._udp.on_errors(port)
        packets = self._udp.packets
        groups = packets.receive(port.fd)
        if isinstance(groups, int):
            return
        tap, flows = self._udp.tap, self._flows[listener.sock]
        for address, local, interface, first, count in groups:
            flow = flows.get((address, local))
            if flow is None:
                peer = routes.peer_of(address)
                if peer is None:
                    continue
                if helped and self._policy.short_cut(listener.rule, peer.address):
                    self._spliced.on_client(listener, port, peer, address, local, first, count, now)
                    continue
                flow = self._birth(listener, port, peer, address, local, interface, now)
                if flow is None:
                    self.refused += count
                    if self._udp.log.debug_on:
                        self._udp.log.flow(
                            "dropped", f"udp from {routes.in_words(address)}: no way in", now
                        )
                    continue
            self._udp.flows.touch(flow, now)
            if tap is not None:
                packets.emit(tap.raw, flow.template, first, count, self._udp.mtu, tap.uso)

    def _birth(
        self,
        listener: Listener,
        port: Port,
        peer: Peer,
        address: bytes,
        local: bytes,
        interface: int,
        now: float,
    ) -> TapFlow | None:
        """The flow of a client that has not been seen yet; None if there is no way to the guest."""
        udp, rule = self._udp, listener.rule
        if udp.tap is None:
            return None
        caller = udp.translation.caller(peer.address, self._policy.guest(rule, peer.address))
        # A server that is asked from a link-local address answers from its own link-local one
        guest = self._policy.guest(rule, caller) if caller else b""
        if not guest or not peer.port:
            return None
        key = guest + caller + struct.pack("!HH", listener.target, peer.port)
        known = udp.flows.get(key)
        names = (address, local)
        theirs = (known.share, known.port, known.address) if isinstance(known, TapFlow) else None
        if known is not None and theirs == (OUTBOUND, port, address):
            # The guest has asked it before
            return self._named(known, listener.sock, names)
        for _ in range(PORT_TRIES):
            if udp.flows.get(key) is None:
                break
            # The guest sees one client where several ports of the host lead to the same of its own
            key = key[:-2] + struct.pack("!H", 1024 + int.from_bytes(os.urandom(2), "big") % 64512)
        else:
            return None
        start = template(udp.tap.guest_mac, udp.tap.mac, key, socket.IPPROTO_UDP)
        flow = TapFlow(key, now, INBOUND, port, peer, start)
        flow.source = local if len(local) == (4 if len(key) == KEY4_LEN else 16) else b""
        if peer.scope:
            flow.interface = interface
        self._named(flow, listener.sock, names)
        udp.flows.add(flow)
        if udp.log.debug_on:
            udp.log.debug(f"udp {flow.name()}: a client on the host")
        return flow

    def _named(self, flow: TapFlow, sock: socket.socket, names: tuple[bytes, bytes]) -> TapFlow:
        """The flow is found by these from now on, until it is forgotten."""
        flows, last = self._flows[sock], self._last[sock]

        def forgotten(flow: TapFlow) -> None:
            if flows.get(names) is flow:
                del flows[names]
            if last.get(names[0]) is flow:
                del last[names[0]]

        flow.forgotten = forgotten
        flows[names] = last[names[0]] = flow
        return flow
