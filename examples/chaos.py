#!/usr/bin/env python3
"""Things that go wrong while traffic runs: what arrives, and how long it takes to go on.

    examples/chaos.py                                      every fault, every kind of traffic: about five minutes
    examples/chaos.py --fault loss,stop --traffic upload   these alone
    examples/chaos.py --list                               the names of both

A fault comes a second after the traffic has begun, and goes after --during seconds; the traffic goes on for some
seconds more.  Every stream must arrive whole (both ends hash what they see), or end at both ends; every answer to a
datagram must be that to its request; and a connection beside them, which the fault is not about, must live.  A cell
says "whole" and how many seconds after the fault bytes arrive again, or "ended".  Any user can run it, in network
namespaces of its own.  A clock that jumps is tried by tests/tcp/history.py, where it can be had.  The exit status is 1
if anything is lost, hangs, or harms the connection beside.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parent / ".venv/bin/python"
if importlib.util.find_spec("uvloop") is None and PYTHON.exists():
    os.execv(PYTHON, [str(PYTHON), *sys.argv])

import compare_pasta as yard  # noqa: E402

GUEST_PORT, REMOTE_PORT, BESIDE_PORT = 8080, 5201, 5202
BLOCK, PACE = 16_384, 0.004  # bytes, and seconds between them: 4 MB/s in each direction
ASK = 0.01  # seconds between requests over UDP
AFTER = 3.0  # seconds of traffic after the fault
PATIENCE = 60.0  # seconds until an end that has not ended hangs

TRAFFIC = ("upload", "download", "both", "published", "spliced", "datagrams")


# One end of some traffic, as a process


class Stream:
    """One end of a stream: sends, receives, or both, and says what it saw."""

    def __init__(self, sock: socket.socket, sends: bool, until: float) -> None:
        self.sock, self.sends, self.until = sock, sends, until
        self.sent, self.got = hashlib.sha256(), hashlib.sha256()
        self.count = [0, 0]
        self.stamps: list[float] = []  # when something arrived, to a hundredth
        self.error = ""

    def _send(self) -> None:
        number = 0
        with contextlib.suppress(OSError):
            while time.monotonic() < self.until:
                block = hashlib.sha256(struct.pack("=Qi", number, os.getpid())).digest() * (BLOCK // 32)
                self.sock.sendall(block)
                self.sent.update(block)
                self.count[0] += len(block)
                number += 1
                time.sleep(PACE)
            self.sock.shutdown(socket.SHUT_WR)

    def run(self) -> dict:
        if self.sends:
            sender = threading.Thread(target=self._send)
            sender.start()
        else:
            self.sock.shutdown(socket.SHUT_WR)
        try:
            while data := self.sock.recv(1 << 18):
                self.got.update(data)
                self.count[1] += len(data)
                now = round(time.monotonic(), 2)
                if not self.stamps or self.stamps[-1] != now:
                    self.stamps.append(now)
        except OSError as e:
            self.error = type(e).__name__
        if self.sends:
            if self.error:
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)
            sender.join()
        return {
            "sent": self.count[0], "sent_hash": self.sent.hexdigest(), "got": self.count[1],
            "got_hash": self.got.hexdigest(), "stamps": self.stamps, "error": self.error,
        }  # fmt: skip


def asks(sock: socket.socket, until: float) -> dict:
    """Requests over UDP, one every hundredth of a second; answers must be theirs."""
    stamps, number, wrong = [], 0, 0
    sock.setblocking(False)
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            sock.send(struct.pack("!Q", number) + b"q" * 56)
        number += 1
        end = time.monotonic() + ASK
        while (left := end - time.monotonic()) > 0 and select.select([sock], [], [], left)[0]:
            try:
                answer = sock.recv(100)
            except OSError:
                continue
            (asked,) = struct.unpack("!Q", answer[:8])
            wrong += not (asked < number and answer[8:] == b"a" * 56)
            stamps.append(round(time.monotonic(), 2))
    return {
        "sent": number,
        "got": len(stamps),
        "stamps": stamps,
        "error": f"{wrong} wrong" if wrong else "",
    }


def serve_streams(address: str, port: int, until: float, reports: Callable[[dict], None]) -> None:
    """Streams: a client says whether this end sends (S), receives (R) or both (B), or answers byte by byte (E)."""
    with socket.create_server((address, port), backlog=64) as listener:
        os.write(1, b"ready\n")
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_serve_one, args=(sock, until, reports), daemon=True).start()


def _serve_one(sock: socket.socket, until: float, reports: Callable[[dict], None]) -> None:
    kind = sock.recv(1)
    if kind == b"E":
        with contextlib.suppress(OSError):
            while byte := sock.recv(1):
                sock.sendall(byte)
        return
    reports(Stream(sock, kind in b"SB", until).run())


def serve_datagrams(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, port))
        os.write(1, b"ready\n")
        while True:
            data, peer = sock.recvfrom(100)
            sock.sendto(data[:8] + b"a" * 56, peer)


def end(words: list[str]) -> None:
    """--end KIND ADDRESS PORT UNTIL: the process of one end; a line of JSON for what it saw."""
    kind, address, port, until = words[0], words[1], int(words[2]), float(words[3])

    lock = threading.Lock()

    def report(result: dict) -> None:
        # Lines of several threads must not mix, and they are longer than a pipe takes at once
        with lock:
            print(json.dumps(result), flush=True)

    if kind == "serve":
        threading.Thread(target=serve_datagrams, args=(address, port), daemon=True).start()
        serve_streams(address, port, until, report)
    elif kind == "datagrams":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((address, port))
            report(asks(sock, until))
    elif kind == "beside":
        report(beside(address, port, until))
    else:
        with socket.create_connection((address, port), 10) as sock:
            sock.settimeout(None)
            sock.sendall({"upload": b"R", "download": b"S"}.get(kind, b"B"))
            report(Stream(sock, kind != "download", until).run())


def beside(address: str, port: int, until: float) -> dict:
    """A byte there and back, ten times a second: the longest time that one took."""
    worst = 0.0
    with socket.create_connection((address, port), 10) as sock:
        sock.settimeout(PATIENCE)
        sock.sendall(b"E")
        while time.monotonic() < until:
            begun = time.monotonic()
            try:
                sock.sendall(b"x")
                if sock.recv(1) != b"x":
                    return {"worst": worst, "error": "ended"}
            except OSError as e:
                return {"worst": worst, "error": type(e).__name__}
            worst = max(worst, time.monotonic() - begun)
            time.sleep(0.1)
    return {"worst": worst, "error": ""}


# The place where it happens


class Place:
    """Host, remote host and guest, the link between the first two, and pysplice for the third."""

    def __init__(self, options: list[str], until: float) -> None:
        self.exit = contextlib.ExitStack()
        self.held: dict[
            int, bytearray
        ] = {}  # what processes have printed, beyond the last line that was read
        try:
            self._open(options, until)
        except BaseException:
            self.exit.close()
            raise

    def _open(self, options: list[str], until: float) -> None:
        for name in ("host", "remote", "guest"):
            yard.sh("ip", "netns", "add", name)
            self.exit.callback(yard.sh, "ip", "netns", "del", name, check=False)
            yard.sh(*yard.inside(name, "ip", "link", "set", "lo", "up"))
        words = [
            sys.executable,
            str(HERE / "link.py"),
            "--a",
            "host:link0",
            "--b",
            "remote:link1",
            "--control",
        ]
        self.link = self.start(words, stdin=subprocess.PIPE)
        assert self.line(self.link) == "ready"
        addresses = (
            (yard.HOST[4], "host:link0"),
            (yard.REMOTE[4], "remote:link1"),
            (yard.GATEWAY[4], "remote:link1"),
        )
        for address, end in addresses:
            name, device = end.split(":")
            yard.sh(*yard.inside(name, "ip", "addr", "add", f"{address}/24", "dev", device))
        self.route("host")
        self.folder = Path(self.exit.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        self.log = self.folder / "log"
        self.log.mkdir()
        yard.sh("mount", "-t", "tmpfs", "-o", "size=16k", "none", str(self.log))
        self.exit.callback(yard.sh, "umount", "-l", str(self.log), check=False)
        ready = self.folder / "pid"
        options = [word.replace("LOG", str(self.log / "log")) for word in options]
        self.pysplice = self.start(
            yard.inside(
                "host", sys.executable, "-m", "pysplice", "-f", "--config-net", "--netns", "/run/netns/guest",
                "-I", "tap0", "-P", str(ready), "-t", str(GUEST_PORT), *options,
            ),
            stderr=(self.folder / "stderr").open("w"),
        )  # fmt: skip
        limit = time.monotonic() + 15
        while not (ready.exists() and ready.stat().st_size):
            if time.monotonic() > limit or self.pysplice.poll() is not None:
                sys.exit(f"pysplice does not start: {(self.folder / 'stderr').read_text().strip()}")
            time.sleep(0.02)
        self.pid = int(ready.read_text())
        self.servers = {
            "remote": self.end_of("remote", "serve", yard.REMOTE[4], REMOTE_PORT, until),
            "guest": self.end_of("guest", "serve", "0.0.0.0", GUEST_PORT, until),
            "beside": self.end_of("remote", "serve", yard.REMOTE[4], BESIDE_PORT, until),
        }
        for server in self.servers.values():
            assert self.line(server) == "ready"
            assert self.line(server) == "ready"

    def start(self, words: list[str], **more: object) -> subprocess.Popen:
        given: dict = {"stdin": subprocess.DEVNULL, **more}
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, start_new_session=True, **given
        )
        self.exit.callback(yard.kill, process)
        return process

    def end_of(self, name: str, kind: str, address: str, port: int, until: float) -> subprocess.Popen:
        words = yard.inside(name, sys.executable, __file__, "--end", kind, address, str(port), str(until))
        return self.start(words, stderr=subprocess.DEVNULL)

    def line(self, process: subprocess.Popen, patience: float = 20.0) -> str:
        """The next line that a process prints; empty if none comes."""
        assert process.stdout is not None
        fd, until = process.stdout.fileno(), time.monotonic() + patience
        held = self.held.setdefault(fd, bytearray())
        while b"\n" not in held:
            if not select.select([fd], [], [], max(until - time.monotonic(), 0))[0]:
                return ""
            data = os.read(fd, 1 << 16)
            if not data:
                return ""
            held += data
        line, _, rest = held.partition(b"\n")
        self.held[fd] = rest
        return line.decode()

    def impair(self, name: str, value: float) -> None:
        assert self.link.stdin is not None
        self.link.stdin.write(f"{name} {value}\n")
        self.link.stdin.flush()

    def route(self, name: str) -> None:
        via, device = (yard.GATEWAY[4], "link0") if name == "host" else (yard.GATEWAY[4], "tap0")
        yard.sh(
            *yard.inside(name, "ip", "route", "replace", "default", "via", via, "dev", device), check=False
        )

    def ip(self, name: str, *words: str) -> None:
        yard.sh(*yard.inside(name, "ip", *words), check=False)

    def up(self, name: str, device: str) -> None:
        self.ip(name, "link", "set", device, "up")
        if name != "remote":
            self.route(name)

    def clients(self, until: float, chosen: list[str]) -> dict[str, subprocess.Popen]:
        where = {
            "published": ("remote", yard.HOST[4], GUEST_PORT),
            "spliced": ("host", "127.0.0.1", GUEST_PORT),
        }
        made = {}
        for kind in chosen:
            name, address, port = where.get(kind, ("guest", yard.REMOTE[4], REMOTE_PORT))
            made[kind] = self.end_of(name, kind, address, port, until)
        return made

    def helpers(self) -> list[int]:
        """The processes that pysplice has started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.pid:
                    found.append(int(path.parent.name))
        return found


# What goes wrong: how it begins and ends; ENDS: the streams may end, on both sides


def impairment(name: str, value: float) -> tuple[Callable, Callable]:
    return (lambda place: place.impair(name, value)), (lambda place: place.impair(name, 0))


def link(name: str, device: str) -> tuple[Callable, Callable]:
    return (lambda place: place.ip(name, "link", "set", device, "down")), (
        lambda place: place.up(name, device)
    )


def mtu(name: str, device: str, low: int, high: int) -> tuple[Callable, Callable]:
    return (
        lambda place: place.ip(name, "link", "set", device, "mtu", str(low)),
        lambda place: place.ip(name, "link", "set", device, "mtu", str(high)),
    )


def signals(first: int, last: int) -> tuple[Callable, Callable]:
    return (lambda place: os.kill(place.pid, first)), (lambda place: os.kill(place.pid, last))


def nothing(place: Place) -> None:
    pass


def kill_clients(place: Place) -> None:
    for client in place.running.values():
        client.kill()


def kill_servers(place: Place) -> None:
    for name in ("remote", "guest"):
        place.servers[name].kill()


def kill_helpers(place: Place) -> None:
    for pid in place.helpers():
        os.kill(pid, signal.SIGKILL)


def fill_descriptors(place: Place) -> None:
    count = len(os.listdir(f"/proc/{place.pid}/fd"))
    place.before = int(as_itself(place, "--output", "SOFT", "--noheadings", "--nofile"))
    as_itself(place, f"--nofile={count}:")
    # Connections that cannot be had
    connect = f"exec 3<>/dev/tcp/{yard.REMOTE[4]}/{REMOTE_PORT}"
    words = yard.inside("guest", "timeout", "0.5", "bash", "-c", connect)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for process in [subprocess.Popen(words, **quiet) for _ in range(20)]:
        process.wait()


def free_descriptors(place: Place) -> None:
    as_itself(place, f"--nofile={place.before}:")


def as_itself(place: Place, *words: str) -> str:
    """Run prlimit(1) about pysplice, as the user that it has become: nobody else may change its limits."""
    status = Path(f"/proc/{place.pid}/status").read_text()
    uid, gid = (re.search(rf"^{name}:\t(\d+)", status, re.MULTILINE)[1] for name in ("Uid", "Gid"))
    become = (
        [] if int(uid) == os.getuid() else ["setpriv", "--reuid", uid, "--regid", gid, "--clear-groups"]
    )
    ran = subprocess.run(
        [*become, "prlimit", "--pid", str(place.pid), *words], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise NotImplementedError(
            f"the limit of another process cannot be changed here: {ran.stderr.strip()}"
        )
    return ran.stdout


def fill_disk(place: Place) -> None:
    with contextlib.suppress(OSError), open(place.log / "full", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def press_memory(place: Place) -> None:
    """A cgroup (version 1 or 2) that leaves little more than there is in use."""
    for base, limit in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        group = Path(base) / f"pysplice-chaos-{os.getpid()}"
        try:
            group.mkdir()
            if not (group / limit).exists():
                group.rmdir()
                continue
            (group / "cgroup.procs").write_text(str(place.pid))
            (group / limit).write_text(str(24 << 20))
        except OSError:
            continue
        place.group = group
        return
    raise NotImplementedError("no cgroup of memory can be made here")


def release_memory(place: Place) -> None:
    with contextlib.suppress(OSError):
        (place.group.parent / "cgroup.procs").write_text(str(place.pid))
        time.sleep(0.1)
        place.group.rmdir()


FAULTS: dict[str, tuple[Callable, Callable]] = {
    "loss": impairment("loss", 10),
    "reorder": impairment("reorder", 20),
    "duplicate": impairment("duplicate", 20),
    "corrupt": impairment("corrupt", 5),
    "jitter": impairment("jitter", 20),
    "rate": impairment("rate", 5),
    "host-link": link("host", "link0"),
    "remote-link": link("remote", "link1"),
    "tap": link("guest", "tap0"),
    "mtu-link": mtu("host", "link0", 1280, 1500),
    "mtu-tap": mtu("guest", "tap0", 1280, 1500),
    "stop": signals(signal.SIGSTOP, signal.SIGCONT),
    "kill-client": (kill_clients, nothing),
    "kill-server": (kill_servers, nothing),
    "kill-helper": (kill_helpers, nothing),
    "descriptors": (fill_descriptors, free_descriptors),
    "disk": (fill_disk, nothing),
    "memory": (press_memory, release_memory),
}
ENDS = ("kill-client", "kill-server", "kill-helper")
# How long the connection beside may wait for a byte: as long as what carries it is away, and TCP's time to notice
BESIDE_MOST = 5.0


def run(fault: str, chosen: list[str], during: float) -> dict[str, str]:
    """One fault and all traffic: a cell for each kind, and for the connection beside."""
    begin, stop = FAULTS[fault]
    if fault == "stop":
        during = max(during, 5.0)
    until = time.monotonic() + 3.0 + during + AFTER
    options = ["-l", "LOG", "--debug"] if fault == "disk" else []
    cells: dict[str, str] = {}
    place = Place(options, until)
    with place.exit:
        place.running = place.clients(until, chosen)
        other = place.end_of("guest", "beside", yard.REMOTE[4], BESIDE_PORT, until)
        time.sleep(1.5)
        started = time.monotonic()
        try:
            begin(place)
        except NotImplementedError as e:
            return dict.fromkeys([*chosen, "beside"], str(e))
        time.sleep(during if fault not in ENDS else 0.1)
        stop(place)
        over = time.monotonic()
        streams = [kind for kind in chosen if kind != "datagrams"]
        ours = {
            kind: place.line(place.running[kind], until + PATIENCE - time.monotonic()) for kind in chosen
        }
        inward = sum(kind in ("published", "spliced") for kind in streams)
        theirs = {"remote": len(streams) - inward, "guest": inward}
        reports = [
            json.loads(text)
            for name, count in theirs.items()
            for _ in range(count)
            if (text := place.line(place.servers[name], until + PATIENCE - time.monotonic()))
        ]
        for kind in chosen:
            cells[kind] = cell(kind, fault, ours[kind], reports, started, over)
        told = json.loads(
            place.line(other, until + PATIENCE - time.monotonic()) or '{"error": "hangs", "worst": 0}'
        )
        limit = during + BESIDE_MOST
        bad = told["error"] or (told["worst"] > limit and f"waited {told['worst']:.1f} s")
        cells["beside"] = f"FAILED: {bad}" if bad else f"lives, {told['worst']:.2f} s at most"
        if place.pysplice.poll() is not None and fault != "kill-helper":
            cells["beside"] = "FAILED: pysplice has ended"
    return cells


def cell(kind: str, fault: str, text: str, reports: list[dict], started: float, over: float) -> str:
    """What became of one kind of traffic."""
    if not text:
        if fault == "kill-client":
            # The other end must have ended too, which is what its report is
            if kind == "datagrams":
                return "ended"
            return "ended" if reports else "FAILED: the server's end hangs"
        return "FAILED: hangs"
    told = json.loads(text)
    stamps = told["stamps"]
    if kind == "datagrams":
        if told["error"]:
            return f"FAILED: {told['error']}"
        if fault == "kill-server":
            return "ended"
        back = [stamp for stamp in stamps if stamp >= over]
        return f"answered, {max(back[0] - over, 0):.2f} s" if back else "FAILED: no answer any more"
    mine = told["sent_hash"], told["got_hash"]
    match = [report for report in reports if (report["got_hash"], report["sent_hash"]) == mine]
    if match and not told["error"] and not match[0]["error"]:
        stamps = sorted([*stamps, *match[0]["stamps"]])
        back = [stamp for stamp in stamps if stamp >= over]
        return f"whole, {max(back[0] - over, 0):.2f} s" if back else "whole"
    if fault in ENDS:
        return f"ended, {told['error'] or 'end of the stream'}"
    return f"FAILED: {told['error'] or 'other bytes'}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument(
        "--fault", type=names, default=list(FAULTS), help="which, with commas (default: all)"
    )
    parser.add_argument(
        "--traffic", type=names, default=list(TRAFFIC), help="which, with commas (default: all)"
    )
    parser.add_argument(
        "--during", type=float, default=2.0, help="how long a fault lasts, seconds (default: 2)"
    )
    parser.add_argument("--list", action="store_true", help="print the faults and the kinds of traffic")
    parser.add_argument("--end", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.end:
        end(args.end)
        return 0
    if args.list:
        print("faults:", *FAULTS)
        print("traffic:", *TRAFFIC)
        return 0
    for name in [name for name in args.fault if name not in FAULTS] + [
        t for t in args.traffic if t not in TRAFFIC
    ]:
        parser.error(f"there is no '{name}': see --list")
    yard.isolate()
    yard.end_in_order()
    yard.sh("mkdir", "-p", "/run/netns")
    columns = [*args.traffic, "beside"]
    print("| fault | " + " | ".join(columns) + " |")
    print("| --- |" + " --- |" * len(columns), flush=True)
    failed = 0
    for fault in args.fault:
        cells = run(fault, args.traffic, args.during)
        failed += sum("FAILED" in text for text in cells.values())
        print(f"| {fault} | " + " | ".join(cells[name] for name in columns) + " |", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
