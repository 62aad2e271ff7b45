"""The plane of TCP: which connection a segment or a ready socket belongs to.

Owns the flows, their host sockets and the small queue.  Imports `backlog`, `budget`, `loop`, `observe`,
`tcp` and the files of this room.

One batch from the tap is handled like this: each run goes to its connection, then the host sockets are asked for
answers, and what was read and is still not acknowledged then gets an acknowledgement of its own.
"""

import errno
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from ..backlog import Backlog
from ..budget import Budget
from ..loop import Loop
from ..observe import describe
from ..observe.log import Log
from ..tcp.doors import ACK, RST, SYN, Run
from ..tcp.events import CLOSED, ESTABLISHED, SOCK_FIN_SENT, TAP_FIN_RCVD
from ..tcp.small_queue import SmallQueue
from .flows import Flow, Flows
from .host import HostSockets
from .linger import reset
from .open import Opener


class Streams(Protocol):
    """What other rooms ask of this plane."""

    def fileno(self) -> int: ...
    def on_ready(self, now: float) -> None: ...
    @property
    def opened(self) -> int: ...
    @property
    def refused(self) -> int: ...
    def __len__(self) -> int: ...
    def names(self) -> Iterator[str]: ...
    def bytes_moved(self) -> tuple[int, int]: ...
    def limit(self, most: Budget) -> None: ...
    def accepted(
        self, sock: socket.socket, guest: bytes, port: int, client: bytes, client_port: int, now: float
    ) -> None: ...
    def undelivered(self) -> list[Any]: ...
    def close(self) -> None: ...


class NoStreams:
    """Without a tap the only TCP flows are spliced ones; any other client is reset."""

    opened: int = 0
    refused: int = 0

    def fileno(self) -> int:
        return -1

    def on_ready(self, now: float) -> None:
        pass

    def __len__(self) -> int:
        return 0

    def names(self) -> Iterator[str]:
        return iter(())

    def bytes_moved(self) -> tuple[int, int]:
        return 0, 0

    def limit(self, most: Budget) -> None:
        pass

    def accepted(
        self, sock: socket.socket, guest: bytes, port: int, client: bytes, client_port: int, now: float
    ) -> None:
        reset(sock)

    def undelivered(self) -> list[Any]:
        return []

    def close(self) -> None:
        pass


class Tap(Protocol):
    """The methods of the tap that this plane calls."""

    def readable(self) -> bool: ...
    @property
    def headers(self) -> Callable[[int], bytes]: ...


class StreamPlane:
    """All TCP flows."""

    def __init__(
        self,
        flows: Flows,
        hosts: HostSockets,
        opener: Opener,
        queue: SmallQueue,
        loop: Loop,
        log: Log,
        tap: Tap,
    ) -> None:
        self.flows = flows
        self.hosts = hosts
        self._open = opener
        self._queue = queue
        self._loop = loop
        self._log = log
        self._tap = tap
        self._backlog: Backlog[tuple[Run, bytes]] = Backlog(loop, self._begin)
        self._resume_timer = loop.timer(self._resume)

    def fileno(self) -> int:
        """The descriptor that is readable while a host socket is ready."""
        return self.hosts.fileno()

    # From the tap

    def on_batch(self, runs: Sequence[Run], now: float) -> None:
        """The runs of one batch."""
        lookup, settle = self.flows.lookup, self.flows.settle
        heard: list[Flow] = []
        self._queue.seen(runs, now)  # type: ignore[arg-type]
        for run in runs:
            flow = lookup(run.key)  # type: ignore[attr-defined]
            try:
                if flow is None:
                    flow = self._unknown(run, now)
                    if flow is None:
                        continue
                else:
                    connection = flow.connection
                    connection.on_tap(run, now)
                    if connection.receive.ack_due:
                        heard.append(flow)
                    elif connection.facts & CLOSED and run.flags & SYN:
                        # The old connection has made room for a new one with the same ports
                        settle(flow)
                        flow = self._unknown(run, now)
                        if flow is None:
                            continue
            except Exception as e:
                self.failed(flow, e)
            if flow is not None:
                settle(flow)
                if self._log.debug_on and flow.connection.facts & CLOSED:
                    self._describe_end(flow)
        # If an answer is there by now, it carries the acknowledgement
        self.on_ready(now)
        for flow in heard:
            try:
                flow.connection.acknowledge()
            except Exception as e:
                self.failed(flow, e)
                settle(flow)
        if self._queue.watching:
            total = sum([run.length for run in runs])
            self._queue.served(total, self._loop.now() - now)
        self._resume_later(now)

    def _unknown(self, run: Run, now: float) -> Flow | None:
        """A segment that belongs to no flow; the result is the flow that it has opened, if it need not wait."""
        key: bytes = run.key  # type: ignore[attr-defined]
        if run.flags & (SYN | ACK | RST) != SYN:
            self._backlog.pop(key)
            self._open.refuse(run, self._tap.headers(run.handle))
        elif self._backlog.get(key) is not None:
            self._backlog.put(key, (run, self._tap.headers(run.handle)))  # the guest repeats it
        elif self._backlog.full:
            # As if it were lost: the guest's kernel tries again
            self.flows.refused += 1
            self._log.flow("limit", "too many connections are opened at once, a SYN was dropped", now)
        elif self._open.admits(key, now):
            headers = self._tap.headers(run.handle)
            if self._backlog.passes(now):
                return self._open.from_tap(run, headers, now)
            self._backlog.put(key, (run, headers))
        return None

    def _begin(self, syn: tuple[Run, bytes], now: float) -> None:
        """The turn of a SYN that has waited; its payload is gone."""
        run, headers = syn
        flow = self.flows.lookup(run.key)  # type: ignore[attr-defined]
        try:
            if flow is None:
                flow = self._open.from_tap(run, headers, now)
        except Exception as e:
            self.failed(flow, e)
        if flow is not None:
            self.flows.settle(flow)

    # From the host sockets

    def on_ready(self, now: float) -> None:
        """Some host sockets are ready."""
        owners, settle = self.hosts.owners, self.flows.settle
        for fd, ready in self.hosts.poll():
            flow = owners.get(fd)
            if flow is None:
                self.hosts.lingering.on_ready(fd, ready)
                continue
            try:
                flow.connection.on_host(ready, now)
            except Exception as e:
                self.failed(flow, e)
            settle(flow)
            if self._log.debug_on and flow.connection.facts & CLOSED:
                self._describe_end(flow)
        self._resume_later(now)

    def accepted(
        self, sock: socket.socket, guest: bytes, port: int, client: bytes, client_port: int, now: float
    ) -> None:
        """A client on the host has connected; see Opener.from_host()."""
        flow = self._open.from_host(sock, guest, port, client, client_port, now)
        if flow is not None:
            self.flows.settle(flow)

    # Time

    def _resume(self) -> None:
        """Resume connections that the small queue has throttled, as far as the ring has room for what they send."""
        now = self._loop.now()
        for connection in self._queue.resume(now, not self._tap.readable()):
            try:
                connection.resume()
            except Exception as e:
                self.failed(None, e)
        self._resume_later(now)

    def _resume_later(self, now: float) -> None:
        if self._queue.throttled:
            self._resume_timer.by(now + self._queue.resume_after(now))

    # Ends

    def failed(self, flow: Flow | None, error: Exception) -> None:
        """A defect of ours has hit one flow: the flow is reset, and the others go on."""
        name = describe.flow_name(flow.key) if flow is not None else "no flow"
        self._log.defect(f"{name}: {type(error).__name__}: {error}", self._loop.now())
        if flow is not None:
            flow.connection.reset(errno.EIO)

    def _describe_end(self, flow: Flow) -> None:
        self._log.debug(f"{describe.flow_name(flow.key)}: {describe.end(flow.connection)}")

    # Limits and counts

    def limit(self, most: Budget) -> None:
        """Allow this many flows from now on."""
        self.flows.outbound_max, self.flows.inbound_max = most.outbound, most.inbound
        self.hosts.lingering.most = most.lingering

    def __len__(self) -> int:
        return len(self.flows)

    @property
    def opened(self) -> int:
        """How many flows there have been."""
        return self.flows.opened

    @property
    def refused(self) -> int:
        """How many flows were refused for lack of room."""
        return self.flows.refused

    def names(self) -> Iterator[str]:
        """All flows in words."""
        return (describe.flow_name(flow.key) for flow in self.flows.all())

    def bytes_moved(self) -> tuple[int, int]:
        """How many bytes the guest has sent, and how many it has acknowledged."""
        return self.flows.bytes_moved()

    def undelivered(self) -> list[Any]:
        """What the guest has sent and the host's kernel does not have yet; empty if it has everything.

        The items can be compared with those of an earlier call: they differ if anything has moved.
        """
        connections = (flow.connection for flow in self.flows.all())
        waiting: list[Any] = [
            (connection.receive.seq_from_tap, connection.receive.kept)
            for connection in connections
            if connection.facts & (ESTABLISHED | SOCK_FIN_SENT) == ESTABLISHED
        ]
        kept = self.hosts.lingering.kept
        return [*waiting, kept] if kept else waiting

    def close(self) -> None:
        """End all flows.  What was acknowledged goes out as far as the kernel takes it at once."""
        for flow in self.flows.all():
            if flow.connection.facts & TAP_FIN_RCVD:
                flow.connection.host.close()
            else:
                flow.connection.host.abort()
        self.hosts.close()
