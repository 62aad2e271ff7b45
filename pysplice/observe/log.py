"""Messages for a person: one line each, on stderr, in a file, or for the system's logger.

Owns the level, the memory of what was said lately, and the file.  Imports no other room.
"""

# system calls (serve): write pread64 pwrite64 ftruncate lseek sendto

import contextlib
import os
import select
import sys
import syslog
import time
from typing import TextIO

REPEAT_AFTER = 1.0  # seconds between two messages of the same cause

# A log that is full loses so much at its beginning
CUT = 0.3


class LogFile:
    """A file that never has more than `most` bytes; its first line stays: who has written it, from where.

    The descriptor is kept open, so nothing is opened by path later on.
    """

    def __init__(self, fd: int, most: int, version: str) -> None:
        self._fd = fd
        self._most = most
        header = f"{version}: {os.path.realpath(sys.executable)} ({os.getpid()})\n".encode()
        self._header = header[: most // 4]
        self._start = time.monotonic()
        self._size = os.write(fd, self._header)

    def write(self, level: str, text: str) -> None:
        seconds = time.monotonic() - self._start
        line = f"{seconds:.4f}: {level:<8}{text}\n".encode(errors="replace")[: self._most // 4]
        if self._size + len(line) > self._most:
            self._make_room(len(line))
        with contextlib.suppress(OSError):
            self._size += os.write(self._fd, line)

    def _make_room(self, wanted: int) -> None:
        """Drop whole lines behind the header, at least a part of the file."""
        body = os.pread(self._fd, self._size, len(self._header))
        drop = max(int(self._most * CUT), self._size + wanted - self._most)
        end = body.find(b"\n", drop)
        body = body[end + 1 :] if end >= 0 else b""
        # First what stays, then the end: whoever reads meanwhile finds no empty file
        self._size = os.pwrite(self._fd, self._header + body, 0)
        os.ftruncate(self._fd, self._size)
        os.lseek(self._fd, 0, os.SEEK_END)


class Log:
    """`quiet` leaves warnings and errors, `debug` adds what is of use to a developer, `trace` single packets.

    A `file` has it all to itself.  With `debug` each line on stderr begins with the seconds since the start.  With
    `system` the system's logger hears what is at least a warning.
    """

    def __init__(
        self,
        quiet: bool = False,
        debug: bool = False,
        stream: TextIO | None = None,
        *,
        trace: bool = False,
        name: str = "pysplice",
        system: bool = False,
    ) -> None:
        self.quiet = quiet
        self.debug_on = debug
        self.trace_on = trace
        self.file: LogFile | None = None
        self._name = name
        self._system = system and not debug
        self._stream = stream if stream is not None else sys.stderr
        self._silent = False
        self._serving = False
        self._start = time.monotonic()
        self._said: dict[str, float] = {}
        self._missed: dict[str, int] = {}
        self._warned: set[str] = set()

    def _say(self, level: str, text: str, prefix: str = "") -> None:
        if self.file is not None:
            self.file.write(level, text)
            return
        if self._system and level == "warning:":
            syslog.syslog(syslog.LOG_WARNING, text)
        if self._silent:
            return
        stamp = f"{time.monotonic() - self._start:.4f}: " if self.debug_on else ""
        if self._serving and not self._takes_more():
            return  # nobody reads it, and others must not wait for that
        try:
            self._stream.write(f"{stamp}{prefix}{text}\n")
            self._stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # nobody reads it any more, or there never was a stderr

    def _takes_more(self) -> bool:
        """False if a write to the stream would block: a pipe or a terminal that is full."""
        try:
            poll = select.poll()
            poll.register(self._stream.fileno(), select.POLLOUT)
            return bool(poll.poll(0))
        except (OSError, ValueError, AttributeError):
            return True  # it is no descriptor

    def serve(self) -> None:
        """From now on a line that would have to wait is lost."""
        self._serving = True

    def warning(self, text: str) -> None:
        self._say("warning:", text, f"{self._name}: ")

    def info(self, text: str) -> None:
        if not self.quiet:
            self._say("info:", text)

    def debug(self, text: str) -> None:
        if self.debug_on:
            self._say("debug:", text)

    def trace(self, text: str) -> None:
        if self.trace_on:
            self._say("trace:", text)

    def flow(self, cause: str, text: str, now: float) -> None:
        """A failure of one flow: at most one message a second for each cause (debug only)."""
        if not self.debug_on:
            return
        if now - self._said.get(cause, -REPEAT_AFTER) < REPEAT_AFTER:
            self._missed[cause] = self._missed.get(cause, 0) + 1
            return
        self._said[cause] = now
        missed = self._missed.pop(cause, 0)
        more = f" (and {missed} more)" if missed else ""
        self._say("debug:", f"{cause}: {text}{more}")

    def once(self, cause: str, text: str) -> None:
        """A warning that is given the first time only."""
        if cause not in self._warned:
            self._warned.add(cause)
            self.warning(text)

    def defect(self, text: str, now: float) -> None:
        """Something that should not happen: said whatever the level, once a second at most."""
        if now - self._said.get("defect", -REPEAT_AFTER) >= REPEAT_AFTER:
            self._said["defect"] = now
            self.warning(f"internal error: {text}")

    def hold(self, number: int) -> None:
        """Connect to the system's logger now: later there may be no way to it.

        `number` is our process ID as others see it: in a PID namespace of our own we are process 1.
        """
        if self._system:
            syslog.openlog(f"{self._name}[{number}]", syslog.LOG_NDELAY, syslog.LOG_DAEMON)

    def silence(self) -> None:
        """Say nothing on stderr from now on: it belongs to somebody else."""
        self._silent = True

    def speak(self) -> None:
        """stderr is ours again."""
        self._silent = False
