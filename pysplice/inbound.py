"""What clients of listeners become: connections through the tap, short cuts, datagrams.

Owns nothing: connections are births.py's, short cuts splice.py's, datagrams datagram/'s.  Imports these, `forward`,
`inside`, `linger`, `observe`, `ports` and `translate`.
"""

import socket
import time
from collections.abc import Callable
from typing import Any

from .births import Births
from .datagram.plane import Plane
from .datagram.routes import Port
from .flows import Flows
from .forward import Forward, Listener, Policy
from .inside import Inside
from .linger import reset
from .observe.log import Log
from .ports import GUEST
from .splice import Splices
from .translate import pack, unpack


class Inbound:
    """Takes what forward.py reports.

    `inside` is None once no process in the namespace makes sockets; `spliced_max` bounds short cuts.  `settled` is
    called when flows may have timers that are due sooner.
    """

    def __init__(
        self,
        births: Births,
        flows: Flows,
        splices: Splices,
        datagrams: Plane,
        policy: Policy,
        inside: Inside | None,
        log: Log,
        settled: Callable[[], None],
    ) -> None:
        self.inside = inside
        self.spliced_max = 1
        self._births = births
        self._flows = flows
        self._splices = splices
        self._datagrams = datagrams
        self._policy = policy
        self._log = log
        self._settled = settled

    def accepted(self, listener: Listener, sock: socket.socket, address: Any) -> None:
        """A TCP client."""
        unix = sock.family == socket.AF_UNIX
        client = b"" if unix else pack(address[0])
        # Without the helper in the namespace loopback comes by the tap; out of it we need none
        helped = self.inside is not None or listener.rule.side == GUEST or unix
        if not helped or not self._policy.short_cut(listener.rule, client):
            guest = self._policy.guest(listener.rule, client)
            now = time.monotonic()
            flow = self._births.from_host(sock, guest, listener.target, client, address[1], now)
            if flow is not None:
                self._flows.settle(flow)
                self._settled()
            return
        local = b"" if unix else pack(sock.getsockname()[0])
        target = self._policy.beyond(listener, local)
        if target is None:
            self._flows.refused += 1
            self._log.flow(
                "inbound", f"{unpack(local)} is no loopback address: not passed on", time.monotonic()
            )
            reset(sock)
            return
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        name = f"{listener.rule.path or f'[{unpack(client)}]:{address[1]}'} -> [{target[0]}]:{target[1]}"
        if self._log.debug_on:
            self._log.debug(f"{name}: short cut")
        if not self._room_for_splice():
            reset(sock)
        elif listener.rule.side == GUEST:
            try:
                server = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            except OSError:
                # There is no descriptor for it
                self._flows.refused += 1
                reset(sock)
                return
            self._splices.start(sock, server, target, name, from_guest=True)
        elif self.inside is None:
            reset(sock)
        else:

            def taken(server: socket.socket | None, error: int) -> None:
                if server is None:
                    reset(sock)
                else:
                    self._splices.start(sock, server, target, name)

            self.inside.stream(family, taken)

    def _room_for_splice(self) -> bool:
        coming = self.inside.claims if self.inside is not None else 0
        if len(self._splices) + coming < self.spliced_max:
            return True
        self._flows.refused += 1
        return False

    def arrived(self, listener: Listener, failed: bool) -> None:
        """A UDP listener has datagrams, or errors."""
        # Without the helper in the namespace loopback comes by the tap; out of it we need none
        helped = self.inside is not None or listener.rule.side == GUEST
        try:
            self._datagrams.on_listener(listener, failed, helped, time.monotonic())
        except Exception as e:
            self._log.defect(f"datagrams: {type(e).__name__}: {e}", time.monotonic())
        self._settled()

    # What forward.py asks of the sockets for datagrams

    def opened(self, listener: Listener) -> None:
        self._datagrams.clients.open(listener)

    def closed(self, listener: Listener) -> None:
        self._datagrams.clients.close(listener)

    def ports(self, side: str) -> int:
        ports = self._datagrams.spliced.ports(side == GUEST)
        return ports if side == GUEST else ports | self._datagrams.udp.ports()

    def release(self, port: int) -> bool:
        return self._datagrams.udp.release(port)

    def published(self, forward: Forward, port: int, guest: bytes) -> Port | None:
        """The socket that the guest's datagrams from a published port leave by."""
        listener = forward.udp_listener(port)
        if listener is None or guest not in (self._policy.guest4, self._policy.guest6):
            return None
        sock = self._datagrams.clients.port(listener)
        # On a kernel without IPv6 it is a socket of IPv4
        return sock if len(guest) == 4 or sock.family == socket.AF_INET6 else None
