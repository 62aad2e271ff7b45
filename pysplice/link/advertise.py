"""Router advertisements that no solicitation has asked for (RFC 4861, 6.2.4).

Owns a timer.  Imports `loop`, the tap and ndp.py.
"""

import os

from ..loop import Loop
from . import ndp
from .tap import TapDevice

INTERVAL = (200.0, 600.0)  # seconds: MinRtrAdvInterval and MaxRtrAdvInterval, as pasta has them


class Advertiser:
    """Advertises `router` to all nodes again and again; the first time after one interval."""

    def __init__(self, tap: TapDevice, router: ndp.Router, loop: Loop) -> None:
        self._tap = tap
        self._router = router
        self._loop = loop
        self._timer = loop.timer(self._advertise)
        self._again()

    def change(self, router: ndp.Router) -> None:
        """Advertise another one from now on, and once at once if it differs."""
        if router != self._router:
            self._router = router
            self._advertise()

    def _again(self) -> None:
        low, high = INTERVAL
        self._timer.by(self._loop.now() + low + (high - low) * os.urandom(1)[0] / 255)

    def _advertise(self) -> None:
        self._tap.emit_frame(ndp.unsolicited(self._router))
        self._again()
