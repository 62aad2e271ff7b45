"""The guest's addresses and ports as sockets on the host: one for each, whatever it talks to.

Owns these sockets.  Imports `observe`, `sockets`, `wire` and the files of this room.

An endpoint is an address and a port of the guest's (RFC 4787, REQ-1: endpoint-independent mapping).  Its socket is at
the same port of the host if that is free.
"""

import errno
import itertools
import select
import socket
from collections import OrderedDict
from typing import Any, Final

from .. import wire
from ..observe.describe import flow_name
from ..sockets.request import Maker
from . import routes
from .routes import Peer, Port
from .table import OUTBOUND, Expiring, Table

PRIVILEGED: Final = 1024  # PROT_SOCK

NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
EVICT_LOOKS: Final = 256  # at flows that were never answered, for an endpoint that has no other


class TapFlow(Expiring):
    """A flow between the guest and a host; `key` is as in the guest's datagrams.

    `peer` and `address` (a struct sockaddr) are where its datagrams go, by `port`; `source` (packed) and `interface`
    (an index) where they leave from.  `start` is the start of frames to the guest.
    """

    __slots__ = ("address", "control", "interface", "peer", "port", "source", "start", "ttl")

    def __init__(self, key: bytes, now: float, share: int, port: Port, peer: Peer, start: bytes) -> None:
        super().__init__(key, now, share)
        self.port = port
        self.peer = peer
        self.address = routes.sockaddr(port.family, peer)
        self.start = start
        self.source = b""
        self.interface = 0
        self.ttl = -1
        self.control = b""

    def use_ttl(self, ttl: int) -> None:
        """Send with the guest's hop limit (traceroute depends on it): to here the datagram has made no hop."""
        if ttl != self.ttl:
            self.ttl = ttl
            self.control = routes.ancillary(self.source, self.interface, ttl, self.peer)

    def name(self) -> str:
        """The flow in words, as the guest has it."""
        return flow_name(self.key)


class Asked:
    """An address of the host's network that an endpoint has sent to.

    `guest` is the address by which the guest knows it (packed), `flows` how many flows lead there, and `flow` the one
    that was opened last.
    """

    __slots__ = ("flow", "flows", "guest")

    def __init__(self, guest: bytes) -> None:
        self.guest = guest
        self.flows = 0
        self.flow: TapFlow | None = None


class Endpoint(Port):
    """An address and port of the guest's, as a socket on the host.

    `name` is address and port as in a flow key, `number` the port on the host, `mac` the MAC address of the guest's
    that the first datagram came from.  `asked`: by packed address; `peers`: flows by the peer's struct sockaddr.
    Until `open_until` any host may answer.  `hops`: routers (packed) that were looked up, valid until `hops_until`.
    """

    __slots__ = ("answered", "asked", "hops", "hops_until", "mac", "name", "number", "open_until", "peers")

    def __init__(self, sock: socket.socket, name: bytes, mac: bytes) -> None:
        super().__init__(sock)
        self.name = name
        self.number: int = sock.getsockname()[1]
        self.mac = mac
        self.answered = 0  # how many of its flows were answered
        self.open_until = 0.0
        self.hops: set[bytes] = set()
        self.hops_until = 0.0
        self.asked: dict[bytes, Asked] = {}
        self.peers: dict[bytes, TapFlow] = {}

    @property
    def guest(self) -> bytes:
        """The guest's packed address."""
        return self.name[:4] if self.family == socket.AF_INET else self.name[:16]


class Endpoints:
    """All endpoints, at most `most`; `epoll` watches their sockets, `flows` is the table of their flows."""

    def __init__(self, epoll: select.epoll, maker: Maker, flows: Table[Any], most: int) -> None:
        self._epoll = epoll
        self._maker = maker
        self._flows = flows
        self.most = max(most, 1)
        # By name, the least loss first; and by descriptor
        self._endpoints: OrderedDict[bytes, Endpoint] = OrderedDict()
        self._by_fd: dict[int, Endpoint] = {}
        self.by_fd = self._by_fd.get

    def __len__(self) -> int:
        return len(self._endpoints)

    def ports(self) -> int:
        """The ports of the host that these sockets have, as bits."""
        bits = 0
        for endpoint in self._endpoints.values():
            bits |= 1 << endpoint.number
        return bits

    def get(self, key: bytes, host: bytes, mac: bytes) -> Endpoint:
        """The endpoint that a flow with this key uses to reach the packed address `host`; raises OSError.

        Where answers could come from one host that the guest knows by two addresses, the endpoint is two sockets.
        """
        guest, called = wire.key_source(key), wire.key_destination(key)
        name = guest + key[-4:-2]
        endpoint = self._endpoints.get(name)
        if endpoint is not None:
            asked = endpoint.asked.get(host)
            if asked is not None and asked.guest != called:
                name += called
                endpoint = self._endpoints.get(name)
        if endpoint is not None:
            self._endpoints.move_to_end(name)
            return endpoint
        if len(self._endpoints) >= self.most:
            self._evict()
        endpoint = Endpoint(self._open(wire.family(guest), wire.key_source_port(key)), name, mac)
        self._endpoints[name] = endpoint
        self._by_fd[endpoint.fd] = endpoint
        self._epoll.register(endpoint.fd, select.EPOLLIN)
        return endpoint

    def _open(self, family: socket.AddressFamily, number: int) -> socket.socket:
        if number < PRIVILEGED:
            number = 0  # with privileges we could bind it, but the host's services use such ports
        try:
            return routes.open_port(self._maker, family, routes.ANY[family], number)
        except OSError as e:
            if e.errno not in NO_DESCRIPTOR or not self._evict():
                raise
            return routes.open_port(self._maker, family, routes.ANY[family], number)

    def add(self, endpoint: Endpoint, flow: TapFlow, called: bytes) -> None:
        """Add a flow to an endpoint until it is forgotten; `called` (packed) is where the guest sends."""
        asked = endpoint.asked.get(flow.peer.address)
        if asked is None:
            endpoint.asked[flow.peer.address] = asked = Asked(called)
        asked.flows += 1
        asked.flow = flow
        endpoint.peers[flow.address] = flow

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

    def answered(self, endpoint: Endpoint, flow: TapFlow, now: float) -> None:
        """A host has answered a flow of an endpoint's."""
        if not flow.answered:
            endpoint.answered += 1
            # An endpoint that has a conversation is the last to give way
            self._endpoints.move_to_end(endpoint.name)
        self._flows.answer(flow, now)

    def _evict(self) -> bool:
        """Drop the endpoint whose loss matters least, with its flows; False if there is none."""
        if not self._endpoints:
            return False
        looked_at = itertools.islice(self._flows.unanswered(OUTBOUND), EVICT_LOOKS)
        ports = (flow.port for flow in looked_at)
        silent = (port for port in ports if isinstance(port, Endpoint) and not port.answered)
        self._forget(next(silent, next(iter(self._endpoints.values()))))
        return True

    def _forget(self, endpoint: Endpoint) -> None:
        for flow in list(endpoint.peers.values()):
            self._flows.remove(flow)
        self._drop(endpoint)

    def _drop(self, endpoint: Endpoint) -> None:
        if self._by_fd.pop(endpoint.fd, None) is not None:
            self._endpoints.pop(endpoint.name, None)
            endpoint.sock.close()

    def release(self, number: int) -> bool:
        """Give up the sockets at a port of the host's, which a listener wants; True if there were any.

        From then on the guest's datagrams from this port go through the listener.
        """
        held = [endpoint for endpoint in self._endpoints.values() if endpoint.number == number]
        for endpoint in held:
            self._forget(endpoint)
        return bool(held)

    def close(self) -> None:
        """Close all sockets."""
        for endpoint in list(self._endpoints.values()):
            self._drop(endpoint)
