"""Control at run time: clients of the two control sockets, each served by a session of its kind.

Owns the clients, which the keeper has let in (sockets/unix.py).  Imports `loop`.  What a session makes
of the bytes is in requests.py (--control) and updates.py (-c).
"""

# system calls (serve): recvfrom sendto

import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

from ..loop import Loop, Timer

RECEIVE_BYTES = 65536
CLIENTS_MAX = 32


class Session(Protocol):
    """One client, without its socket."""

    @property
    def patience(self) -> float | None:
        """Seconds that it has in all; None: as many as it likes."""

    @property
    def alone(self) -> float:
        """Seconds for which the next client of this kind has to wait for the end of this one; 0: it has not."""

    def greeting(self) -> bytes:
        """What we say first."""

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """The answer to some bytes of the client's, and False if that is the end."""


class _Client(NamedTuple):
    """One client; `timer` drops it when its patience is over."""

    session: Session
    timer: Timer


class Control:
    """The server; clients are brought by take().  `sessions` makes the session of a client, by the socket's name."""

    def __init__(self, sessions: Mapping[str, Callable[[], Session]], loop: Loop) -> None:
        self._sessions = sessions
        self._loop = loop
        self._clients: dict[socket.socket, _Client] = {}
        self._queue: dict[socket.socket, None] = {}  # clients that have not been greeted, oldest first
        self._turn: Timer = loop.timer(self._next)
        self._holder: socket.socket | None = None  # whose turn it is

    def take(self, name: str, client: socket.socket) -> None:
        """Serve a client of the control socket `name`."""
        if len(self._clients) >= CLIENTS_MAX:
            # The client that has been connected longest gives way
            self._drop(next(iter(self._clients)))
        client.setblocking(False)
        session = self._sessions[name]()
        self._clients[client] = _Client(session, self._loop.timer(partial(self._drop, client)))
        if session.alone:
            self._queue[client] = None
            if self._holder is None:
                self._next()
        else:
            self._greet(client)

    def _next(self) -> None:
        """It is the turn of the next client in the queue."""
        self._turn.cancel()
        self._holder = client = next(iter(self._queue), None)
        if client is not None:
            del self._queue[client]
            self._turn.by(self._loop.now() + self._clients[client].session.alone)
            self._greet(client)

    def _greet(self, client: socket.socket) -> None:
        session, timer = self._clients[client]
        if session.patience is not None:
            timer.by(self._loop.now() + session.patience)
        self._loop.watch(client.fileno(), partial(self._read, client))
        self._send(client, session.greeting())

    def _read(self, client: socket.socket) -> None:
        try:
            data = client.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        answer, goes_on = self._clients[client].session.take(data)
        # A request may bring other clients (Proxy.change()), to which this one has to give way
        if client in self._clients:
            self._send(client, answer)
            if not goes_on:
                self._drop(client)

    def _send(self, client: socket.socket, data: bytes) -> None:
        """Send all of this at once: a client that does not read is dropped."""
        try:
            if data and client.send(data) < len(data):
                self._drop(client)
        except OSError:
            self._drop(client)

    def _drop(self, client: socket.socket) -> None:
        held = self._clients.pop(client, None)
        if held is None:
            return
        held.timer.cancel()
        waiting = client in self._queue
        self._queue.pop(client, None)
        if not waiting:
            self._loop.unwatch(client.fileno())
        client.close()
        if client is self._holder:
            self._next()

    def close(self) -> None:
        """Drop all clients."""
        self._queue.clear()
        for client in list(self._clients):
            self._drop(client)
