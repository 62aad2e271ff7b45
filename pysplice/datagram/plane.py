"""UDP, echo and fragments as one: what comes from the tap and from listeners to whom it is for.

Owns the three.  Imports the files of this room, and `tap`, `translate`, `inside`, `observe` and `_cext` for what it
hands them.
"""

from .. import _cext
from ..inside import Inside
from ..observe.log import Log
from ..tap import TapDevice
from ..translate import Translation
from . import fragments
from .echo import Echo
from .table import NEVER
from .udp import Udp

IP_HEADER_MIN = 20
# As much of a packet that came in fragments as an ICMP error quotes headers of
QUOTED = 64


class Plane:
    """All flows without a stream.  Without a tap there are short cuts only."""

    def __init__(
        self,
        tap: TapDevice | None,
        translation: Translation,
        inside: Inside | None,
        *,
        udp: bool,
        echo: bool,
        mtu: int,
        flows_max: int,
        log: Log,
    ) -> None:
        self.udp = Udp(tap, translation, inside, mtu, flows_max, log)
        self.echo = Echo(tap, translation, mtu, flows_max, log) if echo and tap is not None else None
        self._with_udp = udp
        self._fragments = fragments.Reassembler()

    def on_run(self, run: _cext.Datagrams, now: float) -> None:
        """Datagrams of one flow from the tap."""
        if self._with_udp:
            self.udp.on_run(run, now)

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
            datagram = fragments.datagram(packet) if self._with_udp else None
            if datagram is not None:
                key, payload, ttl = datagram
                self.udp.on_whole(key, payload, ttl, frame[:14] + packet[:QUOTED], now)
                return
        if self.echo is not None:
            self.echo.on_packet(packet, frame, now)

    def expire(self, now: float) -> float:
        """Forget what has had its time; when to look again, `NEVER` if nothing is left."""
        at = self.udp.flows.expire(now)
        return min(at, self.echo.flows.expire(now)) if self.echo is not None else at

    @property
    def busy(self) -> bool:
        """True if there is a flow, and expire() has something to do in time."""
        return len(self.udp.flows) > 0 or (self.echo is not None and len(self.echo.flows) > 0)

    def close(self) -> None:
        self.udp.close()
        if self.echo is not None:
            self.echo.close()


__all__ = ["NEVER", "Plane"]
