"""Messages for a person: one line each, on stderr.

Owns the level and the memory of what was said lately.  Imports no other room.
"""

import sys
from typing import TextIO

REPEAT_AFTER = 1.0  # seconds between two messages of the same cause


class Log:
    """`quiet` leaves warnings and errors, `debug` adds what is of use to a developer."""

    def __init__(self, quiet: bool = False, debug: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.debug_on = debug
        self._stream = stream if stream is not None else sys.stderr
        self._said: dict[str, float] = {}
        self._missed: dict[str, int] = {}

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # nobody reads it any more, or there never was a stderr

    def warning(self, text: str) -> None:
        self._write(f"pysplice: {text}")

    def info(self, text: str) -> None:
        if not self.quiet:
            self._write(text)

    def debug(self, text: str) -> None:
        if self.debug_on:
            self._write(text)

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
        self._write(f"{cause}: {text}{more}")

    def defect(self, text: str, now: float) -> None:
        """Something that should not happen: said whatever the level, once a second at most."""
        if now - self._said.get("defect", -REPEAT_AFTER) >= REPEAT_AFTER:
            self._said["defect"] = now
            self._write(f"pysplice: internal error: {text}")

    def silence(self) -> None:
        """Say nothing from now on: stderr belongs to somebody else."""
        self._write = _nothing  # type: ignore[method-assign]

    def speak(self) -> None:
        """stderr is ours again."""
        self.__dict__.pop("_write", None)


def _nothing(text: str) -> None:
    """Where messages go that nobody is to see."""
