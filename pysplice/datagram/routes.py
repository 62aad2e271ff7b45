"""Addresses of datagrams as the kernel has them, and sockets for them.

Owns nothing.  Imports `_cext`, `translate` and errors.py.

A socket of this room is not connected.  Between bind() and connect() a socket takes datagrams from any host, and
nothing tells them from those of its peer; so each datagram is sent to an address, and each that comes has one.
"""

import contextlib
import errno
import socket
import struct
from typing import NamedTuple

from .. import _cext
from ..translate import V4_MAPPED, pack, unpack
from . import errors

UDP_GRO = 104
IP_PKTINFO = 8
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER = 10, 23
PMTUDISC_DONT, PMTUDISC_DO = 0, 2
BUFFER = 1 << 20  # net.core.rmem_max and wmem_max bound it

ADDRESS4, ADDRESS6 = struct.Struct("!H4s8x"), struct.Struct("!HI16s")
FAMILY, SCOPE = struct.Struct("=H"), struct.Struct("=I")
# linux/netlink.h, linux/rtnetlink.h: struct nlmsghdr, rtmsg (family and length of the destination) and rtattr
NLMSGHDR, RTMSG, ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BB10x"), struct.Struct("=HH")
RTM_NEWROUTE, RTM_GETROUTE, NLM_F_REQUEST = 24, 26, 1
RTA_DST, RTA_GATEWAY = 1, 5

ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


class Peer(NamedTuple):
    """An address of the other end: packed, IPv4 as such; `scope` is an interface's index, or 0."""

    address: bytes
    port: int
    scope: int = 0


def sockaddr(family: int, peer: Peer) -> bytes:
    """struct sockaddr_in or sockaddr_in6 for a socket of this family (ip(7), ipv6(7))."""
    if family == socket.AF_INET:
        return FAMILY.pack(family) + ADDRESS4.pack(peer.port, peer.address)
    address = peer.address if len(peer.address) == 16 else V4_MAPPED + peer.address
    return FAMILY.pack(family) + ADDRESS6.pack(peer.port, 0, address) + SCOPE.pack(peer.scope)


def peer_of(address: bytes) -> Peer | None:
    """What such a structure says; None if it is none of these."""
    if len(address) == 16:
        port, packed = ADDRESS4.unpack_from(address, 2)
        return Peer(packed, port)
    if len(address) == 28:
        port, _, packed = ADDRESS6.unpack_from(address, 2)
        if packed.startswith(V4_MAPPED):
            return Peer(packed[12:], port)
        return Peer(packed, port, *SCOPE.unpack_from(address, 24))
    return None


def in_words(address: bytes) -> str:
    """Such a structure for a person."""
    peer = peer_of(address)
    return f"[{unpack(peer.address)}]:{peer.port}" if peer is not None else "nowhere"


def peer_of_words(address: tuple[str | int, ...]) -> Peer:
    """The same for what Python makes of it."""
    scope = int(address[3]) if len(address) > 3 else 0
    return Peer(pack(str(address[0])), int(address[1]), scope)


def ancillary(source: bytes, interface: int, hops: int, peer: Peer) -> bytes:
    """What has a datagram for this peer leave as it should; see _cext.ancillary()."""
    family = socket.AF_INET if len(peer.address) == 4 else socket.AF_INET6
    return _cext.ancillary(family, source, interface, hops)


class NextHops:
    """Which router the host sends by, asked of the kernel (rtnetlink(7)).  Owns its socket."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        with contextlib.suppress(OSError):
            self._sock = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
            )

    def of(self, address: bytes) -> bytes:
        """The router that an address is reached by, packed; empty if there is none."""
        if self._sock is None:
            return b""
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        body = RTMSG.pack(family, 8 * len(address)) + ATTRIBUTE.pack(4 + len(address), RTA_DST) + address
        header = NLMSGHDR.pack(NLMSGHDR.size + len(body), RTM_GETROUTE, NLM_F_REQUEST, 0, 0)
        try:
            self._sock.send(header + body)
            answer = self._sock.recv(4096)
        except OSError:
            return b""
        if len(answer) < NLMSGHDR.size or NLMSGHDR.unpack_from(answer)[1] != RTM_NEWROUTE:
            return b""
        at = NLMSGHDR.size + RTMSG.size
        while at + ATTRIBUTE.size <= len(answer):
            length, kind = ATTRIBUTE.unpack_from(answer, at)
            if kind == RTA_GATEWAY:
                return answer[at + ATTRIBUTE.size : at + length]
            at += max(length + 3 & ~3, ATTRIBUTE.size)
        return b""

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()


class Port:
    """A socket that is bound to a port, and how it treats what is larger than the path's MTU."""

    __slots__ = ("closed", "df", "family", "fd", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.family = sock.family
        self.df = -1  # not known
        self.closed = False

    def fragment(self, df: int) -> None:
        """What follows may be fragmented on the way (0), or not (1): then send() reports EMSGSIZE."""
        if df == self.df:
            return
        self.df = df
        how = PMTUDISC_DO if df else PMTUDISC_DONT
        with contextlib.suppress(OSError):
            if self.family == socket.AF_INET6:
                self.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, how)
            # A socket of both versions has both
            self.sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, how)


def tune(sock: socket.socket) -> None:
    """Buffers, and joined datagrams where the kernel can do that."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)


def open_port(family: int, address: str, port: int) -> socket.socket:
    """A socket at this port if it is free, else at another; raises OSError.

    The port is not shared: SO_REUSEADDR would let another user's socket in.
    """
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        errors.enable(sock)
        # A guest may send to a broadcast address
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        tune(sock)
        try:
            sock.bind((address, port))
        except OSError as e:
            if e.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EPERM):
                raise
            sock.bind((address, 0))
    except OSError:
        sock.close()
        raise
    return sock
