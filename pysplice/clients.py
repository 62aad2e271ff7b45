"""What becomes of the clients of listeners: connections through the tap, spliced connections, datagrams.

Owns nothing: the flows are those of the planes.  Imports `config`, `datagram`, `forward`, `observe`, `sockets`,
`splice`, `stream` and `wire`.
"""

import socket
from typing import Any

from .config.ports import GUEST
from .datagram.plane import DatagramPlane
from .forward.policy import Listener, Policy
from .observe.describe import endpoint
from .observe.log import Log
from .sockets.request import Maker
from .splice.plane import SplicePlane
from .stream.linger import reset
from .stream.plane import Streams
from .wire import pack, unpack


class ListenerClients:
    """Takes what listeners report (see forward.listeners.Takers).

    `host` and `guest` make sockets on the two sides.
    """

    def __init__(
        self,
        streams: Streams,
        datagrams: DatagramPlane,
        splices: SplicePlane,
        host: Maker,
        guest: Maker,
        policy: Policy,
        log: Log,
    ) -> None:
        self._streams = streams
        self._datagrams = datagrams
        self._splices = splices
        self._host = host
        self._guest = guest
        self._policy = policy
        self._log = log
        self.spliced_max = 1  # connections; the budget changes it
        self.refused = 0

    def _can_splice(self, listener: Listener) -> bool:
        """False if no socket can be made on the server's side."""
        return (self._host if listener.rule.side == GUEST else self._guest).available

    def accepted(self, listener: Listener, sock: socket.socket, address: Any, now: float) -> None:
        """A TCP client has connected."""
        unix = sock.family == socket.AF_UNIX
        client = b"" if unix else pack(address[0])
        # Where nothing can be spliced, clients on the loopback interface go through the tap; UNIX ones cannot
        splices = unix or self._can_splice(listener)
        if not splices or not self._policy.is_spliced(listener.rule, client):
            guest = self._policy.guest(listener.rule, client)
            self._streams.accepted(sock, guest, listener.target, client, address[1], now)
            return
        local = b"" if unix else pack(sock.getsockname()[0])
        target = self._policy.spliced_to(listener, local)
        if target is None:
            self.refused += 1
            self._log.flow("inbound", f"{unpack(local)} is not a loopback address: not passed on", now)
            reset(sock)
            return
        source = listener.rule.path or endpoint(client, address[1])
        name = f"{source} -> {endpoint(pack(target[0]), target[1])}"
        self._splice(listener, sock, target, name)

    def _splice(
        self, listener: Listener, client: socket.socket, target: tuple[str, int], name: str
    ) -> None:
        """Splice a client to the server at `target`, on the other side."""
        from_guest = listener.rule.side == GUEST
        maker = self._host if from_guest else self._guest
        if self._log.debug_on:
            self._log.debug(f"{name}: spliced")
        if len(self._splices.streams) + maker.waiting >= self.spliced_max:
            self.refused += 1
            reset(client)
            return

        def taken(server: socket.socket | None, error: int) -> None:
            if server is None:
                self.refused += 1
                reset(client)
            else:
                self._splices.streams.start(client, server, target, name, from_guest)

        maker.stream(socket.AF_INET6 if ":" in target[0] else socket.AF_INET, taken)

    def arrived(self, listener: Listener, failed: bool, now: float) -> None:
        """A UDP listener has datagrams, or errors."""
        self._datagrams.arrived(listener, failed, self._can_splice(listener), now)

    def opened(self, listener: Listener) -> None:
        """A UDP listener was opened."""
        self._datagrams.opened(listener)

    def closed(self, listener: Listener) -> None:
        """A UDP listener is being closed."""
        self._datagrams.closed(listener)

    def ports(self, side: str) -> int:
        """The UDP ports of a side that our sockets have, except listeners, as bits."""
        return self._datagrams.ports(side) | self._splices.datagrams.ports(side)

    def release(self, port: int) -> bool:
        """Give up a UDP port of the host's; True if one of our sockets had it."""
        return self._datagrams.release(port)
