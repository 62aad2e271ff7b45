#!/usr/bin/env python3
"""Very many connections and datagrams, opened and closed in every way: what is left of them, and what they cost.

    examples/soak.py                                          a short run, a minute
    examples/soak.py --connections 1000000 --datagrams 10000000 --at-once 10000     half an hour
    examples/soak.py --part churn,flood                       parts: churn, datagrams, many, flood

churn      connections out of the namespace, into it (published) and spliced, each ended in one of ten ways at random
datagrams  from many ports of the guest to many of the remote host, and answers
many       connections that stay: memory for each, and the latency of one among them
flood      SYNs and datagrams from the guest, and connections and datagrams from outside, as many as can be sent,
           beside one conversation: its latency with them and without

After each part the descriptors, the flows of TCP and the memory of pysplice are as before (of connections that stay: as
after the first time; pipes and buffers that are kept for the next ones are left, and UDP flows end by time alone), or
the exit status is 1.  Any user can run it, in network namespaces of its own.  The number at once is
bounded by the limit of descriptors (ulimit -n).
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parent / ".venv/bin/python"
if importlib.util.find_spec("uvloop") is None and PYTHON.exists():
    os.execv(PYTHON, [str(PYTHON), *sys.argv])

import compare_pasta as yard  # noqa: E402

SERVER, CLOSED, ECHO, PUBLISHED, UDP, SINK = 5301, 5302, 5303, 8080, 5304, 5305
PARTS = ("churn", "datagrams", "many", "flood")
# What a client asks of the server: how many bytes to send back, and which of the two ends first
ASK = struct.Struct("!BI")
SILENT_HOST = "10.98.0.77"
FIRST, LAST, RESETS, SILENT = range(4)
ENDINGS = (
    "client", "server", "client-reset", "server-reset", "half", "data", "refused", "abandoned", "unread", "at-once",
)  # fmt: skip
RESET = struct.pack("ii", 1, 0)
SETTLE = 20.0  # seconds until all that has ended must be gone
DESCRIPTORS_SLACK = 64  # of the 32 pipes that are kept for the next splices (POOL_PIPES)
MEMORY_SLACK = 24 << 20  # bytes that may stay, of pools that are kept


def enter(name: str) -> None:
    """Move this process into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    if libc.setns(fd, yard.CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(fd)


def child(name: str, function: Callable, *args: object) -> multiprocessing.Process:
    """A process in a namespace."""

    def run() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        enter(name)
        function(*args)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process


# The servers


def serve(address: str, port: int) -> None:
    """Streams: do what each client asks; those that ask nothing are held."""
    listener = socket.create_server((address, port), backlog=4096)
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    clients: dict[int, socket.socket] = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                with contextlib.suppress(OSError):
                    while True:
                        sock, _ = listener.accept()
                        sock.setblocking(False)
                        clients[sock.fileno()] = sock
                        poll.register(sock, select.EPOLLIN)
                continue
            sock = clients[fd]
            try:
                data = sock.recv(65536)
                if len(data) >= ASK.size and obey(sock, data):
                    continue
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data or len(data) >= ASK.size:
                poll.unregister(fd)
                clients.pop(fd).close()


def obey(sock: socket.socket, data: bytes) -> bool:
    """Do what a client asks; True if the connection goes on."""
    how, size = ASK.unpack_from(data)
    if how == RESETS:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return False
    if size:
        sock.setblocking(True)
        sock.sendall(bytes(size))
        sock.setblocking(False)
    return how in (LAST, SILENT)


def echo(address: str, port: int) -> None:
    """A byte back for a byte, one connection after the other; and datagrams."""
    listener = socket.create_server((address, port))
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock, contextlib.suppress(OSError):
            while byte := sock.recv(1):
                sock.sendall(byte)


def answer(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((address, port))
        count = 0
        while True:
            data, peer = sock.recvfrom(2048)
            count += 1
            if count % 10 == 0:
                sock.sendto(data, peer)


# The clients


def churn(address: str, port: int, count: int, seed: int, refused: bool, at_once: int = 40) -> None:
    """`count` connections, at most `at_once` at a time, each ended in some way."""
    rng = random.Random(seed)
    poll = select.epoll()
    held: dict[int, tuple[socket.socket, str]] = {}
    begun = 0
    while begun < count or held:
        while begun < count and len(held) < at_once:
            begun += 1
            ending = rng.choice(ENDINGS)
            sock = socket.socket()
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                try:
                    sock.connect((address, CLOSED if ending == "refused" and refused else port))
                except OSError as e:
                    if not isinstance(e, BlockingIOError):
                        sock.close()
                        continue
                    raise
            if ending == "abandoned":
                sock.close()
                continue
            held[sock.fileno()] = sock, ending
            poll.register(sock, select.EPOLLOUT)
        for fd, _ in poll.poll(1):
            sock, ending = held.pop(fd)
            poll.unregister(fd)
            with sock, contextlib.suppress(OSError):
                finish(sock, ending, rng)


def finish(sock: socket.socket, ending: str, rng: random.Random) -> None:
    """The rest of a connection that has been established, or refused."""
    sock.setblocking(True)
    sock.settimeout(10)
    size = rng.choice((0, 1, 100, 5000, 100_000))
    if ending in ("client-reset", "at-once", "refused"):
        if ending == "client-reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return
    how = {"server": FIRST, "server-reset": RESETS}.get(ending, LAST)
    sock.sendall(ASK.pack(how, size if ending != "server-reset" else 0))
    if ending == "unread":
        return
    if ending in ("half", "client"):
        sock.shutdown(socket.SHUT_WR)
    want = size if ending == "data" else 1 << 30
    while want > 0 and (data := sock.recv(65536)):
        want -= len(data)


def datagrams(address: str, count: int, seed: int) -> None:
    """From ports that change every thousand datagrams; answers are read now and then."""
    rng = random.Random(seed)
    sent = 0
    while sent < count:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            peer = (address, rng.choice((UDP, CLOSED)))
            payload = bytes(rng.choice((1, 60, 1400)))
            for _ in range(min(1000, count - sent)):
                with contextlib.suppress(OSError):
                    sock.sendto(payload, peer)
            sent += 1000
            with contextlib.suppress(OSError):
                for _ in range(50):
                    sock.recv(2048)


def hold(address: str, port: int, count: int, told: int) -> None:
    """Open connections and keep them; write how many there are."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    socks = []
    with contextlib.suppress(OSError):
        for _ in range(count):
            sock = socket.socket()
            sock.settimeout(5)
            sock.connect((address, port))
            sock.sendall(b"h")  # less than a request: the server waits for more
            socks.append(sock)
    os.write(told, f"{len(socks)}\n".encode())
    signal.pause()


def converse(address: str, seconds: float, told: int) -> None:
    """A byte there and back until the time is up; writes the 50th and the 99th percentile, microseconds."""
    times, until = [], float("inf")
    with contextlib.suppress(OSError), socket.create_connection((address, ECHO), 10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        os.write(told, b"begun\n")
        until = time.monotonic() + seconds
        while (begun := time.monotonic()) < until:
            sock.sendall(b"x")
            if sock.recv(1) != b"x":
                break
            times.append(time.monotonic() - begun)
            time.sleep(0.001)
    if time.monotonic() < until - 1:
        return  # it was ended
    times.sort()
    found = [times[int(len(times) * q)] * 1e6 for q in (0.5, 0.99)]
    os.write(told, (json.dumps(found) + "\n").encode())


def sink(address: str, port: int) -> None:
    """Datagrams that nobody reads: a server that answers a flood takes a processor as well."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, port))
        signal.pause()


def flood_syns(address: str, seconds: float) -> None:
    """Connections that are never waited for, to a host that answers and to one that does not."""
    silent = SILENT_HOST if address == yard.REMOTE[4] else address
    until = time.monotonic() + seconds
    socks: list[socket.socket] = []
    while time.monotonic() < until:
        sock = socket.socket()
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.connect((random.choice((address, silent)), SERVER))
        socks.append(sock)
        if len(socks) > 500:
            for sock in socks:
                sock.close()
            socks.clear()


def flood_datagrams(address: str, port: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    sock.sendto(b"f" * 60, (address, port))


# The place


class Place:
    """Host, remote host and guest, and what pysplice holds."""

    def __init__(self, options: list[str]) -> None:
        self.exit = contextlib.ExitStack()
        try:
            self._open(options)
        except BaseException:
            self.exit.close()
            raise

    def _open(self, options: list[str]) -> None:
        for name in ("host", "remote", "guest"):
            yard.sh("ip", "netns", "add", name)
            self.exit.callback(yard.sh, "ip", "netns", "del", name, check=False)
            yard.sh(*yard.inside(name, "ip", "link", "set", "lo", "up"))
            # Very many short connections must not run out of ports
            settings = "echo 1024 65535 > ip_local_port_range; echo 200 > tcp_max_tw_buckets; echo 1 > tcp_syn_retries"
            yard.sh(*yard.inside(name, "sh", "-c", f"cd /proc/sys/net/ipv4; {settings}"))
        yard.sh(
            *yard.inside(
                "host",
                "ip",
                "link",
                "add",
                "link0",
                "type",
                "veth",
                "peer",
                "name",
                "link1",
                "netns",
                "/run/netns/remote",
            )
        )
        for end, address in (
            ("host:link0", yard.HOST[4]),
            ("remote:link1", yard.REMOTE[4]),
            ("remote:link1", yard.GATEWAY[4]),
        ):
            name, device = end.split(":")
            yard.sh(*yard.inside(name, "ip", "addr", "add", f"{address}/24", "dev", device))
            yard.sh(*yard.inside(name, "ip", "link", "set", device, "up"))
        yard.sh(*yard.inside("host", "ip", "route", "add", "default", "via", yard.GATEWAY[4]))
        folder = Path(self.exit.enter_context(tempfile.TemporaryDirectory()))
        ready, self.socket = folder / "pid", folder / "control"
        published = ["-t", str(PUBLISHED), "-u", f"{PUBLISHED},{SINK}"]
        self.process = subprocess.Popen(
            yard.inside(
                "host", sys.executable, "-m", "pysplice", "-f", "--config-net", "--netns", "/run/netns/guest", "-q",
                "-P", str(ready), "--control", str(self.socket), *published, *options,
            ),
            stdin=subprocess.DEVNULL, stderr=(folder / "stderr").open("w"), start_new_session=True,
        )  # fmt: skip
        self.exit.callback(yard.kill, self.process)
        until = time.monotonic() + 15
        while not (ready.exists() and ready.stat().st_size):
            if time.monotonic() > until or self.process.poll() is not None:
                sys.exit(f"pysplice does not start: {(folder / 'stderr').read_text().strip()}")
            time.sleep(0.02)
        self.pid = int(ready.read_text())
        for name, function, address, port in (
            ("remote", serve, yard.REMOTE[4], SERVER), ("guest", serve, "0.0.0.0", PUBLISHED),
            ("remote", echo, yard.REMOTE[4], ECHO), ("remote", answer, yard.REMOTE[4], UDP),
            ("remote", sink, yard.REMOTE[4], SINK), ("guest", sink, "0.0.0.0", SINK),
        ):  # fmt: skip
            process = child(name, function, address, port)
            self.exit.callback(process.kill)
        time.sleep(0.5)

    def held(self) -> dict[str, int]:
        """Descriptors, flows and memory (bytes) of pysplice."""
        words = [sys.executable, "-m", "pysplice", "ctl", str(self.socket), "show", "--json"]
        figures = json.loads(
            subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
        )["figures"]
        status = Path(f"/proc/{self.pid}/status").read_text()
        return {
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "flows": figures["connections"]["open"] + figures["spliced"]["open"],
            "udp": figures["udp_flows"]["open"],
            "opened": figures["connections"]["opened"] + figures["spliced"]["opened"],
            "memory": int(status.split("VmRSS:")[1].split()[0]) * 1024,
        }

    def settled(self, before: dict[str, int]) -> tuple[dict[str, int], str]:
        """What is held once all has ended, and what is wrong with that; UDP flows end by time alone."""
        until = time.monotonic() + SETTLE
        while True:
            now = self.held()
            # Each endpoint of a UDP flow has a descriptor until it expires
            most = before["descriptors"] + now["udp"] + DESCRIPTORS_SLACK
            wrong = ["descriptors"] if now["descriptors"] > most else []
            wrong += ["flows"] if now["flows"] > before["flows"] else []
            wrong += ["memory"] if now["memory"] > before["memory"] + MEMORY_SLACK else []
            if not wrong or time.monotonic() > until:
                return now, ", ".join(wrong)
            time.sleep(0.5)


def together(children: list[multiprocessing.Process]) -> None:
    for process in children:
        process.join()


def talk(seconds: float, beside: Callable[[], object] = lambda: None) -> tuple[float, float]:
    """The latency of a conversation out of the guest: median and 99th percentile, microseconds; 0 if it was ended.

    `beside` is called once it has begun.
    """
    ours, theirs = os.pipe()
    process = child("guest", converse, yard.REMOTE[4], seconds, theirs)
    os.close(theirs)
    with os.fdopen(ours) as told:
        told.readline()
        beside()
        found = json.loads(told.readline() or "[0, 0]")
    process.join()
    return found[0], found[1]


def part_churn(place: Place, args: argparse.Namespace) -> str:
    share = max(args.connections // 4, 1)
    begun = time.monotonic()
    together(
        [
            child("guest", churn, yard.REMOTE[4], SERVER, share, 1, True),
            child("guest", churn, yard.REMOTE[4], SERVER, share, 2, True),
            child("remote", churn, yard.HOST[4], PUBLISHED, share, 3, False),
            child("host", churn, "127.0.0.1", PUBLISHED, share, 4, False),
        ]
    )
    seconds = time.monotonic() - begun
    return f"{4 * share:,} connections in {seconds:.0f} s, {4 * share / seconds:,.0f} a second"


def part_datagrams(place: Place, args: argparse.Namespace) -> str:
    begun = time.monotonic()
    together([child("guest", datagrams, yard.REMOTE[4], args.datagrams // 2, seed) for seed in (1, 2)])
    return f"{args.datagrams:,} datagrams in {time.monotonic() - begun:.0f} s"


def part_many(place: Place, args: argparse.Namespace) -> str:
    before, quiet = place.held(), talk(2)
    # Out, in and spliced: each kind has a share of the descriptors
    ways = (
        ("guest", yard.REMOTE[4], SERVER, 0.5),
        ("remote", yard.HOST[4], PUBLISHED, 0.3),
        ("host", "127.0.0.1", PUBLISHED, 0.2),
    )
    children, opened = [], 0
    for name, address, port, share in ways:
        ours, theirs = os.pipe()
        children.append(child(name, hold, address, port, int(args.at_once * share), theirs))
        os.close(theirs)
        with os.fdopen(ours) as told:
            opened += int(told.readline() or 0)
    time.sleep(1)
    now, loud = place.held(), talk(2)
    for process in children:
        process.kill()
    each = (now["memory"] - before["memory"]) / max(now["flows"], 1)
    return (
        f"{now['flows']:,} connections at once of {args.at_once:,} asked for ({opened:,} opened): "
        f"{each / 1024:.1f} KiB each, {now['memory'] / 1e6:.1f} MB in all; "
        f"latency of one among them {loud[0]:.0f} us (p99 {loud[1]:.0f}), "
        f"without them {quiet[0]:.0f} (p99 {quiet[1]:.0f})"
    )


def part_flood(place: Place, args: argparse.Namespace) -> str:
    """Each flood also goes elsewhere, to the loopback of where it comes from, beside a process that only computes.

    That shows how long a process waits for a processor while two are busy: one that floods, and one that serves.
    """
    floods: dict[str, tuple[str, Callable, str, tuple[object, ...]]] = {
        "SYNs of the guest": ("guest", flood_syns, yard.REMOTE[4], ()),
        "datagrams of the guest": ("guest", flood_datagrams, yard.REMOTE[4], (SINK,)),
        "connections from outside": ("remote", flood_outside, yard.HOST[4], (PUBLISHED,)),
        "datagrams from outside": ("remote", flood_datagrams, yard.HOST[4], (SINK,)),
    }
    told = []
    for name, (where, function, address, more) in floods.items():
        rounds = []
        for _ in range(args.rounds):
            found = [talk(2)[1]]
            for target in ("127.0.0.1", address):
                begin = [partial(child, where, function, target, *more, 3.0)]
                if target == "127.0.0.1":
                    begin.append(partial(child, where, compute, 3.0))
                started: list[multiprocessing.Process] = []
                found.append(talk(2.5, partial(_start, started, begin))[1])
                together(started)
            rounds.append(found)
        quiet, elsewhere, flooded = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = f"{flooded / max(quiet, 1):.1f} times" if flooded else "FAILED: ended"
        told.append(
            f"\n  {name}: p99 {flooded:.0f} us, quiet {quiet:.0f} ({ratio}), "
            f"the flood elsewhere and a busy process {elsewhere:.0f} ({flooded / max(elsewhere, 1):.1f} times)"
        )
    return "".join(told)


def _start(
    started: list[multiprocessing.Process], begin: list[Callable[[], multiprocessing.Process]]
) -> None:
    started.extend(one() for one in begin)


def compute(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def flood_outside(address: str, port: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.settimeout(1)
            sock.connect((address, port))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=20_000, help="of the churn (default: 20000)")
    parser.add_argument("--datagrams", type=int, default=200_000, help="how many (default: 200000)")
    parser.add_argument("--at-once", type=int, default=2000, help="connections that stay (default: 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="of each flood (default: 3)")
    parser.add_argument(
        "--part",
        type=lambda text: text.split(","),
        default=list(PARTS),
        help="which parts, with commas (all)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        help="one more word for pysplice: --option=--limit-flows --option=200",
    )
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    for name in args.part:
        if name not in PARTS:
            parser.error(f"there is no part '{name}': there are {', '.join(PARTS)}")
    yard.isolate()
    yard.end_in_order()
    yard.sh("mkdir", "-p", "/run/netns")
    failed = False
    place = Place(args.option)
    with place.exit:
        # What is used at first, and stays
        args_first = argparse.Namespace(connections=400, datagrams=1000)
        part_churn(place, args_first)
        before, _ = place.settled(place.held())
        for name in args.part:
            if name == "many":
                # Python keeps the memory of the objects that there were once: a second time must add nothing
                first = part_many(place, args)
                time.sleep(2)
                before["memory"] = max(before["memory"], place.held()["memory"])
            text = globals()[f"part_{name}"](place, args)
            text = first if name == "many" else text
            after, wrong = place.settled(before)
            failed |= bool(wrong) or place.process.poll() is not None
            left = ", ".join(
                f"{key} {after[key]:,} (before {before[key]:,})"
                for key in ("descriptors", "flows", "memory")
            )
            print(
                f"{name}: {text}\n  afterwards: {left}, UDP flows {after['udp']:,}"
                + (f"  FAILED: {wrong}" if wrong else ""),
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
