"""The handshake: connect() first, SYN-ACK afterwards; or a SYN of ours, for a client on the host.

Owns nothing beyond its references; imports the files of this room and no other room.

`Handshake` sends what the handshake needs, and judges what the guest answers.  The connection acts on the verdict,
because the facts are its own.
"""

import errno
from typing import Final

from . import seq
from .doors import ACK, RST, SYN, Run, TapDoor
from .events import TAP_SYN_ACK_SENT, TAP_SYN_SENT
from .receive import Receive
from .send import Send

# Verdicts: what a segment means before the connection is established
IGNORE: Final = 0  # nothing
CHALLENGE: Final = 1  # it may be forged: acknowledge what there is (RFC 5961, section 3.2)
ABORT: Final = 2  # the guest wants no such connection
REFUSED: Final = 3  # the port is closed: the client on the host has a connection already, and sees it reset
CONFIRMED: Final = 4  # the guest has acknowledged our SYN-ACK
ACCEPTED: Final = 5  # the guest has answered our SYN

# Socket errors that an ICMP message carries to the guest
UNREACHABLE = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM, errno.ENETDOWN})


class Handshake:
    """The handshake of one connection; `run` is the guest's SYN, or None if we ask the guest."""

    __slots__ = ("_receive", "_send", "_syn_data", "_tap")

    def __init__(self, tap: TapDoor, receive: Receive, send: Send, run: Run | None) -> None:
        self._tap = tap
        self._receive = receive
        self._send = send
        self._syn_data = 0 if run is None else run.length  # it is not taken, only counted by a refusal

    def ask(self, facts: int, now: float) -> None:
        """Send our SYN, or send it again; it is on its way once TAP_SYN_SENT is a fact."""
        receive, send = self._receive, self._send
        field = receive.first_field(not facts & TAP_SYN_SENT)
        self._tap.syn(send.seq_ack_from_tap, field, receive.mss, receive.ws_to_tap)
        self._sent(facts & TAP_SYN_SENT, now)

    def agree(self, facts: int, now: float) -> None:
        """Send our SYN-ACK, or send it again."""
        receive, send = self._receive, self._send
        field = receive.first_field(not facts & TAP_SYN_ACK_SENT)
        wscale = receive.ws_to_tap if receive.wscale_ok else -1
        self._tap.syn_ack(send.seq_ack_from_tap, receive.seq_from_tap, field, receive.mss, wscale)
        self._sent(facts & TAP_SYN_ACK_SENT, now)

    def again(self, facts: int, now: float) -> None:
        """The guest has not answered: send the same again."""
        (self.ask if facts & TAP_SYN_SENT else self.agree)(facts, now)

    def _sent(self, before: int, now: float) -> None:
        send = self._send
        send.retransmit_at = now + send.round_trip.timeout()
        if before:
            send.round_trip.resent()
        else:
            send.seq_to_tap = seq.add(send.seq_to_tap, 1)
            send.round_trip.sent(send.seq_to_tap, now)

    def refuse(self, error: int, now: float) -> None:
        """Tell the guest that connect() has failed with this errno."""
        if error in UNREACHABLE:
            self._tap.unreachable(error, now)
        elif error != errno.ETIMEDOUT:
            # connect() has timed out: no host answered it, so nothing answers the guest, which has its own timer
            # RFC 9293, 3.10.7.1: the whole length of the SYN is acknowledged
            self._tap.segment(0, seq.add(self._receive.seq_from_tap, self._syn_data), 0, RST | ACK)

    def judge(self, facts: int, run: Run, now: float) -> int:
        """What a run means; one of the verdicts.  A SYN that was repeated is answered here."""
        if facts & TAP_SYN_SENT:
            return self._judge_answer(run)
        receive, flags = self._receive, run.flags
        if flags & RST:
            if run.seq == receive.seq_from_tap:
                return ABORT
            return CHALLENGE if facts & TAP_SYN_ACK_SENT and receive.in_window(run.seq) else IGNORE
        if flags & SYN:
            if run.seq != receive.irs:
                return ABORT  # the guest has given up, and uses the ports again
            if facts & TAP_SYN_ACK_SENT:
                self.agree(facts, now)
            return IGNORE
        if not flags & ACK:
            return IGNORE
        if not facts & TAP_SYN_ACK_SENT or run.ack != self._send.seq_to_tap:
            self._tap.segment(run.ack, 0, 0, RST)
            return IGNORE
        return CONFIRMED

    def _judge_answer(self, run: Run) -> int:
        """The guest's answer to our SYN (RFC 9293, 3.10.7.3)."""
        flags = run.flags
        if flags & ACK and run.ack != self._send.seq_to_tap:
            if not flags & RST:
                self._tap.segment(run.ack, 0, 0, RST)
        elif flags & RST:
            return REFUSED if flags & ACK else IGNORE
        elif flags & SYN and flags & ACK:
            return ACCEPTED
        return IGNORE
