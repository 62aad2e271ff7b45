"""The trace of windows: one line of JSON for each window that is advertised.

Owns the file.  Imports no other room; clock and timer are given to it.
"""

import contextlib
import json
from collections.abc import Callable
from typing import Any, TextIO

# Gathered before it is written, so much or so long (seconds): a write for each line would be felt
BUFFER_BYTES = 256 * 1024
FLUSH_AFTER = 0.5


class WindowTrace:
    """Lines with `time` (seconds since the start), `flow`, and what a connection tells of its window.

    `read` and `edge` are made to count on where sequence numbers wrap.  See Transfer._account() for the rest;
    the numbers are bytes, microseconds for `rtt` and milliseconds for `last_data_sent`.  A file that cannot be
    written any more ends the trace and nothing else.
    """

    def __init__(
        self,
        file: TextIO,
        clock: Callable[[], float],
        later: Callable[[float, Callable[[], None]], Any],
        failed: Callable[[str], None],
    ) -> None:
        self._file: TextIO | None = file
        self._clock = clock
        self._later = later
        self._failed = failed
        self._start = clock()
        self._lines: list[str] = []
        self._bytes = 0

    def of_flow(self, name: str) -> Callable[[dict[str, Any]], None]:
        """What a connection calls with each account."""

        read = 0

        def say(account: dict[str, Any]) -> None:
            nonlocal read
            if self._file is None:
                return
            read += (account["read"] - read) % (1 << 32)
            account |= {"read": read, "edge": read + account["window"]}
            line = json.dumps({"time": round(self._clock() - self._start, 6), "flow": name, **account})
            if not self._lines:
                self._later(FLUSH_AFTER, self.flush)
            self._lines.append(line)
            self._bytes += len(line)
            if self._bytes > BUFFER_BYTES:
                self.flush()

        return say

    def flush(self) -> None:
        """Write what has gathered."""
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
