"""The loop: readiness in, calls out, one heap of timers.

Owns the event loop and the wiring of the rooms; the only room that imports uvloop.  Holds no protocol:
which flow a run belongs to is for flows.py, what becomes of it for tcp/, what a frame of another kind
asks for services/.
"""

import asyncio
import contextlib
import errno
import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import uvloop

from .flows import Flow, Flows, Outbound
from .host import HostSockets
from .observe.log import Log
from .observe.trace import WindowTrace
from .services import arp, icmp, ndp
from .tap import TapDevice, TapEnd
from .tcp import seq, small_queue, window
from .tcp.connection import UNREACHABLE, Connection
from .tcp.doors import ACK, FIN, RST, SYN, Run
from .tcp.events import CLOSED, ESTABLISHED, SOCK_FIN_SENT

KEY4_LEN = 12
IPV4_HEADER = 20
IPV6_HEADER = 40
TCP_HEADER = 20

# How long what an ended command, or somebody in an ended namespace, has said may take to go out, seconds
LINGER_COMMAND = 10.0
LINGER_NAMESPACE = 1.0

LAST_BATCHES = 16

# What we offer at most where the guest may leave segmentation to us.  Frames are 64 KiB then whatever the MSS;
# but a window moves by whole segments, and a young send buffer of 45 KiB does not hold one of 64 KiB.
MSS_MAX_VNET = 16 * 1024


@dataclass(frozen=True)
class Link:
    """The tap's side of things: sizes in bytes, addresses packed."""

    mtu: int
    tx_queue: int
    ipv4: bool
    ipv6: bool
    tcp: bool
    neighbours: bool
    guest_addresses: frozenset[bytes]
    router: ndp.Router | None
    source4: bytes  # what ICMP errors come from; empty: the address that failed
    source6: bytes
    limit_output: int | None = 0  # bytes, 0: no bound, None: as small_queue.py finds out
    window: str = window.DEFAULT_NAME  # a name in window.ESTIMATORS


def flow_name(key: bytes) -> str:
    """A flow in words: source and destination as the guest has them."""
    family = socket.AF_INET if len(key) == KEY4_LEN else socket.AF_INET6
    half = len(key) // 2 - 2
    source, destination = (socket.inet_ntop(family, key[i : i + half]) for i in (0, half))
    ports = [int.from_bytes(key[i : i + 2], "big") for i in (2 * half, 2 * half + 2)]
    return f"[{source}]:{ports[0]} -> [{destination}]:{ports[1]}"


class Proxy:
    """One tap, its flows and their host sockets."""

    def __init__(
        self,
        tap: TapDevice,
        link: Link,
        outbound: Outbound,
        log: Log,
        flow_max: int,
        trace: TextIO | None = None,
    ) -> None:
        self.tap = tap
        self.link = link
        self.outbound = outbound
        self.log = log
        self.hosts = HostSockets(tap.send_run, tap.store_run)
        self.flows = Flows(flow_max)
        self._secret = os.urandom(32)
        self._estimate = window.ESTIMATORS[link.window]
        segment = small_queue.LARGE if tap.vnet else link.mtu - IPV4_HEADER - TCP_HEADER
        self._queue = small_queue.SmallQueue(link.tx_queue, segment, link.limit_output)
        self._resuming = False
        self._mss_max = MSS_MAX_VNET if tap.vnet else link.mtu
        self.complaint = ""  # what the user has to know at the end
        self._loop = uvloop.new_event_loop()
        self._trace: WindowTrace | None = None
        if trace is not None:
            self._trace = WindowTrace(trace, time.monotonic, self._loop.call_later, self._trace_failed)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._status = 0
        self._command = False
        self._ending = False

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back when a descriptor of somebody else's is readable."""
        self._loop.add_reader(fd, callback)

    def run(self, watch_fd: int, on_watch: Callable[[], int | None], command: bool = False) -> int:
        """Serve until `on_watch`, called when `watch_fd` is readable, gives an exit status.

        With `command` it is that of a command, and nothing else ends us but a signal.
        """
        loop = self._loop
        self._command = command

        def ended() -> None:
            status = on_watch()
            if status is not None:
                loop.remove_reader(watch_fd)
                self._end(status)

        loop.add_reader(self.tap.fileno(), self._on_tap)
        loop.add_reader(self.hosts.fileno(), self._on_hosts)
        if watch_fd >= 0:
            loop.add_reader(watch_fd, ended)
        for number in (signal.SIGTERM, signal.SIGQUIT):
            loop.add_signal_handler(number, self.stop, 0)
        try:
            loop.run_forever()
        finally:
            self._bury()
            counts = f"{self.flows.opened} connections, {self.flows.refused} refused for want of room"
            self.log.debug(f"{counts}, {self.tap.dropped} frames dropped as invalid")
            if self._trace is not None:
                self._trace.close()
            self.hosts.close()
            self.tap.close()
            loop.close()
        return self._status

    def stop(self, status: int) -> None:
        self._status = status
        self._loop.stop()

    def _end(self, status: int) -> None:
        """The command or the namespace has ended: what it has said still goes out, if that is soon."""
        self._status = status
        self._ending = True
        linger = LINGER_COMMAND if self._command else LINGER_NAMESPACE
        self._loop.call_later(linger, self.stop, status)
        self._on_tap()

    def _all_said(self) -> bool:
        """True if no connection waits for the rest of what its guest had to say."""
        facts = (flow.connection.facts for flow in self.flows.all())
        return not any(held & (ESTABLISHED | SOCK_FIN_SENT) == ESTABLISHED for held in facts)

    def _bury(self) -> None:
        """The end of all flows: what was passed on completely is the kernel's to deliver."""
        with contextlib.suppress(OSError):
            for _ in range(LAST_BATCHES):
                runs, frames = self.tap.drain()
                if not runs and not frames:
                    break
                self._take_runs(runs, frames)
        for flow in self.flows.all():
            if flow.connection.facts & SOCK_FIN_SENT:
                flow.connection.host.close()
            else:
                flow.connection.host.abort()

    # Readiness

    def _on_tap(self) -> None:
        began = time.monotonic()
        try:
            runs, frames = self.tap.drain()
        except OSError as e:
            # The device is gone, often with its namespace.  A command that runs goes on without it.
            self._loop.remove_reader(self.tap.fileno())
            self.log.warning(f"the tap is gone: {e.strerror}")
            if not self._command or self._ending:
                self.stop(self._status)
            return
        self._queue.seen(runs, began)
        self._take_runs(runs, frames)
        if self._queue.watching:
            total = sum([run.length for run in runs])
            self._queue.served(total, time.monotonic() - began)
        self._resume_later(began)

    def _take_runs(self, runs: Sequence[Run], frames: Sequence[bytes]) -> None:
        """What a batch of frames means for flows and services."""
        now = time.monotonic()
        lookup = self.flows.lookup
        settle = self.flows.settle
        heard: list[Flow] = []
        for run in runs:
            flow = lookup(run.key)  # type: ignore[attr-defined]
            try:
                if flow is None:
                    flow = self._birth(run, now)
                    if flow is None:
                        continue
                else:
                    flow.connection.on_tap(run, now)
                    if flow.connection.ack_due:
                        heard.append(flow)
                    elif flow.connection.facts & CLOSED and run.flags & SYN:
                        # The old connection has made place for a new one with the same ports
                        settle(flow)
                        flow = self._birth(run, now)
                        if flow is None:
                            continue
            except Exception as e:
                self._failed(flow, e)
            if flow is not None:
                settle(flow)
                if self.log.debug_on and flow.connection.facts & CLOSED:
                    self._say_end(flow)
        for frame in frames:
            try:
                self._serve(frame)
            except Exception as e:
                self._failed(None, e)
        # An answer that is there by now carries the acknowledgement
        self._on_hosts()
        for flow in heard:
            try:
                flow.connection.acknowledge()
            except Exception as e:
                self._failed(flow, e)
                settle(flow)

    def _on_hosts(self) -> None:
        now = time.monotonic()
        owners = self.hosts.owners
        settle = self.flows.settle
        for fd, ready in self.hosts.poll():
            flow = owners.get(fd)
            if flow is not None:
                try:
                    flow.connection.on_host(ready, now)
                except Exception as e:
                    self._failed(flow, e)
                settle(flow)
                if self.log.debug_on and flow.connection.facts & CLOSED:
                    self._say_end(flow)
        self._set_timer()
        self._resume_later(now)
        if self._ending and self._all_said():
            self.stop(self._status)

    def _failed(self, flow: Flow | None, error: Exception) -> None:
        """A defect of ours met one flow: it is reset, and the others of its batch go on."""
        name = flow_name(flow.key) if flow is not None else "no flow"
        self.log.defect(f"{name}: {type(error).__name__}: {error}", time.monotonic())
        if flow is not None:
            flow.connection.reset(errno.EIO)

    def _set_timer(self) -> None:
        at = self.flows.next_deadline()
        if at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self._loop.call_later(max(at - time.monotonic(), 0), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._timer_at = float("inf")
        # The loop counts in milliseconds, and may be one early
        self.flows.expire(time.monotonic() + 0.001, self._failed)
        self._set_timer()

    def _trace_failed(self, why: str) -> None:
        self.complaint = why
        self.log.warning(why)

    def _resume(self) -> None:
        """Those whom the small queue holds back go on, once there is place for what they send."""
        self._resuming = False
        now = time.monotonic()
        for connection in self._queue.resume(now, not self.tap.readable()):
            try:
                connection.resume()
            except Exception as e:
                self._failed(None, e)
        self._resume_later(now)

    def _resume_later(self, now: float) -> None:
        if self._queue.throttled and not self._resuming:
            self._resuming = True
            self._loop.call_later(self._queue.resume_after(now), self._resume)

    # Birth

    def _birth(self, run: Run, now: float) -> Flow | None:
        """The first segment of a flow; None if none came of it."""
        key: bytes = run.key  # type: ignore[attr-defined]
        link = self.link
        ipv4 = len(key) == KEY4_LEN
        if not (link.tcp and (link.ipv4 if ipv4 else link.ipv6)):
            return None
        headers = self.tap.headers(run.handle)
        mac = headers[6:12]
        if run.flags & (SYN | ACK | RST) != SYN:
            self._refuse(run, key, mac)
            return None
        if not self.flows.has_room():
            self.log.flow("limit", "too many connections, a SYN was dropped", now)
            return None

        target = self.outbound.target(key)
        unreachable = functools.partial(self._unreachable, headers)
        try:
            host = self.hosts.connect(target.family, target.address, target.source, target.interface)
        except OSError as e:
            self.log.flow("connect", f"{target.address[0]}: {e.strerror}", now)
            if e.errno in UNREACHABLE:
                unreachable(e.errno)
            elif e.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.tap.reset(key, mac, 0, seq.add(run.seq, 1), RST | ACK)
            return None
        connection = Connection(
            TapEnd(self.tap, mac, key, unreachable),
            host,
            run,
            isn=seq.isn(self._secret, key, now),
            mss=min(link.mtu - (IPV4_HEADER if ipv4 else IPV6_HEADER) - TCP_HEADER, self._mss_max),
            queue=self._queue,
            now=now,
            estimate=self._estimate,
            trace=self._trace.of_flow(flow_name(key)) if self._trace is not None else None,
        )
        flow = self.flows.add(key, connection)
        self.hosts.own(host, flow)
        if self.log.debug_on:
            self.log.debug(f"{flow_name(key)}: connecting to {target.address[0]}")
        return flow

    def _say_end(self, flow: Flow) -> None:
        error = flow.connection.error
        end = os.strerror(error) if error else "closed"
        counts = (
            f"{flow.connection.retransmissions} retransmissions, "
            f"{flow.connection.short_sends} of {flow.connection.sends} sends short"
        )
        self.log.debug(f"{flow_name(flow.key)}: {end}; {counts}")

    def _refuse(self, run: Run, key: bytes, mac: bytes) -> None:
        """RFC 9293, 3.10.7.1: a segment for a connection that does not exist."""
        if run.flags & RST:
            return
        if run.flags & ACK:
            self.tap.reset(key, mac, run.ack, 0, RST)
        else:
            length = run.length + bool(run.flags & FIN) + bool(run.flags & SYN)
            self.tap.reset(key, mac, 0, seq.add(run.seq, length), RST | ACK)

    def _unreachable(self, headers: bytes, error: int) -> None:
        """Tell the guest by ICMP why its SYN led nowhere."""
        if headers[12:14] == b"\x08\x00":
            source = self.link.source4 or headers[30:34]
        else:
            source = self.link.source6 or headers[38:54]
        frame = icmp.unreachable(headers, error, self.tap.mac, source)
        if frame is not None:
            self.tap.emit_frame(frame)

    # Frames that are no TCP

    def _serve(self, frame: bytes) -> None:
        ethertype = frame[12:14]
        reply = None
        if ethertype == b"\x08\x06" and self.link.ipv4:
            reply = arp.answer(frame, self.tap.mac, self.link.guest_addresses)
        elif ethertype == b"\x86\xdd" and self.link.ipv6 and self.link.neighbours:
            reply = ndp.answer(frame, self.tap.mac, self.link.guest_addresses, self.link.router)
        if reply is not None:
            self.tap.emit_frame(reply)
