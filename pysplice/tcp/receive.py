"""From the guest to the host socket: what is read, what is kept, and which window is advertised.

Owns one direction of a connection.  Imports the files of this room.
The theory of operation is in __init__.py.

`Receive` sends no segment: it says what goes into the acknowledgement number and the window field, and the
connection, or the other direction, sends them.
"""

import errno
from typing import Final

from . import seq, window
from .account import Account, account
from .doors import FIN, HostDoor, Run, SocketFacts
from .small_queue import SmallQueue, bytes_per_frame

# How far rounding may move the right edge beyond the room; HostSocket.keep() allows for this much
ROUNDED_UP_MAX: Final = 32 * 1024


class Receive:
    """The receiving half of a connection (RCV in RFC 9293), with the host's send buffer in the place of our own.

    `host` takes the payload; `queue` bounds what the guest may have unread in the ring of the tap; `mss` is the
    segment size that we offer the guest, bytes; `estimate` says what the host socket can still queue; `trace`, unless
    it is None, is told of each window.  Methods that move bytes return 0, or the errno that broke the host socket.
    """

    __slots__ = (
        "_estimate",
        "_host",
        "_queue",
        "_reading",
        "_trace",
        "ack_due",
        "armed",
        "bytes_read",
        "ended",
        "frame_bytes",
        "irs",
        "kept",
        "mss",
        "rounded_up",
        "sends",
        "seq_from_tap",
        "short_bytes",
        "short_sends",
        "starved",
        "wnd_edge",
        "ws_to_tap",
        "wscale_ok",
    )

    def __init__(
        self, host: HostDoor, queue: SmallQueue, mss: int, estimate: window.Estimator, trace: Account | None
    ) -> None:
        self._host = host
        self._queue = queue
        self._estimate = estimate
        self._trace = trace
        self._reading: SocketFacts | None = None  # what the room came from, for the trace
        self.mss = mss
        # Sequence numbers count from 0 until the guest's SYN tells where they begin
        self.irs = 0  # IRS
        self.seq_from_tap = 0  # RCV.NXT: the next byte expected from the guest
        self.wnd_edge = 0  # RCV.NXT + RCV.WND: the first byte that the guest may not send yet
        self.ended = False  # the guest's FIN was accepted
        self.wscale_ok = True
        self.ws_to_tap = 0  # Rcv.Wind.Shift; settled with our SYN or SYN-ACK
        self.rounded_up = 0  # how far rounding has moved the edge since the room last grew
        self.bytes_read = 0
        self.ack_due = False  # something was read since the last acknowledgement
        self.kept = 0  # bytes that were read, and that the host socket has not taken yet
        self.armed = False  # the host socket will report when it is writable
        self.starved = False  # the small queue has left less than a segment
        self.frame_bytes = 0  # what a frame of the guest's carries; 0: not known yet
        self.sends = self.short_sends = 0  # calls of send(), and those of which the socket took only a part
        self.short_bytes = 0  # what it did not take, since the last account

    def start(self, run: Run) -> None:
        """The guest's SYN or SYN-ACK."""
        left = self.room_left()  # what our SYN has offered, if it came first
        self.irs = run.seq
        self.seq_from_tap = seq.add(run.seq, 1)
        self.wnd_edge = seq.add(self.seq_from_tap, left)
        # RFC 7323, section 2.2: both ends scale or none does
        self.wscale_ok = run.wscale >= 0
        if not self.wscale_ok:
            self.ws_to_tap = 0

    def room_left(self) -> int:
        """RCV.WND: what the guest may still send, bytes."""
        return seq.diff(self.wnd_edge, self.seq_from_tap)

    def in_window(self, number: int) -> bool:
        """True for a sequence number that the guest may use now."""
        return 0 <= seq.diff(number, self.seq_from_tap) < self.room_left()

    # Payload

    def take(self, run: Run, offset: int) -> int:
        """Pass on the payload of a run, except its first `offset` bytes, which were read before."""
        if run.length:
            self.frame_bytes = bytes_per_frame(self.frame_bytes, run.length, run.frames)
        length = min(run.length - offset, self.room_left())
        if length > 0:
            error = self._to_host(run.handle, offset, length)
            if error:
                return error
        self.ack_due = True
        return 0

    def take_fin(self, run: Run) -> bool:
        """True if the run's FIN is in order: the guest sends no more."""
        if not run.flags & FIN or self.seq_from_tap != seq.add(run.seq, run.length):
            return False
        self.ended = True
        self.seq_from_tap = seq.add(self.seq_from_tap, 1)
        if self.room_left() < 0:
            # The window was closed: the FIN lies one beyond its edge, and moves the edge
            self.wnd_edge = self.seq_from_tap
        return True

    def _to_host(self, handle: int, skip: int, length: int) -> int:
        """Queue payload in the host socket; the rest is kept."""
        sent = 0
        if not self.kept:
            self.sends += 1
            sent = self._host.send(handle, skip, length)
            if sent < 0:
                if sent != -errno.EAGAIN:
                    return -sent
                sent = 0
        if sent < length:
            if not self.kept:
                self.short_sends += 1
                self.short_bytes += length - sent
            # The right edge stays where it is until all of this is flushed
            stored = self._host.keep(handle, skip + sent, length - sent, self.room_left() - sent)
            self.kept += stored
            sent += stored
            self.arm()
        self.bytes_read += sent
        self.seq_from_tap = seq.add(self.seq_from_tap, sent)
        return 0

    def flush(self) -> int:
        """Queue kept bytes in the host socket, which is writable."""
        if not self.kept:
            return 0
        sent = self._host.flush()
        if sent < 0:
            if sent != -errno.EAGAIN:
                return -sent
            sent = 0
        self.kept -= sent
        if self.kept:
            self.arm()
        return 0

    def arm(self) -> None:
        """Have the host socket report when it is writable, once."""
        if not self.armed:
            self.armed = True
            self._host.arm()

    # The window

    def room(self, left: int, throttle: bool = True) -> int:
        """What the guest may send from now on, bytes, computed from the memory of the host socket.

        The room counts from what was read.  It is never less than `left`, what room_left() says: the right edge does
        not move left (RFC 9293, 3.8.6), and not at all while bytes are kept or once the guest has ended.  Where the
        small queue leaves less than a segment the connection is `starved`; without `throttle` it leaves one.
        """
        self._reading = None
        if self.kept or self.ended:
            return left
        facts = self._host.facts()
        # A whole segment, as far as the scale can express it
        segment = (((self.mss - 1) >> self.ws_to_tap) + 1) << self.ws_to_tap
        room = window.room(facts, segment, self._estimate)
        if room <= 0 or not window.writable(facts):
            self.arm()
        if self._trace is not None:
            self._reading = facts
        queue = self._queue
        bound = queue.bound(room, self.frame_bytes)
        if bound < room and bound < 2 * segment:
            # A sender waits until a whole segment fits, so with less it may stop.  It cuts its first segments to
            # fit (tcp_bound_to_half_wnd()).
            if not throttle:
                bound = min(room, segment)
            elif self.frame_bytes or queue.budget:
                self.starved = True
        return bound if bound > left else left

    def is_update(self, room: int, left: int) -> bool:
        """True if a window is worth a segment of its own (RFC 9293, 3.8.6.2.2).

        It is if it allows two segments more than `left`, or opens a closed window.
        """
        return room >= left + 2 * self.mss or left < self.mss <= room

    def field(self) -> int:
        """The window field of a segment that goes out now; new if an acknowledgement is due."""
        left = seq.diff(self.wnd_edge, self.seq_from_tap)
        if self.ack_due:
            return self.advertise(self.room(left), left)
        return self._move_edge(left, left)

    def last_field(self) -> int:
        """The window field of a segment that acknowledges nothing new."""
        left = self.room_left()
        return self._move_edge(left, left)

    def advertise(self, room: int, left: int) -> int:
        """The window field for a room that was just computed; tells the trace."""
        field = self._move_edge(room, left)
        if self._trace is not None:
            self._explain(left, room, field << self.ws_to_tap)
        return field

    def first_field(self, settle_scale: bool) -> int:
        """The window field of our SYN or SYN-ACK; with `settle_scale` also the scale of all later windows."""
        self._reading = facts = self._host.facts()
        room = window.room(facts, self.mss, self._estimate)
        # The scale is announced only once, so it has to suit the size that the send buffer can grow to
        most = max(facts.wmem_max, facts.sndbuf)
        first = window.select_initial_window(room, self.mss, 0, self.wscale_ok, most)
        if settle_scale:
            self.ws_to_tap = first.rcv_wscale
        left = self.room_left()
        # RFC 7323, section 2.2: the window of a SYN is not scaled
        room = self._queue.bound(min(first.rcv_wnd, window.WINDOW_FIELD_MAX), self.frame_bytes)
        room = max(room, left)
        self.wnd_edge = seq.add(self.seq_from_tap, room)
        if self._trace is not None:
            self._explain(left, room, room, initial=True)
        return room

    def _move_edge(self, room: int, left: int) -> int:
        """The window as it goes on the wire; the right edge, so far at `left`, moves to where that puts it."""
        field = room >> self.ws_to_tap
        if field > window.WINDOW_FIELD_MAX:
            field = window.WINDOW_FIELD_MAX
        gain = (field << self.ws_to_tap) - left
        if gain >= 0:
            self.rounded_up = 0 if gain else self.rounded_up
        elif field < window.WINDOW_FIELD_MAX:
            # As tcp_select_window(): rounding must not move the edge left.  But many small segments must not push it
            # on for ever either.  Then the edge dips by less than the scale can say (RFC 7323, 2.4), and what lies
            # between is still accepted.
            gain += 1 << self.ws_to_tap
            if self.rounded_up + gain > ROUNDED_UP_MAX:
                return field
            self.rounded_up += gain
            field += 1
        self.wnd_edge = seq.add(self.seq_from_tap, field << self.ws_to_tap)
        return field

    def _explain(self, left: int, room: int, advertised: int, initial: bool = False) -> None:
        """Tell the trace how a window came about."""
        if self._trace is not None:
            facts, queue = self._reading, self._queue
            self._trace(account(self, queue, self._estimate, facts, left, room, advertised, initial))
        self.short_bytes = 0
