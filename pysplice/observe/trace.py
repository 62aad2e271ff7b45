"""The trace of windows: one line of JSON for each window that is advertised.

Owns the file.  Imports `loop` and describe.py.
"""

import contextlib
import json
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from ..loop import Loop
from . import describe

# Lines are gathered up to this many bytes or this many seconds: one write per line would cost too much
BUFFER_BYTES = 256 * 1024
FLUSH_AFTER = 0.5

Account = Callable[[dict[str, Any]], None]


class Trace(Protocol):
    """What the stream plane asks of a trace."""

    def of_flow(self, key: bytes) -> Account | None:
        """What the connection with this flow key calls with the account of each window; None: it need not give any."""

    def close(self) -> None:
        """Write what has been gathered, and end."""


class NoTrace:
    """The Trace that records nothing."""

    def of_flow(self, key: bytes) -> Account | None:
        return None

    def close(self) -> None:
        pass


class WindowTrace:
    """The Trace that writes a file (--trace-window).

    Each line has `time` (seconds since the start), `flow`, and the account that a connection gives of its window
    (tcp/account.py); sizes are bytes, `rtt` microseconds, `last_data_sent` milliseconds.  `read` and `edge` count on
    where sequence numbers wrap.  Once the file cannot be written the trace ends, and `failed` is told why.
    """

    def __init__(self, file: TextIO, loop: Loop, failed: Callable[[str], None]) -> None:
        self._file: TextIO | None = file
        self._loop = loop
        self._failed = failed
        self._start = loop.now()
        self._lines: list[str] = []
        self._bytes = 0
        self._timer = loop.timer(self.flush)

    def of_flow(self, key: bytes) -> Account | None:
        name, read = describe.flow_name(key), 0

        def record(account: dict[str, Any]) -> None:
            nonlocal read
            if self._file is None:
                return
            read += (account["read"] - read) % (1 << 32)
            account |= {"read": read, "edge": read + account["window"]}
            now = self._loop.now()
            line = json.dumps({"time": round(now - self._start, 6), "flow": name, **account})
            self._timer.by(now + FLUSH_AFTER)
            self._lines.append(line)
            self._bytes += len(line)
            if self._bytes > BUFFER_BYTES:
                self.flush()

        return record

    def flush(self) -> None:
        """Write what has been gathered."""
        if self._file is None or not self._lines:
            return
        text = "\n".join(self._lines) + "\n"
        self._lines.clear()
        self._bytes = 0
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as e:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
            self._failed(f"the trace of windows ends: {e.strerror}")

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
