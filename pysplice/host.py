"""The host sockets: opens them, says which are ready, moves their bytes.

Owns every host socket of a flow and the epoll instance that watches them.  Imports `_cext`, `budget`, `linger`
and the constants of `tcp.doors`; decides nothing about a connection.

Readiness is edge-triggered: a connection reads until there is no more, so a socket whose guest is slow
costs nothing.  The epoll instance is itself a descriptor that the loop watches: one wake-up of the loop
yields all sockets that are ready, and arm() can ask again with EPOLL_CTL_MOD, which no loop offers.
"""

# system calls (serve): socket connect bind setsockopt getsockopt shutdown close epoll_ctl epoll_wait epoll_pwait

import errno
import os
import select
import socket
from collections.abc import Callable
from typing import Any

from . import _cext, budget
from .linger import Lingerers, Lingering, reset, unsent
from .tcp import doors

# Streams that are kept for the next connection once they are empty
POOL_STREAMS = 1024

# Room for what rounding adds to a window while bytes are kept (ROUNDED_UP_MAX in tcp/transfer.py, and one unit)
KEEP_SLACK = 64 * 1024

EVENTS = select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
EVENTS_PER_POLL = 256

WMEM_PATH = "/proc/sys/net/ipv4/tcp_wmem"
WMEM_MAX_DEFAULT = 4 * 1024 * 1024


def read_wmem_max() -> int:
    """tcp_wmem[2], the largest send buffer that the kernel gives a socket by itself, bytes."""
    try:
        with open(WMEM_PATH) as file:
            return int(file.read().split()[2])
    except (OSError, ValueError, IndexError):
        return WMEM_MAX_DEFAULT


class HostSocket:
    """The HostDoor of one connection, over a socket."""

    __slots__ = ("_hosts", "_kept", "_kept_room", "_sock", "capacity", "fd", "stream")

    def __init__(self, hosts: "HostSockets", sock: socket.socket) -> None:
        self._hosts = hosts
        self._sock = sock
        self.fd = sock.fileno()
        self.stream: _cext.Stream | None = None
        self.capacity = hosts.share()
        self._kept: _cext.Stream | None = None
        self._kept_room = 0

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
        return _cext.socket_facts(self.fd, self._hosts.wmem_max)  # type: ignore[return-value]

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
            # More than a FIN.  A socket that is closed with unread input, or gets more, drops what it has queued
            # (tcp_close(), tcp_rcv_state_process())
            self._hosts.lingering.add(Lingering(self._sock, kept, with_reset))
        elif with_reset:
            reset(self._sock)
        else:
            # A descriptor that is closed leaves the epoll instance by itself
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
    if sock.family != socket.AF_UNIX:
        # The guest has decided on segments already
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Urgent data is data: where it stands is for neither of us to change
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    # A remote host that is gone is found by the kernel's own probes
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class HostSockets:
    """All host sockets of flows."""

    def __init__(
        self,
        send_run: Callable[[int, int, int, int], int],
        store_run: Callable[[int, _cext.Stream, int, int], None],
        lingering_max: int = 1024,
    ) -> None:
        self.epoll = select.epoll()
        self.owners: dict[int, Any] = {}
        self.send_run = send_run
        self.store_run = store_run
        self.wmem_max = read_wmem_max()
        self._pools: dict[int, list[_cext.Stream]] = {size: [] for size in budget.STREAM_SIZES}
        self._lent = 0
        self.lingering = Lingerers(self.epoll, lingering_max, self._arm)

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
        """A socket whose connect() is under way; raises OSError where it fails at once."""
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
        try:
            _tune(sock)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if interface:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
            if source is not None:
                sock.bind(source)
            error = sock.connect_ex(address)
            if error not in (0, errno.EINPROGRESS):
                raise OSError(error, os.strerror(error))
            self.epoll.register(sock.fileno(), EVENTS)
        except OSError:
            sock.close()
            raise
        return HostSocket(self, sock)

    def adopt(self, sock: socket.socket) -> HostSocket:
        """A socket that was accepted; raises OSError."""
        try:
            _tune(sock)
            self.epoll.register(sock.fileno(), EVENTS)
        except OSError:
            sock.close()
            raise
        return HostSocket(self, sock)

    def own(self, host: HostSocket, owner: Any) -> None:
        """Name what poll() reports for the socket."""
        self.owners[host.fd] = owner

    def forget(self, host: HostSocket) -> None:
        self.owners.pop(host.fd, None)

    def poll(self) -> list[tuple[int, int]]:
        """Descriptors that are ready, with the bits of epoll(7); does not wait."""
        return self.epoll.poll(0, EVENTS_PER_POLL)

    def share(self) -> int:
        """The capacity of the stream that a connection may borrow next, bytes."""
        return budget.stream_size(self._lent)

    def borrow(self, capacity: int) -> _cext.Stream:
        self._lent += 1
        pool = self._pools[capacity]
        return pool.pop() if pool else _cext.Stream(capacity)

    def give_back(self, stream: _cext.Stream, capacity: int) -> None:
        self._lent -= 1
        pool = self._pools[capacity]
        if len(pool) < POOL_STREAMS:
            if len(pool) >= budget.warm_streams(capacity):
                stream.trim()
            pool.append(stream)

    def close(self) -> None:
        self.lingering.close()
        self.epoll.close()
