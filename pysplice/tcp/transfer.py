"""The two directions of one connection: bytes from the guest to the host socket, and back.

Owns the facts, sequence numbers and windows of a connection; connection.py adds what happens around a
transfer: opening, timers, and which event leads where.  Imports the other files of this room and nothing
else.  The theory of operation is in __init__.py.
"""

import errno
from collections.abc import Callable
from typing import Any

from . import seq, window
from .doors import ACK, FIN, PSH, RST, HostDoor, Run, SocketFacts, TapDoor
from .events import (
    CLOSED,
    ESTABLISHED,
    FINISHED,
    SOCK_CONNECTED,
    SOCK_FIN_RCVD,
    SOCK_FIN_SENT,
    TAP_FIN_ACKED,
    TAP_FIN_RCVD,
    TAP_FIN_SENT,
    TAP_SYN_RCVD,
    learn,
)
from .small_queue import SmallQueue, bytes_per_frame
from .timing import NEVER, RoundTrip

MSS_DEFAULT = 536  # RFC 9293, 3.7.1: without the option; IPv6 has the same floor in practice

# A guest that asks for less would have us send a frame for every few bytes (Linux: TCP_MIN_SND_MSS is 48),
# and so many segments under way are enough for any
MSS_MIN = 88
SEGMENTS_MAX = 1024

DUP_ACKS = 3  # RFC 5681, section 3.2

# Read from the host socket in one piece: both copies then find it in the processor's cache
RECEIVE_CHUNK = 256 * 1024

# Sent again in one frame
RETRANSMIT_MAX = 64 * 1024 - 1024

# How far rounding may move the right edge beyond the room; what is kept for it allows for this much
ROUNDED_UP_MAX = 32 * 1024

# Out-of-order segments answered one by one with a duplicate ACK each
DUP_ACKS_SENT_MAX = 64


class Transfer:
    """The state of a connection, and the bytes that pass through it.

    `isn` is our initial sequence number towards the guest, `mss` what we offer and bound segments by
    (bytes).  The run is the guest's SYN; without one the connection comes from the host and stands there
    already, and open() asks the guest for it.  `queue` bounds what the guest may have unread in the ring of the
    tap, `estimate` what the host socket can still queue.  `trace`, if there is one, is told of each window
    that is advertised and how it came about.
    """

    __slots__ = (
        "ack_due",
        "armed",
        "bytes_acked",
        "dup_acks",
        "error",
        "estimate",
        "facts",
        "frame_bytes",
        "host",
        "host_readable",
        "irs",
        "kept",
        "mss_from_tap",
        "mss_to_tap",
        "queue",
        "quiet_since",
        "reading",
        "recover",
        "retransmissions",
        "retransmit_at",
        "round_trip",
        "rounded_up",
        "sends",
        "seq_ack_from_tap",
        "seq_from_tap",
        "seq_to_tap",
        "short_bytes",
        "short_read_ends",
        "short_sends",
        "stream_len",
        "tap",
        "trace",
        "unanswered",
        "wnd_edge_to_tap",
        "wnd_from_tap",
        "wnd_max_from_tap",
        "wnd_seq",
        "ws_from_tap",
        "ws_to_tap",
        "wscale_ok",
    )

    def __init__(
        self,
        tap: TapDoor,
        host: HostDoor,
        run: Run | None,
        *,
        isn: int,
        mss: int,
        queue: SmallQueue,
        now: float,
        estimate: window.Estimator = window.DEFAULT_ESTIMATOR,
        trace: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.tap = tap
        self.host = host
        self.queue = queue
        self.estimate = estimate
        self.trace = trace
        self.reading: SocketFacts | None = None  # what the room came from, for the trace
        self.facts = 0
        self.error = 0  # errno that ended the connection, 0 for a good end

        # From the guest: what we have read, and the right edge that we advertised
        self.irs = 0
        self.seq_from_tap = 0
        self.wnd_edge_to_tap = 0
        self.mss_from_tap = mss
        self.frame_bytes = 0  # what a frame carries; 0: it is not known yet
        self.kept = 0  # bytes read that the host socket did not take yet
        self.ack_due = False  # something was read since the last acknowledgement
        self.rounded_up = 0  # how far rounding has moved the edge since the room last grew
        self.armed = False  # the host socket will report when it is writable

        # To the guest: what we sent and what of it is acknowledged
        self.seq_to_tap = isn
        self.seq_ack_from_tap = isn
        self.stream_len = 0  # bytes taken from the host socket and not acknowledged
        self.bytes_acked = 0
        self.wnd_from_tap = 0  # SND.WND
        self.wnd_max_from_tap = 0  # MAX.SND.WND (RFC 5961, section 5.2)
        self.wnd_seq = 0  # SND.WL1: the segment that the window was taken from
        self.mss_to_tap = mss
        self.wscale_ok = True
        self.ws_from_tap = 0
        self.ws_to_tap = 0  # settled with our SYN or SYN-ACK

        # Readiness is reported by edges: it holds until the socket said EAGAIN
        self.host_readable = False
        self.short_read_ends = True

        self.round_trip = RoundTrip()
        self.dup_acks = 0
        self.recover = -1  # loss recovery ends when this is acknowledged
        self.retransmit_at = NEVER
        self.quiet_since = now
        self.unanswered = 0
        self.retransmissions = 0
        self.sends = 0  # calls of send(), and those that the socket took a part of
        self.short_sends = 0
        self.short_bytes = 0  # what it did not take

        if run is None:
            self._learn(SOCK_CONNECTED)
        else:
            self._syn_from_tap(run)

    def _syn_from_tap(self, run: Run) -> None:
        """What the guest says in its SYN or SYN-ACK."""
        self.irs = run.seq
        self.seq_from_tap = seq.add(run.seq, 1)
        # What our SYN has offered counts from here
        self.wnd_edge_to_tap = seq.add(self.seq_from_tap, self.wnd_edge_to_tap)
        self.wnd_from_tap = self.wnd_max_from_tap = run.window
        self.wnd_seq = run.seq
        self.mss_to_tap = min(max(run.mss or MSS_DEFAULT, MSS_MIN), self.mss_from_tap)
        # RFC 7323, section 2.2: both ends scale or none does
        self.wscale_ok = run.wscale >= 0
        self.ws_from_tap = run.wscale if self.wscale_ok else 0
        if not self.wscale_ok:
            self.ws_to_tap = 0
        self._learn(TAP_SYN_RCVD)

    def _learn(self, fact: int) -> None:
        """The one place that changes the facts."""
        self.facts = learn(self.facts, fact)
        if fact == CLOSED:
            self.queue.throttled.pop(self, None)

    # From the guest to the host socket

    def _room_left(self) -> int:
        """What the guest may still send, bytes."""
        return seq.diff(self.wnd_edge_to_tap, self.seq_from_tap)

    def _data(self, run: Run, offset: int) -> None:
        """Payload, FIN or both; the first `offset` bytes are known already."""
        if offset < 0:
            # RFC 5681, section 4.2: one duplicate ACK per segment that came too early
            for _ in range(min(run.frames, DUP_ACKS_SENT_MAX)):
                self._ack()
            return
        if self.facts & TAP_FIN_RCVD:
            self._ack()
            return

        if run.length:
            self.frame_bytes = bytes_per_frame(self.frame_bytes, run.length, run.frames)
        length = min(run.length - offset, self._room_left())
        if length > 0 and not self._to_host(run.handle, offset, length):
            return
        self.ack_due = True
        if run.flags & FIN and self.seq_from_tap == seq.add(run.seq, run.length):
            self.seq_from_tap = seq.add(self.seq_from_tap, 1)
            if self._room_left() < 0:
                # The window was closed: the FIN is one beyond its edge, and takes the edge with it
                self.wnd_edge_to_tap = self.seq_from_tap
            self._learn(TAP_FIN_RCVD)
            self._ack()
            if not self.kept:
                self._shutdown()

    def _to_host(self, handle: int, skip: int, length: int) -> bool:
        """Pass payload on; what the socket does not take is kept.  False if it is broken."""
        sent = 0
        if not self.kept:
            self.sends += 1
            sent = self.host.send(handle, skip, length)
            if sent < 0:
                if sent != -errno.EAGAIN:
                    self._broken(-sent)
                    return False
                sent = 0
        if sent < length:
            if not self.kept:
                self.short_sends += 1
                self.short_bytes += length - sent
            # The right edge stays where it is until all of this is flushed
            stored = self.host.keep(handle, skip + sent, length - sent, self._room_left() - sent)
            self.kept += stored
            sent += stored
            self._arm()
        self.seq_from_tap = seq.add(self.seq_from_tap, sent)
        return True

    def _arm(self) -> None:
        if not self.armed:
            self.armed = True
            self.host.arm()

    def _writable(self) -> None:
        """The host socket takes data again."""
        if self.kept:
            sent = self.host.flush()
            if sent < 0:
                if sent != -errno.EAGAIN:
                    self._broken(-sent)
                    return
                sent = 0
            self.kept -= sent
            if self.kept:
                self._arm()
                return
            if self.facts & TAP_FIN_RCVD:
                self._shutdown()
                return
        if not self.facts & ESTABLISHED or self.facts & TAP_FIN_RCVD:
            return
        left = self._room_left()
        room = self._room(left)
        # RFC 9293, 3.8.6.2.2: an update is worth two segments, or opens a closed window
        if room >= left + 2 * self.mss_from_tap or left < self.mss_from_tap <= room:
            self._send_ack(room, left)

    def _room(self, left: int, throttle: bool = True) -> int:
        """What the guest may send from now on, bytes: from the memory of the host socket.

        It counts from what was read.  The right edge never moves left (RFC 9293, 3.8.6), and not at
        all while bytes are kept: it is at `left`.  Without `throttle` the small queue has to leave a segment.
        """
        self.reading = None
        if self.kept:
            return left
        facts = self.host.facts()
        # The scale must not round away what makes it a whole segment
        segment = (((self.mss_from_tap - 1) >> self.ws_to_tap) + 1) << self.ws_to_tap
        room = window.room(facts, segment, self.estimate)
        if room <= 0 or not window.writable(facts):
            self._arm()
        if self.trace is not None:
            self.reading = facts
        bound = self.queue.bound(room, self.frame_bytes)
        if bound < room and bound < 2 * segment:
            # A sender waits until a whole segment fits: with less it may stop.  At first it makes its segments
            # to fit (tcp_bound_to_half_wnd()).
            if not throttle:
                bound = min(room, segment)
            elif self.frame_bytes or self.queue.budget:
                self.queue.throttle(self)
        return bound if bound > left else left

    def resume(self) -> None:
        """The small queue had left too little: say a window of a segment, or what there is by now."""
        if self.facts & (CLOSED | ESTABLISHED | TAP_FIN_RCVD) == ESTABLISHED:
            left = self._room_left()
            room = self._room(left, throttle=False)
            if room >> self.ws_to_tap > left >> self.ws_to_tap:
                self._send_ack(room, left)

    def _advertise(self, room: int, left: int) -> int:
        """The field for a room that was just computed; the trace hears of it."""
        field = self._window_field(room, left)
        if self.trace is not None:
            self.trace(self._account(left, room, field << self.ws_to_tap))
        return field

    def _account(self, left: int, room: int, advertised: int) -> dict[str, Any]:
        """How a window came about, bytes; `read` counts from the guest's SYN, modulo 2**32.

        `by` is the rule that decided: estimate, silly and writable (window.bounds()), queue (the small queue),
        edge (it does not move left; after the guest's FIN there is no other), kept (bytes wait, it does not
        move), field (what the scale can say), initial (select_initial_window()).
        """
        account: dict[str, Any] = {
            "window": advertised,
            "by": "kept" if self.kept else "edge",
            "read": seq.add(self.seq_from_tap, -self.irs),
            "left": left,
            "kept": self.kept,
            "short": self.short_bytes,
            "budget": self.queue.budget,
            "budget_frames": self.queue.frames,
            "frame_bytes": self.frame_bytes,
            "field_max": window.WINDOW_FIELD_MAX << self.ws_to_tap,
        }
        self.short_bytes = 0
        facts = self.reading
        if facts is not None:
            account |= {name: getattr(facts, name) for name in SocketFacts._fields}
            account["mss"] = self.mss_from_tap
            account |= window.bounds(facts, self.mss_from_tap, self.estimate)
            if room > account["room"]:
                account["by"] = "edge"
            elif room < account["room"]:
                account["by"] = "queue" if self.facts & ESTABLISHED else "initial"
        if room > account["field_max"]:
            account["by"] = "field"
        return account

    def _window_field(self, room: int, left: int) -> int:
        """The window as it goes on the wire; moves the right edge, at `left` so far, to what it says."""
        field = room >> self.ws_to_tap
        if field > window.WINDOW_FIELD_MAX:
            field = window.WINDOW_FIELD_MAX
        gain = (field << self.ws_to_tap) - left
        if gain >= 0:
            self.rounded_up = 0 if gain else self.rounded_up
        elif field < window.WINDOW_FIELD_MAX:
            # As the kernel does (tcp_select_window()): rounding must not move the edge left.  But many small
            # segments must not push it on for ever either: then it dips by less than the scale can say
            # (RFC 7323, 2.4), and what lies between is still accepted.
            gain += 1 << self.ws_to_tap
            if self.rounded_up + gain > ROUNDED_UP_MAX:
                return field
            self.rounded_up += gain
            field += 1
        self.wnd_edge_to_tap = seq.add(self.seq_from_tap, field << self.ws_to_tap)
        return field

    def _last_field(self) -> int:
        """The window that was advertised last, for segments that acknowledge nothing new."""
        left = self._room_left()
        return self._window_field(left, left)

    def _send_ack(self, room: int, left: int) -> None:
        self.ack_due = False
        self.tap.segment(self.seq_to_tap, self.seq_from_tap, self._advertise(room, left), ACK)

    def _ack(self) -> None:
        """Acknowledge what was read, with the window as it is now."""
        left = self._room_left()
        if self.facts & TAP_FIN_RCVD:
            self.reading = None
            self._send_ack(left, left)
        else:
            self._send_ack(self._room(left), left)

    def _shutdown(self) -> None:
        """All that the guest had to say is in the host socket: pass its FIN on."""
        result = self.host.shutdown()
        if result < 0:
            self._broken(-result)
            return
        self._learn(SOCK_FIN_SENT)
        self._finish()

    # From the host socket to the guest

    def _in_flight(self) -> int:
        """Sent to the guest and not acknowledged; a FIN counts as one byte."""
        return seq.diff(self.seq_to_tap, self.seq_ack_from_tap)

    def _reads(self) -> bool:
        """True if something is left to be read from the host socket, and the guest takes it."""
        reading = self.facts & (ESTABLISHED | SOCK_FIN_RCVD) == ESTABLISHED
        return reading and self.wnd_from_tap > self._in_flight()

    def _acknowledged(self, run: Run, now: float) -> bool:
        """The acknowledgement and window of an acceptable segment; False if it is for what was never sent.

        False too if it is older than anything that can still be under way (RFC 5961, section 5.2).
        """
        advance = seq.diff(run.ack, self.seq_ack_from_tap)
        in_flight = self._in_flight()
        if advance < 0:
            return advance >= -min(self.wnd_max_from_tap, self.bytes_acked)
        if advance > in_flight:
            return False
        wnd = run.window << self.ws_from_tap
        bare = not run.length and not run.flags & FIN
        same = wnd == self.wnd_from_tap
        # RFC 9293, 3.10.7.4: a window counts if its segment was sent after the one that the last came from.  One that
        # acknowledges more counts in any case, as in tcp_may_update_window(): the window is counted from there.
        if advance > 0 or seq.diff(run.last_seq, self.wnd_seq) >= 0:
            self.wnd_seq = run.last_seq
            self.wnd_from_tap = wnd
            if wnd > self.wnd_max_from_tap:
                self.wnd_max_from_tap = wnd
        if advance == 0:
            # RFC 5681, section 2: what makes an acknowledgement a duplicate
            if bare and in_flight and same:
                self.dup_acks += run.frames
                self._count_duplicates()
            return True

        self.seq_ack_from_tap = run.ack
        self.bytes_acked += advance
        # The run may repeat the acknowledgement that it has moved forward to
        self.dup_acks = run.frames - 1 if bare else 0
        self.round_trip.acknowledged(run.ack, now)
        self.retransmit_at = now + self.round_trip.rto if advance < in_flight else NEVER

        data = min(advance, self.stream_len)
        if data:
            self.host.discard(data)
            self.stream_len -= data
        if self.recover >= 0:
            if seq.diff(run.ack, self.recover) >= 0:
                self.recover = -1
            else:
                # RFC 6582, section 3.2: a partial acknowledgement points at the next hole
                self._retransmit()
        elif self.dup_acks and advance < in_flight:
            self._count_duplicates()
        if advance == in_flight and self.facts & TAP_FIN_SENT and not self.facts & TAP_FIN_ACKED:
            self._learn(TAP_FIN_ACKED)
            self._finish()
        return True

    def _count_duplicates(self) -> None:
        """Fast retransmit (RFC 5681, section 3.2)."""
        if self.dup_acks >= DUP_ACKS and self.recover < 0:
            self.recover = self.seq_to_tap
            self._retransmit()

    def _pump(self, now: float) -> None:
        """Move what the host socket has to the guest, as far as the guest's window goes."""
        if not self.facts & ESTABLISHED or self.facts & TAP_FIN_SENT:
            return
        in_flight = self._in_flight()
        unsent = self.stream_len - in_flight
        while self.host_readable or unsent:
            left = self.wnd_from_tap - in_flight
            moved = 0
            if self.host_readable:
                # No more than can be sent at once: the rest is better off in the kernel
                limit = self._whole_segments(left, in_flight) - unsent
                most = min(self.host.capacity, SEGMENTS_MAX * self.mss_to_tap)
                limit = min(limit, RECEIVE_CHUNK, most - self.stream_len)
                if limit > 0:
                    moved = self._from_host(limit)
                    if self.facts & CLOSED:
                        return
                    unsent += moved
            if unsent and left > 0:
                moved = self._send(in_flight, unsent, left, now)
                in_flight += moved
                unsent -= moved
            if not moved:
                break
        if self.facts & SOCK_FIN_RCVD and not unsent:
            self.tap.segment(self.seq_to_tap, self.seq_from_tap, self._last_field(), FIN | ACK)
            self._learn(TAP_FIN_SENT)
            self.seq_to_tap = seq.add(self.seq_to_tap, 1)
            in_flight += 1
        if self.retransmit_at == NEVER and (in_flight or self.stream_len or self.host_readable):
            self.retransmit_at = now + self.round_trip.rto

    def _whole_segments(self, left: int, in_flight: int) -> int:
        """What to send into a window of `left` bytes (RFC 9293, 3.8.6.2.1).

        Whole segments only, unless less than one fits and nothing is under way.
        """
        if left < self.mss_to_tap:
            return 0 if in_flight else max(left, 0)
        return left - left % self.mss_to_tap

    def _held_up(self) -> bool:
        """Nothing is in flight, and there is, or may be, something that should be."""
        return not self._in_flight() and (self.stream_len > 0 or self.host_readable)

    def _from_host(self, limit: int) -> int:
        """Take bytes from the host socket; how many."""
        n = self.host.receive(limit)
        if n > 0:
            self.stream_len += n
            # epoll(7): a short read has emptied the socket, unless its end or an urgent mark is next
            if n < limit and self.short_read_ends:
                self.host_readable = False
            return n
        if n == 0:
            self.host_readable = False
            self._learn(SOCK_FIN_RCVD)
        elif n == -errno.EAGAIN:
            self.host_readable = False
        else:
            self._broken(-n)
        return 0

    def _send(self, in_flight: int, unsent: int, left: int, now: float) -> int:
        """Send what the window allows; the bytes that went out."""
        length = unsent
        if length > left:
            length = self._whole_segments(left, in_flight)
            if not length:
                return 0
        flags = ACK if length < unsent or self.host_readable else ACK | PSH
        left = self._room_left()
        field = self._advertise(self._room(left), left) if self.ack_due else self._window_field(left, left)
        sent = self.tap.data(
            self.seq_to_tap,
            self.seq_from_tap,
            field,
            flags,
            self.mss_to_tap,
            self.host.stream,
            in_flight,
            length,
        )
        if sent <= 0:
            return 0
        self.ack_due = False
        self.seq_to_tap = seq.add(self.seq_to_tap, sent)
        if not in_flight:
            # Whatever was waited for before, a probe's answer it may be, is over
            self.round_trip.backoff = 0
            self.retransmit_at = now + self.round_trip.rto
        if self.recover < 0:
            self.round_trip.sent(self.seq_to_tap, now)
        return sent

    def _retransmit(self) -> None:
        """Send the first unacknowledged frame once more."""
        self.retransmissions += 1
        self.round_trip.resent()
        field = self._last_field()
        length = min(self.stream_len, self._in_flight(), RETRANSMIT_MAX)
        length = min(length, max(self.wnd_from_tap, self.mss_to_tap))
        if length:
            self.tap.data(
                self.seq_ack_from_tap,
                self.seq_from_tap,
                field,
                ACK,
                self.mss_to_tap,
                self.host.stream,
                0,
                length,
            )
        elif self.facts & TAP_FIN_SENT:
            self.tap.segment(self.seq_ack_from_tap, self.seq_from_tap, field, FIN | ACK)

    # Ends

    def _finish(self) -> None:
        """Close once both directions have ended."""
        if self.facts & FINISHED == FINISHED:
            self.host.close()
            self._learn(CLOSED)

    def _broken(self, error: int) -> None:
        """The host socket failed: the guest gets a RST."""
        self.error = error
        self._send_reset()
        self.host.close()
        self._learn(CLOSED)

    def _send_reset(self) -> None:
        # There is nothing to acknowledge before the guest's SYN
        flags = RST | ACK if self.facts & TAP_SYN_RCVD else RST
        self.tap.segment(self.seq_to_tap, self.seq_from_tap, 0, flags)

    def _gone(self) -> None:
        """The guest answers no more."""
        self._send_reset()
        self.error = errno.ETIMEDOUT
        self._leave_host()

    def _leave_host(self) -> None:
        """The guest has reset the connection, or is gone: so it ends for the remote host.

        What was acknowledged still goes there first.  Behind the guest's FIN it is complete, and ends as such;
        otherwise it is not, and the remote host is told so by a reset.
        """
        self.host.close(not self.facts & TAP_FIN_RCVD)
        self._learn(CLOSED)

    def _abort_host(self) -> None:
        """Nothing was acknowledged yet, or nothing can be relied on: the remote host sees a reset at once."""
        self.host.abort()
        self._learn(CLOSED)
