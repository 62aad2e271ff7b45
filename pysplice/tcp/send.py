"""From the host socket to the guest: what is sent, what is acknowledged, and what is sent again.

Owns the other direction of a connection.  Imports the files of this room, receive.py among them because each segment
carries an acknowledgement and a window.  The theory of operation is in __init__.py.
"""

import errno
from typing import Final

from . import seq
from .doors import ACK, FIN, PSH, HostDoor, Run, TapDoor
from .events import SOCK_FIN_RCVD, TAP_FIN_ACKED, TAP_FIN_SENT
from .receive import Receive
from .timing import NEVER, RoundTrip

MSS_DEFAULT: Final = 536  # RFC 9293, 3.7.1: without the option; IPv6 has the same floor in practice

# A guest that asks for smaller segments would make us send a frame for every few bytes (Linux: TCP_MIN_SND_MSS is
# 48); and this many segments in flight are enough for any guest
MSS_MIN: Final = 88
SEGMENTS_MAX: Final = 1024

DUP_ACKS: Final = 3  # RFC 5681, section 3.2

# Read from the host socket at a time: then both copies find the bytes in the processor's cache
RECEIVE_CHUNK: Final = 256 * 1024

# Sent again in one frame
RETRANSMIT_MAX: Final = 64 * 1024 - 1024

# What acknowledged() says of a segment that it does not accept
UNACCEPTABLE: Final = -1


class Send:
    """The sending half of a connection (SND in RFC 9293).

    `receive` is the other half; `isn` our initial sequence number; `mss` bounds the segments, bytes.
    """

    __slots__ = (
        "_host",
        "_receive",
        "_tap",
        "bytes_acked",
        "dup_acks",
        "ended",
        "host_readable",
        "mss",
        "recover",
        "retransmissions",
        "retransmit_at",
        "round_trip",
        "seq_ack_from_tap",
        "seq_to_tap",
        "short_read_ends",
        "stream_len",
        "wnd_from_tap",
        "wnd_max",
        "wnd_seq",
        "ws_from_tap",
    )

    def __init__(self, tap: TapDoor, host: HostDoor, receive: Receive, isn: int, mss: int) -> None:
        self._tap = tap
        self._host = host
        self._receive = receive
        self.mss = mss
        self.seq_to_tap = isn  # SND.NXT
        self.seq_ack_from_tap = isn  # SND.UNA
        self.stream_len = 0  # bytes taken from the host socket and not acknowledged
        self.bytes_acked = 0
        self.ended = False  # our FIN was sent
        self.wnd_from_tap = 0  # SND.WND, bytes
        self.wnd_max = 0  # MAX.SND.WND (RFC 5961, section 5.2)
        self.wnd_seq = 0  # SND.WL1: the segment that the window was taken from
        self.ws_from_tap = 0  # Snd.Wind.Shift

        # Readiness is edge-triggered: it holds until the socket has returned EAGAIN
        self.host_readable = False
        self.short_read_ends = True  # a short read has emptied the socket

        self.round_trip = RoundTrip()
        self.dup_acks = 0
        self.recover = -1  # loss recovery ends when this number is acknowledged; -1: there is none
        self.retransmit_at = NEVER
        self.retransmissions = 0

    def start(self, run: Run) -> None:
        """The guest's SYN or SYN-ACK."""
        self.wnd_from_tap = self.wnd_max = run.window
        self.wnd_seq = run.seq
        self.mss = min(max(run.mss or MSS_DEFAULT, MSS_MIN), self._receive.mss)
        self.ws_from_tap = max(run.wscale, 0)

    def established(self, run: Run, now: float) -> None:
        """Our SYN is acknowledged: the first round trip is known."""
        self.seq_ack_from_tap = run.ack
        self.round_trip.acknowledged(run.ack, now)
        self.retransmit_at = NEVER

    def in_flight(self) -> int:
        """Bytes that were sent and not acknowledged; a SYN and a FIN count as one byte each."""
        return seq.diff(self.seq_to_tap, self.seq_ack_from_tap)

    def has_window(self) -> bool:
        """True if the guest can take more."""
        return self.wnd_from_tap > self.in_flight()

    def held_up(self) -> bool:
        """True if nothing is in flight although something should be, or may have to be."""
        return not self.in_flight() and (self.stream_len > 0 or self.host_readable)

    # Acknowledgements

    def acknowledged(self, run: Run, now: float) -> int:
        """The acknowledgement and the window of a segment.

        The result: TAP_FIN_ACKED if our FIN was acknowledged, else 0; UNACCEPTABLE if the segment acknowledges what was
        never sent, or is older than anything that can still be under way (RFC 5961, section 5.2).
        """
        advance = seq.diff(run.ack, self.seq_ack_from_tap)
        in_flight = seq.diff(self.seq_to_tap, self.seq_ack_from_tap)
        if advance < 0:
            return 0 if advance >= -min(self.wnd_max, self.bytes_acked + self.ended) else UNACCEPTABLE
        if advance > in_flight:
            return UNACCEPTABLE
        wnd = run.window << self.ws_from_tap
        bare = not run.length and not run.flags & FIN
        same = wnd == self.wnd_from_tap
        # RFC 9293, 3.10.7.4: a window counts if its segment was sent after the one that the last came from.  One that
        # acknowledges more counts in any case, as in tcp_may_update_window(): the window is counted from there.
        if advance > 0 or seq.diff(run.last_seq, self.wnd_seq) >= 0:
            self.wnd_seq = run.last_seq
            self.wnd_from_tap = wnd
            if wnd > self.wnd_max:
                self.wnd_max = wnd
        if advance == 0:
            # RFC 5681, section 2: what makes an acknowledgement a duplicate
            if bare and in_flight and same:
                self.dup_acks += run.frames
                self._count_duplicates()
            return 0

        self.seq_ack_from_tap = run.ack
        # A run may repeat the acknowledgement that it has moved to
        self.dup_acks = run.frames - 1 if bare else 0
        self.round_trip.acknowledged(run.ack, now)
        self.retransmit_at = now + self.round_trip.rto if advance < in_flight else NEVER

        data = min(advance, self.stream_len)
        if data:
            self._host.discard(data)
            self.stream_len -= data
            self.bytes_acked += data
        if self.recover >= 0:
            if seq.diff(run.ack, self.recover) >= 0:
                self.recover = -1
            else:
                # RFC 6582, section 3.2: a partial acknowledgement points at the next hole
                self.retransmit()
        elif self.dup_acks and advance < in_flight:
            self._count_duplicates()
        return TAP_FIN_ACKED if self.ended and advance == in_flight else 0

    def _count_duplicates(self) -> None:
        """Fast retransmit (RFC 5681, section 3.2)."""
        if self.dup_acks >= DUP_ACKS and self.recover < 0:
            self.recover = self.seq_to_tap
            self.retransmit()

    # Data

    def readable(self, ready: bool, ends: bool) -> None:
        """The host socket has reported something to read; `ends`: its end, an error or an urgent mark may be next."""
        self.host_readable = ready
        if ends:
            self.short_read_ends = False

    def pump(self, now: float, sock_ended: bool) -> int:
        """Move what the host socket has to the guest, as far as the guest's window goes.

        `sock_ended`: the end of the remote host's data was read before.  The result: the facts that have become true,
        SOCK_FIN_RCVD or TAP_FIN_SENT or both; below 0 -errno if the host socket is broken.
        """
        learned = 0
        in_flight = seq.diff(self.seq_to_tap, self.seq_ack_from_tap)
        unsent = self.stream_len - in_flight
        while self.host_readable or unsent:
            left = self.wnd_from_tap - in_flight
            moved = 0
            if self.host_readable:
                # No more than can be sent at once: the rest is better off in the kernel
                limit = self._whole_segments(left, in_flight) - unsent
                most = min(self._host.capacity, SEGMENTS_MAX * self.mss)
                limit = min(limit, RECEIVE_CHUNK, most - self.stream_len)
                if limit > 0:
                    n = self._host.receive(limit)
                    if n > 0:
                        self.stream_len += n
                        unsent += n
                        moved = n
                        # epoll(7): a short read has emptied the socket, unless its end or an urgent mark is next
                        if n < limit and self.short_read_ends:
                            self.host_readable = False
                    elif n == 0:
                        self.host_readable = False
                        learned = SOCK_FIN_RCVD
                    elif n == -errno.EAGAIN:
                        self.host_readable = False
                    else:
                        return n
            if unsent and left > 0:
                moved = self._transmit(in_flight, unsent, left, now)
                in_flight += moved
                unsent -= moved
            if not moved:
                break
        if (sock_ended or learned) and not unsent:
            receive = self._receive
            field = receive.field()
            self._tap.segment(self.seq_to_tap, receive.seq_from_tap, field, FIN | ACK)
            receive.ack_due = False
            self.seq_to_tap = seq.add(self.seq_to_tap, 1)
            self.ended = True
            learned |= TAP_FIN_SENT
            in_flight += 1
        if self.retransmit_at == NEVER and (in_flight or self.stream_len or self.host_readable):
            self.retransmit_at = now + self.round_trip.rto
        return learned

    def _whole_segments(self, left: int, in_flight: int) -> int:
        """How much to send into a window of `left` bytes (RFC 9293, 3.8.6.2.1).

        Whole segments only, unless less than one fits and nothing is under way.
        """
        if left < self.mss:
            return 0 if in_flight else max(left, 0)
        return left - left % self.mss

    def _transmit(self, in_flight: int, unsent: int, left: int, now: float) -> int:
        """Send what a window of `left` bytes allows; the bytes that went out."""
        length = unsent
        if length > left:
            length = self._whole_segments(left, in_flight)
            if not length:
                return 0
        receive = self._receive
        sent = self._tap.data(
            self.seq_to_tap,
            receive.seq_from_tap,
            receive.field(),
            ACK if length < unsent or self.host_readable else ACK | PSH,
            self.mss,
            self._host.stream,
            in_flight,
            length,
        )
        if sent <= 0:
            return 0
        receive.ack_due = False
        self.seq_to_tap = seq.add(self.seq_to_tap, sent)
        if not in_flight:
            # Whatever we were waiting for, the answer to a probe for instance, no longer matters
            self.round_trip.backoff = 0
            self.retransmit_at = now + self.round_trip.rto
        if self.recover < 0:
            self.round_trip.sent(self.seq_to_tap, now)
        return sent

    def retransmit(self) -> None:
        """Send the first unacknowledged frame, or the FIN, once more."""
        self.retransmissions += 1
        self.round_trip.resent()
        receive, in_flight = self._receive, self.in_flight()
        field = receive.last_field()
        length = min(self.stream_len, in_flight, RETRANSMIT_MAX)
        length = min(length, max(self.wnd_from_tap, self.mss))
        if length:
            self._tap.data(
                self.seq_ack_from_tap,
                receive.seq_from_tap,
                field,
                ACK,
                self.mss,
                self._host.stream,
                0,
                length,
            )
        elif self.ended:
            self._tap.segment(self.seq_ack_from_tap, receive.seq_from_tap, field, FIN | ACK)

    def expired(self) -> bool:
        """The guest has not answered in time: send the first frame again; False if there is none in flight."""
        if not self.in_flight():
            return False
        self.recover = self.seq_to_tap
        self.retransmit()
        return True

    def probe(self) -> None:
        """Ask for an acknowledgement, with a segment that the guest has seen and must answer (RFC 9293, 3.8.4)."""
        receive = self._receive
        self._tap.segment(seq.add(self.seq_to_tap, -1), receive.seq_from_tap, receive.last_field(), ACK)
