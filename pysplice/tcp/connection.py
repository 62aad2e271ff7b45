"""One connection: its facts, the handshake, the timers, and how it ends.

Owns the facts; `Receive` and `Send` own the two directions.  Imports the other files of this room and nothing else:
no descriptor, clock, loop or randomness.  Time comes in as `now` (seconds, of any clock that never goes back), bytes
stay behind the doors.  The theory of operation is in __init__.py.

A connection has three entries, each of which runs to its end: `on_tap` for a run of segments, `on_host` for the
readiness of the host socket, `on_timer` once `deadline()` has passed.  After each of them the caller looks at `facts`
for CLOSED (the host socket is given back then) and at `deadline()`.  After a batch of runs, and once it has asked the
host sockets for answers that can carry the acknowledgement, the caller calls `acknowledge()`.
"""

import errno
from typing import Final, NamedTuple

from . import seq, window
from .account import Account
from .doors import (
    ACK,
    CLOSING,
    ERROR,
    FIN,
    HANGUP,
    READABLE,
    RST,
    SYN,
    URGENT,
    WRITABLE,
    HostDoor,
    Run,
    TapDoor,
)
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
    TAP_SYN_ACK_SENT,
    TAP_SYN_RCVD,
    TAP_SYN_SENT,
    learn,
)
from .handshake import ABORT, ACCEPTED, CHALLENGE, CONFIRMED, REFUSED, Handshake
from .receive import Receive
from .send import UNACCEPTABLE, Send
from .small_queue import SmallQueue
from .timing import NEVER, Challenges, keepalive_at

# How often in a row the guest may leave us without an answer: tcp_synack_retries, tcp_retries2 and
# tcp_keepalive_probes of Linux
SYN_ACK_RETRIES: Final = 5
RETRIES: Final = 15
KEEPALIVE_PROBES: Final = 9

# Segments of one run that came too early and are answered with a duplicate acknowledgement each
DUP_ACKS_SENT_MAX: Final = 64


# What is established, and whose remote host has not ended, is read
READING: Final = ESTABLISHED | SOCK_FIN_RCVD


class Terms(NamedTuple):
    """What a connection begins with.

    `isn`: our initial sequence number.  `mss`: the segment size that we offer the guest, bytes.  `queue`: the small
    queue of the tap.  `estimate`: the rule for what the host socket can still queue.  `trace`: told about each window
    that is advertised, unless it is None.
    """

    isn: int
    mss: int
    queue: SmallQueue
    estimate: window.Estimator = window.DEFAULT_ESTIMATOR
    trace: Account | None = None


class Connection:
    """A TCP connection of the guest's.

    `tap` and `host` are the two doors.  `run` is the guest's SYN; None: a client on the host has connected, and open()
    asks the guest.  `now` is the time.
    """

    __slots__ = (
        "_challenges", "_handshake", "_queue", "error", "facts", "host", "quiet_since", "receive", "send", "tap",
        "unanswered",
    )  # fmt: skip

    def __init__(self, tap: TapDoor, host: HostDoor, run: Run | None, terms: Terms, now: float) -> None:
        self.tap = tap
        self.host = host
        self._queue = terms.queue
        self.facts = 0
        self.error = 0  # the errno that has ended the connection; 0 for a good end
        self.receive = Receive(host, terms.queue, terms.mss, terms.estimate, terms.trace)
        self.send = Send(tap, host, self.receive, terms.isn, terms.mss)
        self._handshake = Handshake(tap, self.receive, self.send, run)
        self._challenges = Challenges()
        self.quiet_since = now  # when the guest was last heard, or probed
        self.unanswered = 0  # how often in a row it did not answer
        if run is None:
            self._learn(SOCK_CONNECTED)
        else:
            self._syn_from_tap(run)

    def _learn(self, fact: int) -> None:
        """The one place that changes the facts."""
        self.facts = learn(self.facts, fact)
        if fact == CLOSED:
            self._queue.throttled.pop(self, None)

    def on_tap(self, run: Run, now: float) -> None:
        """A run of segments from the guest."""
        if self.facts & CLOSED:
            return
        self.quiet_since = now
        self.unanswered = 0
        flags = run.flags
        if not self.facts & ESTABLISHED and not self._opened(run, now):
            return
        if flags & (RST | SYN):
            self._reset_or_syn(run, now)
            return
        if not flags & ACK:
            return

        # RFC 9293, 3.10.7.4: a segment outside of the window is answered and otherwise ignored
        receive = self.receive
        offset = seq.diff(receive.seq_from_tap, run.seq)
        end = run.length + (1 if flags & FIN else 0)
        if offset >= max(end, 1) or (offset < 0 and seq.diff(run.seq, receive.wnd_edge) > 0):
            if end or self._challenges.may_be(now):
                self._ack()
            return

        acknowledged = self.send.acknowledged(run, now)
        if acknowledged:
            if acknowledged == UNACCEPTABLE:
                if self._challenges.may_be(now):
                    self._ack()
                return
            if not self.facts & TAP_FIN_ACKED:
                self._learn(TAP_FIN_ACKED)
                self._finish()
                if self.facts & CLOSED:
                    return
        if end:
            self._payload(run, offset)
            if self.facts & CLOSED:
                return
        self._pump(now)

    def on_host(self, ready: int, now: float) -> None:
        """The host socket is ready: the bits of epoll(7) that have changed since the last call."""
        facts = self.facts
        if facts & CLOSED:
            return
        if not facts & SOCK_CONNECTED:
            if not ready & (WRITABLE | ERROR | HANGUP):
                return
            self._connected(ready, now)
            facts = self.facts
            if facts & CLOSED:
                return
            # The remote host may have spoken first: this is the only report of it
        if ready & WRITABLE and self.receive.armed:
            self.receive.armed = False
            self._writable()
            if self.facts & CLOSED:
                return
        if ready & (READABLE | URGENT | CLOSING | ERROR | HANGUP):
            self.send.readable(not facts & SOCK_FIN_RCVD, bool(ready & (URGENT | CLOSING | ERROR | HANGUP)))
            if ready & ERROR and not (self.facts & READING == ESTABLISHED and self.send.has_window()):
                # Otherwise reading yields the error, behind the data that came before it
                self._broken(self.host.error() or errno.ECONNRESET)
                return
            self._pump(now)

    def on_timer(self, now: float) -> None:
        """The deadline has passed; a call before it does nothing."""
        if self.facts & CLOSED:
            return
        if now >= self.send.retransmit_at:
            self._timeout(now)
        elif now >= self.deadline():
            self._keepalive(now)

    def acknowledge(self) -> None:
        """Acknowledge what was read, unless a segment with data has done so."""
        if self.receive.ack_due and not self.facts & CLOSED:
            self._ack()

    def resume(self) -> None:
        """The small queue had left too little room: advertise a segment, or the room that there is now."""
        if self.facts & (CLOSED | ESTABLISHED | TAP_FIN_RCVD) == ESTABLISHED:
            receive = self.receive
            left = receive.room_left()
            room = receive.room(left, throttle=False)
            if room >> receive.ws_to_tap > left >> receive.ws_to_tap:
                self._send_ack(room, left)

    def reset(self, error: int, silently: bool = False) -> None:
        """End both directions at once, in any state, with an errno; `silently`: the guest hears nothing of it."""
        if not self.facts & CLOSED:
            self.error = error
            if not silently:
                self._send_reset()
            self._abort_host()

    def deadline(self) -> float:
        """When on_timer() has something to do; `NEVER` if nothing is awaited."""
        facts = self.facts
        if facts & CLOSED:
            return NEVER
        retransmit_at = self.send.retransmit_at
        if retransmit_at != NEVER or not facts & ESTABLISHED:
            return retransmit_at
        return keepalive_at(self.quiet_since)

    def open(self, now: float) -> None:
        """Ask the guest for a connection that was accepted on the host."""
        self._handshake.ask(self.facts, now)
        self._learn(TAP_SYN_SENT)

    def _connected(self, ready: int, now: float) -> None:
        """The outcome of connect() is known."""
        self.error = self.host.error() if ready & (ERROR | HANGUP) else 0
        if self.error:
            self._handshake.refuse(self.error, now)
            self.host.close()
            self._learn(CLOSED)
        else:
            self._learn(SOCK_CONNECTED)
            self._handshake.agree(self.facts, now)
            self._learn(TAP_SYN_ACK_SENT)

    def _syn_from_tap(self, run: Run) -> None:
        """The guest's SYN or SYN-ACK: its numbers and options."""
        self.receive.start(run)
        self.send.start(run)
        self._learn(TAP_SYN_RCVD)

    def _opened(self, run: Run, now: float) -> bool:
        """A run for a connection that is not established; True if it is now, and the run goes on."""
        verdict = self._handshake.judge(self.facts, run, now)
        if verdict == CHALLENGE and self._challenges.may_be(now):
            self._ack()
        elif verdict == ABORT:
            self._abort_host()
        elif verdict == REFUSED:
            self.error = errno.ECONNREFUSED
            self._abort_host()
        elif verdict in (CONFIRMED, ACCEPTED):
            if verdict == ACCEPTED:
                self._syn_from_tap(run)
            self._learn(ESTABLISHED)
            self.send.established(run, now)
            if verdict == ACCEPTED:
                self._ack()
                self._pump(now)
        return verdict == CONFIRMED

    def _reset_or_syn(self, run: Run, now: float) -> None:
        """RFC 5961, sections 3.2 and 4.2: only an exact RST counts, anything else is challenged."""
        if run.flags & RST and run.seq == self.receive.seq_from_tap:
            self.error = errno.ECONNRESET
            self._leave_host()
        elif (not run.flags & RST or self.receive.in_window(run.seq)) and self._challenges.may_be(now):
            self._ack()

    # The two directions

    def _payload(self, run: Run, offset: int) -> None:
        """Payload, FIN or both; the first `offset` bytes were read before."""
        receive = self.receive
        if offset < 0:
            # RFC 5681, section 4.2: one duplicate ACK for each segment that came too early
            for _ in range(min(run.frames, DUP_ACKS_SENT_MAX)):
                self._ack()
            return
        if receive.ended:
            self._ack()
            return
        error = receive.take(run, offset)
        if error:
            self._broken(error)
        elif run.flags & FIN and receive.take_fin(run):
            self._learn(TAP_FIN_RCVD)
            receive.ack_due = True
            if not receive.kept:
                self._shutdown()

    def _writable(self) -> None:
        """The host socket takes data again."""
        receive = self.receive
        if receive.kept:
            error = receive.flush()
            if error:
                self._broken(error)
            elif receive.ended and not receive.kept:
                self._shutdown()
        if receive.kept or receive.ended or self.facts & (ESTABLISHED | CLOSED) != ESTABLISHED:
            return
        left = receive.room_left()
        room = receive.room(left)
        if receive.is_update(room, left):
            self._send_ack(room, left)
        elif receive.starved:
            self._queue.throttle(self)

    def _ack(self) -> None:
        """Acknowledge what was read, with the window as it is now."""
        receive = self.receive
        left = receive.room_left()
        self._send_ack(receive.room(left), left)

    def _send_ack(self, room: int, left: int) -> None:
        receive = self.receive
        receive.ack_due = False
        field = receive.advertise(room, left)
        self.tap.segment(self.send.seq_to_tap, receive.seq_from_tap, field, ACK)
        if receive.starved:
            self._queue.throttle(self)

    def _pump(self, now: float) -> None:
        """Move what the host socket has to the guest."""
        facts = self.facts
        if not facts & ESTABLISHED or facts & TAP_FIN_SENT:
            return
        learned = self.send.pump(now, facts & SOCK_FIN_RCVD != 0)
        if learned:
            if learned < 0:
                self._broken(-learned)
                return
            for fact in (SOCK_FIN_RCVD, TAP_FIN_SENT):
                if learned & fact:
                    self._learn(fact)
        if self.receive.starved:
            self._queue.throttle(self)

    # Timers

    def _timeout(self, now: float) -> None:
        """The guest did not answer in time."""
        send = self.send
        established = self.facts & ESTABLISHED
        if established and not send.in_flight() and not send.held_up():
            send.retransmit_at = NEVER
            return
        self.unanswered += 1
        send.round_trip.expired()
        if self.unanswered > (RETRIES if established else SYN_ACK_RETRIES):
            self._guest_is_gone()
            return
        if not established:
            self._handshake.again(self.facts, now)
            return
        if not send.expired():
            # The tap did not take it, or the window is closed (RFC 9293, 3.8.6.1)
            self._pump(now)
            if self.facts & CLOSED:
                return
            if not send.in_flight():
                send.probe()
        send.retransmit_at = now + send.round_trip.timeout()

    def _keepalive(self, now: float) -> None:
        """The guest has been silent for a long time (RFC 9293, 3.8.4)."""
        self.quiet_since = now
        self.unanswered += 1
        if self.unanswered > KEEPALIVE_PROBES:
            self._guest_is_gone()
        else:
            self.send.probe()

    # Ends

    def _shutdown(self) -> None:
        """Everything that the guest has sent is in the host socket: pass its FIN on."""
        result = self.host.shutdown()
        if result < 0:
            self._broken(-result)
            return
        self._learn(SOCK_FIN_SENT)
        self._finish()

    def _finish(self) -> None:
        """Close once both directions have ended."""
        if self.facts & FINISHED == FINISHED:
            self.acknowledge()
            self.host.close()
            self._learn(CLOSED)

    def _broken(self, error: int) -> None:
        """The host socket has failed: the guest gets a RST."""
        self.error = error
        self._send_reset()
        self.host.close()
        self._learn(CLOSED)

    def _send_reset(self) -> None:
        # Before the guest's SYN there is nothing to acknowledge
        flags = RST | ACK if self.facts & TAP_SYN_RCVD else RST
        self.tap.segment(self.send.seq_to_tap, self.receive.seq_from_tap, 0, flags)

    def _guest_is_gone(self) -> None:
        """The guest no longer answers."""
        self._send_reset()
        self.error = errno.ETIMEDOUT
        self._leave_host()

    def _leave_host(self) -> None:
        """The guest has reset the connection, or is gone: end it for the remote host.

        What was acknowledged still goes there first.  If the guest's FIN has arrived, the data is complete, and ends
        with a FIN; otherwise it is incomplete, and a reset tells the remote host so.
        """
        self.host.close(not self.facts & TAP_FIN_RCVD)
        self._learn(CLOSED)

    def _abort_host(self) -> None:
        """Nothing has been acknowledged yet, or nothing can be relied on: the remote host sees a reset at once."""
        self.host.abort()
        self._learn(CLOSED)
