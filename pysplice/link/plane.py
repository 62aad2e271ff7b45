"""The plane of everything that is not TCP: the link's services answer, the rest goes on to the datagram plane.

Owns nothing.  Imports `backlog`, `loop`, `observe`, `wire`, `_cext` and the files of this room.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from .. import _cext, wire
from ..backlog import Backlog
from ..loop import Loop
from ..observe import describe
from ..observe.log import Log
from .neighbours import Neighbours
from .responder import Responder
from .tap import TapDevice

# Packets that wait to go beyond the link; each costs some 50 us.  With fragments among more, nothing is read, because
# one that is lost costs its whole datagram.  What else finds no room is lost.
PACKETS_WAITING: Final = 256
BYTES_WAITING: Final = 1 << 20


class Beyond(Protocol):
    """The datagram plane, as far as this one calls it."""

    def knows(self, key: bytes) -> bool:
        """True if there is a UDP flow with this key."""

    def on_run(self, run: _cext.Datagrams, now: float) -> None:
        """UDP datagrams of one flow."""

    def on_frame(self, frame: bytes, now: float) -> None:
        """A frame with an IP packet that is neither TCP nor a whole UDP datagram."""

    def finish(self) -> None:
        """Nothing comes after this."""


class LinkPlane:
    """Takes the datagrams and the other frames of each batch.

    `ipv4` and `ipv6` say which versions are served; `failed` is told about an exception that one frame has caused.
    """

    def __init__(
        self,
        tap: TapDevice,
        neighbours: Neighbours,
        responder: Responder,
        beyond: Beyond,
        versions: tuple[bool, bool],
        loop: Loop,
        log: Log,
        failed: Callable[[Exception], None],
    ) -> None:
        self._tap = tap
        self._neighbours = neighbours
        self._responder = responder
        self._beyond = beyond
        self._ipv4, self._ipv6 = versions
        self._log = log
        self._failed = failed
        self.expired = 0  # packets that had no hops left
        self._backlog: Backlog[bytes] = Backlog(loop, self._serve, 1 << 16)
        self._frames = 0  # so far
        self._bytes = 0  # that wait
        self._fragments = 0  # that wait
        self.overrun = 0  # packets that found no room

    def on_batch(self, datagrams: Sequence[_cext.Datagrams], frames: Sequence[bytes], now: float) -> None:
        """Everything of a batch but its TCP segments."""
        for run in datagrams:
            try:
                self._on_datagrams(run, now)
            except Exception as e:
                self._failed(e)
        for frame in frames:
            try:
                self._on_frame(frame, now)
            except Exception as e:
                self._failed(e)

    @property
    def is_behind(self) -> bool:
        """True while so many fragments wait that the guest has to wait too."""
        return self._fragments > 0 and self._is_full

    @property
    def _is_full(self) -> bool:
        return len(self._backlog) > PACKETS_WAITING or self._bytes > BYTES_WAITING

    def catch_up(self) -> None:
        """Serve some of what waits."""
        self._backlog.turn()

    def finish(self) -> None:
        """Serve what waits, also beyond: nothing comes after it."""
        self._backlog.finish()
        self._beyond.finish()

    def _to_beyond(self, frame: bytes, now: float) -> None:
        if self._backlog.passes(now):
            self._beyond.on_frame(frame, now)
            return
        is_fragment = wire.is_fragment(frame[wire.ETHERNET :])
        if self._is_full and not is_fragment:
            self.overrun += 1
            self._log.flow("limit", f"{describe.packet(frame[wire.ETHERNET :])}: too many at once", now)
            return
        self._frames += 1
        self._bytes += len(frame)
        self._fragments += is_fragment
        self._backlog.put(self._frames, frame)

    def _serve(self, frame: bytes, now: float) -> None:
        self._bytes -= len(frame)
        self._fragments -= wire.is_fragment(frame[wire.ETHERNET :])
        try:
            self._beyond.on_frame(frame, now)
        except Exception as e:
            self._failed(e)

    def _on_datagrams(self, run: _cext.Datagrams, now: float) -> None:
        key = run.key
        if self._responder.claims(key):
            self._on_frame(self._tap.frame(run.handle), now)
        elif self._ipv4 if len(key) == wire.KEY4_LEN else self._ipv6:
            if not self._beyond.knows(key):
                mac = wire.frame_source(self._tap.headers(run.handle))
                self._neighbours.heard(mac, wire.key_source(key))
            self._beyond.on_run(run, now)

    def _on_frame(self, frame: bytes, now: float) -> None:
        packet = frame[wire.ETHERNET :]
        served = self._is_served(wire.ethertype(frame), packet)
        if served and wire.hops(packet) == 0:
            # A router does not forward it further, and says so unless the packet was sent to many hosts
            self.expired += 1
            self._log.flow("dropped", f"{describe.packet(packet)}: no hops left", now)
            if not wire.is_to_group(frame):
                self._tap.time_exceeded(frame, now)
            return
        reply = self._responder.answer(frame)
        if reply is not None:
            if not wire.is_group_mac(wire.frame_source(frame)):
                self._neighbours.asked(wire.frame_source(frame), self._responder.asker(frame))
            self._tap.emit_frame(reply)
        elif served:
            self._to_beyond(frame, now)

    def _is_served(self, ethertype: bytes, packet: bytes) -> bool:
        """True for an IP packet of a version that is served, by its ethertype and its own first byte."""
        if ethertype == wire.ETHERTYPE_IPV4:
            return self._ipv4 and wire.is_ipv4(packet)
        return ethertype == wire.ETHERTYPE_IPV6 and self._ipv6 and wire.is_ipv6(packet)
