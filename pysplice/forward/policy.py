"""Where the client of a listener is led: to which address of the guest, and whether through the tap or spliced.

Owns what is known of the guest's addresses.  Imports `config` and `wire`.
"""

import socket
from typing import NamedTuple

from .. import wire
from ..config.ports import GUEST, Rule
from ..wire import is_loopback, unpack


class Listener(NamedTuple):
    """A socket that listens on `port` for a rule; its clients are led to the port `target` on the other side."""

    sock: socket.socket
    rule: Rule
    port: int

    @property
    def target(self) -> int:
        return self.rule.target(self.port)


class Policy:
    """The guest's addresses, and the choice between the tap and splicing.

    `guest4`, `guest6`, `guest6_link` (link-local): the guest's addresses, packed, empty if it has none.  Where
    `follow4` and `follow6` say so, these are the addresses that the guest has used last.  `splice`: clients on
    the host's loopback interface are spliced; `loopback_kept`: they reach the same loopback address in the
    namespace.
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
        """The guest has sent a packet from this address."""
        if len(source) == 4:
            if self._follow4:
                self.guest4 = source
        elif wire.is_link_local(source):
            self.guest6_link = source
        elif self._follow6:
            self.guest6 = source

    def is_spliced(self, rule: Rule, client: bytes) -> bool:
        """True for a client (a packed address, empty for a UNIX socket) that does not go through the tap."""
        if rule.side == GUEST or rule.path:
            return True
        return is_loopback(client) and rule.to_address is None and self._splice

    def spliced_to(self, listener: Listener, local: bytes) -> tuple[str, int] | None:
        """The address and port of the server for a spliced client; None if there is none.

        `local` is the packed address that the client has called, empty for a UNIX socket.  A guest may give its
        loopback interface any address; on the host it may call loopback addresses only.
        """
        ipv6 = len(local) == 16
        if listener.rule.side == GUEST and not is_loopback(local):
            return None
        if is_loopback(local) and (listener.rule.side == GUEST or self._loopback_kept):
            return unpack(local), listener.target
        guest = b"" if self._loopback_kept else self.guest6 if ipv6 else self.guest4 or self.guest6
        return unpack(guest) if guest else "::1" if ipv6 else "127.0.0.1", listener.target

    def guest(self, rule: Rule, client: bytes) -> bytes:
        """The guest's packed address for a client that goes through the tap; empty if it has none of that version."""
        if rule.to_address is not None:
            guest = rule.to_address.packed
            return guest if len(guest) == len(client) else b""
        if wire.is_link_local(client) and self.guest6_link:
            return self.guest6_link
        return self.guest4 if len(client) == 4 else self.guest6
