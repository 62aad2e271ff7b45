"""How a TCP flow comes to be: by the guest's SYN, or by a client on the host.

Owns the secret of initial sequence numbers.  Imports `tap`, `host`, `flows`, `translate`, `observe` and `tcp`.
"""

import errno
import functools
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

from .flows import Flow, Flows
from .host import HostSocket, HostSockets
from .linger import reset
from .observe.log import Log
from .observe.trace import WindowTrace
from .observe.words import flow_name
from .tap import TapDevice, TapEnd
from .tcp import seq, window
from .tcp.connection import UNREACHABLE, Connection
from .tcp.doors import ACK, FIN, RST, SYN, Run
from .tcp.small_queue import SmallQueue
from .translate import KEY4_LEN, Translation, unpack

IPV4_HEADER = 20
IPV6_HEADER = 40
TCP_HEADER = 20

PORT_TRIES = 16
NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

# What we offer at most where the guest may leave segmentation to us.  Frames are 64 KiB then whatever the MSS;
# but a window moves by whole segments, and a young send buffer of 45 KiB does not hold one of 64 KiB.
MSS_MAX_VNET = 16 * 1024


class Link(NamedTuple):
    """The tap's side of things: sizes in bytes, addresses packed."""

    mtu: int
    tx_queue: int
    ipv4: bool
    ipv6: bool
    tcp: bool
    udp: bool
    icmp: bool
    freebind: bool = False
    limit_output: int | None = 0  # bytes, 0: no bound, None: as small_queue.py finds out
    window: str = window.DEFAULT_NAME  # a name in window.ESTIMATORS
    udp_filter: str = "address"  # who may answer: a name in datagram.udp.FILTERS
    broadcasts: frozenset[bytes] = frozenset()  # directed broadcast addresses of the guest's networks


class Births:
    """Makes connections, and adds them to the table."""

    def __init__(
        self,
        tap: TapDevice | None,
        hosts: HostSockets | None,
        flows: Flows,
        translation: Translation,
        link: Link,
        queue: SmallQueue,
        log: Log,
        trace: WindowTrace | None,
        learn: Callable[[bytes, bytes], None],
    ) -> None:
        self._tap = tap
        self._hosts = hosts
        self._flows = flows
        self._translation = translation
        self._link = link
        self._queue = queue
        self._log = log
        self._trace = trace
        self._learn = learn
        self._secret = os.urandom(32)
        self._estimate = window.ESTIMATORS[link.window]
        self._mss_max = MSS_MAX_VNET if tap is not None and tap.vnet else link.mtu

    def from_tap(self, run: Run, now: float) -> Flow | None:
        """The first segment of a flow; None if none came of it."""
        assert self._tap is not None and self._hosts is not None
        key: bytes = run.key  # type: ignore[attr-defined]
        link = self._link
        if not (link.tcp and (link.ipv4 if len(key) == KEY4_LEN else link.ipv6)):
            return None
        headers = self._tap.headers(run.handle)
        mac = headers[6:12]
        if run.flags & (SYN | ACK | RST) != SYN:
            self._refuse(run, key, mac)
            return None
        self._learn(mac, key)
        station = self._tap.station(key[:4] if len(key) == KEY4_LEN else key[:16], mac)
        if station.mac != mac and not mac[0] & 1:
            station.mac = mac
        oldest = self._flows.longest_waiting(inbound=False)
        if oldest is not None:
            oldest.connection.abandon()
            self._flows.settle(oldest)
        if not self._flows.has_room():
            self._log.flow("limit", "too many connections, a SYN was dropped", now)
            return None

        target = self._translation.target(key)
        unreachable = functools.partial(self._tap.unreachable, headers)
        try:
            host = self._hosts.connect(target.family, target.address, target.source, target.interface)
        except OSError as e:
            self._log.flow("connect", f"{target.address[0]}: {e.strerror}", now)
            if e.errno in UNREACHABLE:
                unreachable(e.errno)
            elif e.errno not in NO_DESCRIPTOR:
                self._tap.reset(key, mac, 0, seq.add(run.seq, 1), RST | ACK)
            return None
        flow = self._add(key, mac, host, run, unreachable, now)
        if self._log.debug_on:
            self._log.debug(f"{flow_name(flow.key)}: connecting to {target.address[0]}")
        return flow

    def from_host(
        self, sock: socket.socket, guest: bytes, port: int, client: bytes, client_port: int, now: float
    ) -> Flow | None:
        """A client that was accepted on the host, for `port` of the guest; it is reset where that cannot be."""
        key = self._inbound_key(guest, port, client, client_port)
        oldest = self._flows.longest_waiting(inbound=True)
        if oldest is not None:
            oldest.connection.reset(errno.ETIMEDOUT)
            self._flows.settle(oldest)
        if (
            key is None
            or self._tap is None
            or self._hosts is None
            or not self._flows.has_room(inbound=True)
        ):
            self._log.flow("inbound", f"no way for {unpack(client)} to the guest", now)
            reset(sock)
            return None
        try:
            host = self._hosts.adopt(sock)
        except OSError as e:
            self._log.flow("inbound", f"{unpack(client)}: {e.strerror}", now)
            return None
        flow = self._add(key, self._tap.guest_mac, host, None, lambda error: None, now)
        flow.connection.open(now)
        if self._log.debug_on:
            self._log.debug(f"{flow_name(key)}: a client on the host")
        return flow

    def _inbound_key(self, guest: bytes, port: int, client: bytes, client_port: int) -> bytes | None:
        """The flow of a client as the guest's segments will have it; None if the guest cannot answer."""
        caller = self._translation.caller(client, guest)
        if not caller or not guest:
            return None
        # Two addresses of the host that are one to the guest may use the same port
        others = (1024 + int.from_bytes(os.urandom(4), "big") % (65536 - 1024) for _ in range(PORT_TRIES))
        for number in (client_port, *others):
            key = guest + caller + port.to_bytes(2, "big") + number.to_bytes(2, "big")
            if self._flows.lookup(key) is None:
                return key
        return None

    def _add(
        self,
        key: bytes,
        mac: bytes,
        host: HostSocket,
        run: Run | None,
        unreachable: Callable[[int], None],
        now: float,
    ) -> Flow:
        """A flow of the table; without a run it comes from the host."""
        assert self._tap is not None and self._hosts is not None
        header = IPV4_HEADER if len(key) == KEY4_LEN else IPV6_HEADER
        connection = Connection(
            TapEnd(self._tap, mac, key, unreachable),
            host,
            run,
            isn=seq.isn(self._secret, key, now),
            mss=min(self._link.mtu - header - TCP_HEADER, self._mss_max),
            queue=self._queue,
            now=now,
            estimate=self._estimate,
            trace=self._trace.of_flow(flow_name(key)) if self._trace is not None else None,
        )
        flow = self._flows.add(key, connection, inbound=run is None)
        self._hosts.own(host, flow)
        return flow

    def _refuse(self, run: Run, key: bytes, mac: bytes) -> None:
        """RFC 9293, 3.10.7.1: a segment for a connection that does not exist."""
        assert self._tap is not None
        if run.flags & RST:
            return
        if run.flags & ACK:
            self._tap.reset(key, mac, run.ack, 0, RST)
        else:
            length = run.length + bool(run.flags & FIN) + bool(run.flags & SYN)
            self._tap.reset(key, mac, 0, seq.add(run.seq, length), RST | ACK)
