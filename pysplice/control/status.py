"""What there is, in words and figures: for `pysplice ctl show`, --stats, and the last line of the log.

Owns nothing, changes nothing.  Imports `clients`, `config`, `datagram`, `forward`, `link`, `observe`, `splice`
and `stream`.
"""

import itertools
from typing import Any

from ..clients import ListenerClients
from ..config.ports import GUEST, OPTIONS, Rule
from ..datagram.plane import DatagramPlane
from ..forward.forward import Forward
from ..link.reader import Reader
from ..observe import describe
from ..splice.plane import SplicePlane
from ..stream.plane import Streams

_BY_SIDE = {pair: option for option, pair in OPTIONS.items()}


class Status:
    """Looks at the planes and at the forwarded ports."""

    def __init__(
        self,
        reader: Reader,
        streams: Streams,
        datagrams: DatagramPlane,
        splices: SplicePlane,
        forward: Forward,
        clients: ListenerClients,
    ) -> None:
        self._reader = reader
        self._streams = streams
        self._datagrams = datagrams
        self._splices = splices
        self._forward = forward
        self._clients = clients

    def figures(self) -> dict[str, dict[str, int]]:
        """What has happened so far, as numbers."""
        spliced, udp = self._splices.streams, self._datagrams.flows
        pairs = zip(self._streams.bytes_moved(), spliced.bytes_moved(), strict=True)
        from_guest, to_guest = map(sum, pairs)
        return {
            "connections": {
                "opened": self._streams.opened,
                "open": len(self._streams),
                "refused": self._streams.refused + self._clients.refused,
            },
            "spliced": {"opened": spliced.opened, "open": len(spliced)},
            "udp_flows": {"opened": udp.opened, "open": len(udp)},
            "bytes": {"from_guest": from_guest, "to_guest": to_guest},
            "frames": {"invalid": self._reader.invalid},
            "datagrams": {
                "not_passed_on": self._datagrams.unpassed
                + self._splices.datagrams.refused
                + self._reader.lost
            },
        }

    def counts(self) -> str:
        """The same in one line."""
        found = self.figures()
        connections, spliced, udp, moved = (
            found[name] for name in ("connections", "spliced", "udp_flows", "bytes")
        )
        return (
            f"{connections['opened']} connections ({connections['open']} open), "
            f"{connections['refused']} refused for lack of room, "
            f"{spliced['opened']} spliced ({spliced['open']} open), "
            f"{describe.amount(moved['from_guest'])} from the guest, {describe.amount(moved['to_guest'])} to it, "
            f"{udp['opened']} UDP flows ({udp['open']} open), "
            f"{found['frames']['invalid']} frames dropped as invalid, "
            f"{found['datagrams']['not_passed_on']} datagrams not passed on"
        )

    def show(self) -> dict[str, Any]:
        """Rules, listeners, flows and counts, as lines of text; and the counts as numbers."""
        listeners = self._forward.listeners
        listening = (
            f"{_option(held.rule)} {_where(held.rule)} port {held.port}"
            for held in listeners.all()
            if not held.rule.path
        )
        paths = (f"-t {rule}" for rule in self._forward.rules if rule.path)
        flows = itertools.chain(
            (f"tcp {name}" for name in self._streams.names()),
            (f"tcp {splice.name}, spliced" for splice in self._splices.streams.all()),
            (f"udp {flow.name()}" for flow in self._datagrams.flows),
        )
        count = len(self._streams) + len(self._splices.streams) + len(self._datagrams.flows)
        return {
            "rules": [f"{_option(rule)} {rule}" for rule in self._forward.rules],
            "listening": describe.first(itertools.chain(listening, paths), len(listeners)),
            "connections": describe.first(flows, count),
            "counts": self.counts(),
            "figures": self.figures(),
        }


def _where(rule: Rule) -> str:
    """Where the listeners of a rule are."""
    return "loopback" if rule.side == GUEST else str(rule.address or "*")


def _option(rule: Any) -> str:
    """The option of a rule: -t, -u, -T or -U."""
    return _BY_SIDE[rule.side, rule.protocol]
