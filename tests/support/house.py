"""A proxy with everything but a kernel's tap: a fake loop, a fake clock, and the guest's end of a socket pair.

The servers and clients are real sockets on the loopback interface, which the guest reaches by its gateway's addresses.
"""

from __future__ import annotations

import io
import ipaddress
import os
from collections.abc import Callable

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from pysplice.assemble import Found, assemble
from pysplice.config import Config
from pysplice.observe.log import Log
from pysplice.setup.join import Guest
from pysplice.setup.names import Names
from pysplice.setup.template import Family, Template
from pysplice.setup.watch import NoWatch
from pysplice.sockets.unix import NoFiles

from .loops import FakeLoop
from .taps import GUEST_MAC, OUR_MAC, tap_pair

GUEST, GATEWAY = "10.0.2.15", "10.0.2.2"
GUEST6, GATEWAY6 = "fd00::15", "fd00::2"
ADDRESSES = {
    4: (GUEST, GATEWAY, "127.0.0.1"),
    6: (GUEST6, GATEWAY6, "::1"),
}  # the guest, its gateway, the server
NO_NAMES = Names((), (), {}, True)


class Ended(NoWatch):
    """A namespace whose end is reported by a descriptor."""

    def __init__(self) -> None:
        self.fd, self.end = os.pipe()

    def gone(self) -> bool:
        return True


def ip(version: int = 4, **fields) -> Packet:
    """The header of a packet from the guest to its gateway, or to `dst`."""
    guest, gateway, _ = ADDRESSES[version]
    if version == 4:
        return IP(**{"src": guest, "dst": gateway} | fields)
    if "ttl" in fields:
        fields["hlim"] = fields.pop("ttl")
    return IPv6(**{"src": guest, "dst": gateway} | fields)


class House:
    """A proxy, its loop, and the guest's end of the tap; `vnet`: with offloads; `options` are those of Config."""

    def __init__(self, descriptors: int = 1000, vnet: bool = False, **options) -> None:
        self.loop = FakeLoop()
        ours, self.guest = tap_pair()
        self.tap_fd = ours.detach()
        options.setdefault("ipv6", False)
        family4, family6 = (
            Family("eth0", 1, (ipaddress.ip_interface(f"{guest}/{prefix}"),), ipaddress.ip_address(gateway), (), None)
            for guest, gateway, prefix in ((GUEST, GATEWAY, 24), (GUEST6, GATEWAY6, 64))
        )  # fmt: skip
        self.watch = Ended()
        guest = Guest(
            self.tap_fd, "tap0", vnet, vnet, 1000, bytes.fromhex(GUEST_MAC.replace(":", "")),
            Template(family4, family6 if options["ipv6"] else None), None, self.watch, None,
        )  # fmt: skip
        self.said = io.StringIO()
        log = Log(debug=True, stream=self.said)
        self.proxy = assemble(
            Config(**options), Found(guest, NO_NAMES, NoFiles(), descriptors), self.loop, log
        )

    def serve(self, script: Callable[[], object], status: int = 0) -> int:
        """Serve while the script runs; the exit status."""
        self.loop.script = script
        return self.proxy.serve(self.watch, lambda: status, lambda: None)

    def send(self, packet) -> None:
        """A frame from the guest."""
        self.guest.send(bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / packet))
        self.loop.settle()

    def received(self) -> list:
        """The frames that the guest has got."""
        frames = []
        while True:
            try:
                frames.append(Ether(self.guest.recv(70_000)))
            except BlockingIOError:
                return frames

    def segment(self, port: int, payload: bytes = b"", **fields) -> list:
        """A TCP segment from the guest, and the segments that it gets in return."""
        self.send(IP(src=GUEST, dst=GATEWAY) / TCP(sport=40000, dport=port, **fields) / payload)
        return [frame[TCP] for frame in self.received()]

    def established(self, port: int) -> tuple[int, int]:
        """Open a connection; the next sequence number of the guest, and the one that it acknowledges."""
        (syn_ack,) = self.segment(port, flags="S", seq=1000, window=64240)
        assert syn_ack.flags == "SA" and syn_ack.ack == 1001
        assert self.segment(port, flags="A", seq=1001, ack=syn_ack.seq + 1, window=64240) == []
        return 1001, syn_ack.seq + 1

    def figures(self) -> dict[str, dict[str, int]]:
        """What has happened so far."""
        return self.proxy.status.figures()

    def flows(self) -> list[str]:
        """All flows in words."""
        return self.proxy.status.show()["connections"]

    def datagrams(self) -> list:
        """The frames with datagrams that the guest has got, by ports and payload."""
        return [
            (frame[UDP].sport, frame[UDP].dport, bytes(frame[UDP].payload))
            for frame in self.received() if UDP in frame
        ]  # fmt: skip
