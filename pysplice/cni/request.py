"""A request of an engine's: what to do, for which attachment, and how it fails.

Owns nothing; imports no other file of this room.
"""

import hashlib
import json
import sys
from typing import Any, NamedTuple

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

# Codes of errors, of the specification; 100 and above are ours
INCOMPATIBLE, UNSUPPORTED, ENVIRONMENT, IO_FAILURE, NOT_DECODED, INVALID, NOT_AVAILABLE = (
    1,
    2,
    4,
    5,
    6,
    7,
    50,
)
NOT_STARTED, NOT_SERVED, DEFECT = 100, 101, 999

INPUT_MAX = 16 << 20


class Failure(Exception):
    """A request that fails: a code, a message in a line, and details."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


class Attachment(NamedTuple):
    """One interface of one container on one network."""

    network: str
    container: str
    ifname: str

    @property
    def name(self) -> str:
        """A file name for it."""
        text = "\0".join(self)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Request(NamedTuple):
    """A request: what to do, the configuration of the network, and the version of the answer."""

    command: str
    conf: dict[str, Any]
    version: str
    attachment: Attachment
    netns: str


def read_conf() -> dict[str, Any]:
    """The object on stdin; raises Failure."""
    try:
        conf = json.loads(sys.stdin.read(INPUT_MAX) or "{}")
    except (ValueError, RecursionError) as e:
        raise Failure(NOT_DECODED, "the configuration is no JSON", str(e)) from None
    if not isinstance(conf, dict):
        raise Failure(NOT_DECODED, "the configuration is no JSON object")
    return conf
