"""How a TCP flow comes into being: by the guest's SYN, or by a client on the host.

Owns the secret of initial sequence numbers. Imports `budget`, `link`, `observe`, `tcp`, `translate`, `wire` and the
files of this room.
"""

import errno
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from .. import wire
from ..budget import RateLimit
from ..link.neighbours import Neighbours, Station
from ..link.tap import TapDevice, TapEnd
from ..observe.describe import flow_name
from ..observe.log import Log
from ..observe.trace import Trace
from ..tcp import seq, window
from ..tcp.connection import Connection
from ..tcp.connection import Terms as ConnectionTerms
from ..tcp.doors import ACK, FIN, RST, SYN, Run
from ..tcp.handshake import UNREACHABLE
from ..tcp.small_queue import SmallQueue
from ..translate import Translation
from ..wire import KEY4_LEN, unpack
from .flows import Flow, Flows
from .host import HostSocket, HostSockets
from .linger import reset

PORT_TRIES: Final = 16
NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# The largest MSS that we offer where the guest may leave segmentation to us.  Frames are 64 KiB then, whatever the MSS
# is; but a window moves by whole segments, and a young send buffer of 45 KiB does not hold a segment of 64 KiB.
MSS_MAX_VNET: Final = 16 * 1024


class Common(NamedTuple):
    """What all connections have in common.

    `ipv4`, `ipv6`: which versions carry TCP for the guest.  `mtu`: of the tap, bytes.  `queue`: the small queue.
    `estimate`: the rule for the window.  `trace`: of the windows.  `new_flows`: how many the guest may begin.
    """

    ipv4: bool
    ipv6: bool
    mtu: int
    queue: SmallQueue
    estimate: window.Estimator
    trace: Trace
    new_flows: RateLimit


class Opener:
    """Opens flows, and adds them to the table."""

    def __init__(
        self,
        tap: TapDevice,
        neighbours: Neighbours,
        hosts: HostSockets,
        flows: Flows,
        translation: Translation,
        common: Common,
        log: Log,
    ) -> None:
        self._tap = tap
        self._neighbours = neighbours
        self._hosts = hosts
        self._flows = flows
        self._translation = translation
        self._common = common
        self._log = log
        self._secret = os.urandom(32)
        self._mss_max = MSS_MAX_VNET if tap.vnet else common.mtu

    def _is_served(self, key: bytes) -> bool:
        return self._common.ipv4 if len(key) == KEY4_LEN else self._common.ipv6

    def admits(self, key: bytes, now: float) -> bool:
        """True if a SYN may open a flow, as far as the limit of new flows goes."""
        if not self._is_served(key):
            return False
        if self._common.new_flows.allows(now):
            return True
        # As if it were lost: the guest's kernel tries again
        self._flows.refused += 1
        self._log.flow("limit", "too many new flows, a SYN was dropped", now)
        return False

    def from_tap(self, run: Run, headers: bytes, now: float) -> Flow | None:
        """Open a flow for a SYN; `headers` are those of its frame.  None if that fails."""
        key: bytes = run.key  # type: ignore[attr-defined]
        mac = wire.frame_source(headers)
        guest = wire.key_source(key)
        self._neighbours.heard(mac, guest)
        station = self._neighbours.station(guest, mac)
        self._neighbours.moved(guest, mac)
        oldest = self._flows.longest_waiting(inbound=False)
        if oldest is not None:
            oldest.connection.reset(errno.ETIMEDOUT, silently=True)
            self._flows.settle(oldest)
        if not self._flows.has_room():
            self._log.flow("limit", "too many connections, a SYN was dropped", now)
            return None

        target = self._translation.target(key)
        try:
            host = self._hosts.connect(target.family, target.address, target.source, target.interface)
        except OSError as e:
            self._log.flow("connect", f"{target.address[0]}: {e.strerror}", now)
            if e.errno in UNREACHABLE:
                self._tap.unreachable(headers, e.errno, now)
            elif e.errno not in NO_DESCRIPTOR:
                self.refuse(run, headers)
            return None
        unreachable = partial(self._tap.unreachable, headers)
        flow = self._add(key, station, host, run, unreachable, now)
        if self._log.debug_on:
            self._log.debug(f"{flow_name(key)}: connecting to {target.address[0]}")
        return flow

    def from_host(
        self, sock: socket.socket, guest: bytes, port: int, client: bytes, client_port: int, now: float
    ) -> Flow | None:
        """Open the flow of a client that was accepted on the host, for `port` of the guest's address `guest`.

        If that is not possible, the client is reset.  Addresses are packed.
        """
        key = self._inbound_key(guest, port, client, client_port)
        oldest = self._flows.longest_waiting(inbound=True)
        if oldest is not None:
            oldest.connection.reset(errno.ETIMEDOUT)
            self._flows.settle(oldest)
        if key is None or not self._flows.has_room(inbound=True):
            self._log.flow("inbound", f"no way to the guest for {unpack(client)}", now)
            reset(sock)
            return None
        try:
            host = self._hosts.adopt(sock)
        except OSError as e:
            self._log.flow("inbound", f"{unpack(client)}: {e.strerror}", now)
            return None
        station = self._neighbours.station(guest, self._neighbours.mac)
        flow = self._add(key, station, host, None, lambda error, now: None, now)
        flow.connection.open(now)
        if self._log.debug_on:
            self._log.debug(f"{flow_name(key)}: a client on the host")
        return flow

    def _inbound_key(self, guest: bytes, port: int, client: bytes, client_port: int) -> bytes | None:
        """The key of a client's flow, as the guest's segments will have it; None if the guest could not answer."""
        caller = self._translation.caller(client, guest)
        if not caller or not guest:
            return None
        # Two addresses of the host that are one to the guest may use the same port
        others = (1024 + int.from_bytes(os.urandom(4), "big") % (65536 - 1024) for _ in range(PORT_TRIES))
        for number in (client_port, *others):
            key = wire.make_key(guest, caller, port, number)
            if self._flows.lookup(key) is None:
                return key
        return None

    def _add(
        self,
        key: bytes,
        station: Station,
        host: HostSocket,
        run: Run | None,
        unreachable: Callable[[int, float], None],
        now: float,
    ) -> Flow:
        """Add a flow to the table; without a run a client on the host has begun it."""
        common = self._common
        header = wire.IPV4 if len(key) == KEY4_LEN else wire.IPV6
        terms = ConnectionTerms(
            isn=seq.isn(self._secret, key, now),
            mss=min(common.mtu - header - wire.TCP, self._mss_max),
            queue=common.queue,
            estimate=common.estimate,
            trace=common.trace.of_flow(key),
        )
        tap_end = TapEnd(self._tap, station, key, unreachable)
        connection = Connection(tap_end, host, run, terms, now)
        flow = self._flows.add(key, connection, inbound=run is None)
        self._hosts.own(host, flow)
        return flow

    def refuse(self, run: Run, headers: bytes) -> None:
        """RFC 9293, 3.10.7.1: a segment for a connection that does not exist; `headers` are those of its frame."""
        key: bytes = run.key  # type: ignore[attr-defined]
        if run.flags & RST or not self._is_served(key):
            return
        mac = wire.frame_source(headers)
        if run.flags & ACK:
            self._tap.reset(key, mac, run.ack, 0, RST)
        else:
            length = run.length + bool(run.flags & FIN) + bool(run.flags & SYN)
            self._tap.reset(key, mac, 0, seq.add(run.seq, length), RST | ACK)
