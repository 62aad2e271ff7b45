"""The host sockets of TCP flows: opens and watches them, and moves their bytes.

Owns every host socket of a flow, and the epoll instance that watches them.  Imports `_cext`, `budget`, `loop`,
`sockets`, linger.py and the constants of `tcp.doors`; decides nothing about a connection.

Readiness is edge-triggered: a connection reads until there is no more, so a socket whose guest is slow costs nothing.
The epoll instance is itself a descriptor that the loop watches.  So one wake-up of the loop yields all sockets that are
ready, and arm() can ask again with EPOLL_CTL_MOD, which no loop offers.
"""

# system calls (serve): connect setsockopt getsockopt shutdown close epoll_ctl epoll_wait epoll_pwait

import errno
import os
import select
import socket
from typing import Any, Final, Protocol

from .. import _cext, budget
from ..loop import Loop
from ..sockets.request import Maker, SocketRequest
from ..tcp import doors
from .linger import Lingerers, Lingering, reset, unsent

# Empty streams that are kept for the next connections
POOL_STREAMS: Final = 1024

# Room for what rounding adds to a window while bytes are kept (ROUNDED_UP_MAX in tcp/receive.py, and one unit)
KEEP_SLACK: Final = 64 * 1024

EVENTS: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
EVENTS_PER_POLL: Final = 256

WMEM_PATH = "/proc/sys/net/ipv4/tcp_wmem"
WMEM_MAX_DEFAULT: Final = 4 * 1024 * 1024


def read_wmem_max() -> int:
    """tcp_wmem[2]: the largest send buffer to which the kernel grows a socket's by itself, bytes."""
    try:
        with open(WMEM_PATH) as file:
            return int(file.read().split()[2])
    except (OSError, ValueError, IndexError):
        return WMEM_MAX_DEFAULT


class HostSocket:
    """The HostDoor of one connection: a socket, and the bytes that are on their way through it."""

    __slots__ = ("_hosts", "_kept", "_kept_room", "_snd_mss", "_sock", "capacity", "fd", "stream")

    def __init__(self, hosts: "HostSockets", sock: socket.socket) -> None:
        self._hosts = hosts
        self._sock = sock
        self.fd = sock.fileno()
        self.stream: _cext.Stream | None = None
        self.capacity = hosts.share()
        self._kept: _cext.Stream | None = None
        self._kept_room = 0
        self._snd_mss = 0  # as it was read last; 0: every reading is a whole one

    def error(self) -> int:
        try:
            return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as e:
            return e.errno or errno.EIO

    def send(self, handle: int, skip: int, length: int) -> int:
        return self._hosts.send_run(handle, self.fd, skip, length)

    def keep(self, handle: int, skip: int, length: int, room: int) -> int:
        kept = self._kept
        if kept is None:
            self._kept_room = room + KEEP_SLACK
            self._kept = kept = _cext.Stream(self._kept_room)
        length = min(length, self._kept_room - len(kept))
        self._hosts.store_run(handle, kept, skip, length)
        return length

    def flush(self) -> int:
        if self._kept is None:
            return 0
        sent = self._kept.send(self.fd)
        if not len(self._kept):
            self._kept = None
        return sent

    def receive(self, limit: int) -> int:
        stream = self.stream
        if stream is None:
            self.stream = stream = self._hosts.borrow(self.capacity)
        n = stream.receive(self.fd, limit)
        if n <= 0 and not len(stream):
            self._give_back(stream)
        return n

    def discard(self, n: int) -> None:
        stream = self.stream
        if stream is not None:
            stream.discard(n)
            if not len(stream):
                self._give_back(stream)

    def _give_back(self, stream: _cext.Stream) -> None:
        self.stream = None
        self._hosts.give_back(stream, self.capacity)
        self.capacity = self._hosts.share()

    def facts(self) -> doors.SocketFacts:
        hosts = self._hosts
        facts = _cext.socket_facts(self.fd, hosts.wmem_max, self._snd_mss)
        if not hosts.whole_facts:
            self._snd_mss = facts.snd_mss
        return facts  # type: ignore[return-value]

    def arm(self) -> None:
        self._hosts.epoll.modify(self.fd, EVENTS)

    def shutdown(self) -> int:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as e:
            return -(e.errno or errno.EIO)
        return 0

    def close(self, with_reset: bool = False) -> None:
        self._release()
        kept, self._kept = self._kept, None
        if kept is not None or unsent(self._sock) > 1:
            # More than a FIN is queued, and close() might drop it (linger.py)
            self._hosts.lingering.add(Lingering(self._sock, kept, with_reset))
        elif with_reset:
            reset(self._sock)
        else:
            # The kernel removes a closed descriptor from the epoll instance
            self._sock.close()

    def abort(self) -> None:
        self._release()
        self._kept = None
        reset(self._sock)

    def _release(self) -> None:
        self._hosts.forget(self)
        if self.stream is not None:
            self.stream.discard(len(self.stream))
            self._give_back(self.stream)


def _tune(sock: socket.socket) -> None:
    """The options of every host socket."""
    if sock.family != socket.AF_UNIX:
        # The guest has already decided how its data is cut into segments
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Urgent data stays where it stands in the stream
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    # The kernel finds out by probes when the remote host is gone
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class Payload(Protocol):
    """What moves the payload of a run: the tap."""

    def send_run(self, handle: int, fd: int, skip: int, length: int, /) -> int: ...
    def store_run(self, handle: int, stream: _cext.Stream, skip: int, length: int, /) -> None: ...


class HostSockets:
    """All host sockets of flows.

    `payload` moves the bytes of runs, `maker` makes sockets on the host; at most `lingering_max` sockets linger.
    `whole_facts`: facts() always has all of them, also where the window depends on few (see doors.HostDoor).
    """

    def __init__(
        self,
        payload: Payload,
        maker: Maker,
        loop: Loop,
        lingering_max: int = 1024,
        whole_facts: bool = False,
    ) -> None:
        self.epoll = select.epoll()
        self.owners: dict[int, Any] = {}
        self.send_run = payload.send_run
        self.store_run = payload.store_run
        self.wmem_max = read_wmem_max()
        self.whole_facts = whole_facts
        self._maker = maker
        self._pools: dict[int, list[_cext.Stream]] = {size: [] for size in budget.STREAM_SIZES}
        self._lent = 0
        self.lingering = Lingerers(self.epoll, lingering_max, self._arm, loop)

    def _arm(self, fd: int) -> None:
        self.epoll.modify(fd, EVENTS)

    def fileno(self) -> int:
        """The descriptor that is readable while a socket is ready."""
        return self.epoll.fileno()

    def connect(
        self,
        family: int,
        address: tuple[Any, ...],
        source: tuple[Any, ...] | None = None,
        interface: str = "",
    ) -> HostSocket:
        """A socket whose connect() to `address` is under way; raises OSError if it fails at once.

        `source` is an address to come from, `interface` one to be bound to.
        """
        v6only = True if family == socket.AF_INET6 else None
        request = SocketRequest(family, socket.SOCK_STREAM, bind=source, device=interface, v6only=v6only)
        sock = self._maker.make(request)
        try:
            _tune(sock)
            error = sock.connect_ex(address)
            if error not in (0, errno.EINPROGRESS):
                raise OSError(error, os.strerror(error))
            self.epoll.register(sock.fileno(), EVENTS)
        except OSError:
            sock.close()
            raise
        return HostSocket(self, sock)

    def adopt(self, sock: socket.socket) -> HostSocket:
        """Take over a socket that was accepted; raises OSError."""
        try:
            _tune(sock)
            self.epoll.register(sock.fileno(), EVENTS)
        except OSError:
            sock.close()
            raise
        return HostSocket(self, sock)

    def own(self, host: HostSocket, owner: Any) -> None:
        """Register the owner of this socket: `owners` has it from now on."""
        self.owners[host.fd] = owner

    def forget(self, host: HostSocket) -> None:
        """The socket has no owner any more."""
        self.owners.pop(host.fd, None)

    def poll(self) -> list[tuple[int, int]]:
        """Descriptors that are ready, each with the bits of epoll(7); does not wait."""
        return self.epoll.poll(0, EVENTS_PER_POLL)

    def share(self) -> int:
        """The capacity of the next stream that is borrowed, bytes."""
        return budget.stream_size(self._lent)

    def borrow(self, capacity: int) -> _cext.Stream:
        """An empty stream of this capacity (one of budget.STREAM_SIZES)."""
        self._lent += 1
        pool = self._pools[capacity]
        return pool.pop() if pool else _cext.Stream(capacity)

    def give_back(self, stream: _cext.Stream, capacity: int) -> None:
        """Take an empty stream back."""
        self._lent -= 1
        pool = self._pools[capacity]
        if len(pool) < POOL_STREAMS:
            if len(pool) >= budget.warm_streams(capacity):
                stream.trim()
            pool.append(stream)

    def close(self) -> None:
        """Close everything that lingers."""
        self.lingering.close()
        self.epoll.close()
