"""UDP, echo and fragments as one: what comes from the tap and from listeners to whom it is for.

Owns the three.  Imports the files of this room, and `forward`, `tap`, `translate`, `inside`, `observe` and `_cext`
for what it hands them.
"""

import struct
from typing import NamedTuple

from .. import _cext
from ..budget import Budget
from ..forward import Listener, Policy
from ..inside import Inside
from ..observe import words
from ..observe.log import Log
from ..observe.words import flow_name
from ..tap import TapDevice
from ..translate import KEY4_LEN, Translation
from . import fragments
from .clients import Clients
from .echo import Echo
from .spliced import Spliced
from .table import NEVER
from .udp import Udp

IP_HEADER_MIN = 20
# As much of a packet that came in fragments as an ICMP error quotes headers of
QUOTED = 64

# Of the link's services: what a guest asks its link is for nobody beyond
LINK_PORTS = frozenset({67, 68, 546, 547})


class Limits(NamedTuple):
    """How many flows of each kind there may be, and how many sockets for what the guest sends."""

    outbound: int
    inbound: int
    spliced: int
    endpoints: int
    echo: int

    @staticmethod
    def of(most: Budget) -> "Limits":
        """The part of a budget that is for these."""
        return Limits(most.udp_outbound, most.udp_inbound, most.udp_spliced, most.endpoints, most.echo)


class Plane:
    """All flows without a stream.  Without a tap there are short cuts only.

    `broadcasts`: the directed broadcast addresses of the guest's networks, packed.
    """

    def __init__(
        self,
        tap: TapDevice | None,
        translation: Translation,
        policy: Policy,
        inside: Inside | None,
        *,
        udp: bool,
        echo: bool,
        mtu: int,
        limits: Limits,
        log: Log,
        filtering: str = "address",
        broadcasts: frozenset[bytes] = frozenset(),
    ) -> None:
        shares = (limits.outbound, limits.inbound, limits.spliced)
        self.udp = Udp(tap, translation, mtu, shares, limits.endpoints, log, filtering, broadcasts)
        self.spliced = Spliced(self.udp.flows, self.udp.packets, inside, policy, log)
        self.clients = Clients(self.udp, self.spliced, policy)
        self.echo = Echo(tap, translation, mtu, limits.echo, log) if echo and tap is not None else None
        self.dropped = 0  # packets that are for nobody
        self._with_udp = udp
        self._fragments = fragments.Reassembler()
        self._log = log

    def limit(self, limits: Limits) -> None:
        """There may be so many from now on; those that are more go by and by."""
        self.udp.flows.most[:] = (limits.outbound, limits.inbound, limits.spliced)
        self.udp.endpoints_max = limits.endpoints
        if self.echo is not None:
            self.echo.flows.most[:] = [limits.echo] * len(self.echo.flows.most)

    def on_run(self, run: _cext.Datagrams, now: float) -> None:
        """Datagrams of one flow from the tap."""
        if self._leaves(run.key, run.group, now):
            self.udp.on_run(run, now)
        else:
            self.dropped += run.frames

    def _leaves(self, key: bytes, group: int, now: float) -> bool:
        """True for a datagram that goes on to the host's network.

        One that was sent to everybody on the link has to be for everybody (RFC 1122, section 3.3.6), and what is
        asked of the link's own services goes no further.
        """
        called = key[4:8] if len(key) == KEY4_LEN else key[16:32]
        everybody = self.udp.is_everybody(called)
        why = ""
        if not self._with_udp:
            why = "UDP is switched off"
        elif group and not everybody:
            why = "it is for one host, and came to all"
        elif everybody and struct.unpack("!H", key[-2:])[0] in LINK_PORTS:
            why = "it is for the link's services"
        if why and self._log.debug_on:
            self._log.flow("dropped", f"udp {flow_name(key)}: {why}", now)
        return not why

    def on_packet(self, frame: bytes, now: float) -> None:
        """An Ethernet frame with an IP packet that is neither TCP nor a whole datagram."""
        packet = frame[14:]
        if len(packet) < IP_HEADER_MIN:
            return
        if fragments.is_fragment(packet):
            whole = self._fragments.feed(packet, now)
            if whole is None:
                return
            packet = whole
            datagram = fragments.datagram(packet)
            if datagram is not None:
                key, payload, ttl = datagram
                if self._leaves(key, frame[0] & 1, now):
                    self.udp.on_whole(key, payload, ttl, frame[:14] + packet[:QUOTED], now)
                else:
                    self.dropped += 1
                return
        if self.echo is None or not self.echo.on_packet(packet, frame, now):
            self.dropped += 1
            if self._log.debug_on:
                self._log.flow("dropped", f"{words.packet(packet)}: nothing here takes it", now)

    def on_listener(self, listener: Listener, failed: bool, helped: bool, now: float) -> None:
        """A published UDP port has datagrams, or errors."""
        self.clients.on_ready(listener, failed, helped, now)

    def expire(self, now: float) -> float:
        """Forget what has had its time; when to look again, `NEVER` if nothing is left."""
        at = self.udp.flows.expire(now)
        return min(at, self.echo.flows.expire(now)) if self.echo is not None else at

    @property
    def busy(self) -> bool:
        """True if there is a flow, and expire() has something to do in time."""
        return len(self.udp.flows) > 0 or (self.echo is not None and len(self.echo.flows) > 0)

    def close(self) -> None:
        self.spliced.close()
        self.udp.close()
        if self.echo is not None:
            self.echo.close()


__all__ = ["NEVER", "Limits", "Plane"]
