"""The protocol room: theory of operation.

Names in double backquotes are names in this package; a test holds this text to them.

Two peers, one connection
-------------------------
A guest's kernel speaks TCP on the tap; the host's kernel speaks TCP on a socket.  Both are complete, so a
``Connection`` is no third TCP between them.  It translates segments into a stream and back, and keeps both
ends honest about how much the other can take.  There are two peers, so names say which: "tap" is the
guest, "sock" or "host" the host socket and the remote host behind it.

``Connection`` is fed and never asks: ``on_tap`` with a run of segments, ``on_host`` with the readiness of the
socket, ``on_timer`` once ``deadline`` has passed.  It acts through two doors, ``TapDoor`` and ``HostDoor``,
whose answers are numbers (below 0: an errno) and whose calls never come back into it.  Payload is named by
handles and never seen.  Nothing in this room knows a descriptor, a clock or a loop, so all of it can be
tested with fakes, a thousand simulated seconds at a time.

Facts instead of states
-----------------------
What is known about a connection is a set of facts that only grows: ``TAP_SYN_RCVD``, ``SOCK_CONNECTED``,
``TAP_SYN_ACK_SENT``, ``ESTABLISHED``; then, for each direction by itself, ``TAP_FIN_RCVD`` and ``SOCK_FIN_SENT``,
``SOCK_FIN_RCVD``, ``TAP_FIN_SENT`` and ``TAP_FIN_ACKED``; and ``CLOSED``.  ``REQUIRES``, ``ONE_OF`` and ``FORBIDS`` say
what must and must not hold before a fact can be added, and ``learn`` refuses everything else with
``IllegalTransition``.  RFC 9293's states are combinations of these: guest in FIN-WAIT-2 is ``TAP_FIN_RCVD``
without ``SOCK_FIN_RCVD``, for instance.

Opening
-------
The guest's SYN makes a socket and starts connect().  The guest gets its SYN-ACK (``syn_ack``) when, and only
when, the connection stands on the host; a refusal becomes a RST, an unreachable network the ICMP error that
says so (``unreachable``), and a SYN that nobody answered stays without answer.  So connect() in the guest
ends as it would have ended on the host.  The SYN-ACK is repeated while ``SYN_ACK_RETRIES`` last.

A connection that comes from the host goes the other way round: it stands there already (accept() has it), so
it begins with ``SOCK_CONNECTED``, and ``open`` asks the guest with a SYN (``TAP_SYN_SENT``).  The guest's SYN-ACK is
acknowledged and brings what the client has said meanwhile; a RST, or silence while the same retries last, resets
the client.  What the first window and the scale say is decided in the same place for both (``_first_window``).

From the guest to the host
--------------------------
``seq_from_tap`` is the next byte expected from the guest.  Payload that is in order goes to the socket at
once (``send``), straight from the batch of frames into the kernel, and is acknowledged as soon as the kernel
has it.  What this means for a crash: bytes that the guest saw acknowledged are in the host's kernel, which
goes on delivering them when this process dies; when the host dies, they are lost, as they are on any host
whose application has written them.  The other choice, to acknowledge what the remote host has acknowledged
(tcpi_bytes_acked), has no event that says when to.  Tried with a timer of a quarter of a round trip, at 0, 1, 10
and 50 ms, it was no faster anywhere: the right edge is the same, and the send buffer bounds both.

If the socket takes only a part, the rest is kept (``keep``) and ``flush`` passes it on when there is room.
Kept bytes count as read and are acknowledged: nothing that the guest was allowed to send is sent twice, and
since the right edge of the window stays where it is while something is ``kept``, their number is bounded by
the window that was advertised.

An acknowledgement waits until the batch of frames is done and the host sockets were asked for answers
(``acknowledge``): an answer that is there carries it.  It never waits for time to pass.

A segment that comes too early is dropped, and answered with a duplicate acknowledgement of its own, so that
the guest's fast retransmit works.  Between a guest and its tap this happens only if the ring overflows.

The window
----------
Before every acknowledgement the window is computed from the socket's memory (``SocketFacts``, ``room``): what
the kernel may queue (SK_MEMINFO_SNDBUF), what it has queued (SK_MEMINFO_WMEM_QUEUED), both with the overhead
of its buffers, and the payload in it (SIOCOUTQ).  Large enough, and the kernel grows the buffer by itself; too
large, and sendmsg() is short.  How these numbers become one is for an estimator: ``ESTIMATORS`` has the known
ones, each with what it gets wrong; ``DEFAULT_ESTIMATOR`` is ``truesize``: the free memory, at the price per segment
that the queue shows.  ``bounds`` tells what each makes of a reading.

- The room counts from what was read, not from what is acknowledged: the right edge is ``seq_from_tap`` plus
  the room, ``wnd_edge_to_tap``.  It never moves left: where the scale cannot say it exactly it is rounded up,
  and only after many small segments have made use of that (``ROUNDED_UP_MAX``) down instead, by less than
  one unit of the scale; what lies between is still accepted.
- A closed window has to be opened again, and nothing but the socket can say when.  The kernel reports
  writability (at most two thirds of the buffer used: ``writable``) only to somebody who has asked after it
  was lost, so ``arm`` asks whenever the socket is not writable; the kernel takes the same question as the
  sign that the buffer should grow.  It follows that for the socket's sake the window may be closed only while
  it is not writable: in any other state nothing would ever open it.  (A window that the small queue closes is
  opened by ``resume``, and one that waits for ``kept`` bytes by ``flush``.)
- The remote host's window (tcpi_snd_wnd) does not bound what we advertise.  Nothing reports when it opens, so
  a window closed by it would stay closed; and the send buffer, which the kernel keeps at about twice what is
  under way, bounds the same thing and does report.

The first window and the scale are what ``select_initial_window`` makes of the send buffer: the kernel's own
rule, with the buffer that holds the guest's data in the place of the receive buffer.  The scale is said once,
so it is chosen for what the buffer may become (``wmem_max``).

Small queues
------------
What the guest sends waits in the ring of the tap until it is read, and the guest's kernel cannot see it
there.  ``SmallQueue`` bounds what one connection may have unread, by the same window (``bound``).

- Against an overflow of the ring, half of it is shared out among those who queue (``share``), in frames of
  the size that each of them has sent (``frame_bytes``): who sends tiny ones is bound by that, and nobody else.
  Someone who sends one small frame at a time queues nothing and is not counted.
- So that a small message does not wait behind megabytes, bulk senders are brief (``patience``) while somebody
  else talks in small ones.  Alone, or among themselves, they are not: a short queue costs rate.
- A connection that is left with little may stop, because a sender waits until a whole segment fits.  It is
  listed (``throttled``), and once it has been quiet for a moment, a longer one while others are in the ring,
  ``resume`` gives it room again, in order, to as many at a time as the ring can bear.
- A window cannot be taken back, so the first ones are small (``FIRST_BYTES``) until a connection has shown what
  its frames carry.  Some hundred that begin with tiny frames at once can overflow the ring all the same.

From the host to the guest
--------------------------
``receive`` takes bytes from the socket into a ring, but only as many as the guest's window lets us send at
once: everything else stays in the kernel, whose own window then stops the remote host.  ``discard`` drops
them when the guest has acknowledged them (``seq_ack_from_tap``); until then they are held for
retransmission, ``stream_len`` of them.  ``seq_to_tap`` is the next byte to send, ``wnd_from_tap`` the window in
bytes; it is taken only from a segment that acknowledges more, or was sent after the one that it was taken from
last (``wnd_seq``).  Readiness is reported by edges, so ``host_readable`` remembers that there is more.

The link to the guest loses nothing as a rule, so there is no congestion control, and recovery is plain:
``DUP_ACKS`` duplicates or a timeout send the first frame once more, and partial acknowledgements the next,
until ``recover`` is passed (RFC 6582 without the window arithmetic).  ``RoundTrip`` keeps the timeout
(RFC 6298).  The same timer probes a guest whose window is closed, and one that the tap did not take a frame
for.

Closing
-------
A FIN is passed on in its direction once everything before it was: shutdown() for the guest's
(``SOCK_FIN_SENT``), a FIN for the remote host's (``TAP_FIN_SENT``).  With both done and acknowledged
(``FINISHED``) the connection is gone.  The remote host's reset is passed on at once, as a RST.

What was acknowledged to the guest is the remote host's, whatever becomes of the guest.  So after the guest's
reset, or its silence, the socket is not cut off but given back (``close``): what is queued and ``kept`` goes
out first, then the remote host sees the end if the guest's FIN had come, and a reset if not.  A kernel that
has forgotten its half of a connection after tcp_fin_timeout answers ``keepalive_at`` with a RST; that takes
nothing back.  Only where nothing was acknowledged yet the reset is there at once (``abort``).

Of the guest's resets only one with exactly the right number counts; others in the window, and a SYN in the
middle, are challenged (RFC 5961), as are acknowledgements of what was never sent and those that are older than
anything that can be under way.

A guest that is silent is asked for a sign of life (``keepalive_at``), a remote host by its kernel.  Who does
not answer (``RETRIES``, ``KEEPALIVE_PROBES``) is given up, with a reset to the other side.
"""
