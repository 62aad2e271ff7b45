"""The plane of flows without a stream: UDP, echo requests and fragments.

Owns the epoll instance that watches its sockets.  Imports `_cext`, `backlog`, `budget`, `config`, `forward`, `loop`,
`observe`, `wire` and the files of this room.
"""

import select
from typing import Any, Final

from .. import _cext, wire
from ..backlog import Backlog
from ..budget import Budget
from ..config.ports import GUEST
from ..forward.policy import Listener
from ..loop import NEVER, Loop
from ..observe import describe
from ..observe.log import Log
from . import fragments
from .clients import Clients
from .echo import Echo, NoEcho
from .endpoints import Endpoints
from .table import Table
from .udp import Kept, Rules, Udp

EVENTS_PER_TURN: Final = 64

# Of datagrams whose flows wait to be opened: bytes of all, of one flow, and what each datagram counts beside its own
# (empty ones must be few)
KEPT_BYTES: Final = 4 << 20
KEPT_BYTES_FLOW: Final = 256 << 10
KEPT_EACH: Final = 1 << 10

# As much of a packet that came in fragments as an ICMP error quotes of its headers
QUOTED: Final = 64

# DHCP and DHCPv6: what a guest asks of its link is not for hosts beyond it
LINK_PORTS = frozenset({67, 68, 546, 547})

EXPIRE_AFTER: Final = 1.0  # seconds, between two looks at the flows' times


class Waiting:
    """Datagrams of one flow that wait, those that go out alike together; `size`: what they count of KEPT_BYTES."""

    __slots__ = ("kept", "size")

    def __init__(self) -> None:
        self.kept: list[Kept] = []
        self.size = 0

    def add(self, kept: Kept, size: int) -> None:
        self.size += size
        last = self.kept[-1] if self.kept else None
        if last is not None and (last.ttl, last.df, last.mac) == (kept.ttl, kept.df, kept.mac):
            last.payloads.extend(kept.payloads)
        else:
            self.kept.append(kept)


class FromGuest:
    """What the guest sends that is neither TCP nor for the link's services.

    Without `with_udp` no datagram leaves; `endpoints` are the sockets of `udp`.
    """

    def __init__(
        self,
        udp: Udp,
        endpoints: Endpoints,
        echo: "Echo | NoEcho",
        rules: Rules,
        with_udp: bool,
        loop: Loop,
        log: Log,
    ) -> None:
        self.udp = udp
        self.endpoints = endpoints
        self.echo = echo
        self.dropped = 0  # packets that no host may get
        self.rules = rules
        self._with_udp = with_udp
        self._fragments = fragments.Reassembler()
        self._log = log
        self._backlog: Backlog[Waiting] = Backlog(loop, self._begin)
        self._kept_bytes = 0

    def __bool__(self) -> bool:
        """True while there is something that ends with time."""
        return bool(self.echo.flows or self._backlog)

    def on_run(self, run: _cext.Datagrams, now: float) -> None:
        """Datagrams of one flow."""
        if not self._leaves(run.key, bool(run.group), now):
            self.dropped += run.frames
            return
        if self._backlog and self._backlog.get(run.key) is not None and self.udp.knows(run.key):
            self._begin_early(run.key, now)
        if self.udp.knows(run.key) or self._backlog.passes(now):
            self.udp.on_run(run, now)
        elif self._has_room(run.key, run.length + KEPT_EACH * run.frames):
            self._wait(self.udp.keep(run), run.frames, now)
        else:
            self._lost(run.frames, now)

    def _has_room(self, key: bytes, size: int) -> bool:
        """True if datagrams that count so much can wait."""
        waiting = self._backlog.get(key)
        held = waiting.size if waiting is not None else 0
        full = waiting is None and self._backlog.full
        return not full and self._kept_bytes + size <= KEPT_BYTES and held + size <= KEPT_BYTES_FLOW

    def _lost(self, count: int, now: float) -> None:
        """Datagrams find no room."""
        self.udp.undelivered += count
        self._log.flow("limit", "too many new UDP flows at once, datagrams were dropped", now)

    def _wait(self, kept: Kept, frames: int, now: float) -> None:
        """Have datagrams that came in so many frames wait until their flow can be opened."""
        size = sum(map(len, kept.payloads)) + KEPT_EACH * len(kept.payloads)
        # A frame may hold many, or so many that no kernel has joined them
        if not kept.payloads or not self._has_room(kept.key, size):
            self._lost(max(frames, len(kept.payloads)), now)
            return
        waiting = self._backlog.get(kept.key)
        if waiting is None:
            waiting = Waiting()
            self._backlog.put(kept.key, waiting)
        waiting.add(kept, size)
        self._kept_bytes += size

    def _begin(self, waiting: Waiting, now: float) -> None:
        self._kept_bytes -= waiting.size
        for kept in waiting.kept:
            try:
                self.udp.on_kept(kept, now)
            except Exception as e:
                self._log.defect(f"udp {describe.flow_name(kept.key)}: {type(e).__name__}: {e}", now)

    def _begin_early(self, key: bytes, now: float) -> None:
        """The flow has come into being by a client's datagram: what the guest has sent before goes first."""
        waiting = self._backlog.pop(key)
        if waiting is not None:
            self._begin(waiting, now)

    def finish(self) -> None:
        """Send what waits: nothing comes after it."""
        self._backlog.finish()

    def _leaves(self, key: bytes, to_group: bool, now: float) -> bool:
        """True for a datagram that goes on to the host's network; `to_group`: its frame was sent to all stations.

        A frame that was sent to all stations must carry a datagram for all hosts (RFC 1122, section 3.3.6), and
        requests to the link's own services go no further.
        """
        everybody = self.rules.is_everybody(wire.key_destination(key))
        why = ""
        if not self._with_udp:
            why = "UDP is switched off"
        elif to_group and not everybody:
            why = "it is for one host, but was sent to all stations"
        elif everybody and wire.key_destination_port(key) in LINK_PORTS:
            why = "it is for the link's services"
        if why and self._log.debug_on:
            self._log.flow("dropped", f"udp {describe.flow_name(key)}: {why}", now)
        return not why

    def on_frame(self, frame: bytes, now: float) -> None:
        """A frame with an IP packet that is neither TCP nor a whole datagram."""
        packet = frame[wire.ETHERNET :]
        if len(packet) < wire.IPV4:
            return
        if wire.is_fragment(packet):
            whole = self._fragments.feed(packet, now)
            if whole is None:
                return
            packet = whole
            datagram = fragments.datagram(packet)
            if datagram is not None:
                key, payload, ttl = datagram
                if self._leaves(key, wire.is_to_group(frame), now):
                    headers = frame[: wire.ETHERNET] + packet[:QUOTED]
                    kept = Kept(key, headers, ttl, wire.frame_source(frame), 0, [payload])
                    if self._backlog.get(key) is None or self.udp.knows(key):
                        self._begin_early(key, now)
                        self.udp.on_kept(kept, now)
                    else:
                        self._wait(kept, 1, now)
                else:
                    self.dropped += 1
                return
        if not self.echo.on_packet(packet, frame, now):
            self.dropped += 1
            if self._log.debug_on:
                self._log.flow("dropped", f"{describe.packet(packet)}: nothing here handles it", now)

    def on_ready(self, fd: int, ready: int, now: float) -> None:
        """One of the sockets is ready; `ready`: the bits of epoll(7)."""
        endpoint = self.endpoints.by_fd(fd)
        if endpoint is not None:
            self.udp.on_socket(endpoint, ready, now)
        else:
            self.echo.on_socket(fd, ready, now)

    @property
    def unpassed(self) -> int:
        """How many datagrams of the guest's, or for it, led nowhere."""
        return self.dropped + self.udp.undelivered + self.udp.filtered

    def close(self) -> None:
        """Close all sockets."""
        self.endpoints.close()
        self.echo.close()


class DatagramPlane:
    """All flows without a stream.

    `flows` is the table of UDP, spliced flows included; `from_guest` is None where there is no tap.
    """

    def __init__(
        self,
        epoll: select.epoll,
        flows: Table[Any],
        from_guest: FromGuest | None,
        clients: Clients,
        loop: Loop,
        log: Log,
    ) -> None:
        self._epoll = epoll
        self.flows = flows
        self._from_guest = from_guest
        self.clients = clients
        self._loop = loop
        self._log = log
        self._timer = loop.timer(self._expire)

    def fileno(self) -> int:
        """The descriptor that is readable while a socket of this plane is ready."""
        return self._epoll.fileno()

    def limit(self, most: Budget) -> None:
        """Allow so many flows and sockets from now on; flows beyond that give way as others come."""
        self.flows.most[:] = (most.udp_outbound, most.udp_inbound, most.udp_spliced)
        if self._from_guest is not None:
            self._from_guest.endpoints.most = max(most.endpoints, 1)
            self._from_guest.echo.limit(most.echo)

    # From the link plane

    def knows(self, key: bytes) -> bool:
        """True if there is a flow with this key."""
        return self.flows.get(key) is not None

    def on_run(self, run: _cext.Datagrams, now: float) -> None:
        """Datagrams of one flow from the tap."""
        if self._from_guest is not None:
            self._from_guest.on_run(run, now)
            self._expire_later(now)

    def on_frame(self, frame: bytes, now: float) -> None:
        """A frame with an IP packet that is neither TCP nor a whole datagram."""
        if self._from_guest is not None:
            self._from_guest.on_frame(frame, now)
            self._expire_later(now)

    def finish(self) -> None:
        """Send what waits for its flow: nothing comes after it."""
        if self._from_guest is not None:
            self._from_guest.finish()

    # From sockets

    def on_ready(self, now: float) -> None:
        """Some sockets are ready."""
        if self._from_guest is not None:
            for fd, ready in self._epoll.poll(0, EVENTS_PER_TURN):
                self._from_guest.on_ready(fd, ready, now)
            self._expire_later(now)

    def arrived(self, listener: Listener, failed: bool, splices: bool, now: float) -> None:
        """A forwarded port has datagrams, or errors too if `failed`; see Clients.on_ready()."""
        try:
            self.clients.on_ready(listener, failed, splices, now)
        except Exception as e:
            self._log.defect(f"datagrams: {type(e).__name__}: {e}", now)
        self._expire_later(now)

    # What `forward` asks

    def opened(self, listener: Listener) -> None:
        """A UDP listener was opened."""
        self.clients.opened(listener)

    def closed(self, listener: Listener) -> None:
        """A UDP listener is being closed."""
        self.clients.closed(listener)

    def ports(self, side: str) -> int:
        """The ports of a side that sockets of this plane have, except listeners, as bits."""
        if side == GUEST or self._from_guest is None:
            return 0
        return self._from_guest.endpoints.ports()

    def release(self, port: int) -> bool:
        """Give up a port of the host's; True if a socket of this plane had it."""
        return self._from_guest is not None and self._from_guest.endpoints.release(port)

    # Time

    def _expire_later(self, now: float) -> None:
        """Look at the flows' times in a while, unless a look is due already or there is no flow."""
        if self._timer.when == NEVER and (self.flows or self._from_guest):
            self._timer.by(now + EXPIRE_AFTER)

    def _expire(self) -> None:
        now = self._loop.now()
        at = self.flows.expire(now)
        if self._from_guest is not None:
            at = min(at, self._from_guest.echo.flows.expire(now))
        if at != NEVER:
            self._timer.by(max(at, now + EXPIRE_AFTER))

    @property
    def unpassed(self) -> int:
        """How many datagrams led nowhere."""
        from_guest = self._from_guest.unpassed if self._from_guest is not None else 0
        return from_guest + self.clients.refused

    def close(self) -> None:
        """End all flows."""
        self.flows.close()
        if self._from_guest is not None:
            self._from_guest.close()
        self._epoll.close()
