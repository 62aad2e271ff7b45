"""Flows, and what becomes of them, in words: for the log, and for whoever asks.

Owns nothing; imports no other room.
"""

import itertools
import os
import socket
from collections.abc import Iterable, Iterator
from typing import Any

KEY4_LEN = 12
FLAG_NAMES = {0x02: "S", 0x01: "F", 0x04: "R", 0x08: "P", 0x10: "A"}  # RFC 9293, section 3.1
SHOWN_MAX = 500


def flow_name(key: bytes) -> str:
    """A flow in words: source and destination as the guest has them."""
    family = socket.AF_INET if len(key) == KEY4_LEN else socket.AF_INET6
    half = len(key) // 2 - 2
    source, destination = (socket.inet_ntop(family, key[i : i + half]) for i in (0, half))
    ports = [int.from_bytes(key[i : i + 2], "big") for i in (2 * half, 2 * half + 2)]
    return f"[{source}]:{ports[0]} -> [{destination}]:{ports[1]}"


def packet(data: bytes) -> str:
    """An IP packet in words: its addresses and protocol."""
    if len(data) >= 20 and data[0] >> 4 == 4:
        family, addresses, protocol = socket.AF_INET, (data[12:16], data[16:20]), data[9]
    elif len(data) >= 40 and data[0] >> 4 == 6:
        family, addresses, protocol = socket.AF_INET6, (data[8:24], data[24:40]), data[6]
    else:
        return "a packet without an IP header"
    source, destination = (socket.inet_ntop(family, address) for address in addresses)
    return f"[{source}] -> [{destination}], protocol {protocol}"


def batch(runs: Iterable[Any], datagrams: Iterable[Any], frames: Iterable[bytes]) -> Iterator[str]:
    """What came from the tap, packet by packet as far as they were not one to us."""
    for run in runs:
        flags = "".join(name for bit, name in FLAG_NAMES.items() if run.flags & bit)
        yield (
            f"tcp {flow_name(run.key)}: {flags or '-'} seq {run.seq} ack {run.ack} "
            f"window {run.window}, {run.length} bytes in {run.frames} segments"
        )
    for several in datagrams:
        yield f"udp {flow_name(several.key)}: {several.length} bytes in {several.frames} datagrams"
    for frame in frames:
        yield f"frame of type 0x{frame[12:14].hex()}, {len(frame)} bytes"


def end(connection: Any) -> str:
    """How a TCP connection has ended."""
    reason = os.strerror(connection.error) if connection.error else "closed"
    return (
        f"{reason}; {connection.retransmissions} retransmissions, "
        f"{connection.short_sends} of {connection.sends} sends short"
    )


def shown(lines: Iterable[str], count: int) -> list[str]:
    """No more lines than a person reads, of so many; the others are not even made."""
    made = list(itertools.islice(lines, SHOWN_MAX))
    return [*made, f"... and {count - SHOWN_MAX} more"] if count > SHOWN_MAX else made
