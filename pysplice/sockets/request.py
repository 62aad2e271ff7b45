"""One way to make a socket: a typed request, and makers that fulfil it.

Owns nothing; imports no other room.  `HostMaker` makes sockets here, guest.py has the maker in the guest's namespace,
and `NoMaker` stands in where there is none.
"""

# system calls (serve): socket setsockopt bind listen
# system calls (agent): socket setsockopt bind listen

import errno
import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

BACKLOG = 4096  # the kernel bounds it by net.core.somaxconn

IP_PKTINFO = 8
IP_FREEBIND = 15
IPV6_FREEBIND = 78


class SocketRequest(NamedTuple):
    """What kind of socket to make; all are non-blocking.

    `family`, `kind` and `protocol` are arguments of socket(2).  `bind` is an address for bind(2), in Python's form;
    with `any_port` another port will do if that one is not available.  With a `backlog` the socket listens.  `device`
    is an interface to bind to.  `v6only` is left at the kernel's default if it is None; `freebind` allows addresses
    that the host does not have.  With `packet_info` each datagram comes with the address that it was sent to.  With
    `either`, a kernel without IPv6 gives a socket of IPv4 at any address.  `number` sockets are made at once.
    """

    family: int
    kind: int
    protocol: int = 0
    bind: tuple[Any, ...] | None = None
    any_port: bool = False
    backlog: int = 0
    device: str = ""
    v6only: bool | None = None
    freebind: bool = False
    packet_info: bool = False
    either: bool = False
    number: int = 1


def make(request: SocketRequest) -> socket.socket:
    """The socket of a request, in the network namespace of this process; raises OSError."""
    try:
        return _make(request)
    except OSError as e:
        if e.errno != errno.EAFNOSUPPORT or not request.either:
            raise
    bind = ("0.0.0.0", request.bind[1]) if request.bind is not None else None
    return _make(request._replace(family=int(socket.AF_INET), bind=bind, v6only=None))


def _make(request: SocketRequest) -> socket.socket:
    sock = socket.socket(request.family, request.kind | socket.SOCK_NONBLOCK, request.protocol)
    try:
        ipv6 = request.family == socket.AF_INET6
        if ipv6 and request.v6only is not None:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, request.v6only)
        if request.device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, request.device.encode())
        if request.freebind:
            level, option = (
                (socket.IPPROTO_IPV6, IPV6_FREEBIND) if ipv6 else (socket.IPPROTO_IP, IP_FREEBIND)
            )
            sock.setsockopt(level, option, 1)
        if request.packet_info:
            if ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            if not ipv6 or request.v6only is False:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        if request.backlog:
            # Among listening sockets this lets no other user in; among datagram sockets it would
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if request.bind is not None:
            _bind(sock, request.bind, request.any_port)
        if request.backlog:
            sock.listen(request.backlog)
    except OSError:
        sock.close()
        raise
    return sock


def _bind(sock: socket.socket, address: tuple[Any, ...], any_port: bool) -> None:
    try:
        sock.bind(address)
    except OSError as e:
        if not any_port or e.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EPERM):
            raise
        sock.bind((address[0], 0))


Made = Callable[[list[socket.socket], int], None]
Taken = Callable[["socket.socket | None", int], None]


class Maker(Protocol):
    """Makes sockets in one network namespace."""

    def fileno(self) -> int:
        """The descriptor that is readable when on_ready() has something to do; -1: there is none."""

    def on_ready(self) -> None:
        """Sockets have come; raises ConnectionError once there are no more to come."""

    @property
    def available(self) -> bool:
        """False if no socket can be made."""

    @property
    def pending(self) -> int:
        """How many requests have no answer yet."""

    @property
    def waiting(self) -> int:
        """How many calls of stream() have not got a socket yet."""

    def make(self, request: SocketRequest) -> socket.socket:
        """One socket, now; raises OSError."""

    def ask(self, request: SocketRequest, done: Made) -> None:
        """Have `done` called with the sockets and 0, or with none and an errno; at once or later."""

    def stream(self, family: int, taken: Taken) -> None:
        """Have `taken` called with a TCP socket and 0, or with None and an errno; usually at once."""

    def close(self) -> None:
        """Stop making sockets."""


class HostMaker:
    """The Maker of the namespace that this process runs in."""

    available = True
    pending = waiting = 0

    def fileno(self) -> int:
        return -1

    def on_ready(self) -> None:
        pass

    def make(self, request: SocketRequest) -> socket.socket:
        return make(request)

    def ask(self, request: SocketRequest, done: Made) -> None:
        made: list[socket.socket] = []
        error = 0
        try:
            for _ in range(request.number):
                made.append(make(request))
        except OSError as e:
            error = 0 if made else e.errno or errno.EIO
        done(made, error)

    def stream(self, family: int, taken: Taken) -> None:
        try:
            sock = make(SocketRequest(family, socket.SOCK_STREAM))
        except OSError as e:
            taken(None, e.errno or errno.EIO)
        else:
            taken(sock, 0)

    def close(self) -> None:
        pass


class NoMaker:
    """The Maker of a namespace where no process of ours makes sockets: everything fails with ENETDOWN."""

    available = False
    pending = waiting = 0

    def fileno(self) -> int:
        return -1

    def on_ready(self) -> None:
        pass

    def make(self, request: SocketRequest) -> socket.socket:
        raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))

    def ask(self, request: SocketRequest, done: Made) -> None:
        done([], errno.ENETDOWN)

    def stream(self, family: int, taken: Taken) -> None:
        taken(None, errno.ENETDOWN)

    def close(self) -> None:
        pass
