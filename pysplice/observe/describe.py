"""Flows, packets and how connections ended, in words: for the log and for `pysplice ctl show`.

Pure; imports `wire`.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

from .. import wire

FLAG_NAMES = {0x02: "S", 0x01: "F", 0x04: "R", 0x08: "P", 0x10: "A"}  # RFC 9293, section 3.1
SHOWN_MAX = 500  # lines


def endpoint(address: bytes, port: int) -> str:
    """A packed address and a port, as URLs have them: 10.0.0.1:80, [fd00::1]:80."""
    text = wire.unpack(address)
    return f"{text}:{port}" if len(address) == 4 else f"[{text}]:{port}"


def flow_name(key: bytes) -> str:
    """A flow key in words: the guest's address and port, then those that it sends to."""
    source = endpoint(wire.key_source(key), wire.key_source_port(key))
    return f"{source} -> {endpoint(wire.key_destination(key), wire.key_destination_port(key))}"


def packet(data: bytes) -> str:
    """An IP packet in words: its addresses and its protocol number."""
    if wire.is_ipv4(data) and len(data) >= wire.IPV4:
        protocol = data[9]
    elif wire.is_ipv6(data) and len(data) >= wire.IPV6:
        protocol = data[6]
    else:
        return "a packet without an IP header"
    addresses = (wire.packet_source(data), wire.packet_destination(data))
    source, destination = (wire.unpack(address) for address in addresses)
    return f"{source} -> {destination}, protocol {protocol}"


def batch(runs: Iterable[Any], datagrams: Iterable[Any], frames: Iterable[bytes]) -> Iterator[str]:
    """One batch from the tap: a line for each run and each frame."""
    for run in runs:
        flags = "".join(name for bit, name in FLAG_NAMES.items() if run.flags & bit)
        yield (
            f"tcp {flow_name(run.key)}: {flags or '-'} seq {run.seq} ack {run.ack} "
            f"window {run.window}, {run.length} bytes in {run.frames} segments"
        )
    for run in datagrams:
        yield f"udp {flow_name(run.key)}: {run.length} bytes in {run.frames} datagrams"
    for frame in frames:
        yield f"frame of type 0x{wire.ethertype(frame).hex()}, {len(frame)} bytes"


def end(connection: Any) -> str:
    """How a TCP connection has ended."""
    reason = os.strerror(connection.error) if connection.error else "closed"
    sends = connection.receive
    return (
        f"{reason}; {connection.send.retransmissions} retransmissions, "
        f"{sends.short_sends} of {sends.sends} sends short"
    )


def amount(count: int) -> str:
    """A number of bytes for a person: 0 B, 1.5 KiB, 20 MiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def first(lines: Iterable[str], count: int) -> list[str]:
    """The first lines of `count`, as many as a person reads; lines beyond that are not even made."""
    made = list(itertools.islice(lines, SHOWN_MAX))
    return [*made, f"... and {count - SHOWN_MAX} more"] if count > SHOWN_MAX else made
