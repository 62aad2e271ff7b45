"""Sequence numbers: the only place that compares them.

Pure; imports no other room.  All functions take and give 32-bit numbers that wrap (RFC 9293, section 3.4).  Distances
are signed, and meaningful as long as the two numbers are less than 2**31 apart.
"""

import hashlib
from typing import Final

MASK: Final = 0xFFFFFFFF
HALF: Final = 0x80000000


def add(seq: int, n: int) -> int:
    """The sequence number n bytes further on (n may be negative)."""
    return (seq + n) & MASK


def diff(a: int, b: int) -> int:
    """The signed distance a - b: above 0 if a comes after b."""
    return ((a - b + HALF) & MASK) - HALF


def isn(secret: bytes, key: bytes, now: float) -> int:
    """Initial sequence number for the flow `key` at `now` seconds (RFC 6528, section 3).

    ISN = M + F(key, secret).  M counts ticks of 4 microseconds; F is a keyed hash, so the number of one flow
    tells nothing about that of another, and grows each time that the same flow is opened.
    """
    digest = hashlib.blake2b(key, key=secret, digest_size=4).digest()
    return (int(now * 250_000) + int.from_bytes(digest, "big")) & MASK
