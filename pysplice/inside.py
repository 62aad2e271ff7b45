"""Sockets of the guest's namespace: a process in there makes them, and hands them over.

Owns the connection to that process and the sockets that wait for their use.  Imports no other room.  `serve`
is what the process runs; `Inside` is our end of it.

A socket belongs to the network namespace that it was made in, whoever uses it.  To enter the guest's takes
capabilities that this process does not have, or gives up; so a small process stays in there that does nothing
else.  Requests and answers are packets on a socket pair, the descriptors travel as SCM_RIGHTS.
"""

# system calls (serve): recvmsg sendto poll ppoll
# system calls (inside): socket setsockopt bind listen recvfrom sendmsg ioctl fcntl getsockname

import array  # noqa: F401  socket.send_fds() imports it when it is called, and then there may be no file left
import contextlib
import errno
import json
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

MESSAGE_MAX = 4096
FDS_MAX = 64

# TCP sockets made in advance for each version of IP: a connection then needs no round trip to the process
POOL = 16
FETCH_TIMEOUT = 2  # seconds
IN_FLIGHT_MAX = 32  # requests that were not answered yet

IP_PKTINFO = 8
IP_FREEBIND = 15
IPV6_FREEBIND = 78

Taken = Callable[["socket.socket | None", int], None]


def serve(control: socket.socket) -> None:
    """Make sockets until the other end is closed.

    A request has `family`, `kind`, `protocol` and `count`, or `bind` (an address for bind(2)): then with
    `backlog` for one that listens, `device` to bind it to, `v6only` and `freebind`, and `any` if its port may be
    another where it must.  The answer has the same `tag` and an `errno`, and the sockets.
    """
    while True:
        try:
            message = control.recv(MESSAGE_MAX)
        except ConnectionError:
            return  # it was closed with answers unread
        if not message:
            return
        request = json.loads(message)
        made: list[socket.socket] = []
        error = 0
        try:
            for _ in range(min(request.get("count", 1), FDS_MAX)):
                made.append(make_either(request))
        except OSError as e:
            error = 0 if made else e.errno or errno.EIO
        answer = json.dumps({"tag": request["tag"], "errno": error}).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(control, [answer], [sock.fileno() for sock in made])
        for sock in made:
            sock.close()


def make_either(request: dict[str, Any]) -> socket.socket:
    """The same, and for `either` one of IPv4 where the kernel has no IPv6."""
    try:
        return make(request)
    except OSError as e:
        if e.errno != errno.EAFNOSUPPORT or not request.get("either"):
            raise
        four = {**request, "family": int(socket.AF_INET), "bind": ["0.0.0.0", request["bind"][1]]}
        four.pop("v6only", None)
        return make(four)


def make(request: dict[str, Any]) -> socket.socket:
    """The socket that a request asks for, in the namespace that we are in; raises OSError."""
    family, kind = request["family"], request["kind"]
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, request.get("protocol", 0))
    try:
        if family == socket.AF_INET6 and "v6only" in request:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, request["v6only"])
        if request.get("device"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, request["device"].encode())
        if request.get("freebind"):
            level, option = (
                (socket.IPPROTO_IPV6, IPV6_FREEBIND) if family == socket.AF_INET6 else (0, IP_FREEBIND)
            )
            sock.setsockopt(level, option, 1)
        if "bind" in request:
            _bind(sock, request)
    except OSError:
        sock.close()
        raise
    return sock


def _bind(sock: socket.socket, request: dict[str, Any]) -> None:
    # SO_REUSEADDR lets another user's datagram socket in; among those that listen for connections it does not
    stream = sock.type == socket.SOCK_STREAM
    if stream:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    else:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        if sock.family == socket.AF_INET or not request.get("v6only", 1):
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    address = tuple(request["bind"])
    try:
        sock.bind(address)
    except OSError as e:
        if not request.get("any") or e.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        sock.bind((address[0], 0))
    if stream:
        sock.listen(request.get("backlog", 128))


class Inside:
    """Asks the process in the namespace.  Nothing here waits for it but `fetch`."""

    def __init__(self, control: socket.socket) -> None:
        # socket.recv_fds() of Python 3.11 takes flags and forgets them
        control.setblocking(False)
        self._control = control
        self._tag = 0
        self._gone = False
        self._unsent: deque[bytes] = deque()
        self._waiting: dict[int, Callable[[list[socket.socket], int], None]] = {}
        self._pools: dict[int, deque[socket.socket]] = {socket.AF_INET: deque(), socket.AF_INET6: deque()}
        self._claims: dict[int, deque[Taken]] = {socket.AF_INET: deque(), socket.AF_INET6: deque()}
        self._filling: dict[int, bool] = {socket.AF_INET: False, socket.AF_INET6: False}

    def fileno(self) -> int:
        return self._control.fileno()

    def ask(self, request: dict[str, Any], done: Callable[[list[socket.socket], int], None]) -> None:
        """`done` gets the sockets and 0, or none and an errno, later."""
        if self._gone:
            done([], errno.ENETDOWN)
            return
        self._tag += 1
        self._waiting[self._tag] = done
        self._unsent.append(json.dumps({**request, "tag": self._tag}).encode())
        self._send()

    @property
    def pending(self) -> int:
        """Requests without an answer."""
        return len(self._waiting)

    def _send(self) -> None:
        """As many requests as the process has not to wait for."""
        while self._unsent and len(self._waiting) - len(self._unsent) < IN_FLIGHT_MAX:
            try:
                self._control.send(self._unsent[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                # It is gone, and on_ready() finds out
                return
            self._unsent.popleft()

    def on_ready(self) -> None:
        """The process has answered; raises ConnectionError once it is gone."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._answer()

    def _answer(self) -> None:
        try:
            message, fds, _, _ = socket.recv_fds(self._control, MESSAGE_MAX, FDS_MAX)
        except ConnectionError:
            message, fds = b"", []  # it died with requests unread
        socks = [socket.socket(fileno=fd) for fd in fds]
        if not message:
            self._unsent.clear()
            self._gone = True
            for tag in list(self._waiting):
                self._waiting.pop(tag)([], errno.ENETDOWN)
            raise ConnectionError("the process in the namespace is gone")
        answer = json.loads(message)
        done = self._waiting.pop(answer.get("tag"), None)
        self._send()
        if done is not None:
            # Descriptors that we have no place for are lost on the way
            done(socks, answer["errno"] or (0 if socks else errno.EMFILE))

    def fetch(self, request: dict[str, Any]) -> socket.socket:
        """One socket, now: before the loop runs, or because somebody waits for it; raises OSError."""
        result: list[tuple[list[socket.socket], int]] = []
        self.ask(request, lambda socks, error: result.append((socks, error)))
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        while not result:
            if not poll.poll(FETCH_TIMEOUT * 1000):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            with contextlib.suppress(BlockingIOError):
                self._answer()
        socks, error = result[0]
        if error:
            raise OSError(error, os.strerror(error))
        return socks[0]

    # TCP sockets made in advance

    @property
    def claims(self) -> int:
        """How many wait for a TCP socket."""
        return sum(map(len, self._claims.values()))

    def stream(self, family: int, taken: Taken) -> None:
        """A TCP socket, at once as a rule: `taken` gets it, or None and an errno."""
        pool = self._pools[family]
        if pool:
            taken(pool.popleft(), 0)
        else:
            self._claims[family].append(taken)
        self.fill(family)

    def fill(self, family: int) -> None:
        """See that half of the pool is there."""
        if len(self._pools[family]) > POOL // 2 or self._filling[family]:
            return
        self._filling[family] = True
        request = {"family": family, "kind": int(socket.SOCK_STREAM), "count": POOL}
        self.ask(request, lambda socks, error: self._filled(family, socks, error))

    def _filled(self, family: int, socks: Sequence[socket.socket], error: int) -> None:
        self._filling[family] = False
        pool, claims = self._pools[family], self._claims[family]
        pool.extend(socks)
        while claims and (pool or error):
            claims.popleft()(pool.popleft() if pool else None, error)
        if claims:
            self.fill(family)

    def close(self) -> None:
        self._control.close()
        for pool in self._pools.values():
            while pool:
                pool.popleft().close()
