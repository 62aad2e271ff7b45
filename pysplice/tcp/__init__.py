"""The protocol: theory of operation.

Names in double backquotes are names in this package; a test checks that they exist.

    connection.py   one connection: facts, timers, ends
    handshake.py    how it is established
    receive.py      from the guest to the host socket
    send.py         from the host socket to the guest
    window.py       what a socket can still take, and the first window; pure functions
    small_queue.py  what a connection may have unread in the ring of the tap
    events.py       the facts, and what each requires
    timing.py       round trips and time-outs;  seq.py: sequence numbers;  account.py: the trace
    doors.py        the few calls that a connection may make

Two peers, one connection
-------------------------
The guest's kernel speaks TCP on the tap; the host's kernel speaks TCP on a socket.  Both are complete, so a
``Connection`` is not a third TCP between them.  It translates segments into a stream and back, and tells each end
truthfully how much the other can take.  There are two peers, so names say which: "tap" is the guest, "sock" or "host"
is the host socket and the remote host behind it.

A ``Connection`` is given input and never fetches it: ``on_tap`` with a run of segments, ``on_host`` with the readiness
of the socket, ``on_timer`` once ``deadline`` has passed.  It acts through two doors, ``TapDoor`` and ``HostDoor``,
whose answers are numbers (below 0: an errno) and whose calls never come back into it.  Payload is named by handles and
never seen.  Nothing in this room knows a descriptor, a clock or a loop, so all of it can be tested with fakes, a
thousand simulated seconds at a time.

The two directions are two objects, ``Receive`` and ``Send``.  The RFCs have these names for our fields:

    receive.seq_from_tap      RCV.NXT
    receive.room_left()       RCV.WND
    receive.wnd_edge          RCV.NXT + RCV.WND
    receive.irs               IRS
    receive.ws_to_tap         Rcv.Wind.Shift (RFC 7323)
    send.seq_to_tap           SND.NXT
    send.seq_ack_from_tap     SND.UNA
    send.wnd_from_tap         SND.WND, in bytes
    send.wnd_seq              SND.WL1
    send.wnd_max              MAX.SND.WND (RFC 5961)
    send.ws_from_tap          Snd.Wind.Shift (RFC 7323)
    send.mss                  SendMSS;  receive.mss: the MSS that we offer

Facts instead of states
-----------------------
What is known about a connection is a set of facts that only grows: ``TAP_SYN_RCVD``, ``SOCK_CONNECTED``,
``TAP_SYN_ACK_SENT``, ``ESTABLISHED``; then, for each direction by itself, ``TAP_FIN_RCVD`` and ``SOCK_FIN_SENT``,
``SOCK_FIN_RCVD``, ``TAP_FIN_SENT`` and ``TAP_FIN_ACKED``; and ``CLOSED``.  ``REQUIRES``, ``ONE_OF`` and ``FORBIDS`` say
what must and must not hold before a fact can be added, and ``learn`` refuses everything else with
``IllegalTransition``.  RFC 9293's states are combinations of these: a guest in FIN-WAIT-2, for instance, is
``TAP_FIN_RCVD`` without ``SOCK_FIN_RCVD``.

Opening
-------
The guest's SYN makes a socket and starts connect().  The guest gets its SYN-ACK (``agree``) when, and only
when, the connection is established on the host.  If connect() is refused, the guest gets a RST; if the network is
unreachable, it gets the ICMP error that says so (``unreachable``); if no host answers, the guest's SYN gets no
answer either (``refuse``; ``stream/open.py`` does the same for an error that connect() reports at once).  So connect()
in the guest ends as it would have ended on the host.  The SYN-ACK is repeated while ``SYN_ACK_RETRIES`` last.  A SYN
with the same number is a repetition; one with another number means that the guest has given up and uses the ports
again: the flow is aborted, and the same SYN opens the next (``judge``).  A SYN for an established flow is challenged
(see Closing).

A connection that comes from the host is opened the other way round.  It is already established there (by accept()), so
it begins with ``SOCK_CONNECTED``, and ``open`` asks the guest with a SYN (``ask``, ``TAP_SYN_SENT``).  The guest's
SYN-ACK is acknowledged, and the acknowledgement carries what the client has sent in the meantime; a RST, or silence
while the same retries last, resets the client.  The first window and the scale are chosen in the same place for both
(``first_field``).

From the guest to the host
--------------------------
``seq_from_tap`` is the next byte expected from the guest.  Payload that is in order goes to the socket at once,
straight from the batch of frames into the kernel (``take``), and is acknowledged as soon as the kernel has it.
The consequences of a crash are these.  Bytes that were acknowledged to the guest are in the host's kernel, which goes
on delivering them if this process dies; if the host dies, they are lost, as on any host whose application has written
them.  The alternative is to acknowledge what the remote host has acknowledged (tcpi_bytes_acked), but no event says
when to do that.  With a timer of a quarter of a round trip it was never faster (tried at 0, 1, 10 and 50 ms): the
right edge is the same, and the send buffer bounds both.

If the socket takes only a part, the rest is kept (``keep``), and ``flush`` passes it on when there is room.  Kept bytes
count as read and are acknowledged: the guest never has to send again what it was allowed to send.  The right edge of
the window stays where it is while bytes are ``kept``, so their number is bounded by the window that was advertised.

An acknowledgement waits until the batch of frames is done and the host sockets have been asked for answers
(``acknowledge``): an answer that has arrived carries it.  It never waits for time to pass.

A segment that comes too early is dropped, and answered with a duplicate acknowledgement of its own, so that the
guest's fast retransmit works.  Between a guest and its tap this happens only if the ring overflows.

The window
----------
Before every acknowledgement the window is computed from the socket's memory (``SocketFacts``, ``room``): what
the kernel may queue (SK_MEMINFO_SNDBUF), what it has queued (SK_MEMINFO_WMEM_QUEUED), both with the overhead of
its buffers, and the payload in it (SIOCOUTQ).  If the window is large enough, the kernel grows the buffer by
itself; if it is too large, sendmsg() is short.  An estimator turns these into one number; ``ESTIMATORS`` has the
known ones, each with what it gets wrong.  ``DEFAULT_ESTIMATOR`` is ``truesize``: the free memory, at the price
per segment that the queue shows.  ``bounds`` shows the result of each for one reading.

- The room counts from what was read, not from what is acknowledged: the right edge, ``wnd_edge``, is ``seq_from_tap``
  plus the room.  It never moves left.  Where the scale cannot express the window exactly, it is rounded down, or up
  where that would move the edge left.  After many small segments have made use of that (``ROUNDED_UP_MAX``), what the
  guest sees is left of the edge by less than one unit of the scale, and bytes in between are still accepted.
- A closed window has to be opened again, and only the socket can say when.  The kernel reports writability (at most two
  thirds of the buffer used: ``writable``) only to a process that asks for it after it was lost.  So ``arm`` asks
  whenever the socket is not writable; the kernel takes the same request as a sign that the buffer should
  grow.  It follows that for the socket's sake the window may be closed only while the socket is not writable:
  in any other state nothing would ever open it.  (A window that the small queue closes is opened by ``resume``,
  and one that waits for ``kept`` bytes by ``flush``.)
- The remote host's window (tcpi_snd_wnd) does not bound what we advertise.  Nothing reports when it opens, so a window
  that was closed because of it would stay closed; and the send buffer, which the kernel keeps at about twice the
  amount in flight, bounds the same thing and does report.

The first window and the scale are what ``select_initial_window`` makes of the send buffer: the kernel's own rule, with
the buffer that holds the guest's data in the place of the receive buffer.  The scale is announced only once, so it is
chosen for the size that the buffer may grow to (``wmem_max``).

Small queues
------------
What the guest sends waits in the ring of the tap until it is read, and the guest's kernel cannot see it there.
``SmallQueue`` bounds what one connection may have unread, by means of the same window (``bound``).

- To prevent an overflow of the ring, half of it is shared out among the connections that queue (``share``), in frames
  of the size that each of them has sent (``frame_bytes``).  So a sender of tiny frames is bound by that, and no other
  connection is.  A connection that sends one small frame at a time queues nothing and is not counted.
- So that a small message does not wait behind megabytes, bulk senders keep their queues short (``patience``) while
  another connection sends small messages.  Alone, or among themselves, they do not: a short queue costs throughput.
- A connection that is left with little room may stop, because a sender waits until a whole segment fits.  It is put on
  a list (``throttled``).  Once it has been quiet for a moment, a longer one while others are in the ring, ``resume``
  gives it room again: in order, and to as many at a time as the ring can bear.
- A window cannot be taken back, so the first ones are small (``FIRST_BYTES``) until a connection has shown how
  much its frames carry.  A few hundred connections that begin with tiny frames at once can still overflow the ring.

From the host to the guest
--------------------------
``pump`` takes bytes from the socket into a ring, but only as many as the guest's window lets us send at once:
everything else stays in the kernel, whose own window then stops the remote host.  ``discard`` drops the bytes when
the guest has acknowledged them (``seq_ack_from_tap``); until then they are held for retransmission,
``stream_len`` of them.  ``seq_to_tap`` is the next byte to send.  The guest's window, ``wnd_from_tap``, is
taken only from a segment that acknowledges more, or was sent after the one that it was taken from last
(``wnd_seq``).  Readiness is edge-triggered, so ``host_readable`` remembers that there is more.

The link to the guest rarely loses anything, so there is no congestion control, and recovery is plain: ``DUP_ACKS``
duplicates or a time-out send the first frame once more, and partial acknowledgements the next, until ``recover`` is
passed (RFC 6582 without the window arithmetic).  ``RoundTrip`` computes the time-out (RFC 6298).  The same timer
probes a guest whose window is closed, and one that the tap did not take a frame for (``probe``).

Closing
-------
A FIN is passed on in its direction once everything before it has been passed on: shutdown() for the guest's
(``SOCK_FIN_SENT``), a FIN for the remote host's (``TAP_FIN_SENT``).  When both are done and acknowledged
(``FINISHED``) the connection has ended.  The remote host's reset is passed on at once, as a RST.

What was acknowledged to the guest is owed to the remote host, whatever becomes of the guest.  So after the
guest's reset, or its silence, the socket is not cut off but given back (``close``): what is queued and ``kept``
goes out first, then the remote host sees the end if the guest's FIN had come, and a reset if not.  A kernel
that has forgotten its half of a connection after tcp_fin_timeout answers ``keepalive_at`` with a RST; that
undoes nothing.  Only where nothing has been acknowledged yet is the reset sent at once (``abort``).

A reset from the guest counts only if its sequence number is exactly right.  Others in the window, and a SYN in the
middle, are challenged (RFC 5961), as are acknowledgements of what was never sent, and acknowledgements older than
anything that can still be in flight.

A silent guest is probed for a sign of life (``keepalive_at``); a silent remote host is probed by the host's kernel.  A
guest that does not answer (``RETRIES``, ``KEEPALIVE_PROBES``) is given up, with a reset to the other side.
"""
