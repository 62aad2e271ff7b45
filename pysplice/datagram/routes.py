"""Socket addresses of datagrams as the kernel has them, and the sockets that datagrams go by.

Owns nothing.  Imports `_cext`, `observe`, `sockets`, `wire` and errors.py.

No socket of this room is connected.  Between bind() and connect() a socket takes datagrams from any host, and
nothing tells them apart from its peer's.  So each datagram is sent to an address, and each one that arrives
comes with an address.
"""

import contextlib
import socket
import struct
from typing import Final, NamedTuple

from .. import _cext
from ..observe.describe import endpoint
from ..sockets.request import Maker, SocketRequest
from ..wire import V4_MAPPED, pack
from . import errors

UDP_GRO: Final = 104
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER = 10, 23
PMTUDISC_DONT, PMTUDISC_DO = 0, 2
BUFFER: Final = 1 << 20  # net.core.rmem_max and wmem_max bound it

ADDRESS4, ADDRESS6 = struct.Struct("!H4s8x"), struct.Struct("!HI16s")
FAMILY, SCOPE = struct.Struct("=H"), struct.Struct("=I")
# linux/netlink.h, linux/rtnetlink.h: struct nlmsghdr, rtmsg (family and length of the destination) and rtattr
NLMSGHDR, RTMSG, ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BB10x"), struct.Struct("=HH")
RTM_NEWROUTE, RTM_GETROUTE, NLM_F_REQUEST = 24, 26, 1
RTA_DST, RTA_GATEWAY = 1, 5

ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


class Peer(NamedTuple):
    """A packed address and a port of another host; `scope` is an interface's index, or 0."""

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
    """The peer in a struct sockaddr_in or sockaddr_in6; None if it is neither."""
    if len(address) == 16:
        port, packed = ADDRESS4.unpack_from(address, 2)
        return Peer(packed, port)
    if len(address) == 28:
        port, _, packed = ADDRESS6.unpack_from(address, 2)
        if packed.startswith(V4_MAPPED):
            return Peer(packed[12:], port)
        return Peer(packed, port, *SCOPE.unpack_from(address, 24))
    return None


def described(address: bytes) -> str:
    """Such a structure in readable form."""
    peer = peer_of(address)
    return endpoint(peer.address, peer.port) if peer is not None else "nowhere"


def peer_of_python(address: tuple[str | int, ...]) -> Peer:
    """The peer in a socket address as Python has it."""
    scope = int(address[3]) if len(address) > 3 else 0
    return Peer(pack(str(address[0])), int(address[1]), scope)


def ancillary(source: bytes, interface: int, hops: int, peer: Peer) -> bytes:
    """Ancillary data for datagrams to a peer: see _cext.ancillary().

    `source` is packed (empty: any), `interface` an index (0: any), `hops` a hop limit (0: the socket's).
    """
    family = socket.AF_INET if len(peer.address) == 4 else socket.AF_INET6
    return _cext.ancillary(family, source, interface, hops)


class NextHops:
    """Asks the kernel by which router the host reaches an address (rtnetlink(7)).  Owns its socket."""

    def __init__(self, maker: Maker) -> None:
        self._sock: socket.socket | None = None
        with contextlib.suppress(OSError):
            self._sock = maker.make(SocketRequest(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE))

    def of(self, address: bytes) -> bytes:
        """The router by which a packed address is reached, packed; empty if there is none."""
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
    """A socket that is bound to a port, and what it does with a datagram larger than the path's MTU."""

    __slots__ = ("closed", "df", "family", "fd", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.family = sock.family
        self.df = -1  # not known
        self.closed = False

    def fragment(self, df: int) -> None:
        """Set whether the next datagrams may be fragmented on the way (0), or not (1): then send() reports EMSGSIZE."""
        if df == self.df:
            return
        self.df = df
        how = PMTUDISC_DO if df else PMTUDISC_DONT
        with contextlib.suppress(OSError):
            if self.family == socket.AF_INET6:
                self.sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, how)
            # A socket of both versions has both options
            self.sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, how)


def tune(sock: socket.socket) -> None:
    """Set the buffers, and have the kernel join datagrams if it can (UDP_GRO)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)


def open_port(maker: Maker, family: int, address: str, port: int) -> socket.socket:
    """A socket at this port if it is free, else at another; raises OSError.

    The port is not shared: with SO_REUSEADDR another user's socket could be bound to it too.
    """
    v6only = True if family == socket.AF_INET6 else None
    bind = (address, port)
    request = SocketRequest(
        family, socket.SOCK_DGRAM, bind=bind, any_port=True, v6only=v6only, packet_info=True
    )
    sock = maker.make(request)
    try:
        errors.enable(sock)
        # A guest may send to a broadcast address
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        tune(sock)
    except OSError:
        sock.close()
        raise
    return sock
