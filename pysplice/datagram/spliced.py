"""UDP between the loopback interfaces of host and namespace, without the tap.

Owns a socket for each client, on the side of its server, and the epoll instance that watches them.  Imports `forward`,
`inside`, `observe` and the files of this room.

The listener is one end: it receives from all clients and answers them.  The other end is a socket at the client's
port, so that a server tells clients apart.  It is not connected, and takes what comes from the server's
address and port alone: other datagrams that arrive there come from other programs.
"""

import os
import select
import socket
from typing import Any

from .. import _cext
from ..forward import Listener, Policy
from ..inside import Inside
from ..observe.log import Log
from ..ports import GUEST
from ..translate import pack, unpack
from . import errors, routes
from .routes import Peer, Port
from .table import SPLICED, Expiring, Table

PENDING_BYTES = 1 << 20  # that wait for a socket in the namespace, for each flow
KEY_BYTES_MIN = 64
REQUESTS_MAX = 256  # to the process in the namespace: a flood of new clients asks for no more
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
SOCKETS_PER_EVENT = 64


class SplicedFlow(Expiring):
    """Between a client of the listener `near` and a server; `pending` while the socket `far` is not there.

    `client` and `server` are struct sockaddr, `control` has answers leave from the address that was called.
    """

    __slots__ = ("client", "control", "far", "held", "near", "pending", "server", "words")

    def __init__(
        self, key: bytes, now: float, near: Port, client: bytes, control: bytes, server: bytes, words: str
    ) -> None:
        super().__init__(key, now, SPLICED)
        self.near = near
        self.client = client
        self.control = control
        self.server = server
        self.words = words
        self.far: Port | None = None
        self.pending: list[bytes] = []
        self.held = 0

    def name(self) -> str:
        """The flow in words: its client and its server."""
        return f"{self.words}, short cut"


class Spliced:
    """All of them, in the table of UDP flows."""

    def __init__(
        self, flows: Table[Any], packets: _cext.Packets, inside: Inside | None, policy: Policy, log: Log
    ) -> None:
        self.epoll = select.epoll()
        self._flows = flows
        self._packets = packets
        self._inside = inside
        self._policy = policy
        self._log = log
        self._owners: dict[int, SplicedFlow] = {}
        self.refused = 0  # datagrams that led nowhere

    def fileno(self) -> int:
        return self.epoll.fileno()

    def ports(self, guest: bool) -> int:
        """The ports of these sockets on one side, as bits."""
        bits = 0
        for flow in list(self._owners.values()):
            if flow.far is not None and not flow.closed and (flow.key[:1] == b"h") == guest:
                bits |= 1 << int(flow.far.sock.getsockname()[1])
        return bits

    def on_client(
        self,
        listener: Listener,
        port: Port,
        peer: Peer,
        client: bytes,
        local: bytes,
        first: int,
        count: int,
        now: float,
    ) -> None:
        """A batch's datagrams from a client of the listener's, which has called the address `local`."""
        side = b"g" if listener.rule.side == GUEST else b"h"
        # Longer than a key of the guest's, which it could make up
        key = side + port.fd.to_bytes(4, "big") + client + local
        key = key.ljust(KEY_BYTES_MIN, b"\0")
        flow = self._flows.get(key)
        if flow is None or flow.near is not port:
            flow = self._birth(key, listener, port, peer, client, local, now)
            if flow is None:
                self.refused += count
                return
        self._flows.touch(flow, now)
        if flow.far is not None:
            self._packets.relay(first, count, flow.far.fd, flow.server, b"")
            return
        for index in range(first, first + count):
            for data in self._packets.payload(index):
                if flow.held + len(data) < PENDING_BYTES:
                    flow.pending.append(data)
                    flow.held += len(data)

    def _birth(
        self,
        key: bytes,
        listener: Listener,
        port: Port,
        peer: Peer,
        client: bytes,
        local: bytes,
        now: float,
    ) -> SplicedFlow | None:
        old = self._flows.get(key)
        if old is not None:
            self._flows.remove(old)
        target = self._policy.beyond(listener, local)
        if target is None:
            self._log.flow("udp", f"{unpack(local)} is no loopback address: not passed on", now)
            return None
        outward = listener.rule.side == GUEST
        if not outward and (self._inside is None or self._inside.pending >= REQUESTS_MAX):
            return None
        server = Peer(pack(target[0]), target[1])
        family = socket.AF_INET if len(server.address) == 4 else socket.AF_INET6
        control = routes.ancillary(local, 0, 0, peer) if len(local) == len(peer.address) else b""
        words = f"[{unpack(peer.address)}]:{peer.port} -> [{target[0]}]:{target[1]}"
        flow = SplicedFlow(key, now, port, client, control, routes.sockaddr(family, server), words)
        self._flows.add(flow)
        if self._log.debug_on:
            self._log.debug(f"udp {flow.name()}")
        if outward:
            try:
                self._complete(flow, routes.open_port(family, LOOPBACK[family], peer.port))
            except OSError as e:
                self._log.flow("udp", f"a short cut to {target[0]}: {e.strerror}", now)
                self._flows.remove(flow)
                return None
            return flow
        assert self._inside is not None
        request = {
            "family": int(family),
            "kind": int(socket.SOCK_DGRAM),
            "bind": [routes.ANY[family], peer.port],
            "any": 1,
        }

        def done(socks: list[socket.socket], error: int) -> None:
            if flow.closed or error:
                for sock in socks:
                    sock.close()
                if error:
                    self._log.flow("udp", f"a socket in the namespace: {os.strerror(error)}", flow.used)
                self._flows.remove(flow)
            else:
                routes.tune(socks[0])
                self._complete(flow, socks[0])

        self._inside.ask(request, done)
        return flow

    def _complete(self, flow: SplicedFlow, sock: socket.socket) -> None:
        """The socket is there: what has waited goes out."""
        flow.far = far = Port(sock)
        self._owners[far.fd] = flow
        flow.forgotten = self._forgotten
        self.epoll.register(far.fd, select.EPOLLIN)
        for data in flow.pending:
            for _ in range(2):
                # The first may report what an earlier one has met
                if not self._packets.send_bytes(data, far.fd, flow.server, b""):
                    break
        flow.pending.clear()
        flow.held = 0

    def on_ready(self, now: float) -> None:
        """Servers have answered: one batch of each, the rest when the others had a turn."""
        for fd, ready in self.epoll.poll(0, SOCKETS_PER_EVENT):
            flow = self._owners.get(fd)
            if flow is None or flow.closed or flow.far is None or flow.far.fd != fd:
                continue
            if ready & select.EPOLLERR:
                # No ICMP error can be passed on to a client on a loopback interface
                list(errors.queued(flow.far.sock))
            groups = self._packets.receive(fd)
            if isinstance(groups, int):
                continue
            for address, _, _, first, count in groups:
                if address == flow.server and not flow.near.closed:
                    self._flows.answer(flow, now)
                    self._packets.relay(first, count, flow.near.fd, flow.client, flow.control)

    def _forgotten(self, flow: SplicedFlow) -> None:
        if flow.far is not None:
            self._owners.pop(flow.far.fd, None)
            flow.far.sock.close()

    def forget(self, sock: socket.socket) -> None:
        """A listener goes."""
        for flow in list(self._owners.values()):
            if flow.near.sock is sock:
                self._flows.remove(flow)

    def close(self) -> None:
        for flow in list(self._owners.values()):
            self._flows.remove(flow)
        self.epoll.close()
