"""The window: how much the guest may still send.  Pure functions.

Owns nothing; imports the shape of `SocketFacts` from doors.py.  S, W, Q and m below are the send
buffer (SK_MEMINFO_SNDBUF), what is charged to it (SK_MEMINFO_WMEM_QUEUED), the payload in it
(SIOCOUTQ) and the MSS of the host socket.  S and W are truesize, as sk_stream_memory_free() compares
them: payload plus the sk_buffs that carry it.
"""

from .doors import SocketFacts

WINDOW_FIELD_MAX = 0xFFFF
WSCALE_MAX = 14  # TCP_MAX_WSCALE; RFC 7323, section 2.3

SNDBUF_SMALL = 128 * 1024
SNDBUF_BIG = 4 * 1024 * 1024
SNDBUF_BIG_PERCENT = 75

# A room below one MSS counts as none if data was sent less than this many round trips ago
SILLY_RTTS = 10


class TapQueue:
    """What one connection may have unread in the ring of the tap; all connections share it.

    `budget`: bytes of payload, 0 for no bound.
    """

    __slots__ = ("budget",)

    def __init__(self, budget: int = 0) -> None:
        self.budget = budget


def queue_budget(ring: int, bytes_per_frame: int, active: int) -> int:
    """What one of `active` connections may have unread in a ring of `ring` frames, bytes.

    Half of the ring is shared out, the rest is for everything that no window bounds, and for windows that
    were said when fewer shared it.  At least two frames, as the kernel's small queues leave a socket two
    segments (tcp_small_queue_check()).
    """
    return max(ring // 2 // max(active, 1), 2) * bytes_per_frame


def scaled(sndbuf: int) -> int:
    """The payload that a send buffer of `sndbuf` bytes can be expected to hold.

    100 % of a small buffer, 75 % of a big one, linear between: what passt uses where the overhead of
    sk_buffs cannot be seen (clamped_scale() there).
    """
    if sndbuf <= SNDBUF_SMALL:
        return sndbuf
    if sndbuf >= SNDBUF_BIG:
        return sndbuf * SNDBUF_BIG_PERCENT // 100
    off = (sndbuf - SNDBUF_SMALL) * (100 - SNDBUF_BIG_PERCENT)
    return sndbuf - sndbuf * off // (SNDBUF_BIG - SNDBUF_SMALL) // 100


def writable(facts: SocketFacts) -> bool:
    """True if the kernel calls the socket writable: W is at most two thirds of S.

    sk_stream_is_writeable(): the free space is at least half of what is queued, to the byte, because to
    ask a socket that is writable after all would be answered at once, again and again.  Above that, and only
    above, epoll will report when space comes back, so a window may be closed there and nowhere else.
    """
    queued = facts.outq if facts.wmem_queued < 0 else facts.wmem_queued
    return facts.sndbuf - queued >= queued >> 1


def room(facts: SocketFacts, mss: int) -> int:
    """Bytes of payload that the host socket can still queue; `mss` is the guest's segment size.

    Segments are discrete: with n = max(Q / m, 1) of them queued, each has cost
    o = (W - Q) / n beyond its payload, and floor((S - W) / (m + o)) more fit.  Where the overhead
    cannot be observed (nothing queued, or the queue drained between the two readings) the scaled
    buffer less what is charged to it is the room.  Where the kernel has no SO_MEMINFO, it is the
    scaled buffer less the payload queued.

    Silly windows (RFC 813, section 3; RFC 9293, 3.8.6.2.2): a room below one segment, while data is
    queued and flows, counts as 0.  This is done only while the socket is not writable, because only
    then the kernel tells when to open the window again.  While it is writable the room is at least
    one segment: a sendmsg() may then fall short by less than that, and the rest is kept.
    """
    sndbuf, queued, outq = facts.sndbuf, facts.wmem_queued, facts.outq
    segment = facts.snd_mss or mss
    if queued < 0:
        free = scaled(sndbuf) - outq
    elif queued > sndbuf:
        free = 0
    elif outq > 0 and queued > outq:
        overhead = (queued - outq) // max(outq // segment, 1)
        free = (sndbuf - queued) // (segment + overhead) * segment
    else:
        free = scaled(sndbuf) - queued

    if free >= mss:
        return free
    if writable(facts):
        return mss
    if outq > 0 and facts.last_data_sent * 1000 < SILLY_RTTS * max(facts.rtt, 1000):
        return 0
    return max(free, 0)


def scale(space: int) -> int:
    """The window scale that lets a window of `space` bytes be said (RFC 7323, section 2.3).

    As tcp_select_initial_window() chooses it: the smallest shift that brings the space into 16 bits,
    at most 14.
    """
    return min(max((space // (WINDOW_FIELD_MAX + 1)).bit_length(), 0), WSCALE_MAX)
