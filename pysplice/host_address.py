"""The host's own address, for addresses of the guest's that lead to it (--map-guest-addr), as it changes.

Owns a socket that reports when addresses and routes come and go (rtnetlink(7)).  Imports `translate` and `wire`.
"""

# system calls (serve): socket bind recvfrom connect getsockname

import contextlib
import socket
from collections.abc import Mapping

from . import wire
from .translate import Translation
from .wire import pack, unpack

RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE = 0x10, 0x100, 0x40, 0x400
GROUPS = RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE
MESSAGE_MAX = 65536
MESSAGES_PER_EVENT = 64

# Documentation addresses (RFC 5737, RFC 3849): the kernel chooses a source for them, and nothing is sent
DOCUMENTATION = {4: "192.0.2.1", 16: "2001:db8::1"}


class HostAddress:
    """Keeps a Translation up to date.

    `mapped`: the guest's addresses that lead to the host's own address, and that address (packed both).
    """

    def __init__(self, translation: Translation, mapped: Mapping[bytes, bytes]) -> None:
        self._translation = translation
        self._mapped = dict(mapped)
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
        with contextlib.suppress(OSError):
            self._sock.bind((0, GROUPS))

    def fileno(self) -> int:
        """The descriptor that is readable after a change."""
        return self._sock.fileno()

    def on_ready(self) -> None:
        """Replace each address that the host has lost with the one that it uses now."""
        with contextlib.suppress(OSError):
            for _ in range(MESSAGES_PER_EVENT):
                self._sock.recv(MESSAGE_MAX)
        for guest, host in self._mapped.items():
            if is_local(host):
                continue
            now = preferred(len(guest))
            if now:
                self._mapped[guest] = now
                self._translation.move(guest, host, now)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def is_local(address: bytes) -> bool:
    """True if a packed address is the host's: a socket can be bound to it."""
    with socket.socket(wire.family(address), socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((unpack(address), 0))
        except OSError:
            return False
    return True


def preferred(size: int) -> bytes:
    """The packed address of `size` bytes that connections to other hosts come from; empty if there is none."""
    with socket.socket(socket.AF_INET if size == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((DOCUMENTATION[size], 9))
            return pack(sock.getsockname()[0])
        except OSError:
            return b""
