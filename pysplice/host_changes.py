"""What changes when the host does: its addresses, its interface, its name servers.

Owns the socket of the follower (setup/follow.py), and what the guest had at first.  Imports `config`, `datagram`,
`forward`, `link`, `observe`, `setup`, `translate` and `wire`.  What depends on the host is made again by the functions
that have made it (assemble.py), and put in the place of what there was.
"""

# system calls (serve): recvfrom socket bind

import socket
from collections.abc import Callable
from typing import NamedTuple

from . import wire
from .config import Config, IPAddress
from .datagram.udp import Rules
from .forward.policy import Policy
from .link.advertise import Advertiser
from .link.responder import Responder
from .link.tap import TapDevice
from .observe.log import Log
from .setup.follow import REPORT_MAX, followed, read_report
from .setup.names import HostNames, Names
from .setup.template import Family, Template
from .translate import Translation

OWN_MAX = 256  # addresses of the guest's
SAID_MAX = 4  # addresses in a line


class Makers(NamedTuple):
    """How it was all made, from what the guest has and from the names."""

    names: Callable[[HostNames, Template], Names]
    translation: Callable[[Template, Names], Translation]
    responder: Callable[[Template, Names], Responder]
    broadcasts: Callable[[Template], frozenset[bytes]]


class Made(NamedTuple):
    """What there is, to be changed in place.  Without a tap all but the first two are None."""

    translation: Translation
    policy: Policy
    responder: Responder | None = None
    rules: Rules | None = None
    tap: TapDevice | None = None
    advertiser: Advertiser | None = None


class HostChanges:
    """Puts each change of the host in its place.

    `sock`: the follower's reports; `first`: what the guest had at first; `host_names`: what the host had.
    """

    def __init__(
        self,
        sock: socket.socket,
        config: Config,
        first: Template,
        host_names: HostNames,
        makers: Makers,
        made: Made,
        log: Log,
    ) -> None:
        self._sock = sock
        self._followed = followed(config, first)
        self._template = first
        self._host = first
        self._host_names = host_names
        self._names = makers.names(host_names, first)
        self._makers = makers
        self._made = made
        self._own = list(made.translation.own)  # what it has and has had, the latest last
        self._log = log

    def fileno(self) -> int:
        """The descriptor that is readable after a change."""
        return self._sock.fileno()

    def on_ready(self) -> None:
        """Read a report; raises ConnectionError once there are no more to come."""
        try:
            message = self._sock.recv(REPORT_MAX)
        except BlockingIOError:
            return
        if not message:
            raise ConnectionError("the follower is gone")
        state, note, guest = read_report(message)
        if note:
            self._log.warning(f"the guest's addresses cannot be changed: {note}")
        self._report(state.template)
        self._host, self._host_names = state.template, state.names
        self._template = Template(
            self._family(4, guest.ipv4, state.template.ipv4),
            self._family(6, guest.ipv6, state.template.ipv6),
        )
        names = self._makers.names(state.names, self._template)
        if names != self._names:
            servers = " ".join(str(server) for server in state.names.servers)
            self._log.info(f"the host's name servers: {servers or 'none'}")
        self._names = names
        self._put(self._template, names)

    def _report(self, now: Template) -> None:
        """Say in a line for each version of IP what has changed."""
        pairs = ((4, self._host.ipv4, now.ipv4), (6, self._host.ipv6, now.ipv6))
        for version, before, after in pairs:
            if before is None or after is None or _said(before) == _said(after):
                continue
            self._log.info(f"the host's IPv{version}: {_said(after)}")

    def _family(self, version: int, guest: Family | None, now: Family | None) -> Family | None:
        """What the guest has of a version, and what it has to know of the host's."""
        before = self._template.family(version)
        if before is None or guest is None or now is None or (version in self._followed and guest == now):
            return guest
        address = before.host_address
        if address is None or not is_local(address):
            # An address that the host still has goes on to be the one that it is known by
            address = now.host_address or address
        return guest._replace(interface=now.interface, ifindex=now.ifindex, host_address=address)

    def _put(self, template: Template, names: Names) -> None:
        """Have everything use these."""
        made, makers = self._made, self._makers
        made.translation.become(makers.translation(template, names))
        # The guest keeps some of the addresses that it has had
        now = made.translation.own
        self._own = [*(address for address in self._own if address not in now), *now][-OWN_MAX:]
        made.translation.own = frozenset(self._own)
        ipv4, ipv6 = template.ipv4, template.ipv6
        if 4 in self._followed and ipv4 and ipv4.addresses:
            made.policy.guest4 = ipv4.addresses[0].ip.packed
        if 6 in self._followed and ipv6 and ipv6.addresses:
            made.policy.guest6 = ipv6.addresses[0].ip.packed
        if made.responder is None or made.rules is None or made.tap is None:
            return
        made.responder.become(makers.responder(template, names))
        made.responder.guest_addresses = made.translation.own
        made.rules.broadcasts = makers.broadcasts(template)
        made.tap.source4 = ipv4.gateway.packed if ipv4 and ipv4.gateway else b""
        if ipv6 and ipv6.gateway:
            made.tap.source6 = ipv6.gateway.packed
        if made.advertiser is not None and made.responder.router is not None:
            made.advertiser.change(made.responder.router)


def _said(family: Family) -> str:
    """The addresses of a version, in a line."""
    if not family.online:
        return "none"
    listed = " ".join(str(address) for address in family.addresses[:SAID_MAX]) or str(family.host_address)
    return f"{listed}, gateway {family.gateway or 'none'}, {family.interface}"


def is_local(address: IPAddress) -> bool:
    """True if an address is the host's: a socket can be bound to it."""
    with socket.socket(wire.family(address.packed), socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError:
            return False
    return True
