"""Plays one script against one stack.

What the server may do (`server VERB`):

    accept               take the guest's connection (within 5 seconds)
    connect              begin to connect to the guest's port;  connected, refused: how that ends
    read FROM:TO         the next bytes that the guest sent, with their content;  drain: all that it has sent so far
    write FROM:TO        the next bytes of the server's stream
    waits                there is nothing to read
    shutdown, close, abort   end one direction; both; reset
    end, reset           what reading gives now: the end of the stream, ECONNRESET
    option NAME VALUE... rcvbuf, sndbuf, keepalive IDLE INTERVAL COUNT, oobinline, nodelay: before the connection
    receive LEN, answer LEN  a datagram of the guest's with its content, and one to where it came from
    error                a datagram socket reports ECONNREFUSED
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import struct
import threading
import time
from typing import Any

from . import frames
from .frames import Ends, Frame, pattern, span
from .language import Script, Step
from .stacks import GUEST_MAC, PUBLISHED, Stack

PATIENCE = 5.0  # seconds until an expectation fails
IP_RECVERR, IPV6_RECVERR = 11, 25
CROSSING = 0.2  # seconds in which a repetition may have crossed what the guest has sent
UNIT = 1400  # bytes in a segment of `guest fill`
FILL_MAX = 64 << 20  # bytes
IN_FLIGHT_MAX = 40_000  # bytes: several scripts at a time must not fill the ring of a tap
# Seconds without progress: a host's send buffer may grow when its zero-window probes are answered
FILLED = 2.5
PROBE_EVERY = 0.6  # seconds: stacks answer what is out of the window at a bounded rate


class Failure(AssertionError):
    """What was expected did not come."""


class Server:
    """The application behind the stack."""

    def __init__(self, stack: Stack, ends: Ends, is_connecting: bool) -> None:
        self._stack, self._ends = stack, ends
        self._family = socket.AF_INET if ends.version == 4 else socket.AF_INET6
        self.listener = (
            None
            if is_connecting
            else stack.server.listen(stack.address("server", ends.version), ends.dport)
        )
        self.sock: Any = None
        self._datagrams = stack.server.socket(self._family, socket.SOCK_DGRAM)
        level, option = (
            (socket.IPPROTO_IP, IP_RECVERR) if ends.version == 4 else (socket.IPPROTO_IPV6, IPV6_RECVERR)
        )
        self._datagrams.setsockopt(level, option, 1)
        self._datagrams.bind((stack.address("server", ends.version), ends.dport))
        self._peer: Any = None
        self._got = 0
        self._writer: threading.Thread | None = None

    def accept(self) -> None:
        self.listener.settimeout(PATIENCE)
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(PATIENCE)

    def connect(self) -> None:
        self.sock = self._stack.connect(self._ends.version, self._ends.sport)

    def connected(self) -> None:
        self._outcome(0)

    def refused(self) -> None:
        self._outcome(111)

    def _outcome(self, expected: int) -> None:
        if not select.select([], [self.sock], [], PATIENCE)[1]:
            raise Failure("connect() does not end")
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error != expected:
            raise Failure(f"connect() ends with {error}")
        self.sock.settimeout(PATIENCE)

    def read(self, what: str) -> None:
        start, end = span(what)
        assert start == self._got, "the script reads out of order"
        got = b""
        while len(got) < end - start:
            part = self.sock.recv(end - start - len(got))
            if not part:
                raise Failure(f"the stream ends after byte {start + len(got)}")
            got += part
        if got != pattern("guest", start, end):
            raise Failure("the server reads other bytes than the guest sent")
        self._got = end

    def drain(self, upto: int) -> None:
        while self._got < upto:
            self.read(f"{self._got}:{min(upto, self._got + 100_000)}")

    def write(self, what: str) -> None:
        """In a thread of its own: it may take until the guest has acknowledged much of it."""
        self._written()
        self._writer = threading.Thread(
            target=self._write, args=(pattern("server", *span(what)),), daemon=True
        )
        self._writer.start()

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(data)

    def _written(self) -> None:
        if self._writer is not None:
            self._writer.join(2 * PATIENCE)

    def waits(self) -> None:
        if select.select([self.sock], [], [], 0.3)[0]:
            raise Failure("there is something to read")

    def shutdown(self) -> None:
        self._written()
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._written()
        self.sock.close()

    def abort(self) -> None:
        self._written()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def end(self) -> None:
        got = self.sock.recv(1)
        if got:
            raise Failure("bytes where the stream should end")

    def reset(self) -> None:
        if not select.select([self.sock], [], [], PATIENCE)[0]:
            raise Failure("nothing comes")
        with contextlib.suppress(ConnectionResetError):
            got = self.sock.recv(1)
            raise Failure("bytes where a reset should be" if got else "an end where a reset should be")

    def option(self, name: str, *values: str) -> None:
        sock = self.sock or self.listener
        if name == "keepalive":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in zip(
                (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT), values, strict=True
            ):
                sock.setsockopt(socket.IPPROTO_TCP, option, int(value))
            return
        level, option = {
            "rcvbuf": (socket.SOL_SOCKET, socket.SO_RCVBUF),
            "sndbuf": (socket.SOL_SOCKET, socket.SO_SNDBUF),
            "oobinline": (socket.SOL_SOCKET, socket.SO_OOBINLINE),
            "nodelay": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        }[name]
        sock.setsockopt(level, option, int(values[0]))

    def receive(self, length: str) -> None:
        self._datagrams.settimeout(PATIENCE)
        got, self._peer = self._datagrams.recvfrom(70_000)
        if got != pattern("guest", 0, int(length)):
            raise Failure(f"another datagram of {len(got)} bytes")

    def answer(self, length: str) -> None:
        self._datagrams.sendto(pattern("server", 0, int(length)), self._peer)

    def error(self) -> None:
        with contextlib.suppress(ConnectionRefusedError):
            self._datagrams.settimeout(PATIENCE)
            self._datagrams.recv(1)
            raise Failure("a datagram where an error should be")

    def close_all(self) -> None:
        for sock in (self.listener, self.sock, self._datagrams):
            if sock is not None:
                sock.close()


class Player:
    """The guest of one script: what it has sent and received so far."""

    def __init__(self, script: Script, stack: Stack, version: int, number: int) -> None:
        self.script, self.stack = script, stack
        inbound = script.head.get("from") == "server"
        sport = (PUBLISHED.start if inbound else PUBLISHED.stop) + number
        guest, server, gateway = (stack.address(which, version) for which in ("guest", "server", "gateway"))
        self.ends = Ends(version, guest, server, gateway, GUEST_MAC, stack.mac, sport, 30_000 + 2 * number)
        self.frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self.isn = int(script.head.get("isn", "1000"), 0)
        self.nxt = 0  # the guest's next number, relative
        self.acked = 0  # the highest number that the stack has acknowledged
        self.irs: int | None = None  # the server's first number
        self.rcv_nxt = 0  # relative
        self.parts: dict[int, bytes] = {}  # the server's bytes that have arrived
        self.heard: set[object] = set()  # kind, number and length of each frame
        self.filled = 0  # bytes that the stack has taken of `fill`
        self.edge = 0  # right edge of the window that the guest has advertised
        self.wscale, self.offered = 0, False
        self.server_edge = 0  # right edge of the stack's window
        self.server_wscale = 0
        self.server_mss = UNIT
        self.last_sent = b""
        self.differs = ""  # the value by which the last frame of the right kind was another
        self.last_received: Frame | None = None
        self.mark = self.matched_at = time.monotonic()
        self.server: Any = None

    def play(self) -> None:
        """The whole script; Failure says which line did not hold."""
        self.stack.listen((self.ends.version, self.ends.sport), self._take)
        listener = self._take
        # A script that is alone also gets what cannot be told to be about it
        links = self.script.is_alone or any(
            step.verb in ("WHO-HAS", "IS-AT", "SOLICIT-ROUTER") for step in self.script.steps
        )
        if links:
            self.stack.listen(None, listener)
        self.server = Server(self.stack, self.ends, self.script.head.get("from") == "server")
        try:
            for step in self.script.steps_for(self.stack.name):
                time.sleep(step.delay)
                try:
                    self.act(step)
                except Failure as e:
                    raise Failure(f"line {step.line}: {step.text}: {e}") from None
                except OSError as e:
                    name = "nothing comes" if isinstance(e, TimeoutError) else type(e).__name__
                    raise Failure(f"line {step.line}: {step.text}: {name}") from None
                except Exception as e:
                    why = f"cannot be played: {type(e).__name__}: {e}"
                    raise Failure(f"line {step.line}: {step.text}: {why}") from None
        finally:
            self.stack.forget((self.ends.version, self.ends.sport), listener)
            self.server.close_all()

    def _take(self, frame: Frame) -> None:
        """A frame for this script; what is for all scripts must be of its version of IP."""
        if frame.key is not None or frame.values.get("version") == self.ends.version:
            self.frames.put(frame)

    def act(self, step: Step) -> None:
        if step.actor == ">":
            self.send(step)
        elif step.actor == "<":
            self.expect(step)
        elif step.actor == "server":
            arguments = (self.filled,) if step.verb == "drain" else step.words
            getattr(self.server, step.verb)(*arguments)
        elif step.actor == "guest":
            if step.verb == "fill":
                self.fill()
            else:
                self.ends.guest_mac = step.words[0]

    # What the guest sends

    def send(self, step: Step) -> None:
        fields = step.fields
        transport: Any = None
        if step.is_tcp:
            transport = self.segment(step)
        elif step.verb == "UDP":
            transport = frames.udp_of(step, self.ends)
        elif step.verb == "ECHO":
            transport = frames.echo_of(step, self.ends)
        elif step.verb == "ERROR":
            about = (
                self.last_sent
                if fields.get("about") == "sent"
                else self.last_received.raw
                if self.last_received
                else b""
            )
            transport = frames.error_of(step, self.ends, about)
        count = int(fields.get("times", "1"))
        for frame in frames.frames_of(step, self.ends, transport) * count:
            self.stack.send(frame)
            self.last_sent = frame[14:]
        self.mark = time.monotonic()

    def segment(self, step: Step) -> Any:
        """The segment of a step, with the numbers that are due where the step says nothing."""
        fields, flags = step.fields, step.flags
        data = span(fields["data"]) if "data" in fields else (0, 0)
        default = 0 if "SYN" in flags else data[0] + 1 if "data" in fields else self.nxt
        at = int(fields.get("seq", default)) - ("probe" in fields)
        if "beyond" in fields:
            fields = fields | {"data": f"{at - 1}:{at}", "seq": str(at)}
        ack = int(fields["ack"]) if "ack" in fields else self.rcv_nxt
        win = int(fields.get("win", "65535"))
        is_odd = (
            "seq" in fields or "bad" in fields or "RST" in flags or "cut" in fields or "probe" in fields
        )
        end = at + (data[1] - data[0]) + ("SYN" in flags) + ("FIN" in flags)
        if not is_odd or "counts" in fields:
            self.nxt = max(self.nxt, end)
        if "SYN" in flags:
            self.offered = "wscale" in fields
            self.wscale = min(int(fields.get("wscale", "0")), 14)
        if "ACK" in flags and self.irs is not None:
            edge = ack + (win << (0 if "SYN" in flags else self.scale))
            self.edge = edge if "shrinks" in fields else max(self.edge, edge)
        acknowledged = (self.irs or 0) + ack if "ACK" in flags or "ack" in fields else 0
        return frames.tcp_of(step.verb, fields, self.ends, self.isn + at, acknowledged, win, self.irs or 0)

    @property
    def scale(self) -> int:
        """What the guest's window is shifted by: nothing unless both sides have agreed."""
        return self.wscale if self.offered and self.server_wscale >= 0 else 0

    def ack_now(self) -> None:
        self.send(Step(0, "", ">", "ACK"))

    def fill(self) -> None:
        """Send as much as the stack's window permits, until nothing has been acknowledged for a while.

        What a stack did not take, for want of memory, is sent again, and a closed window is probed, as any sender does.
        """
        quiet, start, rewound = time.monotonic(), self.acked, time.monotonic()
        probed = quiet
        while time.monotonic() - quiet < FILLED or time.monotonic() - probed < PROBE_EVERY:
            with contextlib.suppress(queue.Empty):
                while True:
                    self.note(self.frames.get_nowait())
            if self.acked != start:
                quiet, start = time.monotonic(), self.acked
            elif time.monotonic() - rewound > 0.3:
                self.nxt, rewound = self.acked, time.monotonic()
            size = min(self.server_edge - self.nxt, UNIT, self.server_mss)
            if size <= 0 or self.nxt - self.acked > IN_FLIGHT_MAX:
                time.sleep(0.001)
                now = time.monotonic()
                if size <= 0 and now - probed > PROBE_EVERY and now - quiet < FILLED:
                    probed = now
                    ack = (self.irs or 0) + self.rcv_nxt
                    self.stack.send(frames.segment_of(self.ends, self.isn + self.acked - 1, ack, b""))
                continue
            at = self.nxt - 1
            if at > FILL_MAX:
                raise Failure("the window never closes")
            ack = (self.irs or 0) + self.rcv_nxt
            self.stack.send(
                frames.segment_of(self.ends, self.isn + self.nxt, ack, pattern("guest", at, at + size))
            )
            self.nxt += size
        self.nxt = self.acked
        self.filled = self.acked - 1

    # What the stack sends

    def note(self, frame: Frame) -> Frame:
        """Take a frame into account; its numbers become relative."""
        values = frame.values
        if "win" in values and (frame.payload or "SYN" in frame.kind or "FIN" in frame.kind):
            # Only what takes sequence numbers is sent again
            said = (frame.kind, values["seq"], len(frame.payload))
            frame.is_repetition = said in self.heard
            self.heard.add(said)
        if frame.key is None or "win" not in values:
            self.last_received = frame
            return frame
        if "SYN" in frame.kind and self.irs != values["seq"]:
            self.irs = values["seq"]
            self.ends.dport = frame.values["sport"]
            self.server_wscale = values["wscale"] if values["wscale"] != "none" else -1
            self.server_mss = values["mss"] if values["mss"] != "none" else 536
        at = (values["seq"] - (self.irs or 0)) & 0xFFFFFFFF
        at = at - (1 << 32) if at >> 31 else at
        ack = (values["ack"] - self.isn) & 0xFFFFFFFF
        if "ACK" in frame.kind:
            values["ack"] = ack - (1 << 32) if ack >> 31 else ack
            shift = 0 if "SYN" in frame.kind or not self.offered else max(self.server_wscale, 0)
            values["edge"] = values["ack"] + (values["win"] << shift)
            if "RST" not in frame.kind:
                self.acked = max(self.acked, values["ack"])
                self.server_edge = max(self.server_edge, values["edge"])
        if self.irs is None:
            return frame
        if not ("RST" in frame.kind and values["seq"] == 0):
            values["seq"] = at
        if values["sack"] != "none":
            values["sack"] = ",".join(str((n - self.isn) & 0xFFFFFFFF) for n in values["sack"])
        length = len(frame.payload) + ("SYN" in frame.kind) + ("FIN" in frame.kind)
        if length and "RST" not in frame.kind:
            if frame.payload:
                if frame.payload != pattern("server", at - 1, at - 1 + len(frame.payload)):
                    raise Failure("the stack sends other bytes than the server wrote")
                if self.edge and at + len(frame.payload) > self.edge:
                    raise Failure(
                        f"the stack sends up to {at + len(frame.payload)}, beyond the window, {self.edge}"
                    )
            self.parts[at] = max(self.parts.get(at, b""), bytes(length), key=len)
            while (
                step := next((n for n in self.parts if n <= self.rcv_nxt < n + len(self.parts[n])), None)
            ) is not None:
                self.rcv_nxt = step + len(self.parts.pop(step))
        self.last_received = frame
        return frame

    def next(self, until: float) -> Frame | None:
        with contextlib.suppress(queue.Empty):
            return self.note(self.frames.get(timeout=max(0.0, until - time.monotonic())))
        return None

    def expect(self, step: Step) -> None:
        if step.verb == "nothing":
            until = time.monotonic() + float(step.words[0])
            while (frame := self.next(until)) is not None:
                if not (frame.is_repetition and frame.time - self.mark < CROSSING):
                    raise Failure(f"got {frame}")
            return
        if step.verb == "data":
            self.expect_data(step)
            return
        if "count" in step.fields:
            self.expect_count(step)
            return
        low, high = span_of(step.fields.get("within", ".."))
        low = max(low, 0.0)
        until = time.monotonic() + 4 * low + (4 * PATIENCE if "within" in step.fields else PATIENCE)
        passed: list[Frame] = []
        while True:
            frame = self.next(until)
            if frame is None:
                got = f"got {'; '.join(map(str, passed[-2:]))}"
                differs = f" (differs in {self.differs})" if self.differs else ""
                raise Failure(got + differs if passed else "nothing comes")
            if self.matches(step, frame):
                if not low <= frame.time - self.matched_at <= high:
                    raise Failure(f"after {frame.time - self.matched_at:.2f} s")
                self.mark = self.matched_at = frame.time
                return
            passed.append(frame)
            if "RST" in frame.kind and "RST" not in step.verb:
                raise Failure(f"got {frame}")

    def expect_count(self, step: Step) -> None:
        low, high = span_of(step.fields["count"])
        until, found = time.monotonic() + float(step.fields["in"]), 0
        while (frame := self.next(until)) is not None:
            found += self.matches(step, frame)
        if not low <= found <= high:
            raise Failure(f"{found} of them")

    def expect_data(self, step: Step) -> None:
        _, end = span(step.words[0])
        until = time.monotonic() + 2 * PATIENCE
        limit, least = int(step.fields.get("most", "0")), int(step.fields.get("least", "0"))
        while self.rcv_nxt < end + 1:
            frame = self.next(until)
            if frame is None:
                raise Failure(f"only bytes up to {self.rcv_nxt - 1}")
            if "RST" in frame.kind:
                raise Failure(f"got {frame}")
            length = len(frame.payload)
            if (limit and length > limit) or (0 < length < least and self.rcv_nxt < end + 1):
                raise Failure(f"a segment of {length}")
            if "acknowledged" in step.words and frame.payload:
                self.ack_now()
        self.mark = time.monotonic()

    def matches(self, step: Step, frame: Frame) -> bool:
        """True if a frame is what a step expects.

        PSH is the sender's own affair (RFC 9293, 3.9.1), and a RST may have an ACK where it is not asked for one.
        """
        if step.is_tcp:
            kind = frozenset(frame.kind.split(",")) - {"NONE"}
            passed_over = {"PSH", "ACK"} if step.flags == {"RST"} else {"PSH"}
            if "win" not in frame.values or kind - passed_over != step.flags - passed_over:
                return False
        elif frame.kind != step.verb:
            return False
        self.differs = ""
        for name, wanted in step.fields.items():
            if name in ("within", "count", "in", "times"):
                continue
            got = frame.values.get(name, "none")
            self.differs = name
            if name in ("target", "from"):
                if got != self.ends.address(wanted):
                    return False
            elif name == "content":
                side, length = wanted.split(":")
                if frame.payload != pattern(side, 0, int(length)):
                    return False
            elif wanted == "same":
                if got != self.acked:
                    return False
            elif not within(got, wanted):
                return False
        self.differs = ""
        return True


def span_of(text: str) -> tuple[float, float]:
    """LOW..HIGH, with either left out; a number is both."""
    low, dots, high = text.partition("..")
    if not dots:
        return float(text), float(text)
    return float(low or "-inf"), float(high or "inf")


def within(got: Any, wanted: str) -> bool:
    """True if a value is the one that a step has, or in its range."""
    if ".." in wanted:
        low, high = span_of(wanted)
        return isinstance(got, int) and low <= got <= high
    return str(got) == wanted


def play(script: Script, stack: Stack, version: int, number: int) -> str:
    """The empty string if the script holds, else what does not.  `number` gives the script its ports."""
    if script.head.get("from") == "server" and not stack.publishes:
        return "cannot be tried: no way in"
    try:
        Player(script, stack, version, number).play()
    except Failure as e:
        return str(e)
    return ""
