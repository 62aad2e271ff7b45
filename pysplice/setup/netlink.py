"""rtnetlink: requests and dumps, in the network namespace of the calling process.

Owns its socket; imports no other room.  The messages are pyroute2's.  Importing that package
imports an event loop and all of its modules, which takes four times as long as this program needs.  So the
package is registered without running its __init__, and only three messages are imported.
"""

import contextlib
import errno
import importlib.util
import os
import socket
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any


def _lean_import() -> None:
    """Make `import pyroute2.x` import x alone."""
    spec = importlib.util.find_spec("pyroute2")
    if spec is None or "pyroute2" in sys.modules:
        return
    package = types.ModuleType("pyroute2")
    package.__path__ = list(spec.submodule_search_locations or ())
    package.__spec__ = spec
    sys.modules["pyroute2"] = package


_lean_import()

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg  # noqa: E402
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg  # noqa: E402
from pyroute2.netlink.rtnl.rtmsg import rtmsg  # noqa: E402

# linux/rtnetlink.h, linux/netlink.h
RTM_NEWLINK, RTM_GETLINK = 16, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK = 0x001, 0x004
NLM_F_DUMP = 0x300
NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE = 0x400, 0x200, 0x100
FOREVER = 0xFFFFFFFF  # a lifetime of an address
IFF_UP = 1
SOL_NETLINK, NETLINK_GET_STRICT_CHK = 270, 12
TABLE_MAIN = 254
RECEIVE_BYTES = 1 << 17


class NetlinkError(OSError):
    """The kernel has refused a request."""


class Netlink:
    """A socket of the family NETLINK_ROUTE; raises NetlinkError where the kernel refuses."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
        self._sock.bind((0, 0))
        with contextlib.suppress(OSError):
            self._sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        self._sequence = 0

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def _ask(self, message: Any, kind: int, flags: int) -> Iterator[bytes]:
        """Send a request; the result: the messages of the answer, each with its header."""
        self._sequence += 1
        message["header"]["type"] = kind
        message["header"]["flags"] = NLM_F_REQUEST | flags
        message["header"]["sequence_number"] = self._sequence
        message.encode()
        self._sock.send(message.data)
        while True:
            data = self._sock.recv(RECEIVE_BYTES)
            offset = 0
            while offset < len(data):
                length, answer, _, sequence = struct.unpack_from("IHHI", data, offset)
                part = data[offset : offset + length]
                offset += (length + 3) & ~3
                if sequence != self._sequence:
                    continue
                if answer == NLMSG_DONE:
                    return
                if answer == NLMSG_ERROR:
                    error = -struct.unpack_from("i", part, 16)[0]
                    if error:
                        raise NetlinkError(error, os.strerror(error))
                    return
                yield part

    def routes(self, family: int) -> list[Any]:
        """The routes of the address family in the main table; older kernels give those of all tables."""
        message = rtmsg()
        message["family"] = family
        message["table"] = TABLE_MAIN
        return [_decoded(rtmsg, part) for part in self._ask(message, RTM_GETROUTE, NLM_F_DUMP)]

    def addresses(self, family: int) -> list[Any]:
        """All addresses of the address family."""
        message = ifaddrmsg()
        message["family"] = family
        return [_decoded(ifaddrmsg, part) for part in self._ask(message, RTM_GETADDR, NLM_F_DUMP)]

    def link(self, index: int) -> Any:
        """The interface with this index."""
        message = ifinfmsg()
        message["index"] = index
        for part in self._ask(message, RTM_GETLINK, NLM_F_ACK):
            return _decoded(ifinfmsg, part)
        raise NetlinkError(errno.ENODEV, os.strerror(errno.ENODEV))

    def delete_address(self, index: int, address: Any) -> None:
        """Delete an address of an interface."""
        message = ifaddrmsg()
        message["index"] = index
        message["family"] = socket.AF_INET if address.version == 4 else socket.AF_INET6
        message["prefixlen"] = address.network.prefixlen
        message["attrs"] = [("IFA_LOCAL", str(address.ip)), ("IFA_ADDRESS", str(address.ip))]
        self._run(message, RTM_DELADDR, 0)

    def set_link(self, index: int, up: bool = False, **attributes: Any) -> None:
        """Change an interface; `attributes` have the kernel's names without IFLA_, in small letters."""
        message = ifinfmsg()
        message["index"] = index
        if up:
            message["flags"] = message["change"] = IFF_UP
        message["attrs"] = [(f"IFLA_{name.upper()}", value) for name, value in attributes.items()]
        self._run(message, RTM_NEWLINK, 0)

    def add_address(self, index: int, address: Any, flags: int, preferred: bool | None = None) -> None:
        """Add an address to an interface; `address` is of the module ipaddress, `flags` are IFA_F_*.

        With `preferred` True or False it may be there already, and is or is not to be used for new connections.
        """
        message = ifaddrmsg()
        message["index"] = index
        message["family"] = socket.AF_INET if address.version == 4 else socket.AF_INET6
        message["prefixlen"] = address.network.prefixlen
        message["attrs"] = [("IFA_LOCAL", str(address.ip)), ("IFA_ADDRESS", str(address.ip))]
        if address.version == 4 and address.network.prefixlen < 31:
            message["attrs"].append(("IFA_BROADCAST", str(address.network.broadcast_address)))
        if flags:
            message["attrs"].append(("IFA_FLAGS", flags))
        if preferred is None:
            self._run(message, RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL)
            return
        lifetime = {"ifa_preferred": FOREVER if preferred else 0, "ifa_valid": FOREVER}
        message["attrs"].append(("IFA_CACHEINFO", lifetime))
        self._run(message, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE)

    def add_route(
        self, fields: dict[str, int], attributes: list[tuple[str, Any]], replace: bool = False
    ) -> None:
        """Add a route: fields of struct rtmsg, and attributes with the kernel's names."""
        self._route(
            fields, attributes, RTM_NEWROUTE, NLM_F_CREATE | (NLM_F_REPLACE if replace else NLM_F_EXCL)
        )

    def delete_route(self, fields: dict[str, int], attributes: list[tuple[str, Any]]) -> None:
        """Delete a route."""
        self._route(fields, attributes, RTM_DELROUTE, 0)

    def _route(
        self, fields: dict[str, int], attributes: list[tuple[str, Any]], kind: int, flags: int
    ) -> None:
        message = rtmsg()
        for name, value in fields.items():
            message[name] = value
        message["attrs"] = attributes
        self._run(message, kind, flags)

    def _run(self, message: Any, kind: int, flags: int) -> None:
        for _ in self._ask(message, kind, flags | NLM_F_ACK):
            pass


def _decoded(kind: Any, part: bytes) -> Any:
    message = kind(part)
    message.decode()
    return message
