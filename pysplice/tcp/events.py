"""The facts of a connection, and what each requires and forbids.

A connection has no states such as FIN-WAIT-1: with two peers the product of their states would be large and say
little.  It has facts instead, each of which becomes true once and stays true.  SOCK is the side of the host socket,
TAP the side of the guest.  What can happen next follows from the facts alone:

- `REQUIRES[fact]`: all of these must hold before;
- `ONE_OF[fact]`: at least one of these must hold before;
- `FORBIDS[fact]`: none of these may hold before.

A connection that the guest opens begins with TAP_SYN_RCVD, one that comes from the host with SOCK_CONNECTED.

Owns nothing; imports no other room.  Only Connection._learn() changes a connection's facts, by learn() here, which
refuses anything that the table does not allow.  Facts are plain ints, because they are tested for each run of segments.
"""

from typing import Final

TAP_SYN_RCVD: Final = 1 << 0  # the guest asked for a connection, or agreed to ours
SOCK_CONNECTED: Final = 1 << 1  # connect() on the host has succeeded, or accept()
TAP_SYN_ACK_SENT: Final = 1 << 2  # the guest was told that
ESTABLISHED: Final = 1 << 3  # both SYNs are acknowledged: data may flow
TAP_FIN_RCVD: Final = 1 << 4  # the guest sends no more, and all of its data is here
SOCK_FIN_SENT: Final = 1 << 5  # all of it is in the host socket: shutdown() was called
SOCK_FIN_RCVD: Final = 1 << 6  # the remote host sends no more: the end of its data was read
TAP_FIN_SENT: Final = 1 << 7  # the guest has all of it, and was told that it is the end
TAP_FIN_ACKED: Final = 1 << 8  # the guest has acknowledged that
CLOSED: Final = 1 << 9  # nothing is left to be done, or the connection was cut off
TAP_SYN_SENT: Final = 1 << 10  # the guest was asked for a connection

NAMES = {
    TAP_SYN_RCVD: "TAP_SYN_RCVD",
    SOCK_CONNECTED: "SOCK_CONNECTED",
    TAP_SYN_ACK_SENT: "TAP_SYN_ACK_SENT",
    ESTABLISHED: "ESTABLISHED",
    TAP_FIN_RCVD: "TAP_FIN_RCVD",
    SOCK_FIN_SENT: "SOCK_FIN_SENT",
    SOCK_FIN_RCVD: "SOCK_FIN_RCVD",
    TAP_FIN_SENT: "TAP_FIN_SENT",
    TAP_FIN_ACKED: "TAP_FIN_ACKED",
    CLOSED: "CLOSED",
    TAP_SYN_SENT: "TAP_SYN_SENT",
}

REQUIRES = {
    TAP_SYN_RCVD: 0,
    SOCK_CONNECTED: 0,
    TAP_SYN_ACK_SENT: TAP_SYN_RCVD | SOCK_CONNECTED,
    ESTABLISHED: TAP_SYN_RCVD | SOCK_CONNECTED,
    TAP_FIN_RCVD: ESTABLISHED,
    SOCK_FIN_SENT: TAP_FIN_RCVD,
    SOCK_FIN_RCVD: ESTABLISHED,
    TAP_FIN_SENT: SOCK_FIN_RCVD,
    TAP_FIN_ACKED: TAP_FIN_SENT,
    CLOSED: 0,
    TAP_SYN_SENT: SOCK_CONNECTED,
}

ONE_OF = {
    ESTABLISHED: TAP_SYN_ACK_SENT | TAP_SYN_SENT,
    CLOSED: TAP_SYN_RCVD | SOCK_CONNECTED,
}

# Nothing becomes true twice, and nothing happens to a closed connection
FORBIDS = {fact: fact | CLOSED for fact in REQUIRES}
# Each connection is opened by one side
FORBIDS[TAP_SYN_SENT] |= TAP_SYN_RCVD
FORBIDS[TAP_SYN_ACK_SENT] |= TAP_SYN_SENT

# With these a connection has ended in good order
FINISHED: Final = SOCK_FIN_SENT | TAP_FIN_ACKED


class IllegalTransition(Exception):
    """A fact was added that the table does not allow: a defect of ours, not of a peer."""


def names(facts: int) -> str:
    """The facts in words, for messages and traces."""
    return "|".join(name for fact, name in NAMES.items() if facts & fact) or "0"


def learn(facts: int, fact: int) -> int:
    """The facts with `fact` added; raises IllegalTransition where the table forbids it."""
    required, one_of = REQUIRES[fact], ONE_OF.get(fact, 0)
    if facts & required != required or facts & FORBIDS[fact] or (one_of and not facts & one_of):
        raise IllegalTransition(f"{names(fact)} after {names(facts)}")
    return facts | fact
