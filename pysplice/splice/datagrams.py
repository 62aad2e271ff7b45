"""Spliced datagrams: UDP between the loopback interfaces of host and namespace, without the tap.

Owns a socket for each client, on the server's side.  Imports `_cext`, `config`, `datagram`, `forward`, `observe`,
`sockets` and `wire`.

The listener is one end: it receives from all clients and answers them.  The other end is a socket at the client's
port, so that a server can tell clients apart.  It is not connected, and takes datagrams from the server's address and
port alone: others that arrive there come from other programs.
"""

import os
import select
import socket
from collections.abc import Iterable
from typing import Any, Final

from .. import _cext
from ..config.ports import GUEST
from ..datagram import errors, routes
from ..datagram.clients import Call
from ..datagram.routes import Peer, Port
from ..datagram.table import SPLICED, Expiring, Table
from ..forward.policy import Policy
from ..observe.describe import endpoint
from ..observe.log import Log
from ..sockets.request import Maker, SocketRequest
from ..wire import family, pack, unpack

PENDING_BYTES: Final = 1 << 20  # that wait for a socket in the namespace, for each flow
KEY_BYTES_MIN: Final = 64
REQUESTS_MAX: Final = 256  # requests to the agent: a flood of new clients asks for no more
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


class SplicedFlow(Expiring):
    """Between a client of the listener `near` and a server; datagrams are `pending` until the socket `far` is there.

    `client` and `server` are struct sockaddr; `control` has answers leave from the address that the client has called.
    """

    __slots__ = ("_name", "client", "control", "far", "held", "near", "pending", "server")

    def __init__(
        self, key: bytes, now: float, near: Port, client: bytes, control: bytes, server: bytes, name: str
    ) -> None:
        super().__init__(key, now, SPLICED)
        self.near = near
        self.client = client
        self.control = control
        self.server = server
        self._name = name
        self.far: Port | None = None
        self.pending: list[bytes] = []
        self.held = 0

    def name(self) -> str:
        """The flow in words: its client and its server."""
        return f"{self._name}, spliced"


class SplicedDatagrams:
    """All spliced flows of UDP, in the table `flows`.

    `packets` is the batch that listeners receive into, `epoll` watches the sockets, `host` and `guest` make them.
    """

    def __init__(
        self,
        epoll: select.epoll,
        flows: Table[Any],
        packets: _cext.Packets,
        host: Maker,
        guest: Maker,
        policy: Policy,
        log: Log,
    ) -> None:
        self._epoll = epoll
        self._flows = flows
        self._packets = packets
        self._host = host
        self._guest = guest
        self._policy = policy
        self._log = log
        self._by_fd: dict[int, SplicedFlow] = {}
        self.refused = 0  # datagrams that led nowhere

    def owns(self, fd: int) -> bool:
        """True for the descriptor of a socket of this plane's datagrams."""
        return fd in self._by_fd

    def ports(self, side: str) -> int:
        """The ports that these sockets have on one side, as bits."""
        wanted = b"h" if side == GUEST else b"g"  # a client on the host has its socket in the namespace
        bits = 0
        for flow in list(self._by_fd.values()):
            if flow.far is not None and not flow.closed and flow.key[:1] == wanted:
                bits |= 1 << int(flow.far.sock.getsockname()[1])
        return bits

    def on_client(self, call: Call, batch: tuple[int, int], now: float) -> None:
        """Datagrams of the batch (first, count) from a client of a listener's."""
        first, count = batch
        side = b"g" if call.listener.rule.side == GUEST else b"h"
        # Longer than any flow key of the guest's, which the guest could make up
        key = (side + call.port.fd.to_bytes(4, "big") + call.address + call.local).ljust(
            KEY_BYTES_MIN, b"\0"
        )
        flow = self._flows.get(key)
        if flow is None or flow.near is not call.port:
            flow = self._open(key, call, now)
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

    def _open(self, key: bytes, call: Call, now: float) -> SplicedFlow | None:
        """Open the flow of a client that has not been seen yet; None if that is not allowed."""
        old = self._flows.get(key)
        if old is not None:
            self._flows.remove(old)
        listener, peer, local = call.listener, call.peer, call.local
        target = self._policy.spliced_to(listener, local)
        if target is None:
            self._log.flow("udp", f"{unpack(local)} is not a loopback address: not passed on", now)
            return None
        outward = listener.rule.side == GUEST
        maker = self._host if outward else self._guest
        if not maker.available or maker.pending >= REQUESTS_MAX:
            return None
        server = Peer(pack(target[0]), target[1])
        kind = family(server.address)
        control = routes.ancillary(local, 0, 0, peer) if len(local) == len(peer.address) else b""
        name = f"{endpoint(peer.address, peer.port)} -> {endpoint(server.address, server.port)}"
        flow = SplicedFlow(key, now, call.port, call.address, control, routes.sockaddr(kind, server), name)
        self._flows.add(flow)
        if self._log.debug_on:
            self._log.debug(f"udp {flow.name()}")

        def done(socks: list[socket.socket], error: int) -> None:
            if flow.closed or error:
                for sock in socks:
                    sock.close()
                if error:
                    self._log.flow("udp", f"a socket for {target[0]}: {os.strerror(error)}", flow.used)
                self._flows.remove(flow)
            else:
                self._complete(flow, socks[0])

        bind = (LOOPBACK[kind] if outward else routes.ANY[kind], peer.port)
        v6only = True if outward and kind == socket.AF_INET6 else None
        maker.ask(
            SocketRequest(int(kind), int(socket.SOCK_DGRAM), bind=bind, any_port=True, v6only=v6only), done
        )
        return None if flow.closed else flow

    def _complete(self, flow: SplicedFlow, sock: socket.socket) -> None:
        """The socket is there: what was pending goes out."""
        routes.tune(sock)
        flow.far = far = Port(sock)
        self._by_fd[far.fd] = flow
        flow.forgotten = self._forgotten
        self._epoll.register(far.fd, select.EPOLLIN)
        for data in flow.pending:
            for _ in range(2):
                # The first try may report an error that an earlier datagram caused
                if not self._packets.send_bytes(data, far.fd, flow.server, b""):
                    break
        flow.pending.clear()
        flow.held = 0

    def on_ready(self, ready_sockets: Iterable[tuple[int, int]], now: float) -> None:
        """Servers have answered: one batch of each is passed on, so that all have their turn."""
        for fd, ready in ready_sockets:
            flow = self._by_fd.get(fd)
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
            self._by_fd.pop(flow.far.fd, None)
            flow.far.sock.close()

    def forget(self, sock: socket.socket) -> None:
        """A listener is being closed: its flows end."""
        for flow in list(self._by_fd.values()):
            if flow.near.sock is sock:
                self._flows.remove(flow)

    def close(self) -> None:
        """End all flows."""
        for flow in list(self._by_fd.values()):
            self._flows.remove(flow)
