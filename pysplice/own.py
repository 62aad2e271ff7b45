"""The host's own addresses, for those of the guest's that lead to them (--map-guest-addr), as the host moves.

Owns a socket that hears when an address comes or goes (rtnetlink(7)).  Imports `translate`.
"""

# system calls (serve): socket bind recvfrom connect getsockname

import contextlib
import socket
from collections.abc import Mapping

from .translate import Translation, pack, unpack

RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE = 0x10, 0x100, 0x40, 0x400
GROUPS = RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE
MESSAGE_MAX = 65536
MESSAGES_PER_EVENT = 64

# Addresses that nobody has (RFC 5737, RFC 3849): the kernel chooses a source for them, and nothing is sent
ELSEWHERE = {4: "192.0.2.1", 16: "2001:db8::1"}


class Own:
    """`mapped`: addresses of the guest's, packed, that lead to the host's own address, packed."""

    def __init__(self, translation: Translation, mapped: Mapping[bytes, bytes]) -> None:
        self._translation = translation
        self._mapped = dict(mapped)
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
        with contextlib.suppress(OSError):
            self._sock.bind((0, GROUPS))

    def fileno(self) -> int:
        return self._sock.fileno()

    def on_ready(self) -> None:
        """Something has changed: where an address is the host's no more, another one takes its place."""
        with contextlib.suppress(OSError):
            for _ in range(MESSAGES_PER_EVENT):
                self._sock.recv(MESSAGE_MAX)
        for guest, host in self._mapped.items():
            if is_ours(host):
                continue
            now = current(len(guest))
            if now:
                self._mapped[guest] = now
                self._translation.move(guest, host, now)

    def close(self) -> None:
        self._sock.close()


def is_ours(address: bytes) -> bool:
    """True if connections can come from a packed address."""
    with socket.socket(_family(len(address)), socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((unpack(address), 0))
        except OSError:
            return False
    return True


def current(size: int) -> bytes:
    """The address, packed in so many bytes, that connections to elsewhere come from; empty if there is none."""
    with socket.socket(_family(size), socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((ELSEWHERE[size], 9))
            return pack(sock.getsockname()[0])
        except OSError:
            return b""


def _family(size: int) -> socket.AddressFamily:
    return socket.AF_INET if size == 4 else socket.AF_INET6
