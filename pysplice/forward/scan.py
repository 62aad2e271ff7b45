"""Which ports are bound on the host and in the namespace, asked of the kernel (sock_diag(7)).

Owns a netlink socket for each side.  Imports `_cext`, `config` and `sockets`.

The answer is one bit for each port, so a scan costs the same for any number of rules.
"""

# system calls (serve): sendto

import socket
from collections.abc import Iterator

from .. import _cext
from ..config.ports import GUEST, TCP
from ..sockets.request import Maker, SocketRequest

NETLINK_SOCK_DIAG = 4
IFINDEX_LO = 1  # LOOPBACK_IFINDEX of the kernel

EPHEMERAL_PATH = "/proc/sys/net/ipv4/ip_local_port_range"
EPHEMERAL_DEFAULT = (32768, 60999)


def bits(first: int, last: int) -> int:
    """A number with the bits `first` to `last` set."""
    return ((1 << (last - first + 1)) - 1) << first


def ones(number: int) -> Iterator[int]:
    """Which bits of a number are set, in ascending order."""
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def ranges(number: int) -> Iterator[tuple[int, int]]:
    """The runs of set bits, each as its first and last bit, in ascending order."""
    while number:
        first = (number & -number).bit_length() - 1
        above = (number >> first) + 1
        last = first + (above & -above).bit_length() - 2
        yield first, last
        number &= ~bits(first, last)


def ephemeral_ports() -> int:
    """The ports that the kernel assigns by itself (net.ipv4.ip_local_port_range), as bits."""
    try:
        with open(EPHEMERAL_PATH) as file:
            low, high = file.read().split()
        return bits(int(low), int(high))
    except (OSError, ValueError):
        return bits(*EPHEMERAL_DEFAULT)


class Scan:
    """Asks for the ports of both sides; `makers` make the sockets, by side."""

    def __init__(self, makers: dict[str, Maker]) -> None:
        self._makers = makers
        self._sockets: dict[str, socket.socket] = {}

    def bound(self, side: str, protocol: str) -> int:
        """The ports of one side that a socket listens on, or (UDP) is bound to, as bits; raises OSError.

        In the namespace, sockets that are bound to the interface `lo` are left out: these are our own listeners.
        """
        fd = self._socket(side).fileno()
        number = socket.IPPROTO_TCP if protocol == TCP else socket.IPPROTO_UDP
        without = IFINDEX_LO if side == GUEST else 0
        found = 0
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                found |= int.from_bytes(_cext.bound_ports(fd, family, number, without), "little")
            except FileNotFoundError:
                continue  # the kernel does not have this protocol
        return found

    def _socket(self, side: str) -> socket.socket:
        if side not in self._sockets:
            request = SocketRequest(int(socket.AF_NETLINK), int(socket.SOCK_RAW), NETLINK_SOCK_DIAG)
            self._sockets[side] = self._makers[side].make(request)
        return self._sockets[side]

    def close(self) -> None:
        """Close the sockets."""
        for sock in self._sockets.values():
            sock.close()
