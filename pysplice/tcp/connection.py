"""One connection: what happens when, around the transfer of its bytes.

Owns nothing beyond what transfer.py has; it is the state machine's outside.  Imports the other files of
this room and nothing else: no descriptor, clock, loop or randomness.  Time comes in as `now` (seconds, any
epoch that never goes back), bytes stay behind the doors.  The theory of operation is in __init__.py.

Three entries, each to its end: `on_tap` for a run of segments, `on_host` for readiness of the host
socket, `on_timer` once `deadline()` has passed.  After each the caller looks at `facts` for CLOSED
(the host socket is gone then) and at `deadline()`; and after a batch of runs it calls `acknowledge()`, once
it has looked whether a host socket has an answer that can carry the acknowledgement.
"""

import errno

from . import seq, window
from .doors import ACK, CLOSING, ERROR, FIN, HANGUP, READABLE, RST, SYN, URGENT, WRITABLE, Run
from .events import CLOSED, ESTABLISHED, SOCK_CONNECTED, SOCK_FIN_RCVD, TAP_SYN_ACK_SENT, TAP_SYN_SENT
from .timing import NEVER, keepalive_at
from .transfer import Transfer

# How often in a row the guest may leave us without an answer: tcp_synack_retries, tcp_retries2 and
# tcp_keepalive_probes of Linux
SYN_ACK_RETRIES = 5
RETRIES = 15
KEEPALIVE_PROBES = 9

# Socket errors that an ICMP message carries to the guest
UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM, errno.ENETDOWN})


class Connection(Transfer):
    """A TCP connection of the guest's: the arguments are those of Transfer."""

    __slots__ = ()

    # Entries

    def on_tap(self, run: Run, now: float) -> None:
        """A run of segments from the guest."""
        if self.facts & CLOSED:
            return
        self.quiet_since = now
        self.unanswered = 0
        flags = run.flags
        if not self.facts & ESTABLISHED and not self._handshake(run, now):
            return
        if flags & (RST | SYN):
            self._reset_or_syn(run)
            return
        if not flags & ACK:
            return

        # RFC 9293, 3.10.7.4: a segment outside of the window is answered and otherwise ignored
        offset = seq.diff(self.seq_from_tap, run.seq)
        end = run.length + (1 if flags & FIN else 0)
        if offset > 0 and offset >= end:
            self._ack()
            return
        if offset < 0 and seq.diff(run.seq, self.wnd_edge_to_tap) > 0:
            self._ack()
            return

        if not self._acknowledged(run, now):
            # RFC 9293, 3.10.7.4, RFC 5961, 5.2: it acknowledges what was never sent, or is far too old
            self._ack()
            return
        if self.facts & CLOSED:
            return
        if end:
            self._data(run, offset)
        if self.facts & CLOSED:
            return
        self._pump(now)

    def on_host(self, ready: int, now: float) -> None:
        """The host socket is ready: bits of epoll, `ready` says what changed since the last call."""
        facts = self.facts
        if facts & CLOSED:
            return
        if not facts & SOCK_CONNECTED:
            if not ready & (WRITABLE | ERROR | HANGUP):
                return
            self._connected(now)
            facts = self.facts
            if facts & CLOSED:
                return
            # The remote host may have spoken first: its edge is this one
        if ready & WRITABLE and self.armed:
            self.armed = False
            self._writable()
            if self.facts & CLOSED:
                return
        if ready & (READABLE | URGENT | CLOSING | ERROR | HANGUP):
            self.host_readable = not facts & SOCK_FIN_RCVD
            if ready & (URGENT | CLOSING | ERROR | HANGUP):
                self.short_read_ends = False
            if ready & ERROR and not self._reads():
                # Otherwise reading yields the error, behind what came before it
                self._broken(self.host.error() or errno.ECONNRESET)
                return
            self._pump(now)

    def on_timer(self, now: float) -> None:
        """The deadline has passed (a call before it does nothing)."""
        if self.facts & CLOSED:
            return
        if now >= self.retransmit_at:
            self._timeout(now)
        elif now >= self.deadline():
            self._keepalive(now)

    def acknowledge(self) -> None:
        """Acknowledge what was read, unless a segment with data has done so."""
        if self.ack_due and not self.facts & CLOSED:
            self._ack()

    def reset(self, error: int) -> None:
        """Cut the connection short in both directions, whatever state it is in."""
        if not self.facts & CLOSED:
            self.error = error
            self._send_reset()
            self._abort_host()

    def abandon(self) -> None:
        """The host's connect() is waited for no longer; the guest hears nothing, as from a host that is not there."""
        if not self.facts & CLOSED:
            self.error = errno.ETIMEDOUT
            self._abort_host()

    def deadline(self) -> float:
        """When on_timer() has something to do, `NEVER` if nothing is awaited."""
        facts = self.facts
        if facts & CLOSED:
            return NEVER
        if self.retransmit_at != NEVER or not facts & ESTABLISHED:
            return self.retransmit_at
        return keepalive_at(self.quiet_since)

    # The handshake: connect() first, SYN-ACK afterwards

    def _connected(self, now: float) -> None:
        """The outcome of connect() is known."""
        error = self.host.error()
        if error:
            self.error = error
            if error in UNREACHABLE:
                self.tap.unreachable(error)
            elif error != errno.ETIMEDOUT:
                # Nobody answered a SYN that timed out: nor do we, the guest has a timer of its own
                self.tap.segment(0, self.seq_from_tap, 0, RST | ACK)
            self.host.close()
            self._learn(CLOSED)
            return
        self._learn(SOCK_CONNECTED)
        self._syn_ack(now)
        self._learn(TAP_SYN_ACK_SENT)
        self.seq_to_tap = seq.add(self.seq_to_tap, 1)

    def open(self, now: float) -> None:
        """Ask the guest for a connection that was accepted on the host."""
        self._syn(now)
        self._learn(TAP_SYN_SENT)
        self.seq_to_tap = seq.add(self.seq_to_tap, 1)

    def _syn(self, now: float) -> None:
        window_field = self._first_window()
        self.tap.syn(self.seq_ack_from_tap, window_field, self.mss_from_tap, self.ws_to_tap)
        self.retransmit_at = now + self.round_trip.timeout()

    def _syn_ack(self, now: float) -> None:
        window_field = self._first_window()
        wscale = self.ws_to_tap if self.wscale_ok else -1
        self.tap.syn_ack(self.seq_ack_from_tap, self.seq_from_tap, window_field, self.mss_from_tap, wscale)
        self.retransmit_at = now + self.round_trip.timeout()

    def _first_window(self) -> int:
        """The window of a SYN, and the scale of those to come unless it was said already."""
        self.reading = facts = self.host.facts()
        room = window.room(facts, self.mss_from_tap, self.estimate)
        # The scale has to serve for what the send buffer can become, and is said once
        most = max(facts.wmem_max, facts.sndbuf)
        first = window.select_initial_window(room, self.mss_from_tap, 0, self.wscale_ok, most)
        if not self.facts & (TAP_SYN_ACK_SENT | TAP_SYN_SENT):
            self.ws_to_tap = first.rcv_wscale
        left = self._room_left()
        # RFC 7323, section 2.2: the window of a SYN is not scaled
        room = self.queue.bound(min(first.rcv_wnd, window.WINDOW_FIELD_MAX), self.frame_bytes)
        room = max(room, left)
        self.wnd_edge_to_tap = seq.add(self.seq_from_tap, room)
        if self.trace is not None:
            self.trace(self._account(left, room, room))
        return room

    def _handshake(self, run: Run, now: float) -> bool:
        """A run for a connection that is not established; True if it is now."""
        flags = run.flags
        if self.facts & TAP_SYN_SENT:
            self._answer(run, now)
            return False
        if flags & RST:
            if run.seq == self.seq_from_tap:
                self._abort_host()
            elif self.facts & TAP_SYN_ACK_SENT and self._in_window(run.seq):
                self._ack()  # RFC 5961, section 3.2
            return False
        if flags & SYN:
            if run.seq != self.irs:
                # The guest gave up, and uses the ports again
                self._abort_host()
            elif self.facts & TAP_SYN_ACK_SENT:
                self._syn_ack(now)
            return False
        if not flags & ACK or not self.facts & TAP_SYN_ACK_SENT or run.ack != self.seq_to_tap:
            if flags & ACK:
                self.tap.segment(run.ack, 0, 0, RST)
            return False
        self._established(run)
        return True

    def _established(self, run: Run) -> None:
        self._learn(ESTABLISHED)
        self.seq_ack_from_tap = run.ack
        self.round_trip.backoff = 0
        self.retransmit_at = NEVER

    def _answer(self, run: Run, now: float) -> None:
        """The guest's answer to our SYN (RFC 9293, 3.10.7.3)."""
        flags = run.flags
        if flags & ACK and run.ack != self.seq_to_tap:
            if not flags & RST:
                self.tap.segment(run.ack, 0, 0, RST)
        elif flags & RST:
            if flags & ACK:
                # Nobody listens: the client on the host has a connection by now, and sees it reset
                self.error = errno.ECONNREFUSED
                self._abort_host()
        elif flags & SYN and flags & ACK:
            self._syn_from_tap(run)
            self._established(run)
            self._ack()
            self._pump(now)

    def _reset_or_syn(self, run: Run) -> None:
        """RFC 5961, sections 3.2 and 4.2: only an exact RST counts, the rest is challenged."""
        if run.flags & RST:
            if run.seq == self.seq_from_tap:
                self.error = errno.ECONNRESET
                self._leave_host()
                return
            if not self._in_window(run.seq):
                return
        self._ack()

    def _in_window(self, number: int) -> bool:
        """True for a sequence number that the guest may use now."""
        return 0 <= seq.diff(number, self.seq_from_tap) < self._room_left()

    # Timers

    def _timeout(self, now: float) -> None:
        """Something was not answered in time."""
        established = self.facts & ESTABLISHED
        if established and not self._in_flight() and not self._held_up():
            self.retransmit_at = NEVER
            return
        self.unanswered += 1
        self.round_trip.expired()
        if self.unanswered > (RETRIES if established else SYN_ACK_RETRIES):
            self._gone()
            return
        if not established:
            if self.facts & TAP_SYN_SENT:
                self._syn(now)
            else:
                self._syn_ack(now)
            return
        if self._in_flight():
            self.recover = self.seq_to_tap
            self._retransmit()
        else:
            # The tap did not take it, or the window is closed (RFC 9293, 3.8.6.1)
            self._pump(now)
            if self.facts & CLOSED:
                return
            if not self._in_flight():
                self._probe()
        self.retransmit_at = now + self.round_trip.timeout()

    def _probe(self) -> None:
        """Ask for an acknowledgement: a segment that the guest must answer and has seen."""
        field = self._last_field()
        self.tap.segment(seq.add(self.seq_to_tap, -1), self.seq_from_tap, field, ACK)

    def _keepalive(self, now: float) -> None:
        """The guest was silent for long (RFC 9293, 3.8.4)."""
        self.quiet_since = now
        self.unanswered += 1
        if self.unanswered > KEEPALIVE_PROBES:
            self._gone()
        else:
            self._probe()
