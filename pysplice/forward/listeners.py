"""Listening sockets, on the host and in the guest's namespace, and the clients that connect to them.

Owns every listener, and the epoll instance that watches them.  Imports `config`, `loop`, `observe`, `sockets` and
policy.py.  The takers decide what becomes of a client.
"""

# system calls (serve): accept4 getsockname

import errno
import select
import socket
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ..config.ports import GUEST, HOST, TCP, UDP, Rule
from ..loop import Loop
from ..observe.log import Log
from ..sockets.request import BACKLOG, Maker, SocketRequest
from ..sockets.unix import SocketFiles
from .policy import Listener

# Each takes about as long as a batch of small frames; the others wait for all of them
# Clients that are accepted before everything else gets its turn; fewer of a listener's once so many turns in a row have
# left some of them over, for that is a flood
ACCEPTS_PER_TURN = 8
ACCEPTS_IN_FLOOD = 2
FLOOD_TURNS = 128
LISTENERS_PER_TURN = 64
PAUSE = 1.0  # seconds, while there is no descriptor for a client

NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Takers(Protocol):
    """What takes clients and datagrams, and knows our other UDP sockets."""

    def accepted(self, listener: Listener, sock: socket.socket, address: Any, now: float) -> None:
        """A TCP client has connected; `address` is its socket address as Python has it."""

    def arrived(self, listener: Listener, failed: bool, now: float) -> None:
        """A UDP listener has datagrams; `failed`: it has errors too."""

    def opened(self, listener: Listener) -> None:
        """A UDP listener was opened."""

    def closed(self, listener: Listener) -> None:
        """A UDP listener is being closed."""

    def ports(self, side: str) -> int:
        """The UDP ports of a side that our sockets have, except listeners, as bits."""

    def release(self, port: int) -> bool:
        """Give up a UDP port of the host's; True if one of our sockets had it."""


class Addressing(NamedTuple):
    """How listeners are bound.

    `ipv4`, `ipv6`: which versions are served.  `protocols`: TCP, UDP or both.  `freebind`: an address need not be the
    host's (yet).  `scope`: the interface of link-local addresses, its index.
    """

    ipv4: bool = True
    ipv6: bool = True
    protocols: tuple[str, ...] = (TCP, UDP)
    freebind: bool = False
    scope: int = 0


class _Change(NamedTuple):
    """A change of rules that is under way.

    `before`: all listeners as they were, by rule and port, and `by_socket`; `open`, `ours`: the tables of ports as they
    were.  `aside`: listeners that no rule has any more, by what they are bound to.  `given_up`: those of `before` that
    had to be closed, because a new one could not be bound beside them.
    """

    before: dict[tuple[Rule, int], Listener]
    by_socket: dict[socket.socket, Listener]
    open: dict[Rule, int]
    ours: dict[tuple[str, str], int]
    aside: dict[tuple[Any, ...], Listener]
    given_up: list[Listener]


def _bound_to(rule: Rule, port: int) -> tuple[Any, ...]:
    """What makes two listeners the same to the kernel."""
    return rule.side, rule.protocol, rule.address, rule.interface, rule.path, port


def _leads_to(listener: Listener) -> tuple[Any, int]:
    """Where the clients of a listener go."""
    return listener.rule.to_address, listener.target


class Listeners:
    """All listeners; by rule and port.  `host`, `guest` and `files` make the sockets, `takers` get the clients."""

    def __init__(
        self,
        host: Maker,
        guest: Maker,
        files: SocketFiles,
        addressing: Addressing,
        takers: Takers,
        loop: Loop,
        log: Log,
    ) -> None:
        self.epoll = select.epoll()
        self._host = host
        self._guest = guest
        self._files = files
        self._addressing = addressing
        self._takers = takers
        self._loop = loop
        self._log = log
        self._paused: set[int] = set()
        self._turns = 0
        self._full_turns: dict[int, int] = {}  # in a row, by descriptor
        self._resume_timer = loop.timer(self._resume)
        self._by_fd: dict[int, Listener] = {}
        self._listeners: dict[tuple[Rule, int], Listener] = {}
        self._change: _Change | None = None  # while rules are changed
        self.open: dict[Rule, int] = {}  # ports as bits, so that a scan looks at no listener
        self.ours = {(side, protocol): 0 for side in (HOST, GUEST) for protocol in (TCP, UDP)}
        self._announced: dict[socket.socket, Listener] = {}  # UDP listeners that the takers know

    def fileno(self) -> int:
        """The descriptor that is readable while a listener has clients."""
        return self.epoll.fileno()

    def __len__(self) -> int:
        return len(self._listeners)

    def __contains__(self, key: tuple[Rule, int]) -> bool:
        return key in self._listeners

    def all(self) -> list[Listener]:
        """All listeners."""
        return list(self._listeners.values())

    # Opening and closing

    def bind(self, rule: Rule, port: int) -> socket.socket:
        """A listening socket for a port of a rule, now; raises OSError."""
        if self._change is not None:
            held = self._change.aside.pop(_bound_to(rule, port), None)
            if held is not None:
                return held.sock
        try:
            return self._make(rule, port)
        except OSError as e:
            if e.errno != errno.EADDRINUSE or not self._make_way(rule, port):
                raise
            return self._make(rule, port)

    def _make(self, rule: Rule, port: int) -> socket.socket:
        if rule.path:
            return self._files.listen(rule.path)
        request = self._request(rule, port)
        return (self._guest if rule.side == GUEST else self._host).make(request)

    def _make_way(self, rule: Rule, port: int) -> bool:
        """Close sockets of ours that are in the way of a new one at this port; True if there were any."""
        if rule.path:
            return False
        if self._change is not None:
            aside = self._change.aside
            in_the_way = [
                key
                for key, held in aside.items()
                if (held.rule.side, held.rule.protocol, held.port) == (rule.side, rule.protocol, port)
            ]
            for key in in_the_way:
                held = aside.pop(key)
                before = self._change.by_socket.get(held.sock)
                if before is not None:
                    self._change.given_up.append(before)
                self._discard(held)
            if in_the_way:
                return True
        # The guest may have sent from this port before it was forwarded
        return rule.side == HOST and rule.protocol == UDP and self._takers.release(port)

    def ask(self, rule: Rule, port: int, done: Callable[[list[socket.socket], int], None]) -> None:
        """The same for a rule of the guest's, without waiting for it: see Maker.ask()."""
        self._guest.ask(self._request(rule, port), done)

    def _request(self, rule: Rule, port: int) -> SocketRequest:
        address, how = rule.address, self._addressing
        version = address.version if address is not None else 6 if how.ipv6 else 4
        bind: tuple[Any, ...] = (
            str(address) if address is not None else "::" if version == 6 else "0.0.0.0",
            port,
        )
        if address is not None and version == 6 and address.is_link_local and not rule.interface:
            bind += (0, how.scope)
        return SocketRequest(
            family=int(socket.AF_INET6 if version == 6 else socket.AF_INET),
            kind=int(socket.SOCK_STREAM if rule.protocol == TCP else socket.SOCK_DGRAM),
            bind=bind,
            backlog=BACKLOG if rule.protocol == TCP else 0,
            # In the namespace only clients on the loopback interface are served
            device="lo" if rule.side == GUEST else rule.interface,
            v6only=(address is not None or not how.ipv4) if version == 6 else None,
            freebind=how.freebind,
            packet_info=rule.protocol == UDP,
            either=address is None,
        )

    def add(self, rule: Rule, port: int, sock: socket.socket) -> None:
        """Serve a listening socket."""
        listener = Listener(sock, rule, port)
        self._listeners[rule, port] = listener
        self._by_fd[sock.fileno()] = listener
        self.ours[rule.side, rule.protocol] |= 1 << port
        self.open[rule] = self.open.get(rule, 0) | 1 << port
        if self._change is None:
            self._announce(listener)
        self.epoll.register(sock.fileno(), select.EPOLLIN)

    def close_port(self, rule: Rule, port: int) -> None:
        """Close the listener of a rule at a port; what was accepted goes on."""
        listener = self._listeners.pop((rule, port))
        del self._by_fd[listener.sock.fileno()]
        self._full_turns.pop(listener.sock.fileno(), None)
        self.epoll.unregister(listener.sock.fileno())
        if self._change is not None:
            self._change.aside[_bound_to(rule, port)] = listener
        else:
            self._discard(listener)
        self._note_closed(rule, port)

    def _note_closed(self, rule: Rule, port: int) -> None:
        """A rule does not listen at a port any more."""
        self.open[rule] &= ~(1 << port)
        if not self.open[rule]:
            del self.open[rule]
        # Another rule may listen on that port at another address
        ours = 0
        for other, opened in self.open.items():
            if (other.side, other.protocol) == (rule.side, rule.protocol):
                ours |= opened
        self.ours[rule.side, rule.protocol] = ours

    def move(self, rule: Rule, port: int, to: Rule) -> None:
        """Have the listener of one rule serve another rule, which leads the port to the same target."""
        listener = self._listeners.pop((rule, port))
        moved = listener._replace(rule=to)
        self._listeners[to, port] = self._by_fd[listener.sock.fileno()] = moved
        self.open[rule] &= ~(1 << port)
        self.open[to] = self.open.get(to, 0) | 1 << port
        if not self.open[rule]:
            del self.open[rule]

    def _discard(self, listener: Listener) -> None:
        if listener.rule.path:
            self._files.unlink(listener.rule.path)
        self._withdraw(listener)
        listener.sock.close()

    def _announce(self, listener: Listener) -> None:
        """Tell the takers of a UDP listener."""
        if listener.rule.protocol == UDP:
            self._announced[listener.sock] = listener
            self._takers.opened(listener)

    def _withdraw(self, listener: Listener) -> None:
        """The takers have nothing to do with this socket any more."""
        announced = self._announced.pop(listener.sock, None)
        if announced is not None:
            self._takers.closed(announced)

    # A change of several rules

    def begin(self) -> None:
        """Until commit() or roll_back(), what is closed stays bound: a new rule may take it over."""
        by_socket = {listener.sock: listener for listener in self._listeners.values()}
        self._change = _Change(
            self._listeners.copy(), by_socket, self.open.copy(), self.ours.copy(), {}, []
        )

    def spare(self, rule: Rule) -> int:
        """The ports at which this rule would take over a socket, as bits."""
        ports = 0
        for key, held in self._change.aside.items() if self._change is not None else ():
            if rule.first <= held.port <= rule.last and key == _bound_to(rule, held.port):
                ports |= 1 << held.port
        return ports

    def commit(self) -> None:
        """The change is made: close what no rule has taken over, and tell the takers."""
        change, self._change = self._change, None
        if change is None:
            return
        for listener in change.aside.values():
            self._discard(listener)
        udp = [listener for listener in self._listeners.values() if listener.rule.protocol == UDP]
        for listener in udp:
            announced = self._announced.get(listener.sock)
            if announced is not None and _leads_to(announced) != _leads_to(listener):
                self._withdraw(listener)
        for listener in udp:
            if listener.sock not in self._announced:
                self._announce(listener)

    def roll_back(self) -> None:
        """The change is not made: everything listens as before."""
        change, self._change = self._change, None
        if change is None:
            return
        before = change.by_socket
        registered = {listener.sock for listener in self._listeners.values()}
        for listener in (*self._listeners.values(), *change.aside.values()):
            if listener.sock not in before:
                if listener.sock in registered:
                    self.epoll.unregister(listener.sock.fileno())
                self._discard(listener)
        self._listeners, self.open, self.ours = change.before, change.open, change.ours
        for listener in change.aside.values():
            if listener.sock in before:
                self.epoll.register(listener.sock.fileno(), select.EPOLLIN)
        self._by_fd = {
            listener.sock.fileno(): listener
            for listener in self._listeners.values()
            if listener.sock.fileno() >= 0
        }
        for listener in change.given_up:
            self._bind_again(listener)

    def _bind_again(self, listener: Listener) -> None:
        """Put a new socket in the place of one that had to be closed."""
        rule, port = listener.rule, listener.port
        del self._listeners[rule, port]
        try:
            self.add(rule, port, self._make(rule, port))
        except OSError as e:
            self._note_closed(rule, port)
            self._log.warning(f"'{rule}': port {port} could not be opened again: {e.strerror}")

    # Clients

    def on_ready(self, now: float) -> None:
        """Some listeners have clients."""
        ready = []
        for fd, bits in self.epoll.poll(0, LISTENERS_PER_TURN):
            listener = self._by_fd.get(fd)
            if listener is None:
                continue
            if listener.rule.protocol == UDP:
                self._takers.arrived(listener, bool(bits & select.EPOLLERR), now)
            else:
                ready.append((fd, listener))
        left = ACCEPTS_PER_TURN
        # Each turn begins with another one, so that none is held out by the others
        self._turns += 1
        for n in range(len(ready)):
            fd, listener = ready[(self._turns + n) % len(ready)]
            turns = self._full_turns.get(fd, 0)
            most = min(left, ACCEPTS_IN_FLOOD if turns >= FLOOD_TURNS else ACCEPTS_PER_TURN)
            if most <= 0:
                break
            accepted = self._accept(listener, most, now)
            left -= accepted
            if accepted < most:
                self._full_turns.pop(fd, None)
            else:
                self._full_turns[fd] = turns + 1

    def _accept(self, listener: Listener, most: int, now: float) -> int:
        """Accept at most so many clients; the result: how many there were."""
        for n in range(most):
            try:
                sock, address = listener.sock.accept()
            except BlockingIOError:
                return n
            except OSError as e:
                if e.errno in NO_DESCRIPTOR:
                    self._pause(listener, e)
                    return most
                continue  # the client has already gone (accept(2))
            sock.setblocking(False)
            self._takers.accepted(listener, sock, address, now)
        return most

    def _pause(self, listener: Listener, error: OSError) -> None:
        """There is no descriptor for a client: look again in a while, not all the time."""
        text = f"clients have to wait: {error.strerror}"
        self._log.once(text, text)
        self._resume_timer.by(self._loop.now() + PAUSE)
        fd = listener.sock.fileno()
        self._paused.add(fd)
        self.epoll.modify(fd, 0)

    def _resume(self) -> None:
        for fd in self._paused & self._by_fd.keys():
            self.epoll.modify(fd, select.EPOLLIN)
        self._paused.clear()

    def close_all(self) -> None:
        """Close all listeners; what was accepted goes on."""
        for rule, port in list(self._listeners):
            self.close_port(rule, port)

    def close(self) -> None:
        """Close everything."""
        self.close_all()
        self.epoll.close()
