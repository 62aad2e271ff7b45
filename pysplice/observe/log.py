"""Messages for the user: one line each, on stderr, in a file, or for the system's logger.

Owns the level, the memory of recent messages, and the file.  Imports no other room.
"""

# system calls (serve): write pread64 pwrite64 ftruncate lseek sendto

import contextlib
import os
import select
import stat
import sys
import syslog
import time
from typing import TextIO

REPEAT_AFTER = 1.0  # seconds between two messages of the same cause

# A full log loses this much at its beginning
CUT = 0.3

DATE = "%Y-%m-%d %H:%M:%S"


def print_text(text: str, name: str = "") -> int:
    """Print what the user has asked for on stdout; the exit status, 1 if that cannot be done.

    With the `name` of the program a line on stderr says why, unless the reader has only seen enough.
    """
    if sys.stdout is None:  # the caller has closed it
        return int(bool(text))
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as e:
        # What Python still holds would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if name and not isinstance(e, BrokenPipeError):
            sys.stderr.write(f"{name}: cannot write the output: {e.strerror}\n")
        return 1
    return 0


class Clock:
    """What a line begins with: the seconds since the start, or with `absolute` the local date and time."""

    def __init__(self, absolute: bool) -> None:
        self._absolute = absolute
        self._start = time.monotonic()

    def stamp(self) -> str:
        """The beginning of a line that is written now."""
        if self._absolute:
            now = time.time()
            return f"{time.strftime(DATE, time.localtime(now))}.{int(now % 1 * 1000):03}: "
        return f"{time.monotonic() - self._start:.4f}: "


class LogFile:
    """A file of at most `most` bytes; its first line stays: program, process ID and date.

    `fd` is kept open, so nothing is opened by its path later on.  A pipe or a device has no bound.
    """

    def __init__(self, fd: int, most: int, version: str, clock: Clock) -> None:
        self._fd = fd
        self._most = most
        self._bounded = stat.S_ISREG(os.fstat(fd).st_mode)
        self._clock = clock
        started = time.strftime(f"{DATE} %z")
        header = f"{version}: {os.path.realpath(sys.executable)} ({os.getpid()}), {started}\n".encode()
        self._header = header[: most // 4]
        self._size = os.write(fd, self._header)

    def write(self, level: str, text: str) -> None:
        """Write one line."""
        line = f"{self._clock.stamp()}{level:<9}{text}\n".encode(errors="replace")[: self._most // 4]
        with contextlib.suppress(OSError):
            if self._bounded and self._size + len(line) > self._most:
                self._make_room(len(line))
            self._size += os.write(self._fd, line)

    def _make_room(self, wanted: int) -> None:
        """Drop whole lines behind the header, at least a part of the file."""
        body = os.pread(self._fd, self._size, len(self._header))
        drop = max(int(self._most * CUT), self._size + wanted - self._most)
        end = body.find(b"\n", drop)
        body = body[end + 1 :] if end >= 0 else b""
        # First write what stays, then truncate: a program that reads meanwhile never finds an empty file
        self._size = os.pwrite(self._fd, self._header + body, 0)
        os.ftruncate(self._fd, self._size)
        os.lseek(self._fd, 0, os.SEEK_END)


class Log:
    """`quiet` leaves warnings and errors; `debug` adds a line for each flow, `trace` one for single packets.

    With a `file` nothing goes to stderr; with `debug` each line there begins with the time.  With `system`, warnings go
    to the system's logger too.  `stream` stands in for stderr; `name` begins each warning.
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
        clock: Clock | None = None,
    ) -> None:
        self.quiet = quiet
        self.debug_on = debug
        self.trace_on = trace
        self.file: LogFile | None = None
        self._name = name
        self._system = system and not debug
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock or Clock(absolute=False)
        self._silent = False
        self._serving = False
        self._said: dict[str, float] = {}
        self._missed: dict[str, int] = {}
        self._warned: set[str] = set()

    def _print(self, level: str, text: str, prefix: str = "", aloud: bool = False) -> None:
        """Print one line where it belongs; with `aloud` on stderr even while a command owns it."""
        if self.file is not None:
            self.file.write(level, text)
            return
        if self._system and level == "warning:":
            syslog.syslog(syslog.LOG_WARNING, text)
        if self._silent and not aloud:
            return
        stamp = self._clock.stamp() if self.debug_on else ""
        if self._serving and not self._takes_more():
            return  # no program reads it, and the guest must not wait for that
        try:
            self._stream.write(f"{stamp}{prefix}{text}\n")
            self._stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # no program reads it any more, or there never was a stderr

    def _takes_more(self) -> bool:
        """False if a write to the stream would block: a pipe or a terminal that is full."""
        try:
            poll = select.poll()
            poll.register(self._stream.fileno(), select.POLLOUT)
            return bool(poll.poll(0))
        except (OSError, ValueError, AttributeError):
            return True  # it is not a descriptor

    def serve(self) -> None:
        """From now on drop a line rather than wait for its reader."""
        self._serving = True

    def warning(self, text: str, aloud: bool = False) -> None:
        """Something that the user has to know."""
        self._print("warning:", text, f"{self._name}: ", aloud)

    def error(self, text: str) -> None:
        """What ends this process: in the file, if there is one, and on stderr."""
        if self.file is not None:
            self.file.write("error:", text)
            sys.stderr.write(f"{self._name}: {text}\n")
        else:
            self._print("error:", text, f"{self._name}: ")

    def info(self, text: str) -> None:
        """Something that the user has asked for."""
        if not self.quiet:
            self._print("info:", text)

    def debug(self, text: str) -> None:
        """A detail (--debug)."""
        if self.debug_on:
            self._print("debug:", text)

    def trace(self, text: str) -> None:
        """A single packet (--trace)."""
        if self.trace_on:
            self._print("trace:", text)

    def flow(self, cause: str, text: str, now: float) -> None:
        """A failure of one flow (--debug): at most one line a second for each cause."""
        if not self.debug_on:
            return
        if now - self._said.get(cause, -REPEAT_AFTER) < REPEAT_AFTER:
            self._missed[cause] = self._missed.get(cause, 0) + 1
            return
        self._said[cause] = now
        missed = self._missed.pop(cause, 0)
        more = f" (and {missed} more)" if missed else ""
        self._print("debug:", f"{cause}: {text}{more}")

    def once(self, cause: str, text: str, aloud: bool = False) -> None:
        """A warning that is given the first time only."""
        if cause not in self._warned:
            self._warned.add(cause)
            self.warning(text, aloud)

    def defect(self, text: str, now: float) -> None:
        """Something that must not happen: printed whatever the level, at most once a second."""
        if now - self._said.get("defect", -REPEAT_AFTER) >= REPEAT_AFTER:
            self._said["defect"] = now
            self.warning(f"internal error: {text}")

    def hold(self, number: int) -> None:
        """Connect to the system's logger now: later there may be no way to reach it.

        `number` is the process ID as other processes see it: in a PID namespace of its own this process is 1.
        """
        if self._system:
            syslog.openlog(f"{self._name}[{number}]", syslog.LOG_NDELAY, syslog.LOG_DAEMON)

    def silence(self) -> None:
        """Print nothing on stderr from now on: it belongs to a command."""
        self._silent = True

    def speak(self) -> None:
        """Print on stderr again."""
        self._silent = False
