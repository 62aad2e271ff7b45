"""Sockets of the guest's namespace: a process there makes them, and hands them over.

Owns the connection to that process, and the sockets that were made in advance.  Imports request.py.  `serve` is what
the process runs; `GuestMaker` is our end.

A socket belongs to the network namespace that it was made in, whichever process uses it.  Entering the guest's
namespace takes capabilities that this process does not have, or gives up.  So a small process, the agent, stays there
and does nothing else.  Requests and answers are packets of JSON on a socket pair; descriptors travel with them
(SCM_RIGHTS).
"""

# system calls (serve): recvmsg sendto poll ppoll
# system calls (agent): recvfrom sendmsg ioctl fcntl getsockname

import array  # noqa: F401  socket.send_fds() imports it when it is called, and by then the process has no files
import contextlib
import errno
import json
import os
import select
import socket
from collections import deque
from collections.abc import Sequence

from .request import HostMaker, Made, SocketRequest, Taken

MESSAGE_MAX = 4096
FDS_MAX = 64

POOL = 16  # TCP sockets made in advance for each version of IP: then most connections wait for no answer
MAKE_TIMEOUT = 2  # seconds
IN_FLIGHT_MAX = 32  # requests that were sent and not answered


def _encode(tag: int, request: SocketRequest) -> bytes:
    return json.dumps({"tag": tag, **request._asdict()}).encode()


def _decode(message: bytes) -> tuple[int, SocketRequest]:
    fields = json.loads(message)
    tag = fields.pop("tag")
    if fields["bind"] is not None:
        fields["bind"] = tuple(fields["bind"])
    request = SocketRequest(**fields)
    return tag, request._replace(number=min(request.number, FDS_MAX))


def serve(control: socket.socket) -> None:
    """Make sockets until the other end of `control` is closed.

    The answer to a request is a packet with the request's `tag` and an `errno` (0: it carries the sockets).
    """
    maker = HostMaker()
    while True:
        try:
            message = control.recv(MESSAGE_MAX)
        except ConnectionError:
            return  # the other end was closed with answers unread
        if not message:
            return
        tag, request = _decode(message)

        def done(made: list[socket.socket], error: int, tag: int = tag) -> None:
            answer = json.dumps({"tag": tag, "errno": error}).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(control, [answer], [sock.fileno() for sock in made])
            for sock in made:
                sock.close()

        maker.ask(request, done)


class GuestMaker:
    """The Maker of the guest's namespace, over the socket `control`.  Only make() waits for the agent."""

    def __init__(self, control: socket.socket) -> None:
        # socket.recv_fds() of Python 3.11 takes flags and ignores them
        control.setblocking(False)
        self.available = True
        self._control = control
        self._tag = 0
        self._unsent: deque[bytes] = deque()
        self._asked: dict[int, Made] = {}
        self._pools: dict[int, deque[socket.socket]] = {socket.AF_INET: deque(), socket.AF_INET6: deque()}
        self._claims: dict[int, deque[Taken]] = {socket.AF_INET: deque(), socket.AF_INET6: deque()}
        self._filling: dict[int, bool] = {socket.AF_INET: False, socket.AF_INET6: False}

    def fileno(self) -> int:
        """The descriptor that is readable when the agent has answered."""
        return self._control.fileno()

    @property
    def pending(self) -> int:
        return len(self._asked)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._claims.values()))

    def ask(self, request: SocketRequest, done: Made) -> None:
        if not self.available:
            done([], errno.ENETDOWN)
            return
        self._tag += 1
        self._asked[self._tag] = done
        self._unsent.append(_encode(self._tag, request))
        self._send()

    def _send(self) -> None:
        """Send requests, as long as the agent does not have too many left to answer."""
        while self._unsent and len(self._asked) - len(self._unsent) < IN_FLIGHT_MAX:
            try:
                self._control.send(self._unsent[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                return  # the agent is gone, and on_ready() will find out
            self._unsent.popleft()

    def on_ready(self) -> None:
        """The agent has answered; raises ConnectionError once it is gone."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._receive_answer()

    def _receive_answer(self) -> None:
        try:
            message, fds, _, _ = socket.recv_fds(self._control, MESSAGE_MAX, FDS_MAX)
        except ConnectionError:
            message, fds = b"", []  # the agent has died with requests unread
        socks = [socket.socket(fileno=fd) for fd in fds]
        if not message:
            self.available = False
            self._unsent.clear()
            for tag in list(self._asked):
                self._asked.pop(tag)([], errno.ENETDOWN)
            raise ConnectionError("the process in the namespace is gone")
        answer = json.loads(message)
        done = self._asked.pop(answer.get("tag"), None)
        self._send()
        if done is not None:
            # Descriptors that this process has no room for are lost on the way
            done(socks, answer["errno"] or (0 if socks else errno.EMFILE))

    def make(self, request: SocketRequest) -> socket.socket:
        """One socket, now: before the loop runs, or because a client of the control socket waits for it."""
        result: list[tuple[list[socket.socket], int]] = []
        given_up = False

        def done(socks: list[socket.socket], error: int) -> None:
            if given_up:
                for sock in socks:
                    sock.close()
            else:
                result.append((socks, error))

        self.ask(request, done)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        while not result:
            if not poll.poll(MAKE_TIMEOUT * 1000):
                given_up = True
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            with contextlib.suppress(BlockingIOError):
                self._receive_answer()
        socks, error = result[0]
        if error:
            raise OSError(error, os.strerror(error))
        return socks[0]

    # TCP sockets made in advance

    def stream(self, family: int, taken: Taken) -> None:
        pool = self._pools[family]
        if pool:
            taken(pool.popleft(), 0)
        else:
            self._claims[family].append(taken)
        self.fill(family)

    def fill(self, family: int) -> None:
        """Ask for more sockets once half of the pool is used."""
        if len(self._pools[family]) > POOL // 2 or self._filling[family]:
            return
        self._filling[family] = True
        request = SocketRequest(family, int(socket.SOCK_STREAM), number=POOL)
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
        self.available = False
        self._control.close()
        for pool in self._pools.values():
            while pool:
                pool.popleft().close()
