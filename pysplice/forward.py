"""Listeners and port policy: who may be born from the other side.

Owns every listening socket, on the host and in the guest's namespace, and the epoll instance that watches them.
Imports `ports`, `inside`, `translate`, `unix`, `config` and `_cext`.  What becomes of a client is for proxy.py to say.

With `auto`, a port is open here while somebody listens on its target over there.  That is asked of the kernel
(sock_diag) once a second, as one bit for each port, so a scan costs the same for any number of rules.
"""

# system calls (serve): accept4 listen getsockname sendto

import errno
import os
import select
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from . import _cext, unix
from .config import ConfigError
from .inside import Inside, make_either
from .ports import GUEST, HOST, TCP, UDP, Rule, overlap
from .translate import unpack

LINK_LOCAL = b"\xfe\x80"
LOOPBACK6 = bytes(15) + b"\x01"

EPHEMERAL_PATH = "/proc/sys/net/ipv4/ip_local_port_range"
EPHEMERAL_DEFAULT = (32768, 60999)

NETLINK_SOCK_DIAG = 4
IFINDEX_LO = 1  # LOOPBACK_IFINDEX of the kernel
OPEN_PER_TURN = 64  # ports, while we serve
FOLLOW_PER_TURN = 256  # ports that are opened or closed before everything else has a turn
SCAN_EVERY = 1.0  # seconds, as pasta

ACCEPTS_PER_EVENT = 64
LISTENERS_PER_EVENT = 64


class Listener(NamedTuple):
    """A socket that listens on `port` for a rule; clients go to `target` on the other side."""

    sock: socket.socket
    rule: Rule
    port: int

    @property
    def target(self) -> int:
        return self.rule.target(self.port)


class Policy:
    """Where clients are led, and by which way.

    `guest4`, `guest6`, `guest6_link` (link-local): the guest's addresses, packed, empty if it has none; where `follow4`
    and `follow6` say so, the last that it has shown.  `splice`: loopback takes the short cut; `loopback_kept`: to the
    same loopback address.
    """

    def __init__(
        self,
        guest4: bytes = b"",
        guest6: bytes = b"",
        guest6_link: bytes = b"",
        *,
        follow4: bool = True,
        follow6: bool = True,
        splice: bool = True,
        loopback_kept: bool = False,
    ) -> None:
        self.guest4 = guest4
        self.guest6 = guest6
        self.guest6_link = guest6_link
        self._follow4 = follow4
        self._follow6 = follow6
        self._splice = splice
        self._loopback_kept = loopback_kept

    def learn(self, source: bytes) -> None:
        """The guest has sent from this address."""
        if len(source) == 4:
            if self._follow4:
                self.guest4 = source
        elif source[:2] == LINK_LOCAL:
            self.guest6_link = source
        elif self._follow6:
            self.guest6 = source

    def short_cut(self, rule: Rule, client: bytes) -> bool:
        """True for a client that does not pass the tap."""
        if rule.side == GUEST or rule.path:
            return True
        return is_loopback(client) and rule.to_address is None and self._splice

    def beyond(self, listener: Listener, local: bytes) -> tuple[str, int] | None:
        """Where the server of a short cut is, or None if there is none; `local` is the address that the client
        has called, or empty.

        A guest may give its loopback interface any address; on the host only loopback addresses are its to call.
        """
        ipv6 = len(local) == 16
        if listener.rule.side == GUEST and not is_loopback(local):
            return None
        if is_loopback(local) and (listener.rule.side == GUEST or self._loopback_kept):
            return unpack(local), listener.target
        guest = b"" if self._loopback_kept else self.guest6 if ipv6 else self.guest4 or self.guest6
        return unpack(guest) if guest else "::1" if ipv6 else "127.0.0.1", listener.target

    def guest(self, rule: Rule, client: bytes) -> bytes:
        """Where a client is led by the tap; empty if the guest has no address of that version."""
        if rule.to_address is not None:
            guest = rule.to_address.packed
            return guest if len(guest) == len(client) else b""
        if client[:2] == LINK_LOCAL and len(client) == 16 and self.guest6_link:
            return self.guest6_link
        return self.guest4 if len(client) == 4 else self.guest6


def is_loopback(address: bytes) -> bool:
    """True for 127.0.0.0/8 and ::1, packed."""
    return address[0] == 127 if len(address) == 4 else address == LOOPBACK6


def ephemeral_ports() -> tuple[int, int]:
    """net.ipv4.ip_local_port_range: ports that the kernel gives away by itself."""
    try:
        with open(EPHEMERAL_PATH) as file:
            low, high = file.read().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return EPHEMERAL_DEFAULT


def bits(first: int, last: int) -> int:
    """The bits `first` to `last`."""
    return ((1 << (last - first + 1)) - 1) << first


def ones(number: int) -> Iterator[int]:
    """The bits that are set."""
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


class Datagrams(Protocol):
    """What takes the datagrams of listeners."""

    def opened(self, listener: Listener) -> None: ...
    def closed(self, listener: Listener) -> None: ...

    def ports(self, side: str) -> int:
        """The UDP ports of a side that sockets of ours have beside the listeners, as bits."""

    def release(self, port: int) -> bool:
        """Give up a port of the host's; True if that was ours."""


class Forward:
    """All rules and their listeners.

    `accepted(listener, sock, address)` is called for each TCP client, `arrived(listener, failed)` when a UDP listener
    has something, errors too if `failed`; `warn` with what a person should know; `later(seconds, call)` is the loop's
    timer.  `datagrams` hears of UDP listeners, and knows which ports other UDP sockets of ours have.
    """

    def __init__(
        self,
        inside: Inside | None,
        keeper: unix.Keeper | None,
        *,
        ipv4: bool,
        ipv6: bool,
        protocols: Sequence[str],
        freebind: bool,
        scope: int,
        accepted: Callable[[Listener, socket.socket, Any], None],
        arrived: Callable[[Listener, bool], None],
        datagrams: Datagrams,
        listeners_max: int,
        warn: Callable[[str], None],
        warn_once: Callable[[str], None],
        later: Callable[[float, Callable[[], None]], Any],
    ) -> None:
        self.epoll = select.epoll()
        self.rules: list[Rule] = []
        self._inside = inside
        self._keeper = keeper
        self._ipv4 = ipv4
        self._ipv6 = ipv6
        self._protocols = protocols
        self._freebind = freebind
        self._scope = scope
        self._listeners_max = listeners_max
        self._accepted = accepted
        self._arrived = arrived
        self._datagrams = datagrams
        self._warn = warn
        self._warn_once = warn_once
        self._later = later
        self._paused: set[int] = set()
        self._by_fd: dict[int, Listener] = {}
        self._listeners: dict[tuple[Rule, int], Listener] = {}
        self._open: dict[Rule, int] = {}  # ports as bits, so that a scan looks at no listener
        self._published: dict[int, Listener] = {}
        self._wanted: dict[Rule, int] = {}
        self.unfinished = False  # the last scan has left ports for the next
        self._asked: set[tuple[Rule, int]] = set()
        self._complained: set[tuple[Rule, int]] = set()
        self._ours = {(side, protocol): 0 for side in (HOST, GUEST) for protocol in (TCP, UDP)}
        self._diag: dict[str, socket.socket] = {}
        self._ephemeral = bits(*ephemeral_ports())

    def fileno(self) -> int:
        return self.epoll.fileno()

    # Rules

    def add(self, rule: Rule, running: bool = False) -> None:
        """Follow a rule from now on; raises ConfigError if its ports cannot be bound.

        With `running`, many ports that need not be had (`all`) are opened by and by.
        """
        if rule.address is not None and not (self._ipv4 if rule.address.version == 4 else self._ipv6):
            raise ConfigError(f"'{rule}': IPv{rule.address.version} is switched off")
        if rule.protocol not in self._protocols:
            raise ConfigError(f"'{rule}': {rule.protocol.upper()} is switched off")
        for other in self.rules:
            if not overlap(rule, other):
                continue
            if other.auto == rule.auto:
                raise ConfigError(f"'{rule}' overlaps '{other}'")
            # What is written out goes before what follows
            for port in range(rule.first, rule.last + 1) if other.auto else ():
                if (other, port) in self._listeners:
                    self._close((other, port))
        if rule.side == GUEST and self._inside is None:
            raise ConfigError("there is no process in the namespace to listen there")
        if not rule.auto and running and rule.weak:
            self._open_some(rule, self._ports(rule))
        elif not rule.auto:
            self._open_all(rule)
        self.rules.append(rule)

    def remove(self, rule: Rule) -> None:
        """Listen no more; connections stay.  Raises ConfigError if there is no such rule."""
        if rule not in self.rules:
            raise ConfigError(f"'{rule}' is not forwarded")
        self.rules.remove(rule)
        for port in ones(self._open.pop(rule, 0)):
            self._open[rule] = 1 << port
            self._close((rule, port))
        self._open.pop(rule, None)
        self._wanted.pop(rule, None)

    def _ports(self, rule: Rule) -> int:
        """The ports that a rule may listen on, as bits."""
        wanted = self._wanted.get(rule)
        if wanted is None:
            wanted = bits(rule.first, rule.last)
            self._wanted[rule] = wanted = wanted & ~self._ephemeral if rule.weak else wanted
        return wanted

    def _open_some(self, rule: Rule, ports: int) -> None:
        """Open the first of these, and the others after everybody else had a turn."""
        for _ in range(OPEN_PER_TURN):
            if not ports or len(self._listeners) >= self._listeners_max:
                return
            port = (ports & -ports).bit_length() - 1
            ports &= ports - 1
            self._open_later(rule, port)
        self._later(0.001, lambda: self._open_some(rule, ports) if rule in self.rules else None)

    def _open_all(self, rule: Rule) -> None:
        error: OSError | None = None
        for port in ones(self._ports(rule)):
            if len(self._listeners) >= self._listeners_max:
                if not rule.weak:
                    error = OSError(errno.EMFILE, "too many ports for this limit of descriptors")
                    break
                left = (self._ports(rule) >> port).bit_count()
                self._warn(f"'{rule}': {left} ports are left out for want of descriptors")
                break
            try:
                self._keep(rule, port, self._bind(rule, port))
            except OSError as e:
                error = e
                if not rule.weak:
                    break
                if e.errno in (errno.EMFILE, errno.ENFILE):
                    break
        opened = [(rule, port) for port in ones(self._open.get(rule, 0))]
        if error is not None and (not rule.weak or not opened):
            for key in opened:
                self._close(key)
            where = f"{rule.address or ''}{'%' + rule.interface if rule.interface else ''}"
            what = rule.path or f"{where} port {port} ({rule.protocol})".strip()
            raise ConfigError(f"cannot listen on {what}: {error.strerror}")

    def _bind(self, rule: Rule, port: int) -> socket.socket:
        """The listening socket, now; raises OSError."""
        if rule.path:
            if self._keeper is None:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            return self._keeper.listen(rule.path)
        request = self._request(rule, port)
        if rule.side == HOST:
            try:
                return make_either(request)
            except OSError as e:
                # The guest may have sent from a port before it was to be published
                taken = e.errno == errno.EADDRINUSE and rule.protocol == UDP
                if not taken or not self._datagrams.release(port):
                    raise
                return make_either(request)
        assert self._inside is not None
        return self._inside.fetch(request)

    def _request(self, rule: Rule, port: int) -> dict[str, Any]:
        """What inside.make() makes a listener of."""
        address = rule.address
        version = address.version if address is not None else 6 if self._ipv6 else 4
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        bind: list[Any] = [
            str(address) if address is not None else "::" if version == 6 else "0.0.0.0",
            port,
        ]
        if address is not None and version == 6 and address.is_link_local and not rule.interface:
            bind += [0, self._scope]
        request: dict[str, Any] = {
            # A kernel without IPv6 has 0.0.0.0 only
            "either": address is None,
            "family": int(family),
            "kind": int(socket.SOCK_STREAM if rule.protocol == TCP else socket.SOCK_DGRAM),
            "bind": bind,
            "backlog": unix.BACKLOG,
            "freebind": self._freebind,
            # The guest's side is its loopback interface alone
            "device": "lo" if rule.side == GUEST else rule.interface,
        }
        if version == 6:
            request["v6only"] = int(address is not None or not self._ipv4)
        return request

    def _keep(self, rule: Rule, port: int, sock: socket.socket) -> None:
        listener = Listener(sock, rule, port)
        self._listeners[rule, port] = listener
        self._by_fd[sock.fileno()] = listener
        self._ours[rule.side, rule.protocol] |= 1 << port
        self._open[rule] = self._open.get(rule, 0) | 1 << port
        if rule.protocol == UDP:
            self._datagrams.opened(listener)
            if (
                rule.side == HOST
                and rule.to_address is None
                and rule.address is None
                and not rule.interface
            ):
                self._published.setdefault(listener.target, listener)
        self.epoll.register(sock.fileno(), select.EPOLLIN)

    def _close(self, key: tuple[Rule, int]) -> None:
        listener = self._listeners.pop(key)
        rule, port = key
        del self._by_fd[listener.sock.fileno()]
        self.epoll.unregister(listener.sock.fileno())
        if rule.path and self._keeper is not None:
            self._keeper.unlink(rule.path)
        if rule.protocol == UDP:
            self._datagrams.closed(listener)
            if self._published.get(listener.target) is listener:
                del self._published[listener.target]
        listener.sock.close()
        self._open[rule] &= ~(1 << port)
        # Another rule may listen on that port at another address
        ours = 0
        for other, opened in self._open.items():
            if (other.side, other.protocol) == (rule.side, rule.protocol):
                ours |= opened
        self._ours[rule.side, rule.protocol] = ours

    # Clients

    def on_ready(self) -> None:
        """Some listeners have clients."""
        accepts = ACCEPTS_PER_EVENT
        for fd, ready in self.epoll.poll(0, LISTENERS_PER_EVENT):
            listener = self._by_fd.get(fd)
            if listener is None:
                continue
            if listener.rule.protocol == UDP:
                self._arrived(listener, bool(ready & select.EPOLLERR))
            elif accepts > 0:
                accepts -= self._accept(listener, accepts)

    def _accept(self, listener: Listener, most: int) -> int:
        """Take clients, at most so many; how many there were."""
        for n in range(most):
            try:
                sock, address = listener.sock.accept()
            except BlockingIOError:
                return n
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause(listener, e)
                    return most
                continue  # it has gone again (accept(2))
            sock.setblocking(False)
            self._accepted(listener, sock, address)
        return most

    def _pause(self, listener: Listener, error: OSError) -> None:
        """There is no descriptor for a client: look again in a while, not all the time."""
        self._warn_once(f"clients have to wait: {error.strerror}")
        if not self._paused:
            self._later(SCAN_EVERY, self._resume)
        fd = listener.sock.fileno()
        self._paused.add(fd)
        self.epoll.modify(fd, 0)

    def _resume(self) -> None:
        for fd in self._paused & self._by_fd.keys():
            self.epoll.modify(fd, select.EPOLLIN)
        self._paused.clear()

    # Ports that follow others

    def udp_listener(self, port: int) -> Listener | None:
        """The listener at all addresses that leads to this UDP port of the guest's, if there is one."""
        return self._published.get(port)

    @property
    def scanning(self) -> bool:
        """True if a rule says `auto`."""
        return any(rule.auto for rule in self.rules)

    def scan(self) -> None:
        """Open and close listeners as their targets have been bound and released."""
        seen: dict[tuple[str, str], int] = {}
        self.unfinished = False
        for rule in self.rules:
            if not rule.auto:
                continue
            other = GUEST if rule.side == HOST else HOST
            try:
                bound = self._bound(other, TCP, seen)
                if rule.protocol == UDP:
                    # UDP's follow TCP's too, as pasta has it
                    bound |= self._bound(other, UDP, seen)
            except OSError as e:
                self._warn_once(f"cannot read the ports of the {other}: {e.strerror or e}")
                return
            self._follow(rule, bound & ~self._ours[other, rule.protocol])

    def _follow(self, rule: Rule, bound: int) -> None:
        wanted = self._ports(rule) & (bound >> rule.to_first << rule.first)
        have = self._open.get(rule, 0)
        # Those that another rule has are its own
        wanted &= ~(self._ours[rule.side, rule.protocol] & ~have)
        turn = FOLLOW_PER_TURN
        for port in ones(have & ~wanted):
            self._close((rule, port))
            turn -= 1
            if not turn:
                self.unfinished = True
                return
        for port in ones(wanted & ~have):
            turn -= 1
            if not turn:
                self.unfinished = True
                break
            if len(self._listeners) >= self._listeners_max:
                self._complain((rule, port), errno.EMFILE)
                break
            self._open_later(rule, port)
        if self._complained:
            self._complained -= {
                (held, port) for held, port in self._complained if held == rule and not wanted >> port & 1
            }

    def _open_later(self, rule: Rule, port: int) -> None:
        key = (rule, port)
        if rule.side == HOST:
            try:
                self._keep(rule, port, self._bind(rule, port))
            except OSError as e:
                self._complain(key, e.errno or errno.EIO)
        elif self._inside is not None and key not in self._asked:
            self._asked.add(key)

            def done(socks: list[socket.socket], error: int) -> None:
                self._asked.discard(key)
                if error:
                    self._complain(key, error)
                elif rule in self.rules and key not in self._listeners:
                    self._keep(rule, port, socks[0])
                else:
                    socks[0].close()

            self._inside.ask(self._request(rule, port), done)

    def _complain(self, key: tuple[Rule, int], error: int) -> None:
        if key not in self._complained:
            self._complained.add(key)
            rule, port = key
            self._warn(f"cannot follow {rule.protocol} port {port}: {os.strerror(error)}")

    def _bound(self, side: str, protocol: str, seen: dict[tuple[str, str], int]) -> int:
        """The ports that somebody but us listens on, as bits; `seen` are those that were read already."""
        if (side, protocol) not in seen:
            fd = self._diag_socket(side).fileno()
            number = socket.IPPROTO_TCP if protocol == TCP else socket.IPPROTO_UDP
            found = 0
            for family in (socket.AF_INET, socket.AF_INET6):
                try:
                    # On the guest's side all that is bound to its loopback interface is ours
                    without = IFINDEX_LO if side == GUEST else 0
                    found |= int.from_bytes(_cext.bound_ports(fd, family, number, without), "little")
                except FileNotFoundError:
                    continue  # the kernel has no such protocol
            ours = self._ours[side, protocol]
            if protocol == UDP:
                ours |= self._datagrams.ports(side)
            seen[side, protocol] = found & ~ours
        return seen[side, protocol]

    def _diag_socket(self, side: str) -> socket.socket:
        """What the ports of a side are asked by."""
        if side not in self._diag:
            request = {
                "family": int(socket.AF_NETLINK),
                "kind": int(socket.SOCK_RAW),
                "protocol": NETLINK_SOCK_DIAG,
            }
            if side == HOST:
                self._diag[side] = make_either(request)
            elif self._inside is not None:
                self._diag[side] = self._inside.fetch(request)
            else:
                raise OSError(errno.ENETDOWN, os.strerror(errno.ENETDOWN))
        return self._diag[side]

    def __len__(self) -> int:
        """How many listeners there are."""
        return len(self._listeners)

    def listening(self) -> Iterable[Listener]:
        return list(self._listeners.values())

    def close_all(self) -> None:
        """Listen no more, and follow no ports; what was accepted goes on."""
        self.rules.clear()
        for key in list(self._listeners):
            self._close(key)

    def close(self) -> None:
        self.close_all()
        for sock in self._diag.values():
            sock.close()
        self.epoll.close()
