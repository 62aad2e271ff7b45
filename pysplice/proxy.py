"""The loop: readiness in, calls out, one heap of timers.

Owns the event loop and the wiring of the rooms; the only room that imports uvloop.  Holds no protocol:
which flow a run belongs to is for flows.py, what becomes of it for tcp/ and datagram/, what a frame of another
kind asks for services/, who listens for forward.py.
"""

# system calls (serve): eventfd2 socketpair signalfd4 epoll_create1 rt_sigprocmask rt_sigaction

import asyncio
import contextlib
import errno
import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import uvloop

from . import budget
from ._cext import Datagrams
from .births import Births, Link
from .control import Control
from .datagram.echo import Echo
from .datagram.plane import NEVER, Limits, Plane
from .datagram.spliced import Spliced
from .datagram.udp import Udp
from .ending import Ending
from .flows import Flow, Flows
from .forward import LINK_LOCAL, SCAN_EVERY, Forward, Policy
from .host import HostSockets
from .inbound import Inbound
from .inside import Inside
from .observe import words
from .observe.log import Log
from .observe.trace import WindowTrace
from .ports import OPTIONS, TCP, UDP, Rule
from .services import ndp
from .services.desk import Desk
from .splice import Splices
from .tap import TapDevice
from .tcp import small_queue
from .tcp.doors import SYN, Run
from .tcp.events import CLOSED, TAP_FIN_RCVD
from .translate import KEY4_LEN, Translation
from .unix import Keeper

IPV4_HEADER = 20
TCP_HEADER = 20

# Seconds without progress, after which what an ended command, or namespace, has said is waited for no longer
LINGER_COMMAND = 10.0
LINGER_NAMESPACE = 1.0

SCAN_SOON = 0.01  # seconds

POLL_EVERY = 1.0  # seconds, where the end of a namespace is reported by nothing

LAST_BATCHES = 16

SIGNALS = (signal.SIGTERM, signal.SIGQUIT)  # they end us in order

ADVERTISE_EVERY = (200.0, 600.0)  # seconds, RFC 4861: MinRtrAdvInterval and MaxRtrAdvInterval


def hops(frame: bytes) -> int:
    """The hop limit of an Ethernet frame with an IP packet; -1 if it has none."""
    at = 14 + (8 if frame[12:14] == b"\x08\x00" else 7)
    return frame[at] if len(frame) >= 34 else -1


class Proxy:
    """One tap, its flows and their host sockets."""

    def __init__(
        self,
        tap: TapDevice | None,
        link: Link,
        desk: Desk,
        translation: Translation,
        policy: Policy,
        inside: Inside | None,
        keeper: Keeper | None,
        log: Log,
        descriptors: int,
        trace: TextIO | None = None,
    ) -> None:
        self.link = link
        self.desk = desk
        self.translation = translation
        self.policy = policy
        self.inside = inside
        self.keeper = keeper
        self.log = log
        self._loop = uvloop.new_event_loop()
        self._descriptors = descriptors
        most = budget.share_out(descriptors)
        self.flows = Flows(most.outbound, most.inbound, most.half_open)
        self.complaint = ""  # what the user has to know at the end
        self._resuming = False
        self._trace: WindowTrace | None = None
        if trace is not None:
            self._trace = WindowTrace(trace, time.monotonic, self._loop.call_later, self._trace_failed)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._status = 0
        self._command = False

        vnet = tap is not None and tap.vnet
        segment = small_queue.LARGE if vnet else link.mtu - IPV4_HEADER - TCP_HEADER
        self._queue = small_queue.SmallQueue(link.tx_queue, segment, link.limit_output)

        # Without a tap there is nothing but the short cut
        self.tap = tap
        self.hosts = HostSockets(tap.send_run, tap.store_run, most.lingering) if tap is not None else None
        self.births = Births(
            tap, self.hosts, self.flows, translation, link, self._queue, log, self._trace, self._learn
        )
        self.datagrams = Plane(
            tap,
            translation,
            policy,
            inside,
            udp=link.udp,
            echo=link.icmp,
            mtu=link.mtu,
            limits=Limits.of(most),
            log=log,
            filtering=link.udp_filter,
            broadcasts=link.broadcasts,
        )
        self.datagrams.udp.published = lambda port, guest: self.inbound.published(self.forward, port, guest)
        if tap is not None:
            tap.clock = time.monotonic
        self._expiring = False

        self.splices = Splices(self._splice_again)
        self._ending = Ending(
            self.flows, self.hosts, self.splices, self._loop.call_later, lambda: self.stop(self._status)
        )
        self.inbound = Inbound(
            self.births,
            self.flows,
            self.splices,
            self.datagrams,
            policy,
            inside,
            log,
            self._settled,
        )
        self.inbound.spliced_max = most.spliced
        self.forward = Forward(
            inside,
            keeper,
            ipv4=link.ipv4,
            ipv6=link.ipv6,
            freebind=link.freebind,
            scope=translation.scope,
            protocols=[*((TCP,) if link.tcp else ()), *((UDP,) if link.udp else ())],
            listeners_max=most.listeners,
            accepted=self.inbound.accepted,
            arrived=self.inbound.arrived,
            datagrams=self.inbound,
            warn=log.warning,
            warn_once=lambda text: log.once(text, text),
            later=self._loop.call_later,
        )
        self._scanning = False
        self._control = Control(self, self._show, self._loop.add_reader, self._loop.remove_reader)
        self._counts = ""
        self._dropped: dict[str, int] = {}
        self._capturing = tap is not None and tap.raw.capturing

    def _on_keeper(self) -> None:
        """Clients of the control socket."""
        assert self.keeper is not None
        try:
            for client in self.keeper.clients():
                self._control.take(client)
        except ConnectionError:
            self.log.warning("the process that keeps socket files is gone: no requests any more")
            self._loop.remove_reader(self.keeper.fileno())

    def _show(self) -> dict[str, Any]:
        options = {pair: option for option, pair in OPTIONS.items()}
        listening = (
            f"{options[held.rule.side, held.rule.protocol]} {held.rule.address or '*'} port {held.port}"
            for held in self.forward.listening()
            if not held.rule.path
        )
        paths = (f"-t {rule}" for rule in self.forward.rules if rule.path)
        of_udp = self.datagrams.udp.flows
        flows = itertools.chain(
            (f"tcp {words.flow_name(flow.key)}" for flow in self.flows.all()),
            (f"tcp {splice.name}, short cut" for splice in self.splices.all()),
            (f"udp {flow.name()}" for flow in of_udp),
        )
        return {
            "rules": [f"{options[rule.side, rule.protocol]} {rule}" for rule in self.forward.rules],
            "listening": words.shown(itertools.chain(listening, paths), len(self.forward)),
            "connections": words.shown(flows, len(self.flows) + len(self.splices) + len(of_udp)),
            "counts": self.counts(),
        }

    def add(self, rule: Rule) -> None:
        """Forward more; raises ConfigError."""
        self.forward.add(rule, running=True)
        if self.keeper is not None:
            self._on_keeper()  # a client may have come while a socket was waited for
        self._share_out()
        self.scan_later(0)

    def remove(self, rule: Rule) -> None:
        """Forward less; connections stay.  Raises ConfigError."""
        self.forward.remove(rule)
        self._share_out()

    def say_counts(self, seconds: int) -> None:
        """Say what was counted every so often, if it has changed."""
        counts = self.counts()
        if counts != self._counts:
            self._counts = counts
            self.log.info(counts)
        self._loop.call_later(seconds, self.say_counts, seconds)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back when a descriptor of somebody else's is readable."""
        self._loop.add_reader(fd, callback)

    def run(
        self,
        watch_fd: int,
        on_watch: Callable[[], int | None],
        started: Callable[[], None],
        command: bool = False,
        polled: bool = False,
    ) -> int:
        """Serve until `on_watch`, called when `watch_fd` is readable, gives an exit status.

        `started` is called once we serve.  With `command` the status is that of a command, and nothing else ends
        us but a signal.  With `polled` it is called now and then instead.
        """
        loop = self._loop
        self._command = command

        def ended() -> None:
            status = on_watch()
            if status is not None:
                if watch_fd >= 0:
                    loop.remove_reader(watch_fd)
                self._end(status)
            elif polled:
                loop.call_later(POLL_EVERY, ended)

        if self.tap is not None and self.hosts is not None:
            loop.add_reader(self.tap.fileno(), self._on_tap)
            loop.add_reader(self.hosts.fileno(), self._on_hosts)
        loop.add_reader(self.forward.fileno(), self.forward.on_ready)
        loop.add_reader(self.splices.fileno(), self.splices.on_ready)
        for flows in (self.datagrams.udp, self.datagrams.spliced, self.datagrams.echo):
            if flows is not None:
                loop.add_reader(flows.fileno(), self._on_sockets, flows)
        if self.inside is not None:
            loop.add_reader(self.inside.fileno(), self._on_inside)
        if self.keeper is not None:
            loop.add_reader(self.keeper.fileno(), self._on_keeper)
        if self.desk.router is not None:
            self._advertise(first=True)
        if watch_fd >= 0:
            loop.add_reader(watch_fd, ended)
        elif polled:
            loop.call_later(POLL_EVERY, ended)
        # A signal that comes before the loop runs would be lost in it
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop, 0)
        loop.call_soon(signal.pthread_sigmask, signal.SIG_UNBLOCK, SIGNALS)
        loop.call_soon(started)
        try:
            loop.run_forever()
        finally:
            self._bury()
            self.log.debug(self.counts())
            if self._trace is not None:
                self._trace.close()
            for room in (
                self._control,
                self.forward,
                self.splices,
                self.datagrams,
                self.hosts,
                self.tap,
                self.inside,
                self.keeper,
            ):
                if room is not None:
                    room.close()
            loop.close()
        return self._status

    def counts(self) -> str:
        """What has happened so far, in one line."""
        invalid = sum(self.tap.dropped.values()) if self.tap is not None else 0
        return (
            f"{self.flows.opened} connections ({len(self.flows)} open), {self.flows.refused} refused for want "
            f"of room, {self.splices.opened} short cuts ({len(self.splices)} open), "
            f"{self.datagrams.udp.flows.opened} UDP flows ({len(self.datagrams.udp.flows)} open), "
            f"{invalid} frames dropped as invalid, {self._unpassed()} datagrams not passed on"
        )

    def _unpassed(self) -> int:
        """Datagrams that led nowhere: from the guest, from hosts that were not asked, from clients."""
        of = self.datagrams
        return of.dropped + of.udp.undelivered + of.udp.filtered + of.clients.refused + of.spliced.refused

    def stop(self, status: int) -> None:
        self._status = status
        self._loop.stop()

    def _end(self, status: int) -> None:
        """The command or the namespace has ended: what it has said still goes out."""
        self._status = status
        # Their ports are free for the next one that wants them
        self.forward.close_all()
        self._ending.begin(LINGER_COMMAND if self._command else LINGER_NAMESPACE)
        if self.tap is not None:
            self._on_tap()
        self._ending.look()

    def _bury(self) -> None:
        """The end of all flows: what was passed on completely is the kernel's to deliver."""
        if self.tap is None:
            return
        with contextlib.suppress(OSError):
            for _ in range(LAST_BATCHES):
                batch = self.tap.drain()
                if not any(batch):
                    break
                self._take_runs(*batch)
        for flow in self.flows.all():
            # What is kept goes with it, as far as the kernel takes it at once
            if flow.connection.facts & TAP_FIN_RCVD:
                flow.connection.host.close()
            else:
                flow.connection.host.abort()

    # Readiness

    def _on_tap(self) -> None:
        assert self.tap is not None
        began = time.monotonic()
        try:
            runs, datagrams, frames = self.tap.drain()
        except OSError as e:
            # The device is gone, often with its namespace.  A command that runs goes on without it.
            self._loop.remove_reader(self.tap.fileno())
            self.log.warning(f"the tap is gone: {e.strerror}")
            if not self._command or self._ending.begun:
                self.stop(self._status)
            return
        if self.log.trace_on:
            for line in words.batch(runs, datagrams, frames):
                self.log.trace(line)
        if self.log.debug_on:
            self._say_dropped(began)
        if self._capturing and not self.tap.raw.capturing:
            self._capturing = False
            self.complaint = "the capture ends: it cannot be written any more"
            self.log.warning(self.complaint)
        self._queue.seen(runs, began)
        self._take_runs(runs, datagrams, frames)
        if self._queue.watching:
            total = sum([run.length for run in runs])
            self._queue.served(total, time.monotonic() - began)
        self._resume_later(began)

    def _say_dropped(self, now: float) -> None:
        """Name the frames that were not even looked at."""
        assert self.tap is not None
        dropped = self.tap.dropped
        if dropped != self._dropped:
            self._dropped = dropped
            causes = ", ".join(f"{why} {count}" for why, count in dropped.items())
            self.log.flow("dropped", f"frames so far, by what is wrong: {causes}", now)

    def _take_runs(
        self, runs: Sequence[Run], datagrams: Sequence[Datagrams], frames: Sequence[bytes]
    ) -> None:
        """What a batch of frames means for flows and services."""
        now = time.monotonic()
        lookup = self.flows.lookup
        settle = self.flows.settle
        heard: list[Flow] = []
        for run in runs:
            flow = lookup(run.key)  # type: ignore[attr-defined]
            try:
                if flow is None:
                    flow = self.births.from_tap(run, now)
                    if flow is None:
                        continue
                else:
                    flow.connection.on_tap(run, now)
                    if flow.connection.ack_due:
                        heard.append(flow)
                    elif flow.connection.facts & CLOSED and run.flags & SYN:
                        # The old connection has made place for a new one with the same ports
                        settle(flow)
                        flow = self.births.from_tap(run, now)
                        if flow is None:
                            continue
            except Exception as e:
                self._failed(flow, e)
            if flow is not None:
                settle(flow)
                if self.log.debug_on and flow.connection.facts & CLOSED:
                    self._say_end(flow)
        for several in datagrams:
            try:
                self._take_datagrams(several, now)
            except Exception as e:
                self._failed(None, e)
        for frame in frames:
            try:
                self._serve(frame, now)
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
        assert self.hosts is not None
        now = time.monotonic()
        owners = self.hosts.owners
        settle = self.flows.settle
        for fd, ready in self.hosts.poll():
            flow = owners.get(fd)
            if flow is None:
                self.hosts.lingering.on_ready(fd, ready)
            else:
                try:
                    flow.connection.on_host(ready, now)
                except Exception as e:
                    self._failed(flow, e)
                settle(flow)
                if self.log.debug_on and flow.connection.facts & CLOSED:
                    self._say_end(flow)
        self._set_timer()
        self._resume_later(now)
        if self._ending.begun:
            self._ending.look()

    def _failed(self, flow: Flow | None, error: Exception) -> None:
        """A defect of ours met one flow: it is reset, and the others of its batch go on."""
        name = words.flow_name(flow.key) if flow is not None else "no flow"
        self.log.defect(f"{name}: {type(error).__name__}: {error}", time.monotonic())
        if flow is not None:
            flow.connection.reset(errno.EIO)

    def _set_timer(self) -> None:
        at = self.flows.next_deadline()
        if self.hosts is not None and len(self.hosts.lingering):
            at = min(at, self.hosts.lingering.next_deadline())
        if at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self._loop.call_later(max(at - time.monotonic(), 0), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._timer_at = float("inf")
        # The loop counts in milliseconds, and may be one early
        now = time.monotonic() + 0.001
        self.flows.expire(now, self._failed)
        if self.hosts is not None:
            self.hosts.lingering.expire(now)
        self._set_timer()

    def _trace_failed(self, why: str) -> None:
        self.complaint = why
        self.log.warning(why)

    def _resume(self) -> None:
        """Those whom the small queue holds back go on, once there is place for what they send."""
        self._resuming = False
        now = time.monotonic()
        assert self.tap is not None
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

    def _say_end(self, flow: Flow) -> None:
        self.log.debug(f"{words.flow_name(flow.key)}: {words.end(flow.connection)}")

    def _learn(self, mac: bytes, key: bytes) -> None:
        """The guest speaks: where clients find it."""
        assert self.tap is not None
        if not mac[0] & 1:
            self.tap.guest_mac = mac
        self.policy.learn(key[:4] if len(key) == KEY4_LEN else key[:16])

    # Frames that are no TCP

    def _take_datagrams(self, run: Datagrams, now: float) -> None:
        assert self.tap is not None
        key = run.key
        if self.desk.claims(key):
            self._serve(self.tap.frame(run.handle), now)
        elif self.link.ipv4 if len(key) == KEY4_LEN else self.link.ipv6:
            if self.datagrams.udp.flows.get(key) is None:
                self._learn(self.tap.headers(run.handle)[6:12], key)
            self.datagrams.on_run(run, now)
            self._expire_later()

    def _serve(self, frame: bytes, now: float) -> None:
        assert self.tap is not None
        if self._enabled(frame[12:14], frame[14:15]) and hops(frame) == 0:
            # A router sends it no further, and says so but of what went to many
            self.datagrams.dropped += 1
            self.log.flow("dropped", f"{words.packet(frame[14:])}: no hop left", now)
            if not frame[0] & 1:
                self.tap.expired(frame)
            return
        reply = self.desk.answer(frame)
        if reply is not None:
            if not frame[6] & 1:
                self._meet(frame[6:12], self.desk.asker(frame))
            self.tap.emit_frame(reply)
        elif self._enabled(frame[12:14], frame[14:15]):
            self.datagrams.on_packet(frame, now)
            self._expire_later()

    def _meet(self, mac: bytes, address: bytes) -> None:
        """Somebody in the guest asks for a neighbour: its connections go where it is now."""
        assert self.tap is not None
        self.tap.guest_mac = mac
        if address[:2] == LINK_LOCAL and len(address) == 16:
            self.policy.learn(address)
        if address:
            station = self.tap.station(address, mac)
            if station.mac != mac:
                station.mac = mac

    def _enabled(self, ethertype: bytes, first: bytes) -> bool:
        """True for an IP packet of a version that is served, by what its frame and itself say."""
        if ethertype == b"\x08\x00":
            return self.link.ipv4 and first != b"" and first[0] >> 4 == 4
        return ethertype == b"\x86\xdd" and self.link.ipv6 and first != b"" and first[0] >> 4 == 6

    def _on_sockets(self, flows: Udp | Spliced | Echo) -> None:
        flows.on_ready(time.monotonic())

    def _expire_later(self, after: float = 1.0) -> None:
        """Look after flows that are forgotten in time, as long as there are any."""
        if not self._expiring and self.datagrams.busy:
            self._expiring = True
            self._loop.call_later(after, self._expire)

    def _expire(self) -> None:
        now = time.monotonic()
        self._expiring = False
        at = self.datagrams.expire(now)
        if at < NEVER:
            self._expire_later(max(at - now, 1.0))

    def _advertise(self, first: bool = False) -> None:
        """Tell the guest of its router every now and then (RFC 4861, 6.2.4), as often as pasta does."""
        router = self.desk.router
        if router is None or self.tap is None:
            return
        if not first:
            self.tap.emit_frame(ndp.unsolicited(router))
        low, high = ADVERTISE_EVERY
        self._loop.call_later(low + (high - low) * os.urandom(1)[0] / 255, self._advertise)

    # Clients of listeners

    def follow(self, rules: Sequence[Rule]) -> None:
        """Open the listeners of all rules; raises ConfigError."""
        for rule in rules:
            self.forward.add(rule)
        self._share_out()
        self.scan_later(0)

    def _share_out(self) -> None:
        """What listeners have is not there for flows."""
        most = budget.share_out(self._descriptors, len(self.forward))
        self.flows.outbound_max, self.flows.inbound_max = most.outbound, most.inbound
        self.inbound.spliced_max = most.spliced
        self.datagrams.limit(Limits.of(most))
        if self.hosts is not None:
            self.hosts.lingering.most = most.lingering

    def scan_later(self, after: float = SCAN_EVERY) -> None:
        """Follow the ports of the other side, as long as a rule asks for it."""
        if self.forward.scanning and not self._scanning:
            self._scanning = True
            if after:
                self._loop.call_later(after, self._scan)
            else:
                self._scan()

    def _scan(self) -> None:
        self._scanning = False
        self.forward.scan()
        self._share_out()
        self.scan_later(SCAN_SOON if self.forward.unfinished else SCAN_EVERY)

    def _on_inside(self) -> None:
        assert self.inside is not None
        try:
            self.inside.on_ready()
        except ConnectionError:
            # With the namespace, as a rule; what is open goes on, and others come by the tap
            self.log.warning("the process in the namespace is gone: no short cuts into it any more")
            self._loop.remove_reader(self.inside.fileno())
            self.inside.close()
            self.inside = self.inbound.inside = None

    def _settled(self) -> None:
        """Clients have come: there may be something to look after in time."""
        self._set_timer()
        self._expire_later()

    def _splice_again(self) -> None:
        self._loop.call_soon(self.splices.on_ready)
