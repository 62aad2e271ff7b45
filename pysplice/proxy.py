"""One tap and its planes: start, and orderly end.

Owns the wiring between the loop and the planes.  Imports `budget`, `clients`, `config`, `control`, `datagram`,
`ending`, `forward`, `host_changes`, `link`, `loop`, `observe`, `setup`, `sockets`, `splice` and `stream`.  It knows no
protocol and no flow: the planes decide what a frame or a ready socket means.
"""

import itertools
import signal
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from . import budget
from .clients import ListenerClients
from .config.ports import Rule
from .control import updates
from .control.requests import Requests
from .control.server import Control, Session
from .control.status import Status
from .datagram.plane import DatagramPlane
from .ending import Ending
from .forward.forward import Forward
from .host_changes import HostChanges
from .link.advertise import Advertiser
from .link.reader import Reader, TapGone
from .loop import Call, MainLoop
from .observe.log import Log
from .observe.trace import Trace
from .setup.watch import Watch
from .sockets.request import Maker
from .sockets.unix import REQUESTS, UPDATES, SocketFiles
from .splice.plane import SplicePlane
from .stream.plane import Streams

# Seconds in which nothing moves, after which the data of an ended command, or namespace, is given up
LINGER_COMMAND = 10.0
LINGER_NAMESPACE = 1.0

CLIENTS_PER_TURN = 4  # of the control sockets
REFUSALS_MAX = 8  # updates by pesto(1) that `ctl show` remembers

POLL_EVERY = 1.0  # seconds, where nothing reports the end of a namespace

SIGNALS = (signal.SIGTERM, signal.SIGQUIT)  # they end this process in order


class Plane(Protocol):
    """The one interface of all planes."""

    def fileno(self) -> int: ...
    def on_ready(self, now: float) -> None: ...
    def close(self) -> None: ...


class Planes(NamedTuple):
    """What serves: the planes, and the objects around them.

    `reader` reads the tap.  `host_files` keeps UNIX sockets, `guest` makes sockets in the namespace.
    """

    reader: Reader
    streams: Streams
    datagrams: DatagramPlane
    splices: SplicePlane
    forward: Forward
    clients: ListenerClients
    files: SocketFiles
    guest: Maker
    trace: Trace
    advertiser: Advertiser | None


class Proxy:
    """Serves until the namespace, or the command in it, has ended.

    `descriptors`: how many there may be; they are shared out again whenever listeners come or go.
    """

    def __init__(self, loop: MainLoop, planes: Planes, descriptors: int, log: Log) -> None:
        self._loop = loop
        self._planes = planes
        self._descriptors = descriptors
        self._log = log
        self.complaint = ""  # what the user has to know at the end
        self._status = 0
        self._has_command = False
        self._counts_printed = False
        p = planes
        self.status = Status(p.reader, p.streams, p.datagrams, p.splices, p.forward, p.clients)
        how = p.forward.addressing
        can = updates.capabilities(how.ipv4, how.ipv6, how.protocols)
        self._refusals: deque[str] = deque(maxlen=REFUSALS_MAX)
        sessions: dict[str, Callable[[], Session]] = {
            REQUESTS: lambda: Requests(
                self, lambda: self.status.show() | {"refused": list(self._refusals)}
            ),
            UPDATES: lambda: updates.Update(self, can, self._refusals, log),
        }
        self._control = Control(sessions, loop)
        self._ending = Ending(p.streams, p.splices.streams, loop, lambda: self.stop(self._status))
        p.forward.changed = self._share_out
        self._share_out()

    # Forwarded ports

    def follow(self, rules: tuple[Rule, ...]) -> None:
        """Open the listeners of these rules, also of those that follow ports; raises ConfigError."""
        for rule in rules:
            self._planes.forward.add(rule)
        self._planes.forward.scan()

    def pieces(self) -> list[Rule]:
        """The rules that have ports."""
        return self._planes.forward.pieces()

    def arrange(self, pieces: Sequence[Rule]) -> None:
        """Put the rules into this order."""
        self._planes.forward.arrange(pieces)

    def change(self, changes: Sequence[tuple[bool, Rule]]) -> list[str]:
        """Forward more (True) and less; what the user should know about it.  Raises ConfigError, and nothing changes.

        Connections stay.
        """
        try:
            notes = self._planes.forward.change(changes)
        finally:
            self._take_clients()  # one may have come while the keeper made a socket
        for adds, rule in changes:
            self._log.debug(
                f"{rule.protocol} of the {rule.side}: {rule} is {'' if adds else 'no longer '}forwarded"
            )
        return notes

    def _share_out(self) -> None:
        """Share the descriptors that listeners leave among the flows."""
        most = budget.share_out(self._descriptors, len(self._planes.forward.listeners))
        self._planes.streams.limit(most)
        self._planes.datagrams.limit(most)
        self._planes.clients.spliced_max = most.spliced

    # Serving

    def serve(
        self, watch: Watch, ended: Callable[[], int], started: Call, has_command: bool = False
    ) -> int:
        """Serve until the watch says that the namespace has gone away; the exit status.

        That is what `ended` returns.  `started` is called when the loop runs.  With `has_command` the watch is that of
        a command: then only that or a signal ends this process; even the loss of the tap does not.
        """
        self._has_command = has_command
        planes = self._planes
        if planes.reader.fileno() >= 0:
            self._loop.watch(planes.reader.fileno(), self._on_tap, hot=True)
        for plane in (planes.forward, planes.splices, planes.datagrams, planes.streams):
            if plane.fileno() >= 0:
                hot = plane is not planes.forward
                self._loop.watch(plane.fileno(), partial(self._on_plane, plane), hot)
        for other, call in ((planes.guest, self._on_agent), (planes.files, self._take_clients)):
            if other.fileno() >= 0:
                self._loop.watch(other.fileno(), call)
        self._watch_end(watch, ended)
        try:
            self._loop.run(SIGNALS, lambda: self.stop(0), started)
        finally:
            self._close()
        return self._status

    def _on_tap(self) -> None:
        try:
            self._planes.reader.on_ready(self._loop.now())
        except TapGone as e:
            # A command that runs goes on without it
            self._loop.unwatch(self._planes.reader.fileno())
            self._log.warning(f"the tap is gone: {e}")
            if not self._has_command or self._ending.begun:
                self.stop(self._status)
        if self._ending.begun:
            self._ending.look()

    def _on_plane(self, plane: Plane) -> None:
        plane.on_ready(self._loop.now())
        if self._ending.begun:
            self._ending.look()

    def _on_agent(self) -> None:
        try:
            self._planes.guest.on_ready()
        except ConnectionError:
            # As a rule it ends with the namespace.  Open flows go on, and new clients come through the tap.
            self._log.warning(
                "the process in the namespace is gone: nothing can be spliced into the namespace any more"
            )
            self._loop.unwatch(self._planes.guest.fileno())
            self._planes.guest.close()

    def _take_clients(self) -> None:
        """Serve clients of the control sockets that the keeper has let in."""
        try:
            for name, client in itertools.islice(self._planes.files.clients(), CLIENTS_PER_TURN):
                self._control.take(name, client)
        except ConnectionError:
            self._log.warning("the process that keeps socket files is gone: no more control requests")
            self._loop.unwatch(self._planes.files.fileno())

    def follow_host(self, changes: HostChanges) -> None:
        """Put changes of the host in their place as they are reported."""

        def on_report() -> None:
            try:
                changes.on_ready()
            except ConnectionError:
                self._log.warning(
                    "the process that follows the host is gone: its changes are not noticed any more"
                )
                self._loop.unwatch(changes.fileno())

        self._loop.watch(changes.fileno(), on_report)

    def print_counts(self, seconds: int) -> None:
        """Print what has happened so far, every `seconds` and at the end (--stats)."""

        def again() -> None:
            self._log.info(self.status.counts())
            timer.by(self._loop.now() + seconds)

        timer = self._loop.timer(again)
        timer.by(self._loop.now() + seconds)
        self._counts_printed = True

    # The end

    def _watch_end(self, watch: Watch, ended: Callable[[], int]) -> None:
        def look() -> None:
            if watch.gone():
                status = ended()
                if watch.fd >= 0:
                    self._loop.unwatch(watch.fd)
                self._end(status)
            elif watch.polled:
                self._loop.at(self._loop.now() + POLL_EVERY, look)

        if watch.fd >= 0:
            self._loop.watch(watch.fd, look)
        elif watch.polled:
            self._loop.at(self._loop.now() + POLL_EVERY, look)

    def _end(self, status: int) -> None:
        """The command or the namespace has ended: what the guest has sent still goes out."""
        self._status = status
        # Its ports are free for the next program that wants them
        self._planes.forward.end()
        self._ending.begin(LINGER_COMMAND if self._has_command else LINGER_NAMESPACE)
        self._planes.reader.read_last()
        self._ending.look()

    def stop(self, status: int) -> None:
        """Stop serving; `status` is the exit status."""
        self._status = status
        self._loop.stop()

    def _close(self) -> None:
        planes = self._planes
        planes.reader.read_last()
        counts = self.status.counts()
        (self._log.info if self._counts_printed else self._log.debug)(counts)
        planes.trace.close()
        self._control.close()
        for room in (planes.forward, planes.splices, planes.datagrams, planes.streams, planes.reader):
            room.close()
        for other in (planes.guest, planes.files, self._loop):
            other.close()
